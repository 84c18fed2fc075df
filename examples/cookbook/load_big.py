"""A model that does not fit in bf16: quantized while it is read, layer by layer, or converted on disk once."""

import sys
import tempfile
from pathlib import Path

import torch

import mxfp4_compile
from mxfp4_compile.checkpoint.convert import convert

NAME = sys.argv[1] if len(sys.argv) > 1 else str(Path(mxfp4_compile.__file__).parent / "demo_model")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# In one go: bf16 experts are never all in memory.
model = mxfp4_compile.load(NAME, device_map=DEVICE)
print(model.mxfp4_report)

# Or once for all, on disk; the same as: mxfp4-compile optimize NAME --out DIR
with tempfile.TemporaryDirectory() as folder:
    done = convert(NAME, f"{folder}/mxfp4")
    print(f"{done.bytes_before:,} -> {done.bytes_after:,} bytes in {done.files} file(s), form {done.format}")
    again = mxfp4_compile.load(f"{folder}/mxfp4", device_map=DEVICE)

prompt = torch.tensor([list(b"TIMON:\n")], device=DEVICE)
with torch.no_grad():
    same = torch.equal(model(prompt).logits, again(prompt).logits)
print(f"both give the same logits, bit for bit: {same}")
assert same
