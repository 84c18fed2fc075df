"""Dense products of few rows, in bf16: cuBLAS against ``mxfp4_runtime::linear_rows``, on the shapes of decoder layers.

    python benchmarks/linear_rows.py --out linear_rows.json --seconds 40

CUDA-graph replay, L2 flushed before each, medians of 20; every output is compared with the fp32 product first, and 50
launches with one another, bit for bit. ``floor``: the weight's bytes at the bandwidth of a large copy. ``rule``: the
plan that the op takes; ``best``: of a few others. q and k are what is computed one by one where nothing is packed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mxfp4_compile.runtime import linear
from mxfp4_compile.timing import median_us, median_wall_us, stream_bandwidth

# columns, depth, bias
SHAPES = {
    "qwen3 qkv": (5120, 2048, False),
    "qwen3 o": (2048, 4096, False),
    "qwen3 router": (128, 2048, False),
    "gpt-oss qkv": (5120, 2880, True),
    "gpt-oss o": (2880, 4096, True),
    "gpt-oss router": (32, 2880, True),
    "qwen3 q": (4096, 2048, False),
    "qwen3 k": (512, 2048, False),
}
ROWS = (8, 64, 1, 16, 32, 2, 4)  # what matters most first
PLANS = [(block_k, programs) for block_k in (64, 128) for programs in (132, 264, 528)]
TINY = {"tiny": (96, 160, True)}


def measure(name: str, rows: int, bandwidth: float, device: str, plans: list[tuple[int, int]]) -> dict[str, Any]:
    """One shape with one number of rows."""
    columns, depth, biased = {**SHAPES, **TINY}[name]
    generator = torch.Generator(device).manual_seed(rows)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    x, weight = draw(rows, depth).bfloat16(), (draw(columns, depth) * depth**-0.5).bfloat16()
    bias = draw(columns).bfloat16() if biased else None
    exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    cuda = device == "cuda"
    timed = median_us if cuda else lambda run: median_wall_us(run, 2, 0.1)
    row: dict[str, Any] = {"shape": name, "rows": rows, "floor": weight.numel() * 2 / bandwidth * 1e6}
    row["cublas"] = timed(lambda: F.linear(x, weight, bias))
    if not cuda:
        return row
    rule = linear.plan(rows, columns, depth)
    chosen = {(rule.block_k, rule.steps): rule}
    for block_k, programs in plans:
        how = linear.plan(rows, columns, depth, block_k, programs)
        chosen.setdefault((how.block_k, how.steps), how)
    times = {}
    for how in chosen.values():
        run = lambda how=how: linear.launch(x, weight, bias, how)
        out = run()
        error = float((out.float() - exact).norm() / exact.norm())
        if not error < 4e-3 or not all(torch.equal(run(), out) for _ in range(50)):
            row.setdefault("wrong", []).append(f"{how}: error {error:.1e}, or bits that change")
            continue
        times[how] = timed(run)
    if times:
        best = min(times, key=lambda how: times[how])
        row.update(rule=times.get(rule), best=times[best], plan=str(best))
        row["plans"] = {str(how): us for how, us in times.items()}
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=float, default=40.0, help="after which nothing more is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    cuda = args.device == "cuda"
    bandwidth = stream_bandwidth(1024) if cuda else 1e10
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else args.device,
        "torch": torch.__version__,
        "unit": "microseconds; CUDA-graph replay, L2 flushed, median of 20",
        "bandwidth": bandwidth,
        "rows": [],
    }
    for rows in map(int, args.rows.split(",")):
        for name in args.shapes.split(","):
            if time.perf_counter() - started > args.seconds:
                break
            result["rows"].append(measure(name, rows, bandwidth, args.device, PLANS))
            if args.out:
                args.out.write_text(json.dumps(result, indent=1))
    print(f"{'shape':16s} {'rows':>4s} {'floor':>7s} {'cuBLAS':>7s} {'rule':>7s} {'best':>7s}  best plan")
    cell = lambda value: f"{value:7.1f}" if value is not None else f"{'':>7s}"
    for r in sorted(result["rows"], key=lambda r: (r["shape"], r["rows"])):
        figures = " ".join(cell(r.get(key)) for key in ("floor", "cublas", "rule", "best"))
        print(f"{r['shape']:16s} {r['rows']:4d} {figures}  {r.get('plan', '')} {'WRONG' if 'wrong' in r else ''}")
    print(f"{len(result['rows'])} of {len(args.shapes.split(',')) * len(args.rows.split(','))} measured")


if __name__ == "__main__":
    main()
