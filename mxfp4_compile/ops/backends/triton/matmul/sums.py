"""A tile's sums over K, by the loop that its sizes ask for: what both kernels share.

Tiles of fewer than eight tokens take columns of blocks; others load weights AHEAD steps early to registers, or leave
the loads to the compiler's pipeline. Either kernel first asks for the weights that may be on their way before its
tokens are there (``first_weights``), then for the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .direct import (
    accumulate_blocks,
    accumulate_direct,
    load_steps,
    part_of_steps,
    scale_steps,
    steps_ahead,
    weight_pointers,
)
from .pipelined import accumulate
from .step import COLUMNS


@triton.jit
def first_weights(
    codes, scales, expert, slab0, part, live, SLABS,
    STEPS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, TAIL: tl.constexpr,
    UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What ``sums`` needs of an expert's weights where a program loads them itself, and the first of them on their way.

    That is: pointers to codes and scales of the first step, the codes and the scales of the steps that are loaded
    ahead (tuples; what is not ``live`` holds anything), and a program's first step and the one after its last.
    """
    first = 0
    last = 0
    if BT < COLUMNS:
        first, last = part_of_steps(part, STEPS, K, UNROLL * scale_steps(BT), SPLIT_K)
    code_ptrs, scale_ptrs = weight_pointers(codes, scales, expert, slab0, SLABS, STEPS, BM, scale_steps(BT))
    code_ptrs += first * 128
    scale_ptrs += first * 8
    c, s = ahead_of_time(code_ptrs, scale_ptrs, live, STEPS, BT, TAIL, UNROLL, AHEAD)
    return code_ptrs, scale_ptrs, c, s, first, last


@triton.jit
def ahead_of_time(
    code_ptrs, scale_ptrs, live,
    STEPS: tl.constexpr, BT: tl.constexpr, TAIL: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The codes and scales of the steps that are loaded before the loop begins."""
    return load_steps(code_ptrs, scale_ptrs, live, steps_ahead(BT, TAIL, UNROLL, AHEAD), scale_steps(BT), STEPS)


@triton.jit
def sums(
    x_rows,  # [BT] pointers to the tokens' first elements; for fewer than eight tokens [8], those of each column
    tail_rows,  # [TAIL] pointers to those of some tokens more, or None
    codes,  # pointers to the expert's weights, for the pipelined loop
    scales,
    bases,  # as for ``accumulate``
    code_ptrs,  # these as from ``first_weights``, for the other loops
    scale_ptrs,
    c,
    s,
    first,
    last,
    slab0,
    part,
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
    AHEAD: tl.constexpr,
):
    """Part ``part`` of SPLIT_K of the sums: fp32 [BM, BT], and for the tail [BM, TAIL]."""
    if BT < COLUMNS:
        acc = accumulate_blocks(
            x_rows, code_ptrs, scale_ptrs, c, s, part, first, last,
            STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, UNROLL, WAIT, SPLIT_K, AHEAD,
        )  # fmt: skip
        tail = acc
    elif AHEAD > 0 and tail_rows is None:
        acc = accumulate_direct(
            x_rows, code_ptrs, scale_ptrs, c, s, STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, AHEAD, WAIT
        )
        tail = acc
    else:
        acc, tail = accumulate(
            x_rows, tail_rows, codes, scales, bases, slab0, part, SLABS,
            STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, UNROLL, WAIT, SPLIT_K,
        )  # fmt: skip
    return acc, tail
