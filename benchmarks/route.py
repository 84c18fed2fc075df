"""The router's three steps in torch against ``mxfp4::route``: microseconds a call, inside CUDA graphs.

    python benchmarks/route.py [--out route.json]

Each line is one layer's router after its linear: softmax in fp32, top-k, renormalization, cast. The torch rows are
measured eager and compiled by Inductor; all of them replayed from a CUDA graph of 200 calls, median of 20 replays.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mxfp4_compile.ops import schema

CALLS = 200


def qwen(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax, top-k, renormalization."""
    values, ids = torch.topk(torch.softmax(x, -1, dtype=torch.float32), k, dim=-1)
    return (values / values.sum(-1, keepdim=True)).to(x.dtype), ids


def gpt_oss(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k, softmax."""
    values, ids = torch.topk(x, k, dim=-1)
    return torch.softmax(values, 1, dtype=values.dtype), ids


def microseconds(call: Callable[[], Any]) -> float:
    """Time of one call within a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("router     E    K    T   torch  compiled   route  (us a call)")
    for name, function, experts, k, form in (
        ("qwen3_moe", qwen, 128, 8, ("softmax", "sum")),
        ("gpt_oss", gpt_oss, 32, 4, ("none", "softmax")),
    ):
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16)
            torch._dynamo.reset()
            compiled = torch.compile(function, dynamic=False)
            row = {
                "router": name, "E": experts, "K": k, "T": tokens,
                "torch": microseconds(lambda f=function, x=x, k=k: f(x, k)),
                "compiled": microseconds(lambda f=compiled, x=x, k=k: f(x, k)),
                "route": microseconds(lambda x=x, k=k, form=form: schema.route(x, k, *form, 0.0, torch.bfloat16)),
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name:9s} {experts:4d} {k:4d} {tokens:4d} {row['torch']:7.2f} {row['compiled']:9.2f} "
                f"{row['route']:7.2f}",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
