"""Where the time of one MoE layer goes on the native kernels: microseconds of each kernel of each number of tokens.

    python benchmarks/breakdown.py [--shapes qwen3-30b-a3b,mixtral-8x7b] [--tokens 1,8,64]

Medians over ten runs with a cold L2, by the profiler's account of each kernel; ``layer`` is what moe_layer.py
measures (graph replay), so the difference is launches and the tails that graphs overlap.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_layer import HIT, SHAPES, shape_of

from mxfp4_compile.timing import flush_l2, median_us
from mxfp4_compile.tools.benchmark import Layer, Run, relative_error

OURS = ("vector_up", "vector_down", "scan_matmul", "sorted_matmul", "sort_pairs", "combine", "quantize_rows")
RUNS = 10


def kernels(run: Run) -> list[tuple[str, float]]:
    """Name and median microseconds of each native kernel of a run, in the order of launching."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(RUNS):
            flush_l2()
            run()
        torch.cuda.synchronize()
    events = [
        (e.time_range.start, e.name, e.time_range.elapsed_us())
        for e in profile.events()
        if e.name in OURS and e.device_type == torch.autograd.DeviceType.CUDA
    ]
    events.sort()
    count = len(events) // RUNS
    return [(events[i][1], statistics.median(events[i + r * count][2] for r in range(RUNS))) for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="as for moe_layer.py")
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    for name in args.shapes.split(","):
        shape, skew = shape_of(name)
        layer = Layer(shape, torch.device("cuda"))
        at = layer.backend("triton")
        for tokens in map(int, args.tokens.split(",")):
            inputs = layer.inputs(tokens, skew, HIT.get((name, tokens)))
            run = at(*inputs)
            error = relative_error(run(), layer.reference(*inputs))
            parts = " ".join(f"{kernel} {us:.1f}" for kernel, us in kernels(run))
            hit = int(inputs[1].unique().numel())
            print(f"{name} T={tokens} hit={hit} layer {median_us(run):.1f}: {parts}; error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
