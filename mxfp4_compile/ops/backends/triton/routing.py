"""Pairs sorted by expert, on the device: no host synchronization, no atomics, the same order every run."""

from __future__ import annotations

import triton
import triton.language as tl

from .dependent import let_next_start, wait_for_previous


@triton.jit(do_not_specialize=["pairs"])
def sort_pairs(ids, offsets, order, pairs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per expert scans all ids: those below it give its start, its own their places.

    Writes offsets int32 [E], the end row of each expert, and order int32 [pairs], the pair at each
    sorted row (stable: pairs of an expert keep their order). Pairs whose id is no expert get no row.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    wait_for_previous(PDL)
    let_next_start(PDL, 2)
    for at in range(0, pairs, BLOCK):
        ids_here = tl.load(ids + at + lane, mask=at + lane < pairs, other=-1).to(tl.int32)
        before += ((ids_here >= 0) & (ids_here < expert)).to(tl.int32)
    row = tl.sum(before, 0)
    for at in range(0, pairs, BLOCK):
        mine = tl.load(ids + at + lane, mask=at + lane < pairs, other=-1).to(tl.int32) == expert
        place = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order + row + place - 1, at + lane, mask=mine)
        row += tl.sum(mine.to(tl.int32), 0)
    tl.store(offsets + expert, row)
    let_next_start(PDL, 1)
