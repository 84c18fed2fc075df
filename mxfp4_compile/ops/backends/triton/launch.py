"""Launching compiled kernels with little host work.

Triton's own launch path binds and specializes every argument on every call, tens of microseconds that
an eager decoding step pays per kernel and layer. A ``Step`` has all of that decided: constants,
dtypes and options are fixed when it is made, integers are not specialized, and pointers are only
checked for the 16-byte alignment that the compiled kernel assumes.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import instruction


class Step:
    """One kernel with its constants and options; call it with a grid and the run-time arguments.

    ``product`` is None unless the kernel multiplies with mma.sync: then it stands for its constants QUADS and WAIT,
    which follow what the compiler chooses.
    """

    def __init__(
        self,
        kernel: Any,
        constants: dict[str, Any],
        warps: int,
        stages: int,
        registers: int = 0,
        product: instruction.Product | None = None,
        arch: str | None = None,
    ) -> None:
        self.kernel = kernel
        self._product = product
        if product is not None:
            constants = {**constants, "QUADS": int(product.quads), "WAIT": int(product.wait)}
        names = list(kernel.arg_names)
        # In signature order, since the compiled kernel takes all of them by position.
        self.constants = {name: constants[name] for name in names if name in constants}
        if names[len(names) - len(self.constants) :] != list(self.constants):
            raise ValueError(f"constants {sorted(constants)} are not the last parameters of {names}")
        # Fused multiply-adds are what kernels were measured with; Triton's own default is about to change.
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        if arch is not None:
            self.options["arch"] = arch
        if self.constants.get("PDL"):
            self.options["launch_pdl"] = True  # see dependent.py
        if registers:
            self.options["maxnreg"] = registers
        self._tail = tuple(self.constants.values())
        self._compiled: dict[int, Any] = {}
        self._ahead: set[int] = set()
        self._interpreted = not hasattr(kernel, "device_caches")

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on the current stream of the current device; tensors, ints and None by position."""
        for a in args:
            if isinstance(a, Tensor) and a.data_ptr() & 15:
                aligned = False
                break
        else:
            aligned = True
        if not aligned or self._interpreted:
            self.kernel[grid](*args, **self.constants, **({} if self._interpreted else self.options))
            return
        device = torch.cuda.current_device()
        compiled = self._compiled.get(device)
        if compiled is None:
            if self._product is not None:
                self.compile(*args)
            self._compiled[device] = self.kernel[grid](*args, **self.constants, **self.options)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *self._tail)

    def compile_ahead(self, device: int, *args: Any) -> None:
        """Compile for arguments like these, aligned as all real ones are, and launch nothing."""
        self._ahead.add(device)
        with torch.cuda.device(device):
            self.compile(*args)

    def compile(self, *args: Any) -> None:
        """For arguments like these on the current device, with the constants that suit what the compiler chooses."""
        dtypes = [a.dtype if isinstance(a, Tensor) else a for a in args]
        compile_now = lambda: self.kernel.warmup(*dtypes, **self.constants, **self.options, grid=(1, 1, 1))
        compiled = compile_now()
        if self._product is not None and self.settle(compiled.asm["ttgir"]):
            compile_now()

    def settle(self, ttgir: str) -> bool:
        """Take over what the compiler chose for this kernel's products; whether it must be compiled anew for that."""
        chosen = None if self._product is None else instruction.chosen(ttgir)
        if chosen is None or chosen == self._product:
            return False
        # Once: with these constants the compiler might choose the first again.
        self._product = None
        self.constants.update(QUADS=int(chosen.quads), WAIT=int(chosen.wait))
        self._tail = tuple(self.constants.values())
        return True

    def fresh(self, device: int) -> bool:
        """Whether it was neither launched nor compiled on ``device``."""
        return not self._interpreted and device not in self._compiled and device not in self._ahead


Launch = tuple[Step, tuple[int, int, int], tuple[Any, ...]]

# CPython 3.11 before 3.11.8 and 3.12 before 3.12.2 count how deep ast.parse is for all threads together (gh-106905).
_PARSER_COUNTS_THREADS = (3, 11) <= sys.version_info < (3, 11, 8) or (3, 12) <= sys.version_info < (3, 12, 2)
_PARSING = threading.Lock()


@contextmanager
def _parsing_in_threads() -> Iterator[None]:
    """Within it threads may parse Python side by side, as Triton does with kernels.

    Where the interpreter counts threads together, parsing fails once the garbage collector has run Python code, and
    with it another thread, in the midst of it; a function of Triton that fails so keeps a cache key that says nothing
    of its source. No collection, then, until all are done.
    """
    if not _PARSER_COUNTS_THREADS:
        yield
        return
    with _PARSING:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def compile_together(device: int, launches: Sequence[Launch]) -> None:
    """Compile what was never launched on ``device``, in threads: most of compiling is outside of Python's lock."""
    fresh = [(step, args) for step, _, args in launches if step.fresh(device)]
    if len(fresh) < 2:
        return
    for step, _ in fresh:
        # Makes the driver and each function's cache, once: two threads would each make theirs, and one would be lost.
        step.kernel.device_caches[device]
    with _parsing_in_threads(), ThreadPoolExecutor(len(fresh)) as pool:
        for job in [pool.submit(step.compile_ahead, device, *args) for step, args in fresh]:
            # What fails here fails again when it is launched, in the caller's own thread.
            job.exception()


def launch(launches: Sequence[Launch]) -> None:
    """Launch one after the other; what is launched for the first time is compiled before, side by side."""
    first, _, args = launches[0]
    # The kernels of a layer are made together: if one was launched, all were.
    if args[0].is_cuda and first.fresh(device := torch.cuda.current_device()):
        compile_together(device, launches)
    for step, grid, args in launches:
        step(grid, *args)
