"""Training around frozen experts on one GPU: memory, tokens per second, and one layer's forward and backward.

    python benchmarks/train.py --model qwen3-30b-a3b --lora attention+experts --whole --few 1 --out RESULT.json
    python benchmarks/train.py --model gpt-oss-20b --few 4 --whole --out RESULT.json
    python benchmarks/train.py --model tiny --few 2 --device cpu --shapes 1x32 --tokens 32      # for trying this file

A real configuration with random weights. ``--whole``: the whole model with MXFP4 experts is trained, whose bf16 form
may not fit a card; ``--few`` layers are trained in bf16 (transformers' grouped experts) and with MXFP4 experts, 0 for
none. What trains is PEFT's LoRA of rank 16 on attention, or on attention and every expert (``--lora``), the adapters in
``--adapters``. A step is forward, backward and the optimizer; the figure is the median of five steps after two. Memory
is the peak of what PyTorch allocated in these steps. ``--loss chunked`` makes the logits 256 tokens at a time and again
in the backward, as trainers with a fused loss do. One layer's router and experts are timed apart, with the adapters
that they have, with gradients to their input and to these.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from generate import build, config_of, synchronize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WARM, TIMED = 2, 5
LOSS_TOKENS = 256
ATTENTION, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]


def seconds(run: Callable[[], Any], warm: int = WARM, repeats: int = TIMED) -> float:
    """Median seconds of a call, the device's work included."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def experts_of(model: nn.Module) -> nn.Module:
    """The feed-forward block of the first decoder layer: router and experts."""
    return next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))


def adapted(model: nn.Module, args: argparse.Namespace) -> Any:
    """The model with new adapters, the only parameters that train."""
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=ATTENTION, target_parameters=EXPERTS if "experts" in args.lora else None
    )
    peft = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, args.adapters))
            nn.init.normal_(parameter, std=0.02)  # both factors: no gradient is zero
    return peft


def chunked_loss(model: Any, ids: Tensor) -> Tensor:
    """The mean loss, the logits of ``LOSS_TOKENS`` tokens at a time."""
    base = model.get_base_model()
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()

    def of(rows: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(base.lm_head(rows).float(), wanted, reduction="sum")

    parts = zip(hidden.split(LOSS_TOKENS), labels.split(LOSS_TOKENS), strict=True)
    return sum(checkpoint(of, rows, wanted, use_reentrant=False) for rows, wanted in parts) / len(labels)


def optimizer_of(name: str, parameters: list[nn.Parameter]) -> Any:
    """``adamw`` (fused, states in the adapters' dtype) or ``adafactor``."""
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)


def layer_times(block: nn.Module, hidden: int, tokens: int) -> dict[str, float]:
    """Milliseconds of one block's forward without gradients, with them, and of its backward."""
    like = next(p for n, p in block.named_parameters() if p.is_floating_point() and "lora" not in n)
    trained = [p for p in block.parameters() if p.requires_grad]
    x = torch.randn(1, tokens, hidden, device=like.device, dtype=like.dtype, requires_grad=True)
    grad = torch.randn(1, tokens, hidden, device=like.device, dtype=like.dtype)

    def forward() -> torch.Tensor:
        out = block(x)
        return out[0] if isinstance(out, tuple) else out

    def both() -> None:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        forward().backward(grad)

    with torch.no_grad():
        plain = seconds(forward)
    kept, whole = seconds(forward), seconds(both)
    return {"tokens": tokens, "forward_ms": plain * 1e3, "backward_ms": (whole - kept) * 1e3, "both_ms": whole * 1e3}


