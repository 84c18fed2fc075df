"""Train a small mixture of experts, then judge what MXFP4 costs it: rounded to nearest, calibrated, on which text.

    python examples/small_moe/train.py --text text.xz --work DIR --out RESULTS

``--text`` is the file that ``prepare.py`` packs. Training takes ``--train-seconds`` by the clock, judging
``--judge-seconds``; both end by themselves, and a second call with the same ``--work`` goes on where the first ended.
``--out`` gets the curve of the losses and the table of results (JSON, markdown, and a picture of each where matplotlib
is installed), written anew after each row; the model stays in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from judge import judge
from pack import unpack
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

PROSE_SHARE = 0.25  # of the sequences trained on
BALANCE = 0.02
CLIP = 1.0
HELD_WINDOWS = 24  # windows of each held-out text whose loss is taken on the way


def build(args: argparse.Namespace, vocabulary: int, first: int) -> Qwen3MoeForCausalLM:
    """The model with random weights, in bf16."""
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=max(1, args.hidden // 192), head_dim=64,
        num_experts=args.experts, num_experts_per_tok=args.top_k, moe_intermediate_size=args.width,
        intermediate_size=args.width, decoder_sparse_step=1, norm_topk_prob=True, tie_word_embeddings=True,
        max_position_embeddings=2 * args.window, bos_token_id=first, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.device(args.device):
        model: Qwen3MoeForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    try:
        trial = torch.zeros(1, args.window, dtype=torch.int64, device=args.device)
        model(input_ids=trial, use_cache=False).logits.float().mean().backward()
    except RuntimeError as error:  # a release whose grouped products have no gradient here: slower, and said
        print(f"experts one by one, since grouped products fail: {error}", flush=True)
        model.set_experts_implementation("eager")
    model.zero_grad(set_to_none=True)
    return model


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """Load-balancing loss of one layer: 1.0 when every expert gets the same share of the tokens."""
    probs = logits.float().softmax(-1)
    experts = probs.shape[-1]
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0).mean(0) / top_k
    return experts * (chosen * probs.mean(0)).sum()


@contextmanager
def router_logits(model: Qwen3MoeForCausalLM) -> Iterator[list[Tensor]]:
    """Within the block each forward appends the logits [tokens, experts] of each layer's router."""
    found: list[Tensor] = []

    def note(module: Any, inputs: Any, _: Any) -> None:
        found.append(F.linear(inputs[0].flatten(0, -2), module.weight))

    handles = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats of each token but the first: [n, T - 1]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )


class Text:
    """What is trained on and what is held out, as ids on the device."""

    def __init__(self, file: Path, device: str) -> None:
        splits, self.header = unpack(file)
        as_tensor = lambda ids: torch.frombuffer(ids, dtype=torch.uint16).to(torch.int32).to(device)
        self.ids = {name: as_tensor(ids) for name, ids in splits.items()}

    def batch(self, count: int, window: int) -> Tensor:
        """[count, window] of the training text."""
        prose = round(count * PROSE_SHARE)
        parts = []
        for name, some in (("code", count - prose), ("prose", prose)):
            ids = self.ids[name]
            starts = torch.randint(0, len(ids) - window, (some, 1), device=ids.device)
            parts.append(ids[starts + torch.arange(window, device=ids.device)].long())
        return torch.cat(parts)

    def windows(self, name: str, count: int, window: int) -> Tensor:
        """[count, window] of a text, evenly spread over it."""
        ids = self.ids[name]
        whole = len(ids) // window
        chosen = torch.linspace(0, whole - 1, min(count, whole)).long().to(ids.device)
        return ids[: whole * window].view(whole, window)[chosen].long()


