"""Two turns of a chat that share one cache: the second turn computes its own tokens only."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import mxfp4_compile

NAME = sys.argv[1] if len(sys.argv) > 1 else str(Path(mxfp4_compile.__file__).parent / "demo_model")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

model = mxfp4_compile.optimize(AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16).to(DEVICE))
cache = DynamicCache(config=model.config)
ids = torch.empty(1, 0, dtype=torch.long, device=DEVICE)
for said in ("TIMON:\nWho is there?\n", "\n\nAPEMANTUS:\nA friend.\n"):
    ids = torch.cat([ids, torch.tensor([list(said.encode())], device=DEVICE)], dim=1)
    known = cache.get_seq_length()
    ids = model.generate(ids, past_key_values=cache, max_new_tokens=32, do_sample=False)
    print(f"[{known} tokens were in the cache, {cache.get_seq_length()} are]")
print(bytes(ids[0].tolist()).decode("utf-8", "replace"))
# On a CUDA device decode steps are recorded as graphs; what was recorded, and what was not and why:
print(mxfp4_compile.capture(model) if DEVICE == "cuda" else "recorded steps need a CUDA device")