def training(
    model: Any, shape: tuple[int, int], checkpointing: bool, optimizer_name: str, loss_name: str
) -> dict[str, Any]:
    """Seconds a step and peak memory for ``shape`` = (rows, tokens of each)."""
    # Enabling also makes the embeddings' output require gradients, by a hook: disabling leaves it.
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    device = next(model.parameters()).device
    ids = torch.randint(1, model.config.get_text_config().vocab_size, shape, device=device)
    optimizer = optimizer_of(optimizer_name, [p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        chunked = loss_name == "chunked"
        loss = chunked_loss(model, ids) if chunked else model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    took = seconds(step)
    return {
        "seconds_per_step": took,
        "tokens_per_second": shape[0] * shape[1] / took,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "allocated_gb": torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def measure(
    name: str, model: Any, args: argparse.Namespace, layers: bool, save: Callable[[dict[str, Any]], None]
) -> None:
    """One model: training with adapters, then its layer's times with them."""
    out: dict[str, Any] = {"name": name, "layers": model.config.get_text_config().num_hidden_layers, "training": []}
    peft = adapted(model, args)
    out["trained_parameters"] = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    for rows, tokens in args.shapes:
        for loss, optimizer, checkpointing in product(args.loss, args.optimizer, args.checkpointing):
            row: dict[str, Any] = {"rows": rows, "tokens": tokens, "checkpointing": checkpointing == "on"}
            row |= {"loss": loss, "optimizer": optimizer}
            try:
                row |= training(peft, (rows, tokens), checkpointing == "on", optimizer, loss)
            except torch.OutOfMemoryError as error:
                row["failed"] = str(error)[:100]
            out["training"].append(row)
            print(f"{name:24s}", {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            save(out)
    if layers:
        peft.gradient_checkpointing_disable()
        peft.disable_input_require_grads()
        hidden = model.config.get_text_config().hidden_size
        out["one_layer"] = []
        for tokens in args.tokens:
            out["one_layer"].append(layer_times(experts_of(model), hidden, tokens))
            print(f"{name:24s}", {k: round(v, 3) for k, v in out["one_layer"][-1].items()}, flush=True)
            save(out)
    peft.unload().eval()


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, briefly."""
    lines = []
    for row in rows:
        for t in row["training"]:
            on = "on" if t["checkpointing"] else "off"
            what = f"{t['rows']}x{t['tokens']} checkpointing {on} {t['loss']} {t['optimizer']}"
            figures = t.get("failed") or f"{t['peak_gb'] or 0:6.2f} GB {t['tokens_per_second']:8.0f} tokens/s"
            lines.append(f"{row['name']:22s} {row['layers']:3d} layers  {what:45s} {figures}")
        for t in row.get("one_layer", ()):
            figures = f"forward {t['forward_ms']:.2f} ms, backward {t['backward_ms']:.2f} ms"
            lines.append(f"{row['name']:22s} one layer, {t['tokens']} tokens: {figures}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    words = lambda *known: (
        lambda given: [w if w in known else parser.error(f"{w}: one of {known}") for w in given.split(",")]
    )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--lora", choices=("attention", "attention+experts"), default="attention")
    parser.add_argument("--adapters", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--optimizer", type=words("adamw", "adafactor"), default=["adamw"])
    parser.add_argument("--loss", type=words("whole", "chunked"), default=["whole"])
    parser.add_argument("--checkpointing", type=words("on", "off"), default=["on", "off"])
    parser.add_argument(
        "--few", type=int, default=4, help="layers that are trained both in bf16 and with MXFP4 experts"
    )
    parser.add_argument("--whole", action="store_true", help="the whole model with MXFP4 experts, too")
    parser.add_argument(
        "--shapes", type=lambda s: [tuple(map(int, p.split("x"))) for p in s.split(",")], default="1x2048,4x1024"
    )
    parser.add_argument("--tokens", type=lambda s: [int(n) for n in s.split(",")], default="2048,8192")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import mxfp4_compile
    from mxfp4_compile.tools.environment import hardware, versions

    result: dict[str, Any] = {"arguments": vars(args), "hardware": hardware(), "versions": versions(), "rows": []}
    result["versions"]["peft"] = importlib.metadata.version("peft")
    rows: dict[str, dict[str, Any]] = {}

    def save(row: dict[str, Any]) -> None:
        rows[row["name"]] = row
        result["rows"] = list(rows.values())
        if args.out:
            args.out.write_text(json.dumps(result, indent=1, default=str))

    def optimized(model: Any) -> Any:
        mxfp4_compile.optimize(model, verify=False, scale_rule="floor")
        result["backend"] = str(model.mxfp4_report.sites[0].backend)
        return model

    if args.whole:
        measure("MXFP4 experts, whole", optimized(build(config_of(args.model, None), args.device)), args, False, save)
        gc.collect()
    if args.few:
        model = build(config_of(args.model, args.few), args.device)
        measure("bf16", model, args, True, save)
        measure("MXFP4 experts", optimized(model), args, True, save)
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
