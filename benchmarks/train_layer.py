"""One layer of MXFP4 experts forward and backward, beside transformers' bf16 experts; train.py has whole models.

    python benchmarks/train_layer.py --shapes qwen3-30b-a3b,gpt-oss-20b --tokens 2048,8192 --out layer.json
    python benchmarks/train_layer.py --candidates 1x256x64x64w4s3,0x128x128x64w4s3   # tiles of the backward's products
    python benchmarks/train_layer.py --device cpu --shapes 4x2x64x32 --tokens 8      # for trying this file

CUDA events around several calls, medians; gradients reach the tokens and the routing weights. Ours are compared with
the reference's first, and what is wrong is not timed. "hf" are transformers' experts on bf16 weights, grouped_mm,
eager; "dequantize" the same module on weights that are dequantized in every forward and again in the backward, by way
of checkpointing. "chunked" is the backward of backends that have none of their own. "checkpointed" is forward, forward
and backward: what a layer costs under gradient checkpointing. --seconds ends early: what was not begun by then is left
out, and said.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_layer import shape_of

from mxfp4_compile import mx
from mxfp4_compile.ops.arguments import MoEInputs
from mxfp4_compile.ops.backend import Backend
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.tools.benchmark import TOLERANCE, Layer, one_line, relative_error

Gradients = tuple[Tensor, Tensor]


def free() -> None:
    """What nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Clock:
    """How much of a budget of seconds is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def over(self) -> bool:
        """Whether nothing more should begin."""
        return time.perf_counter() > self.end


def timed_us(run: Callable[[], Any], repeats: int = 9) -> float:
    """Median microseconds of a call: by events on a GPU, which work of the host overlaps as it does in a model."""
    run()
    if not torch.cuda.is_available():
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks))


def kernels_us(run: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of one call by kernel; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as events:
        run()
        torch.cuda.synchronize()
    rows = [(e.key[:60], e.self_device_time_total) for e in events.key_averages()]
    return dict(sorted(rows, key=lambda row: -row[1])[:12])


def choice_of(text: str) -> Any:
    """ "1x256x64x64w4s3" -> tiles: FIRST, BM, BT, BN, warps, stages."""
    from mxfp4_compile.ops.backends.triton.select import BackwardChoice, Tiles

    found = re.fullmatch(r"([01])x(\d+)x(\d+)x(\d+)w(\d+)s(\d+)", text)
    if not found:
        raise ValueError(f"{text!r} is no candidate: FIRSTxBMxBTxBNwWARPSsSTAGES")
    first, bm, bt, bn, warps, stages = map(int, found.groups())
    sizes = {"FIRST": first, "BM": bm, "BT": bt, "BN": bn, "WAIT": first, "GROUP": 8}
    tiles = Tiles(warps, stages, tuple(sizes.items()))
    return BackwardChoice(tiles, tiles)


class Ours:
    """A layer on the native backend, or on the CPU's."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.backend = get_backend("triton" if layer.device.type == "cuda" else "cpu")
        self.weights, self.layout = layer.prepared(self.backend.name)

    def inputs(self, x: Tensor, ids: Tensor, w: Tensor) -> MoEInputs:
        """A call."""
        return MoEInputs(
            x, ids, w, self.weights["up"], self.weights["down"], None, None, self.layer.params, self.layout
        )

    def backward(self, name: str) -> Callable[[Tensor, MoEInputs], Gradients]:
        """ "ours" as the rules say, "chunked" by way of dequantized weights, or some tiles."""
        if name == "ours":
            return self.backend.moe_backward
        if name == "chunked":
            return lambda grad, inputs: Backend.moe_backward(self.backend, grad, inputs)
        from mxfp4_compile.ops.backends.triton.backward import moe_backward

        return lambda grad, inputs: moe_backward(grad, inputs, choice_of(name))


