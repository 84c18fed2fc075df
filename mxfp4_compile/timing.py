"""Timing: on a GPU by CUDA-graph replay with a cold L2, on a CPU by the wall clock; medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20
_flush: torch.Tensor | None = None


def flush_l2() -> None:
    """Write more than any L2 holds."""
    global _flush
    device = torch.device("cuda", torch.cuda.current_device())
    if _flush is None or _flush.device != device:
        _flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
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
    return _events_us(graph.replay, repeats)


def eager_median_us(run: Callable[[], Any], repeats: int = 10) -> float:
    """As ``median_us`` for what no graph can hold: launches, and waits of the host, are in the time."""
    run()
    return _events_us(run, repeats)


def _events_us(run: Callable[[], Any], repeats: int) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush_l2()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median([float(start.elapsed_time(end)) * 1e3 for start, end in events])


def wall_median_us(run: Callable[[], Any], seconds: float = 1.0, repeats: int = 20) -> float:
    """Median time of ``run`` on the CPU in microseconds: up to ``repeats`` runs, at least 3, in about ``seconds``."""
    run()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def copy_bandwidth(size: int = 2 << 30) -> float:
    """Device-to-device copy of ``size`` bytes: bytes read plus written per second."""
    a = torch.empty(size, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (median_us(lambda: b.copy_(a), 10) * 1e-6)


def matmul_rate() -> float:
    """An 8192^3 bf16 product on random data, FLOP per second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (median_us(lambda: a @ b, 10) * 1e-6)
