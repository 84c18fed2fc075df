"""Sorting pairs by expert both ways, and the weighted sum of sorted rows, one kernel each.

The forms that other libraries' products need: they want and leave rows sorted by expert, where the native
kernels write in the pairs' order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["pairs"])
def _sort_pairs(ids, offsets, order, place, pairs, E: tl.constexpr, BLOCK: tl.constexpr):
    """One program per expert: ids below it give its start, its own their places (stable)."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for at in range(0, pairs, BLOCK):
        here = tl.load(ids + at + lane, mask=at + lane < pairs, other=-1).to(tl.int32)
        before += ((here >= 0) & (here < expert)).to(tl.int32)
    row = tl.sum(before, 0)
    tl.store(offsets + expert, row)
    # The program after the last expert only leaves the number of rows.
    if expert < E:
        for at in range(0, pairs, BLOCK):
            mine = tl.load(ids + at + lane, mask=at + lane < pairs, other=-1).to(tl.int32) == expert
            rank = row + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(order + rank, at + lane, mask=mine)
            tl.store(place + at + lane, rank, mask=mine)
            row += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _combine(
    y,  # [pairs, N] contiguous rows
    place,  # [T*TOP_K]
    ids,  # [T, TOP_K]
    weights,  # [T, TOP_K] or None
    out,  # [T, N]
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        pair = token * TOP_K + i
        expert = tl.load(ids + pair)
        ok = (expert >= 0) & (expert < E)
        at = tl.load(place + pair).to(tl.int64)
        row = tl.load(y + tl.where(ok, at, 0) * N + n, mask=n < tl.where(ok, N, 0), other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + pair).to(tl.float32)
        # The weight of an id that is no expert may be anything, NaN included.
        acc += tl.where(ok, row, 0.0)
    tl.store(out + token * N + n, acc.to(out.dtype.element_ty), mask=n < N)


def sort_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, K] contiguous -> offsets int32 [E+1], order int32 [pairs], place int32 [pairs]."""
    pairs = ids.numel()
    # Zeros: rows that no expert has must name some pair, for gathers that do not know their number.
    both = torch.zeros(2 * pairs, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    order, place = both[:pairs], both[pairs:]
    block = 512 if pairs <= 512 else 2048
    with torch.cuda.device(ids.device):
        _sort_pairs[(num_experts + 1,)](ids, offsets, order, place, pairs, E=num_experts, BLOCK=block, num_warps=4)
    return offsets, order, place


def combine(
    y: Tensor, place: Tensor, ids: Tensor, weights: Tensor | None, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """y [pairs, N], place [pairs], ids and weights [T, K] -> [T, N] in ``dtype``."""
    tokens, top_k = ids.shape
    n = y.shape[1]
    out = torch.empty((tokens, n), dtype=dtype, device=y.device)
    block = min(triton.next_power_of_2(n), 1024)
    with torch.cuda.device(y.device):
        _combine[(tokens, triton.cdiv(n, block))](
            y, place, ids, weights, out, E=num_experts, TOP_K=top_k, N=n, BLOCK=block, num_warps=4
        )
    return out
