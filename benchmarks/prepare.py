"""Time from bf16 experts to prepared MXFP4 weights on one GPU, and to the first output of each kernel.

    python benchmarks/prepare.py [--layers 48] [--out FILE]

Qwen3-30B-A3B's experts (E 128, H 2048, I 768), random bf16, one layer at a time: what optimize() does to a site
once it is planned (prep programs of both projections with scale rule mse, error of every expert included), without
verification. Then, with an empty kernel cache, the first call for each of several numbers of tokens: what a user
waits for compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

# Before triton is imported: its cache of this process starts empty.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxfp4_compile.ops.triton import BACKEND
from mxfp4_compile.passes.experts import Projection
from mxfp4_compile.passes.prep import prep_program, run_prep
from mxfp4_compile.spec import Activation, MoEParams, WeightSource

E, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
TOKENS = (1, 8, 64, 512, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    params = MoEParams(E, HIDDEN, INNER, Activation("silu"), "halves", 0, False, torch.bfloat16, torch.bfloat16)
    experts = nn.Module()
    experts.up = nn.Parameter(torch.empty(E, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16), False)
    experts.down = nn.Parameter(torch.empty(E, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16), False)
    layout = BACKEND.plan(params, torch.device("cuda"))
    seconds, peak, prepared = [], 0, {}
    for _ in range(args.layers):
        for weight in experts.parameters():
            weight.normal_(std=0.02)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for role in ("up", "down"):
            projection = Projection(role, WeightSource((role,), False), params.shape(role), role)  # type: ignore[arg-type]
            program = prep_program(projection, params, "mse", BACKEND.name, layout)
            prepared[role] = run_prep(program, projection, experts).tensors
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        peak = max(peak, torch.cuda.max_memory_allocated() - before)

    first = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        weights, ids = torch.rand(tokens, E, device="cuda").topk(TOP_K, -1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        BACKEND.moe(x, ids, weights, prepared["up"], prepared["down"], None, None, params, layout)
        torch.cuda.synchronize()
        first[tokens] = time.perf_counter() - start

    source = sum(w.numel() * w.element_size() for w in experts.parameters())
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": args.layers,
        "seconds": sum(seconds),
        "seconds_per_layer_median": statistics.median(seconds),
        "seconds_first_layer": seconds[0],
        "bytes_per_layer": source,
        "peak_beyond_source_bytes": peak,
        "first_call_seconds": first,
        "first_calls_seconds": sum(first.values()),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))
    print(f"{result['gpu']}, torch {result['torch']}")
    print(
        f"{args.layers} layers quantized and prepared in {result['seconds']:.1f} s "
        f"(median {result['seconds_per_layer_median']:.3f}, first {seconds[0]:.2f}), "
        f"peak {peak / 2**30:.2f} GiB beyond the source's {source / 2**30:.2f}"
    )
    calls = ", ".join(f"T={t} {s:.1f} s" for t, s in first.items())
    print(f"first call: {calls}; together {sum(first.values()):.1f} s")


if __name__ == "__main__":
    main()
