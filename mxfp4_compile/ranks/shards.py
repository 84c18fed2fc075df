"""Which experts, or which of their columns, each rank holds. Arithmetic only: no torch.distributed, no processes.

MXFP4 blocks of 32 lie along K. Those of the up-projection lie along H, which is never cut; those of the down-projection
along I, so that I is cut at multiples of 32: then every code and scale of a part is the whole's. The parts need not be
equal, as the output is a plain sum over them; a rank may even get none.
"""

from __future__ import annotations

import itertools
from typing import Literal

from .. import mx
from ..planning import OptimizeError

Experts = Literal["auto", "expert", "tensor"]
EXPERTS: tuple[Experts, ...] = ("auto", "expert", "tensor")

Parts = tuple[tuple[int, int], ...]


def expert_parts(experts: int, ranks: int) -> Parts:
    """Equal ranges of whole experts; OptimizeError if they do not divide."""
    if experts % ranks:
        raise OptimizeError(
            f'{experts} experts do not divide by {ranks} ranks: experts="tensor" gives each rank some columns of every '
            f"expert, or use a number of ranks that divides {experts}"
        )
    own = experts // ranks
    return tuple((rank * own, (rank + 1) * own) for rank in range(ranks))


def column_parts(columns: int, ranks: int, block: int = mx.BLOCK) -> Parts:
    """Ranges of the intermediate columns I that begin at multiples of ``block``; the first ranks get one more."""
    least, more = divmod(-(-columns // block), ranks)
    ends = [0]
    for rank in range(ranks):
        ends.append(min(columns, ends[-1] + block * (least + (rank < more))))
    return tuple(itertools.pairwise(ends))


def whole_blocks(parts: Parts, block: int = mx.BLOCK) -> bool:
    """Whether every part begins where a block does."""
    return all(start % block == 0 for start, stop in parts if stop > start)


def choose(wanted: Experts, experts: int, columns: int, ranks: int) -> tuple[Literal["expert", "tensor"], Parts, str]:
    """How a site's experts are split, the part of each rank, and why.

    Whole experts are preferred: tiles keep their I, reads are contiguous, any layout and bias will do.
    """
    if wanted not in EXPERTS:
        raise ValueError(f"experts={wanted!r} is not known; known: {', '.join(EXPERTS)}")
    if wanted == "tensor" or (wanted == "auto" and experts % ranks):
        reason = "as asked for" if wanted == "tensor" else f"{experts} experts do not divide by {ranks} ranks"
        return "tensor", column_parts(columns, ranks), reason
    reason = "as asked for" if wanted == "expert" else f"{experts} experts divide by {ranks} ranks"
    return "expert", expert_parts(experts, ranks), reason


__all__ = ["EXPERTS", "Experts", "Parts", "choose", "column_parts", "expert_parts", "whole_blocks"]
