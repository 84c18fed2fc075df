"""Which tensor-core instruction a kernel gets, and in which order of K its threads hold the operands.

Kernels for few tokens are written for mma.sync: decoded weights go to it from the registers they were decoded in. That
holds only while Triton chooses that instruction, and while weights are decoded in the order of K that it gives the
operands (decode.py, ``quads``). Both are heuristics of its compiler which changed from release to release: from 3.8 on
it takes wgmma wherever four warps have 64 rows, and the order depends on the tile's rows. What does not fit goes
through shared memory at every step, which costs up to 2.6 times the time.

So neither is left to chance. The instruction is asked for: ``MMA_SYNC`` as the launch option "arch" compiles a kernel
with the passes of an architecture that has no wgmma; PTX is made for the device all the same. The order is read off
the kernel once it is compiled: where it is another than expected the kernel is compiled again to suit
(``Step.settle``), which costs a compilation and happens with releases of Triton that ``expected`` does not know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

# Releases of Triton whose kernels were timed side by side on one GPU (benchmarks/tritons.py): figures hold for them.
TIMED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")

# Passes for this architecture know mma.sync and asynchronous copies, not wgmma.
MMA_SYNC = "sm80"

_MMA_SYNC = re.compile(r"tt\.dot .*?opIdx = 0, parent = #\w+, kWidth = (\d+)")


@dataclass(frozen=True)
class Product:
    """How a kernel multiplies: ``quads`` as in decode.py, ``wait`` for wgmma, which needs it (matmul/)."""

    quads: bool
    wait: bool


@cache
def triton_release() -> tuple[int, int]:
    """(3, 6) of Triton 3.6.0."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def expected(rows: int, columns: int, ahead: int) -> Product:
    """What mma.sync is expected to be given for tiles of ``rows`` weights and ``columns`` tokens.

    With ``ahead`` weights and scales are loaded to registers some steps before their use.
    """
    # Seen in 3.6.0, 3.7.1, 3.8.0 and 3.9.0. Tiles of fewer than eight tokens are decoded without their scales.
    return Product(triton_release() < (3, 8) or (columns >= 8 and (rows <= 64 or ahead > 0)), False)


def chosen(ttgir: str) -> Product | None:
    """What the compiler chose, from a kernel's intermediate code; None where that does not say."""
    if "warp_group_dot" in ttgir:
        return Product(False, True)
    widths = {int(width) for width in _MMA_SYNC.findall(ttgir)}
    return Product(widths == {4}, False) if len(widths) == 1 else None
