"""Fine-tune the demo model around its MXFP4 experts with PEFT, on a CPU, in about a minute.

The model writes plays; it learns to write them in capitals. LoRA on attention and on the experts is
trained; the experts themselves stay 4-bit codes. Prints the held-out loss before and after, saves the adapter, reads
it back.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import mxfp4_compile
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, TEXT_FILE

LENGTH, BATCH, HELD_OUT = 64, 4, 16


def windows(text: bytes) -> torch.Tensor:
    """Token ids [windows, LENGTH]: the model's tokens are bytes."""
    whole = len(text) // LENGTH * LENGTH
    return torch.tensor(list(text[:whole])).view(-1, LENGTH)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Mean nats a byte."""
    model.eval()
    return float(model(input_ids=ids, labels=ids).loss)


def main() -> None:
    """Load, train, save, read back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", help="a directory for the adapter; by default a temporary one")
    args = parser.parse_args()
    torch.manual_seed(0)
    ids = windows((MODEL_DIRECTORY / TEXT_FILE).read_bytes().upper())
    train, held_out = ids[:-HELD_OUT], ids[-HELD_OUT:]

    base = mxfp4_compile.load(MODEL_DIRECTORY, dtype=torch.float32, progress=False)
    attention, experts = ["q_proj", "k_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=attention, target_parameters=experts)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    before = held_out_loss(model, held_out)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(args.steps):
        batch = train[torch.randint(len(train), (BATCH,))]
        model.train()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}")
    after = held_out_loss(model, held_out)
    print(f"held-out loss {before:.3f} -> {after:.3f} nats a byte")

    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or temporary
        model.save_pretrained(out)
        base = mxfp4_compile.load(MODEL_DIRECTORY, dtype=torch.float32, progress=False)
        again = held_out_loss(PeftModel.from_pretrained(base, out), held_out)
    print(f"held-out loss of the adapter read back: {again:.3f}")
    if again != after or after > before - 0.5:
        raise SystemExit("the loss did not fall by 0.5 nats, or the adapter read back computes something else")


if __name__ == "__main__":
    main()
