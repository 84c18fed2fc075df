"""Several ranks on one machine: processes of a group that run functions of a module until they are stopped.

With NCCL each has a GPU of its own, and NVLink multicast is off: a program that dies in it can leave a machine's GPUs
unusable for others. On CPUs equal experts are traced and matched once a rank (``remembered``), as in the process of the
tests: none that several ranks run there is about that.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from remembered import match_of

from mxfp4_compile import planning

SECONDS = 120
"""How long the group waits for a rank, and the pool for a result."""


NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def _serve(rank: int, size: int, backend: str, store: str, tasks: Any, results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    device = {}
    if backend == "nccl":
        os.environ.update(NO_MULTICAST)
        torch.cuda.set_device(rank)
        device = {"device_id": torch.device("cuda", rank)}
    else:
        planning._match_of = match_of
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS), **device
    )
    while True:
        task = tasks.get()
        if task is None:
            torch.distributed.destroy_process_group()
            return
        work, args = task
        try:
            results.put((rank, work(rank, *args), None))
        except BaseException as error:
            results.put((rank, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Pool:
    """``size`` ranks. ``run`` calls work(rank, *args) on each and returns the results by rank."""

    def __init__(self, size: int = 2, backend: str = "gloo") -> None:
        context: Any = mp.get_context("spawn")
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(size)]
        arguments = [(rank, size, backend, store, self.tasks[rank], self.results) for rank in range(size)]
        self.processes = [context.Process(target=_serve, args=a, daemon=True) for a in arguments]
        for process in self.processes:
            process.start()

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """The results by rank; AssertionError with the traceback of the first rank that raised."""
        for tasks in self.tasks:
            tasks.put((work, args))
        found: dict[int, Any] = {}
        for _ in range(self.size):
            rank, result, error = self.results.get(timeout=SECONDS)
            assert error is None, f"rank {rank}: {error}"
            found[rank] = result
        return [found[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """End the processes."""
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()
