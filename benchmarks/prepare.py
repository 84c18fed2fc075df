"""How long a model's experts take to become MXFP4: quantize (rule mse), lay out, measure the error.

    python benchmarks/prepare.py [--layers 48] [--shape 128,8,2048,768] [--device cuda] [--profile]

Random bf16 weights of Qwen3-30B-A3B's shape by default, through the same prep program that optimize()
runs. Prints seconds per layer and for all layers, peak memory beyond the weights, and what each part
costs (--profile). Writes JSON with --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxfp4_compile import mx
from mxfp4_compile.ops.arguments import Slot
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.ops.synthetic import LayerShape, parse_shape
from mxfp4_compile.passes.build.prep import prep_program, run_prep
from mxfp4_compile.passes.weights import Projection
from mxfp4_compile.spec import WeightSource


def projections(shape: LayerShape) -> list[Projection]:
    """The two packed projections of a transformers experts module."""
    out = []
    for role, name in (("up", "gate_up_proj"), ("down", "down_proj")):
        source = WeightSource((name,), transposed=False)
        out.append(Projection(role, source, shape.params.shape(role), role))  # type: ignore[arg-type]
    return out


def weights(shape: LayerShape, device: torch.device) -> nn.Module:
    """Random bf16 weights."""
    module = nn.Module()
    for p in projections(shape):
        w = torch.randn(p.shape, device=device, dtype=torch.bfloat16).mul_(0.02)
        module.register_parameter(p.source.parameters[0], nn.Parameter(w, requires_grad=False))
    return module


def seconds(run: Any, device: torch.device) -> float:
    """Wall time of ``run``, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def parts(shape: LayerShape, module: nn.Module, backend: str, layout: str, device: torch.device) -> dict[str, float]:
    """Seconds of quantize, of the layout and of the error for one layer, each by itself."""
    out = {"quantize": 0.0, "layout": 0.0, "error": 0.0}
    for p in projections(shape):
        w = module.get_parameter(p.source.parameters[0])
        group = max(shape.num_experts // 16, 1)
        for i in range(0, shape.num_experts, group):
            some = w[i : i + group]
            out["quantize"] += seconds(lambda some=some: mx.quantize(some), device)
            packed, scales = mx.quantize(some)
            prepare = lambda p=p, packed=packed, scales=scales: get_backend(backend).prepare(
                packed, scales, Slot(p.role, shape.params, layout), k=p.shape[2]
            )
            out["layout"] += seconds(prepare, device)
            error = lambda some=some, packed=packed, scales=scales: mx.relative_error(some, packed, scales)
            out["error"] += seconds(error, device)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="128,8,2048,768")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="", help="default: triton on a GPU, cpu elsewhere")
    parser.add_argument("--profile", action="store_true", help="also time each part of one layer")
    parser.add_argument("--chunks", default="", help="also time quantize with these chunk exponents, 20,22,24")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape, device = parse_shape(args.shape), torch.device(args.device)
    gpu = device.type == "cuda"
    backend = args.backend or ("triton" if gpu else "cpu")
    layout = get_backend(backend).plan(shape.params, device)
    module = weights(shape, device)
    programs = [(prep_program(p, shape.params, "mse", backend, layout), p) for p in projections(shape)]
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    times = []
    for i in range(args.layers):
        times.append(seconds(lambda: [run_prep(program, p, module) for program, p in programs], device))
        if i in (0, 1):
            print(f"layer {i}: {times[-1]:.3f} s", flush=True)
    peak = torch.cuda.max_memory_allocated() - before if gpu else None
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "torch": torch.__version__,
        "shape": str(shape),
        "backend": backend,
        "layers": args.layers,
        "seconds": sum(times),
        "per_layer": times,
        "median_layer": statistics.median(times),
        "peak_bytes_beyond_weights": peak,
    }
    total, median = sum(times), statistics.median(times)
    print(f"{shape}, {args.layers} layers: {total:.2f} s, median layer {median:.3f} s", flush=True)
    if peak is not None:
        print(f"peak beyond the weights: {peak / 2**20:.0f} MiB (prepared weights included)")
    if args.profile:
        parts(shape, module, backend, layout, device)
        result["parts"] = parts(shape, module, backend, layout, device)
        print("one layer by parts:", {k: f"{v:.3f} s" for k, v in result["parts"].items()}, flush=True)
    if args.chunks:
        result["quantize_by_chunk"] = {}
        w = module.get_parameter("gate_up_proj")[: max(shape.num_experts // 16, 1)]
        want = mx.quantize(w)
        default = mx._CHUNK_DEVICE
        for exponent in map(int, args.chunks.split(",")):
            mx._CHUNK_DEVICE = 1 << exponent
            got = mx.quantize(w)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
            took = min(seconds(lambda: mx.quantize(w), device) for _ in range(3))
            error = min(seconds(lambda: mx.relative_error(w, *want), device) for _ in range(3))
            result["quantize_by_chunk"][exponent] = [took, error]
            print(f"{w.numel() / 1e6:.0f} M weights, chunks of 2^{exponent}:", end=" ")
            print(f"quantize {took * 1e3:.2f} ms, error {error * 1e3:.2f} ms", flush=True)
        mx._CHUNK_DEVICE = default
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
