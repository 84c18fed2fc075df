"""Timing on a GPU: CUDA-graph replay, cold L2, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20
_flush: torch.Tensor | None = None


def flush_l2() -> None:
    """Write more than any L2 holds."""
    global _flush
    if _flush is None:
        _flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    _flush.zero_()


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """``run`` as a graph, after two eager runs on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def median_us(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of one replay of ``run`` in microseconds, L2 flushed before each."""
    graph = capture(run)
    for _ in range(3):
        graph.replay()
    times = []
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, end in events:
        flush_l2()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e3 for start, end in events]
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Device-to-device copy, bytes read plus written per second."""
    a = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (median_us(lambda: b.copy_(a), 10) * 1e-6)


def matmul_rate() -> float:
    """An 8192^3 bf16 product on random data, FLOP per second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (median_us(lambda: a @ b, 10) * 1e-6)
