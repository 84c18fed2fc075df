"""Timing: on a GPU CUDA-graph replay with a cold L2, on a CPU the wall clock; medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20
_flush: dict[int, torch.Tensor] = {}
_awake: set[int] = set()


def flush_l2() -> None:
    """Write more than any L2 holds, on the current GPU."""
    device = torch.cuda.current_device()
    if device not in _flush:
        _flush[device] = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    _flush[device].zero_()


def raise_clocks(seconds: float = 0.3) -> None:
    """Keep the current GPU busy once in a process: an idle one's clocks are low, and take a while to rise.

    With little work: what draws full power lowers them again, for longer than a measurement takes.
    """
    device = torch.cuda.current_device()
    if device in _awake:
        return
    a = torch.zeros(1 << 20, device="cuda")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(100):
            a.add_(1.0)
        torch.cuda.synchronize()
    _awake.add(device)


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
    """Median time of one replay of ``run`` on the current GPU in microseconds, L2 flushed before each."""
    raise_clocks()
    graph = capture(run)
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush_l2()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) * 1e3 for start, end in events))


def median_wall_us(run: Callable[[], Any], repeats: int = 5, seconds: float = 2.0) -> float:
    """Median wall-clock time of ``run`` in microseconds after one unmeasured run; fewer repeats beyond ``seconds``."""
    run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def stream_bandwidth(megabytes: int = 2048) -> float:
    """Bytes per second of a plain kernel that reads and writes ``megabytes`` each, on the current GPU."""
    a = torch.randn(megabytes << 18, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / (median_us(lambda: torch.add(a, 1.0, out=b), 10) * 1e-6)


def matmul_rate() -> float:
    """An 8192^3 bf16 product on random data on the current GPU, FLOP per second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return float(2 * 8192**3 / (median_us(lambda: a @ b, 10) * 1e-6))
