"""First use: a bf16 model, MXFP4 experts, the report, some text.  python first_use.py [MODEL directory or hub id]"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mxfp4_compile

# Without an argument: the small trained model that comes with the package; it reads and writes bytes.
NAME = sys.argv[1] if len(sys.argv) > 1 else str(Path(mxfp4_compile.__file__).parent / "demo_model")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16).to(DEVICE)
before = sum(p.nbytes for p in model.parameters())
model = mxfp4_compile.optimize(model)  # the same object, of the same class
report = model.mxfp4_report
print(report)
print(f"experts: {report.bytes_before:,} -> {report.bytes_after:,} bytes of {before:,} in the model")

prompt = torch.tensor([list(b"TIMON:\n")], device=DEVICE)
out = model.generate(prompt, max_new_tokens=48, do_sample=False)
print(bytes(out[0].tolist()).decode("utf-8", "replace"))