class Original:
    """transformers' experts in bf16, or on weights dequantized in every forward."""

    def __init__(self, layer: Layer, dequantize: bool) -> None:
        self.layer, self.dequantize = layer, dequantize
        self.module = layer.hf_module("grouped_mm")
        if dequantize:
            self.module.to("meta")
            free()

    def _dense(self) -> dict[str, Tensor]:
        params = self.layer.params
        return {
            name: mx.dequantize(*self.layer.canonical[role], params.shape(role)[2], torch.bfloat16)
            for name, role in (("gate_up_proj", "up"), ("down_proj", "down"))
        }

    def __call__(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        if not self.dequantize:
            return self.module(x, ids, w)
        call = lambda x, w: torch.func.functional_call(self.module, self._dense(), (x, ids, w))
        if torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            return checkpoint(call, x, w, use_reentrant=False)
        return call(x, w)

    def both(self, grad: Tensor, x: Tensor, ids: Tensor, w: Tensor) -> Gradients:
        """Forward and backward."""
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        return torch.autograd.grad(self(x, ids, w), (x, w), grad)


def layer_row(layer: Layer, tokens: int, args: argparse.Namespace, ours: Ours) -> dict[str, Any]:
    """Ours at one number of tokens: each way of the backward, compared and timed."""
    x, ids, w = layer.inputs(tokens)
    generator = torch.Generator(layer.device).manual_seed(tokens + 1)
    grad = torch.randn(x.shape, generator=generator, device=layer.device).to(x.dtype)
    inputs = ours.inputs(x, ids, w)
    row: dict[str, Any] = {"tokens": tokens, "us": {}, "errors": {}, "kernels": {}, "skipped": {}}
    canonical = MoEInputs(
        x, ids, w, layer.canonical["up"], layer.canonical["down"], None, None, layer.params, "canonical"
    )
    want = get_backend("reference").moe_backward(grad, canonical)
    row["us"]["forward"] = timed_us(lambda: ours.backend.moe(inputs))
    for name in ("ours", "chunked", *args.candidates):
        if args.clock.over():
            row["skipped"][name] = "no time left"
            continue
        try:
            backward = ours.backward(name)
            got = backward(grad, inputs)
            row["errors"][name] = max(relative_error(a, b.float()) for a, b in zip(got, want, strict=True))
            del got
            if not row["errors"][name] <= TOLERANCE:
                row["skipped"][name] = f"wrong: relative error {row['errors'][name]:.2g}"
                continue
            run = lambda backward=backward: backward(grad, inputs)
            row["us"][name] = timed_us(run)
            row["kernels"][name] = kernels_us(run) if name != "chunked" else {}
        except Exception as error:
            row["skipped"][name] = one_line(error)
    return row


def bf16_row(layer: Layer, original: Original, tokens: int) -> dict[str, float]:
    """transformers' at one number of tokens: its forward, and both."""
    x, ids, w = layer.inputs(tokens)
    generator = torch.Generator(layer.device).manual_seed(tokens + 1)
    grad = torch.randn(x.shape, generator=generator, device=layer.device).to(x.dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return original(x, ids, w)

    return {"forward": timed_us(forward), "both": timed_us(lambda: original.both(grad, x, ids, w))}


def run_layers(args: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Each shape: ours at every number of tokens, then transformers'."""
    device = torch.device(args.device)
    for name in args.shapes:
        if args.clock.over():
            print(f"{name}: no time left", flush=True)
            continue
        shape, _ = shape_of(name)
        layer = Layer(shape, device)
        ours = Ours(layer)
        rows = result["layers"].setdefault(name, [])
        for tokens in args.tokens:
            if args.clock.over():
                break
            rows.append(layer_row(layer, tokens, args, ours))
            save()
        del ours
        for kind in () if args.no_bf16 else ("hf", "dequantize"):
            free()
            try:
                original = Original(layer, kind == "dequantize")
                for row in rows:
                    if not args.clock.over():
                        row[kind] = bf16_row(layer, original, row["tokens"])
                        save()
                del original
            except Exception as error:
                rows[0]["skipped"][kind] = one_line(error)
        del layer
        free()


def layer_table(result: dict[str, Any]) -> Iterator[str]:
    """Microseconds, a line a layer and number of tokens."""
    for name, rows in result["layers"].items():
        for row in rows:
            us = row["us"]
            if "ours" not in us:
                yield f"{name} T={row['tokens']}: {row['skipped']}"
                continue
            again = 2 * us["forward"] + us["ours"]
            parts = [f"forward {us['forward']:.0f}, backward {us['ours']:.0f} ({us['ours'] / us['forward']:.2f} x)"]
            parts += [f"chunked {us['chunked']:.0f}"] if "chunked" in us else []
            parts += [f"checkpointed {again:.0f}"]
            for kind in ("hf", "dequantize"):
                if kind in row:
                    hf = row[kind]["forward"] + row[kind]["both"]
                    backward = row[kind]["both"] - row[kind]["forward"]
                    parts += [
                        f"{kind} forward {row[kind]['forward']:.0f} backward {backward:.0f} checkpointed {hf:.0f}"
                    ]
                    parts += [f"= {hf / again:.2f} x ours"]
            yield f"{name} T={row['tokens']}: " + ", ".join(parts)
            others = sorted((v, k) for k, v in us.items() if "x" in k)
            if others:
                yield "    " + ", ".join(f"{k} {v:.0f}" for v, k in others)
            kernels = row["kernels"].get(others[0][1] if others and others[0][0] < us["ours"] else "ours", {})
            yield "    " + ", ".join(f"{k[:28]} {v:.0f}" for k, v in list(kernels.items())[:7])
            if row["skipped"]:
                yield f"    skipped: {row['skipped']}"


def main() -> None:
    """Command line."""
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    names = lambda text: [n for n in text.split(",") if n]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names, default=["qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b"])
    parser.add_argument("--tokens", type=numbers, default=[2048, 8192])
    parser.add_argument(
        "--candidates", type=names, default=[], help="tiles of the backward's products beside the rules'"
    )
    parser.add_argument("--no-bf16", action="store_true", help="ours alone")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.clock = Clock(args.seconds)

    import transformers

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "clock"},
        "layers": {},
    }

    def save() -> None:
        """After every measurement: a run that is cut short keeps what it has."""
        if args.out:
            args.out.write_text(json.dumps(result, indent=1))

    run_layers(args, result, save)
    table = list(layer_table(result))
    save()
    print("\n".join(table), flush=True)


if __name__ == "__main__":
    main()
