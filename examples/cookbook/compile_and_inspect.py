"""See what was made of a model: every stage as files, and one graph of the whole model without a break."""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mxfp4_compile

NAME = sys.argv[1] if len(sys.argv) > 1 else str(Path(mxfp4_compile.__file__).parent / "demo_model")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16).to(DEVICE)
with tempfile.TemporaryDirectory() as folder:
    with mxfp4_compile.inspect(folder):
        mxfp4_compile.optimize(model)
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            print(f"{file.relative_to(folder)}: {file.stat().st_size:,} bytes")

prompt = torch.tensor([list(b"TIMON:\n")], device=DEVICE)
compiled = torch.compile(model, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
with torch.no_grad():
    plain, fused = model(prompt).logits.float(), compiled(prompt).logits.float()
print(f"compiled against plain: relative difference {(plain - fused).norm() / plain.norm():.1e}")

# The other way in: the model stays as it is, its experts are quantized as torch.compile meets them.
ordinary = mxfp4_compile.restore(model)
met = torch.compile(ordinary, backend="mxfp4_compile", options={"inner": "eager"})
with torch.no_grad():
    print(f"the torch.compile backend: {(met(prompt).logits.float() - plain).norm() / plain.norm():.1e} from these")
