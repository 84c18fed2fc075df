"""The kernel of few pairs: an expert's are found by scanning the ids, in one launch without a routing step."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dependent import let_next_start, wait_for_previous
from .direct import token_of_column
from .finish import finish
from .step import COLUMNS
from .sums import ahead_of_time, first_weights, sums


@triton.jit(do_not_specialize=["pairs"])
def scan_matmul(
    x,  # [T, K] if X_BY_TOKEN else [pairs, K], row stride X_STRIDE
    codes,
    scales,
    bias,
    ids,  # [pairs], any integer type
    weights,  # [pairs] or None: scales the input
    out,  # [pairs, SPLIT_K, N] contiguous
    pairs,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    SLABS: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    X_BY_TOKEN: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    QUADS: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    UNROLL: tl.constexpr,
    WAIT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (expert, row tile, part of K); ``pairs`` <= PAIRS <= a few hundred.

    The second grid axis is the expert, or, where there are fewer pairs than experts, the pair: the first
    pair of an expert then serves all of them. Results go to the pair's own row. Where experts are few and
    K is long, SPLIT_K programs share a row's sum, which the combination finishes (BT < 8, no activation).
    """
    tl.static_assert(SPLIT_K == 1 or (BT < COLUMNS and KIND is None))
    which = tl.program_id(1)
    part = tl.program_id(2)
    slab0 = tl.program_id(0) * (BM // 16)
    p = tl.arange(0, PAIRS)
    # A down-projection follows an up-projection, which waited for the ids.
    if X_BY_TOKEN:
        wait_for_previous(PDL)
    let_next_start(PDL, 2)
    pair_expert = tl.load(ids + p, mask=p < pairs, other=-1).to(tl.int32)
    if BY_EXPERT:
        expert = which
        mine = pair_expert == expert
        count = tl.sum(mine.to(tl.int32), 0)
    else:
        expert = tl.load(ids + which).to(tl.int32)
        mine = pair_expert == expert
        first = tl.min(tl.where(mine, p, PAIRS), 0)
        valid = (first == which) & (expert >= 0) & (expert < E)
        count = tl.where(valid, tl.sum(mine.to(tl.int32), 0), 0)
    if BY_EXPERT:
        live = count
    else:
        # Weights are on their way before it is known whether another program has this expert.
        live = ((expert >= 0) & (expert < E)).to(tl.int32)
        expert = expert * live
    code_ptrs, scale_ptrs, c, s, first_step, last_step = first_weights(
        codes, scales, expert, slab0, part, live, SLABS, STEPS, K, BM, BT, 0, UNROLL, SPLIT_K, AHEAD
    )
    if count > 0:
        place = tl.cumsum(mine.to(tl.int32), 0) - 1
        if not X_BY_TOKEN:
            wait_for_previous(PDL)
        codes += expert.to(tl.int64) * (SLABS * STEPS * 128)
        scales += expert.to(tl.int64) * (SLABS * STEPS * 8)
        if bias is not None:
            bias += expert.to(tl.int64) * (SLABS * 16)
        for start in range(0, count, BT):
            slot = start + tl.arange(0, BT)
            pair = _pair_at(slot, place, mine, p)
            ok = slot < count
            source = pair
            if BT < COLUMNS:
                source = _pair_at(start + token_of_column(BT), place, mine, p)
            if X_BY_TOKEN:
                source = source // TOP_K
            x_rows = x + source.to(tl.int64) * X_STRIDE
            acc, _ = sums(
                x_rows, None, codes, scales, None, code_ptrs, scale_ptrs, c, s, first_step, last_step,
                slab0, part, SLABS, STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, UNROLL, WAIT, SPLIT_K, AHEAD,
            )  # fmt: skip
            # The last of its sums, but for experts of very many rows.
            let_next_start(PDL, 1)
            finish(
                acc, weights, pair, bias, out + (pair.to(tl.int64) * SPLIT_K + part) * N, ok, slab0, part,
                SLABS, N,
                KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT, BM, BT,
            )  # fmt: skip
            again = (start + BT < count).to(tl.int32)
            c, s = ahead_of_time(code_ptrs, scale_ptrs, again, STEPS, BT, 0, UNROLL, AHEAD)


@triton.jit
def _pair_at(slot, place, mine, p):
    """The pair of each of an expert's slots, without a scatter: exactly one pair has the slot as its place."""
    hit = (place[:, None] == slot[None, :]) & mine[:, None]
    return tl.sum(tl.where(hit, p[:, None], 0), 0)
