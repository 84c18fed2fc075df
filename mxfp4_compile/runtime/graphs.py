"""Recording a function whose inputs and outputs stay at fixed addresses, and running it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Recording(Protocol):
    """A recorded function: ``replay`` runs it again on whatever its static tensors hold then."""

    bytes: int

    def replay(self) -> None:
        """Run it, asynchronously, on the current stream."""


class Recorder(Protocol):
    """Turns functions into recordings on one device."""

    name: str
    compiles: bool
    device: torch.device | None  # the only one it records on; None: whichever the model is on

    def record(self, run: Callable[[], None], warmups: int) -> Recording:
        """Run ``run`` a few times, then record it."""

    def free_bytes(self) -> int | None:
        """Memory that new static tensors may take, or None where it is not known."""

    def guard(self) -> AbstractContextManager[Any]:
        """Entered around everything done on the device."""


class _Call:
    """What ``EagerRecorder`` makes: nothing but the function."""

    bytes = 0

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def replay(self) -> None:
        self._run()


class EagerRecorder:
    """The stand-in where there are no CUDA graphs: same static tensors, same padding, no recording."""

    name = "none"
    compiles = False
    device: torch.device | None = None

    def record(self, run: Callable[[], None], warmups: int) -> Recording:
        for _ in range(warmups):
            run()
        return _Call(run)

    def free_bytes(self) -> int | None:
        return None

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, size: int) -> None:
        self._graph = graph
        self.bytes = size

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphRecorder:
    """CUDA graphs of one device that share one memory pool: only one of them is in use at a time."""

    name = "CUDA graphs"
    compiles = True

    def __init__(self, device: torch.device) -> None:
        self.device: torch.device | None = device
        self._pool: Any = None

    def record(self, run: Callable[[], None], warmups: int) -> Recording:
        """Warm up on a side stream, as capture needs it: autotuning and lazy initialization synchronize."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(warmups):
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # as capture begins with it: what is reserved afterwards is the graph's
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may use the device meanwhile (a data loader, another model).
        # Compiling during a capture breaks it, and the random generators with it: what would is to fail first.
        with (
            torch.compiler.set_stance("fail_on_recompile"),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            run()
        torch.cuda.synchronize(self.device)
        return _Graph(graph, max(torch.cuda.memory_reserved(self.device) - before, 0))

    def free_bytes(self) -> int | None:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def guard(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)


def brief(error: Exception) -> str:
    """An exception in a line: of a compiler's pages, what failed and why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:2]])[:400]


def recorder_for(device: torch.device) -> Recorder | None:
    """The recorder of a device, or None where there are no CUDA graphs."""
    if device.type == "cuda" and torch.cuda.is_available():
        return CudaGraphRecorder(device)
    return None
