"""Less loss in the same format: experts calibrated on a text, or on one that the model writes itself."""

import sys
from pathlib import Path

import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

import mxfp4_compile

DEMO = Path(mxfp4_compile.__file__).parent / "demo_model"
NAME = sys.argv[1] if len(sys.argv) > 1 else str(DEMO)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = torch.tensor(list((DEMO / "heldout.txt").read_bytes()[:16384]), device=DEVICE)  # token ids: bytes here
CALIBRATE, JUDGE = TEXT[:8192], TEXT[8192:].view(-1, 256)


def unquantized() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32).to(DEVICE)


def divergence(model: torch.nn.Module) -> float:
    """Mean KL(original || model) of a token on text that no calibration saw, in thousandths of a nat."""
    with torch.no_grad():
        ours, original = model(JUDGE).logits.log_softmax(-1), unquantized()(JUDGE).logits.log_softmax(-1)
    return 1000 * float(kl_div(ours, original, reduction="sum", log_target=True)) / JUDGE.numel()


nearest = divergence(mxfp4_compile.optimize(unquantized()))
model = unquantized()
# Path("a.txt") reads a file; without a text the model writes its own. More tokens are better: 524288 by default.
report = mxfp4_compile.calibrate(model, CALIBRATE, tokens=len(CALIBRATE), window=256)
print(report)
model = mxfp4_compile.optimize(model)
calibrated = divergence(model)
print(f"KL on held-out text: rounded to nearest {nearest:.2f}, calibrated {calibrated:.2f} thousandths of a nat")
