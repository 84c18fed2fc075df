"""Training around frozen experts on one GPU: memory, tokens per second, and one layer's forward and backward.

    python benchmarks/train.py --model qwen3-30b-a3b --few 4 --out RESULT.json
    python benchmarks/train.py --model gpt-oss-20b --few 4 --whole --out RESULT.json
    python benchmarks/train.py --model tiny --few 2 --device cpu --shapes 1x32 --tokens 32      # for trying this file

A real configuration with random weights. ``--few`` layers are trained in bf16 (transformers' grouped experts) and with
MXFP4 experts, ``--whole`` also the whole model with MXFP4 experts, whose bf16 form may not fit a card. What trains is
LoRA of rank 16 on attention (PEFT). A step is forward, backward and AdamW; the figure is the median of five steps after
two. Memory is the peak of what PyTorch allocated in these steps. One layer's router and experts are timed apart, with
gradients to their input.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generate import build, config_of, synchronize
from torch import nn

WARM, TIMED = 2, 5


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


def layer_times(block: nn.Module, hidden: int, tokens: int) -> dict[str, float]:
    """Milliseconds of one block's forward without gradients, with them, and of its backward."""
    like = next(p for p in block.parameters() if p.is_floating_point())
    x = torch.randn(1, tokens, hidden, device=like.device, dtype=like.dtype, requires_grad=True)
    grad = torch.randn(1, tokens, hidden, device=like.device, dtype=like.dtype)

    def forward() -> torch.Tensor:
        out = block(x)
        return out[0] if isinstance(out, tuple) else out

    def both() -> None:
        x.grad = None
        forward().backward(grad)

    with torch.no_grad():
        plain = seconds(forward)
    kept, whole = seconds(forward), seconds(both)
    return {"tokens": tokens, "forward_ms": plain * 1e3, "backward_ms": (whole - kept) * 1e3, "both_ms": whole * 1e3}


def training(model: Any, shape: tuple[int, int], checkpointing: bool) -> dict[str, Any]:
    """Seconds a step and peak memory for ``shape`` = (rows, tokens of each)."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    model.train()
    device = next(model.parameters()).device
    ids = torch.randint(1, model.config.get_text_config().vocab_size, shape, device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(step)
    return {
        "rows": shape[0],
        "tokens": shape[1],
        "checkpointing": checkpointing,
        "seconds_per_step": took,
        "tokens_per_second": shape[0] * shape[1] / took,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "allocated_gb": torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def measure(name: str, model: Any, args: argparse.Namespace, layers: bool) -> dict[str, Any]:
    """One model: its layer's times, then training with LoRA on attention."""
    from peft import LoraConfig, get_peft_model

    out: dict[str, Any] = {"name": name, "layers": model.config.get_text_config().num_hidden_layers}
    if layers:
        hidden = model.config.get_text_config().hidden_size
        out["one_layer"] = [layer_times(experts_of(model), hidden, t) for t in args.tokens]
        for row in out["one_layer"]:
            print(f"{name:24s}", {k: round(v, 3) for k, v in row.items()}, flush=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    peft = get_peft_model(model, lora)
    out["training"] = []
    for shape in args.shapes:
        for checkpointing in (True, False):
            try:
                row = training(peft, shape, checkpointing)
            except torch.OutOfMemoryError as error:
                row = {"rows": shape[0], "tokens": shape[1], "checkpointing": checkpointing, "failed": str(error)[:100]}
            out["training"].append(row)
            print(f"{name:24s}", row, flush=True)
    peft.unload().eval()
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b")
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

    result: dict[str, Any] = {"model": args.model, "hardware": hardware(), "versions": versions(), "rows": []}

    def add(name: str, model: Any, layers: bool) -> None:
        result["rows"].append(measure(name, model, args, layers))
        if args.out:
            args.out.write_text(json.dumps(result, indent=1, default=str))

    model = build(config_of(args.model, args.few), args.device)
    add("bf16", model, True)
    mxfp4_compile.optimize(model, verify=False, scale_rule="floor")
    result["backend"] = str(model.mxfp4_report.sites[0].backend)
    add("MXFP4 experts", model, True)
    del model
    gc.collect()
    if args.whole:
        model = build(config_of(args.model, None), args.device)
        mxfp4_compile.optimize(model, verify=False, scale_rule="floor")
        if args.device == "cuda":
            torch.cuda.empty_cache()
        add("MXFP4 experts, whole", model, False)


if __name__ == "__main__":
    main()
