"""The weighted sum over a token's experts, in fp32 and in the order of topk_ids."""

from __future__ import annotations

import triton
import triton.language as tl

from .dependent import wait_for_previous


@triton.jit
def combine(
    y,  # [T*TOP_K, SPLIT_K, N] contiguous; rows of pairs whose id is no expert hold anything
    ids,  # [T, TOP_K]
    weights,  # [T, TOP_K], or None: all ones
    out,  # [T, N] contiguous
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (BLOCK columns, token)."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    # These are older than the projections.
    experts = ()
    factors = ()
    for i in tl.static_range(TOP_K):
        experts += (tl.load(ids + token * TOP_K + i),)
        if weights is not None:
            factors += (tl.load(weights + token * TOP_K + i).to(tl.float32),)
    wait_for_previous(PDL)
    # Unrolled, so that every expert's row is in flight at once.
    for i in tl.static_range(TOP_K):
        pair = token * TOP_K + i
        ok = (experts[i] >= 0) & (experts[i] < E)
        inside = n < tl.where(ok, N, 0)
        row = tl.load(y + pair * (SPLIT_K * N) + n, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, SPLIT_K):
            row += tl.load(y + (pair * SPLIT_K + part) * N + n, mask=inside, other=0.0).to(tl.float32)
        if weights is not None:
            row *= factors[i]
        # A sentinel's weight may be anything, NaN included.
        acc += tl.where(ok, row, 0.0)
    tl.store(out + token * N + n, acc.to(out.dtype.element_ty), mask=n < N)
