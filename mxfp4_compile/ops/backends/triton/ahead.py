"""Kernels compiled ahead: in processes of their own, into Triton's cache, while a model's weights are prepared.

::

    optimize, load: layers planned --> begin() ----> processes of this file ---> Triton's cache on disk
                    weights prepared, verified                                        |
                    the first forward, the first generate <-- read, not compiled <----+

A process never touches the GPU: it is told for which one, and compiles what ``moe`` would launch for tensors without
data. Nothing waits for it, and nothing depends on it: a kernel that is not in the cache when it is launched is compiled
there and then, as ever. What was compiled is marked in the cache, so that the next time no process is started.
Only with ``MXFP4_COMPILE_AHEAD=1``.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...arguments import MoEInputs, MoETypes
from ...platforms import processors
from . import tuned
from .launch import Step
from .moe import moe, pairs_class
from .select import architecture, choose
from .tiles import TileChoice

VARIABLE = "MXFP4_COMPILE_AHEAD"
# What is met first comes first: a token, a prompt, a batch; the others follow the rules from power to power of two.
_FIRST = (1, 512, 8, 64, 4096)
_LARGEST = 8192
_MOST_PROCESSES = 4

_running: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Call:
    """A call of ``moe``, as far as what it launches depends on it."""

    types: MoETypes
    tokens: int
    choice: TileChoice

    def inputs(self) -> MoEInputs:
        """The call's arguments, without data."""
        types, params = self.types, self.types.params

        def new(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        def bias(dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else new(1, dtype=dtype)

        weight = [*[new(1, dtype=torch.int32)] * 2, new(1, dtype=torch.uint8)]
        pairs = (self.tokens, types.top_k)
        return MoEInputs(
            new(self.tokens, params.hidden, dtype=types.x), new(*pairs, dtype=types.ids),
            new(*pairs, dtype=types.weights), weight, weight, bias(types.up_bias), bias(types.down_bias), params,
            types.layout,
        )  # fmt: skip

    @property
    def kernels(self) -> tuple[Any, ...]:
        """What tells its kernels from those of other calls."""
        pairs = self.tokens * self.types.top_k
        return self.types, self.choice, pairs_class(self.choice, pairs), pairs >= self.types.params.num_experts


def warm(step: Step, _grid: tuple[int, int, int], *args: Any) -> None:
    """In place of a launch: compile for arguments of these dtypes, aligned as all real ones are."""
    step.compile(*args)


def instead_of_launching() -> None:
    """From here on this process compiles what it would launch; what compilers print, pages of it, goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    Step.__call__ = warm  # type: ignore[method-assign,assignment]


def compile_call(call: Call) -> str:
    """Compile what the call would launch; the reason if that fails, else ""."""
    try:
        moe(call.inputs(), call.choice)
    except Exception as error:
        return shortly(error)
    return ""


def shortly(error: Exception) -> str:
    """One line of what a compiler or a kernel raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:160] if lines else ''}"


def calls_of(types: MoETypes, arch: str, device: torch.device | None) -> list[Call]:
    """Calls of different kernels from 1 to 8192 tokens, what is met first before the others."""
    found: dict[Any, Call] = {}
    params, rounded = types.params, types.params.round_dtype
    for tokens in (*_FIRST, *(1 << power for power in range(_LARGEST.bit_length()))):
        choice = choose(
            arch, params.num_experts, types.top_k, params.hidden, params.intermediate, tokens,
            types.x == rounded == torch.bfloat16, device, types.x if types.x == rounded else None,
            types.layout == "sm89_fp8",
        )  # fmt: skip
        call = Call(types, tokens, choice)
        found.setdefault(call.kernels, call)
    return list(found.values())


def begin(layers: Iterable[MoETypes], device: torch.device) -> int:
    """Begin to compile what such layers launch on a CUDA device; the number of processes that do."""
    if os.environ.get(VARIABLE, "0") != "1" or not sys.executable:
        return 0
    from triton.runtime import driver

    arch = architecture(device)
    with torch.cuda.device(device):
        target = driver.active.get_current_target()
    return start(layers, device, arch, target)


def start(layers: Iterable[MoETypes], device: torch.device | None, arch: str, target: Any) -> int:
    """See ``begin``; ``target``: Triton's, which ``arch`` names."""
    _running[:] = [process for process in _running if process.poll() is None]
    turns = [calls_of(types, arch, device) for types in dict.fromkeys(layers)]
    calls = [of[at] for at in range(max(map(len, turns), default=0)) for of in turns if at < len(of)]
    calls = [call for call in calls if not _mark(call, target).exists()]
    workers = min(max(processors() // 2, 1), _MOST_PROCESSES, len(calls))
    # The same modules as here, whatever lies in the current directory.
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    # No business on the GPU, whose memory is the model's.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for at in range(workers):
        with tempfile.TemporaryFile() as jobs:
            pickle.dump((arch, target, calls[at::workers]), jobs)
            jobs.seek(0)
            _running.append(
                subprocess.Popen(
                    [sys.executable, "-c", program],
                    stdin=jobs,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                )
            )
    return workers


@atexit.register
def stop() -> None:
    """End the processes that still compile."""
    for process in _running:
        process.terminate()
    for process in _running:
        process.wait()
    _running.clear()


# the processes


class _Elsewhere:
    """Triton's driver of a GPU that this process does not touch, as far as compiling for it goes."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def main() -> None:
    """Compile the calls that stdin names, pickled with their architecture and Triton's target."""
    from triton.runtime import driver

    if hasattr(os, "nice"):
        os.nice(10)
    tuned.meta_device, target, calls = pickle.load(sys.stdin.buffer)
    driver.set_active(_Elsewhere(target))
    instead_of_launching()
    for call in calls:
        mark = _mark(call, target)
        if not mark.exists() and not compile_call(call):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


# marks


def _mark(call: Call, target: Any) -> Path:
    """The file that says that the call's kernels are in the cache: of this source, this Triton and this target."""
    import triton

    said = f"{triton.__version__} {sys.version_info[:2]} {target} {_source()} {call.kernels}"
    return Path(triton.knobs.cache.dir) / f"mxfp4_compile-{hashlib.sha256(said.encode()).hexdigest()[:32]}"


@cache
def _source() -> str:
    """Of the kernels and of what chooses their constants."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


__all__ = [
    "VARIABLE", "Call", "begin", "calls_of", "compile_call", "instead_of_launching", "main", "shortly", "start",
    "stop", "warm",
]  # fmt: skip
