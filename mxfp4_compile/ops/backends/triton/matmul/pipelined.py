"""Sums over K whose weights come by way of shared memory: loads that Triton's compiler pipelines."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode import SCALE
from .step import product


@triton.jit
def accumulate(
    x_rows,  # [BT] pointers to the tokens' first elements
    tail_rows,  # [TAIL] pointers to those of some tokens more, or None
    codes,  # pointer to the expert's codes, int32 [SLABS, STEPS, 128]
    scales,  # pointer to the expert's scales, int32 [SLABS, STEPS, 8]
    bases,  # pointer to the expert's bases, uint8 [SLABS*16], where weights and x are to be multiplied as e4m3, or None
    slab0,
    part,  # which of SPLIT_K parts of K to sum
    SLABS,
    STEPS: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    QUADS: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    UNROLL: tl.constexpr,
    WAIT: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """sum over k of weight[slab0*16 + r, k] * x[t, k] -> fp32 [BM, BT], and for the tail [BM, TAIL].

    With ``bases`` these are of weights times 2^-5 over their base, and of x over its scale: ``row_scales`` makes up
    for both.
    """
    k = tl.arange(0, 64)
    # Slabs past the end repeat the last: no mask in the loop, and the store drops them.
    slab = tl.minimum(slab0 + tl.arange(0, BM // 16), SLABS - 1)
    base = None
    if bases is not None:
        base_ptrs = bases + (slab * 16)[:, None, None, None] + tl.arange(0, 8)[None, :, None, None]
        base = tl.load(base_ptrs + (tl.arange(0, 2) * 8)[None, None, None, :]).to(tl.int32)
    slab = slab.to(tl.int64) * STEPS
    code_ptrs = codes + (slab * 128)[:, None] + tl.arange(0, 128)[None, :]
    scale_ptrs = scales + (slab * 8)[:, None] + tl.arange(0, 8)[None, :]
    x_ptrs = x_rows[:, None] + k[None, :]
    acc = tl.zeros([BM, BT], tl.float32)
    # Without a tail these go unused.
    tail_ptrs = x_ptrs
    tail_acc = tl.zeros([1, 1], tl.float32)
    TAIL: tl.constexpr = tail_rows is not None
    if TAIL:
        tail_ptrs = tail_rows[:, None] + k[None, :]
        tail_acc = tl.zeros([BM, tail_rows.shape[0]], tl.float32)
    # Two steps per iteration halve what the loop itself costs: barriers, waits, addresses.
    WIDE: tl.constexpr = STEPS // UNROLL * UNROLL if K % 64 == 0 else 0
    FROM: tl.constexpr = WIDE if UNROLL == 2 else 0
    first = 0
    wide = FROM
    last = STEPS
    if SPLIT_K > 1:
        EACH: tl.constexpr = (STEPS + SPLIT_K * UNROLL - 1) // (SPLIT_K * UNROLL) * UNROLL
        first = tl.minimum(part * EACH, STEPS)
        last = tl.minimum(first + EACH, STEPS)
        wide = tl.maximum(tl.minimum(last, FROM), first)
        code_ptrs += first * 128
        scale_ptrs += first * 8
        x_ptrs += first * 64
        if TAIL:
            tail_ptrs += first * 64
    if UNROLL == 2:
        for _ in range(first, wide, 2):
            c0 = tl.load(code_ptrs)
            s0 = tl.load(scale_ptrs)
            x0 = tl.load(x_ptrs)
            c1 = tl.load(code_ptrs + 128)
            s1 = tl.load(scale_ptrs + 8)
            x1 = tl.load(x_ptrs + 64)
            tail0 = x0
            tail1 = x1
            if TAIL:
                tail0 = tl.load(tail_ptrs)
                tail1 = tl.load(tail_ptrs + 64)
                tail_ptrs += 128
            acc, tail_acc = product(acc, tail_acc, c0, s0, base, x0, tail0, TAIL, SPLIT, QUADS, BITS, DTYPE, WAIT)
            acc, tail_acc = product(acc, tail_acc, c1, s1, base, x1, tail1, TAIL, SPLIT, QUADS, BITS, DTYPE, WAIT)
            code_ptrs += 256
            scale_ptrs += 16
            x_ptrs += 128
    if FROM < STEPS:
        for step in range(wide, last):
            c = tl.load(code_ptrs)
            s = tl.load(scale_ptrs)
            if K % 64 == 0:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(step * 64 + k < K)[None, :], other=0.0)
            tail = x
            if TAIL:
                if K % 64 == 0:
                    tail = tl.load(tail_ptrs)
                else:
                    tail = tl.load(tail_ptrs, mask=(step * 64 + k < K)[None, :], other=0.0)
                tail_ptrs += 64
            acc, tail_acc = product(acc, tail_acc, c, s, base, x, tail, TAIL, SPLIT, QUADS, BITS, DTYPE, WAIT)
            code_ptrs += 128
            scale_ptrs += 8
            x_ptrs += 64
    if bases is None:
        acc *= SCALE
        tail_acc *= SCALE
    return acc, tail_acc


@triton.jit
def row_scales(acc, bases, x_scales, source, slab0, SLABS, BM: tl.constexpr):
    """e4m3 sums [BM, BT] -> what they are of: times the rows' bases and the scales of x at ``source``."""
    row = slab0 * 16 + tl.arange(0, BM)
    base = tl.load(bases + row, mask=row < SLABS * 16, other=0).to(tl.int32)
    # A prepared scale is biased by 127 + 94, and a code times 2^-5 (layout.py, fp8_operand). Rows of next to nothing
    # are made 2^-126 at least.
    scale = (tl.maximum(base - (94 - 5), 1) << 23).to(tl.float32, bitcast=True)
    return acc * tl.load(x_scales + source)[None, :] * scale[:, None]