class Training:
    """The model, fp32 weights and moments behind its bf16 ones, and the curve so far."""

    def __init__(self, model: Qwen3MoeForCausalLM, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.step, self.tokens, self.elapsed = 0, 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.exact = [p.detach().float().clone() for p in self.parameters]
        groups = [
            {"params": [x for x in self.exact if x.dim() > 1], "weight_decay": 0.1},
            {"params": [x for x in self.exact if x.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.file = args.work / "training.pt"

    @property
    def done(self) -> bool:
        """Whether the time for it is used up."""
        return self.elapsed >= self.args.train_seconds

    def load(self) -> None:
        """Go on from what an earlier call left."""
        if not self.file.exists():
            return
        state = torch.load(self.file, map_location=self.args.device, weights_only=True)
        self.step, self.tokens, self.elapsed = state["step"], state["tokens"], state["elapsed"]
        self.curve = state["curve"]
        for kept, values in zip(self.exact, state["exact"], strict=True):
            kept.copy_(values)
        self.optimizer.load_state_dict(state["optimizer"])
        self._give()

    def save(self) -> None:
        """Leave all of it in ``--work``."""
        state = {
            "step": self.step, "tokens": self.tokens, "elapsed": self.elapsed, "curve": self.curve,
            "exact": self.exact, "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.file)

    @torch.no_grad()
    def _give(self) -> None:
        torch._foreach_copy_(self.parameters, self.exact)

    def update(self, rate: float) -> None:
        """One step of AdamW on the fp32 weights."""
        for kept, parameter in zip(self.exact, self.parameters, strict=True):
            kept.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.exact, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._give()

    def train(self, text: Text) -> None:
        """Until the time is used up. The learning rate follows the clock: linear at first, then a cosine to zero."""
        args = self.args
        count = max(1, args.batch // args.window)
        started, before = time.monotonic(), self.elapsed
        shown = saved = started
        sums: list[Tensor] = []
        balance = 0.0
        self.model.train()
        while not self.done:
            share = min(1.0, self.elapsed / args.train_seconds)
            rate = args.lr * min(1.0, (self.step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * share))
            batch = text.batch(count, args.window)
            with router_logits(self.model) as logits:
                out = self.model(input_ids=batch, use_cache=False)
                aux = torch.stack([balance_loss(x, args.top_k) for x in logits]).mean()
            loss = token_losses(out.logits, batch).mean()
            (loss + BALANCE * aux).backward()
            self.update(rate)
            sums.append(loss.detach())
            self.step, self.tokens = self.step + 1, self.tokens + batch.numel()
            if self.step % 10 == 0 or args.device == "cpu":
                balance = float(aux.detach())  # waits for the device, so that the clock is right
            now = time.monotonic()
            self.elapsed = before + now - started
            if now - shown > args.show_seconds or self.done:
                held = {name: held_loss(self.model, text, name, args) for name in ("held-code", "held-prose")}
                self.curve.append(
                    {"seconds": self.elapsed, "step": self.step, "tokens": self.tokens, "balance": balance,
                     "loss": float(torch.stack(sums).mean()), **held}
                )  # fmt: skip
                print(json.dumps(self.curve[-1]), flush=True)
                (args.out / "curve.json").write_text(json.dumps(self.curve, indent=1) + "\n", encoding="utf-8")
                sums, shown = [], now
            if now - saved > args.save_seconds:
                self.save()
                saved = now
        self.save()


@torch.no_grad()
def held_loss(model: Qwen3MoeForCausalLM, text: Text, name: str, args: argparse.Namespace) -> float:
    """Nats per token of a text that is held out."""
    model.eval()
    windows = text.windows(name, HELD_WINDOWS, args.window)
    losses = [float(token_losses(model(input_ids=w, use_cache=False).logits, w).mean()) for w in windows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def write_curve(curve: list[dict[str, float]], out: Path) -> None:
    """``curve.json`` and, where matplotlib is installed, ``curve.png``."""
    (out / "curve.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    millions = [point["tokens"] / 1e6 for point in curve]
    lines = {"loss": "training text", "held-code": "code held out", "held-prose": "prose held out"}
    for (key, label), colour in zip(lines.items(), ("#9aa5b1", "#d9480f", "#52606d"), strict=True):
        axis.plot(millions, [point[key] for point in curve], label=f"{label}: {curve[-1][key]:.3f}", color=colour)
    axis.set_xlabel("million tokens")
    axis.set_ylabel("nats per token")
    axis.set_ylim(0, max(point["held-code"] for point in curve[1:] or curve) * 1.05)
    axis.set_xlim(0)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "curve.png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what prepare.py packed")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model")
    parser.add_argument("--out", type=Path, required=True, help="folder for curves and tables")
    parser.add_argument("--train-seconds", type=float, default=360.0, help="in all calls together")
    parser.add_argument("--judge-seconds", type=float, default=200.0, help="of this call; 0: do not judge")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=256, help="intermediate size of an expert")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32768, help="tokens of a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--calibration-tokens", type=int, default=524288)
    parser.add_argument("--own-tokens", type=int, default=131072, help="tokens that the model writes itself")
    parser.add_argument("--judged-windows", type=int, default=192, help="windows of 512 tokens of each held-out text")
    parser.add_argument("--show-seconds", type=float, default=15.0)
    parser.add_argument("--save-seconds", type=float, default=150.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    text = Text(args.text, args.device)
    model = build(args, text.header["vocabulary"], text.header["end"])
    training = Training(model, args)
    training.load()
    torch.manual_seed(args.seed + training.step)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    facts = {
        "parameters": total, "in_experts": experts,
        "active_parameters": total - experts + experts * args.top_k // args.experts,
        "text": {k: v for k, v in text.header.items() if k != "tokenizer"},
        "options": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
    }  # fmt: skip
    print(json.dumps(facts), flush=True)
    print(f"ready after {time.monotonic() - started:.0f} s, {training.elapsed:.0f} s trained before", flush=True)
    training.train(text)
    if training.curve:
        write_curve(training.curve, args.out)
    facts |= {"steps": training.step, "tokens": training.tokens, "train_seconds": training.elapsed}
    facts["last"] = training.curve[-1] if training.curve else None
    (args.out / "model.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    del training
    for parameter in model.parameters():
        parameter.grad = None
    if args.judge_seconds:
        judge(model.eval(), text, facts, args)


if __name__ == "__main__":
    main()
