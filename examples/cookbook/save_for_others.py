"""Save for others: a form that vLLM, SGLang and transformers alone read, and one for this package; read back."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mxfp4_compile

NAME = sys.argv[1] if len(sys.argv) > 1 else str(Path(mxfp4_compile.__file__).parent / "demo_model")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

model = mxfp4_compile.optimize(AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16).to(DEVICE))
prompt = torch.tensor([list(b"TIMON:\n")], device=DEVICE)
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    for form in ("auto", "mxfp4_compile"):  # auto: compressed-tensors wherever it can express the model
        target = Path(folder) / form
        mxfp4_compile.save(model, target, form)
        size = sum(f.stat().st_size for f in target.iterdir())
        method = json.loads((target / "config.json").read_text())["quantization_config"].get("quant_method")
        again = mxfp4_compile.load(target, device_map=DEVICE)
        same = torch.equal(again(prompt).logits, model(prompt).logits)
        print(f"{form}: quant_method {method}, {size:,} bytes, read back bit for bit: {same}")
        assert same
# vllm serve DIR reads the first; from_pretrained reads the second after import mxfp4_compile.
