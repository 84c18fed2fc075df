"""Sums over K for few tokens: weights straight to registers, or tokens in columns of blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode import SCALE, multiplier
from .step import COLUMNS, product, raw_product


@triton.constexpr_function
def scale_steps(BT):
    """The steps of K whose scales one load brings: those of a turn of columns of blocks, else one."""
    return 4 // BT if COLUMNS.value > BT else 1


@triton.constexpr_function
def steps_ahead(BT, TAIL, UNROLL, AHEAD):
    """The steps of K that are loaded before the loop begins: AHEAD of them, or one turn of columns of blocks."""
    if AHEAD == 0 or TAIL > 0:
        return 0
    return AHEAD if COLUMNS.value <= BT else UNROLL * scale_steps(BT)


@triton.jit
def weight_pointers(
    codes, scales, expert, slab0, SLABS,
    STEPS: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Pointers to the first step's codes [BM/16, 128] and to the scales of GROUP steps [BM/16 * 32].

    A row's four lanes hold its scale words: of the step that (lane % GROUP) counts. Along one dimension lanes can lie
    in one order only, the one that the products need; with more, Triton chooses. Slabs past the end repeat the last:
    no mask in the loop, and the store drops them.
    """
    slab = expert.to(tl.int64) * SLABS + tl.minimum(slab0 + tl.arange(0, BM // 16), SLABS - 1)
    code_ptrs = codes + (slab * (STEPS * 128))[:, None] + tl.arange(0, 128)[None, :]
    lane = tl.arange(0, BM // 16 * 32)
    slab = expert.to(tl.int64) * SLABS + tl.minimum(slab0 + lane // 32, SLABS - 1)
    return code_ptrs, scales + slab * (STEPS * 8) + lane % 4 % GROUP * 8 + lane // 4 % 8


@triton.jit
def load_steps(code_ptrs, scale_ptrs, live, COUNT: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr):
    """The codes of COUNT steps and the scales of every GROUP of them, as tuples; what is not ``live`` holds anything.

    Weights are read once: they need not stay in L2, where other data may. At most LIMIT steps exist.
    """
    c = ()
    s = ()
    for j in tl.static_range(COUNT):
        if j < LIMIT:
            mask = live + tl.zeros([1, 1], tl.int32) > 0
            c += (tl.load(code_ptrs + j * 128, mask=mask, eviction_policy="evict_first"),)
    for j in tl.static_range(0, COUNT, GROUP):
        if j < LIMIT:
            s += (tl.load(scale_ptrs + j * 8, mask=live + tl.zeros([1], tl.int32) > 0),)
    return c, s


@triton.jit
def accumulate_direct(
    x_rows, code_ptrs, scale_ptrs, c, s,
    STEPS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, AHEAD: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """``accumulate`` without a tail, weights straight to registers, AHEAD steps before their use.

    ``c`` and ``s`` are the first AHEAD steps as ``load_steps`` left them.
    """
    k = tl.arange(0, 64)
    x_ptrs = x_rows[:, None] + k[None, :]
    acc = tl.zeros([BM, BT], tl.float32)
    WHOLE: tl.constexpr = STEPS if K % 64 == 0 else STEPS - 1
    WIDE: tl.constexpr = WHOLE // AHEAD * AHEAD
    if WIDE > 0:
        for at in range(0, WIDE, AHEAD):
            code_ptrs += AHEAD * 128
            scale_ptrs += AHEAD * 8
            next_c = ()
            next_s = ()
            for j in tl.static_range(AHEAD):
                more = at + AHEAD + j + tl.zeros([1], tl.int32) < STEPS
                x = tl.load(x_ptrs + j * 64)
                next_c += (tl.load(code_ptrs + j * 128, mask=more[:, None], eviction_policy="evict_first"),)
                next_s += (tl.load(scale_ptrs + j * 8, mask=more),)
                acc, _ = product(acc, acc, c[j], s[j], None, x, x, False, SPLIT, QUADS, BITS, DTYPE, WAIT)
            c = next_c
            s = next_s
            x_ptrs += AHEAD * 64
    for j in tl.static_range(STEPS - WIDE):
        x = tl.load(x_ptrs + j * 64, mask=((WIDE + j) * 64 + k < K)[None, :], other=0.0)
        acc, _ = product(acc, acc, c[j], s[j], None, x, x, False, SPLIT, QUADS, BITS, DTYPE, WAIT)
    return acc * SCALE


@triton.jit
def part_of_steps(part, STEPS: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, SPLIT_K: tl.constexpr):
    """First step of a part of K, and the step that ends its whole turns of STRIDE steps."""
    WHOLE: tl.constexpr = STEPS if K % 64 == 0 else STEPS - 1
    TURNS: tl.constexpr = WHOLE // STRIDE
    return part * TURNS // SPLIT_K * STRIDE, (part + 1) * TURNS // SPLIT_K * STRIDE


@triton.jit
def accumulate_blocks(
    x_cols,  # [8] pointers to the first element of each column's token
    code_ptrs,  # of step ``first``, as from ``weight_pointers``
    scale_ptrs,
    c,  # with AHEAD the codes of the first UNROLL * GROUP steps, else empty
    s,  # and the scales of the first GROUP steps, alike
    part,  # which of SPLIT_K parts of K to sum
    first,  # its steps
    last,
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
    """``accumulate`` for fewer than eight tokens, over a part of K: -> fp32 [BM, BT].

    A tensor-core operation has eight columns. They hold (token, block): the token's activations within one
    of 8 / BT neighbouring blocks of 32, zeros elsewhere. The sums of a block then lie in a column of their
    own, and its scale multiplies them there, once for all 32 weights, rather than every weight.
    """
    BLOCKS: tl.constexpr = COLUMNS // BT
    GROUP: tl.constexpr = scale_steps(BT)
    STRIDE: tl.constexpr = GROUP * UNROLL
    k = tl.arange(0, 64)
    x_ptrs = x_cols[:, None] + k[None, :] + first * 64
    block = (tl.arange(0, COLUMNS) % BLOCKS)[:, None] - (k // 32)[None, :]
    total = tl.zeros([BM, COLUMNS], tl.float32)
    WHOLE: tl.constexpr = STEPS if K % 64 == 0 else STEPS - 1
    WIDE: tl.constexpr = WHOLE // STRIDE * STRIDE
    if AHEAD > 0:
        ahead = s[0]
    else:
        ahead = tl.load(scale_ptrs)
    # Loads that feed no product are not pipelined: the scales of the next group by hand.
    if WIDE > 0:
        for at in range(first, last, STRIDE):
            code_ptrs += STRIDE * 128
            next_c = ()
            for u in tl.static_range(UNROLL):
                now = ahead
                scale_ptrs += GROUP * 8
                more = at + (u + 1) * GROUP + tl.zeros([1], tl.int32) < last
                ahead = tl.load(scale_ptrs, mask=more, other=0)
                acc = tl.zeros([BM, COLUMNS], tl.float32)
                for j in tl.static_range(GROUP):
                    if AHEAD > 0:
                        words = c[u * GROUP + j]
                        more = at + STRIDE + tl.zeros([1, 1], tl.int32) < last
                        next_c += (
                            tl.load(code_ptrs + (u * GROUP + j) * 128, mask=more, eviction_policy="evict_first"),
                        )
                    else:
                        words = tl.load(code_ptrs + (u * GROUP + j - STRIDE) * 128)
                    x = tl.load(x_ptrs + (u * GROUP + j) * 64, mask=block == j * 2, other=0.0)
                    acc = raw_product(acc, words, x, SPLIT, QUADS, BITS, DTYPE, WAIT)
                total += acc * _block_scales(now, BM)
            c = next_c
            x_ptrs += STRIDE * 64
    if part == SPLIT_K - 1:
        for rest in tl.static_range(WIDE, STEPS, GROUP):
            inside = rest + tl.arange(0, BM // 16 * 32) % 4 % GROUP < STEPS
            now = tl.load(scale_ptrs, mask=inside, other=0)
            acc = tl.zeros([BM, COLUMNS], tl.float32)
            for i in tl.static_range(GROUP):
                if rest + i < STEPS:
                    words = tl.load(code_ptrs + i * 128, eviction_policy="evict_first")
                    own = (block == i * 2) & ((rest + i) * 64 + k < K)[None, :]
                    x = tl.load(x_ptrs + i * 64, mask=own, other=0.0)
                    acc = raw_product(acc, words, x, SPLIT, QUADS, BITS, DTYPE, WAIT)
            total += acc * _block_scales(now, BM)
            code_ptrs += GROUP * 128
            scale_ptrs += GROUP * 8
            x_ptrs += GROUP * 64
    return tl.sum(tl.reshape(total, [BM, BT, BLOCKS]), 2)


@triton.jit
def token_of_column(BT: tl.constexpr):
    """Which of BT tokens each column of ``accumulate_blocks`` belongs to."""
    return tl.arange(0, COLUMNS) // (COLUMNS // BT)


@triton.jit
def _block_scales(words, BM: tl.constexpr):
    """words int32 [BM/16 * 32] -> what finishes the sums of each row and column, fp32 [BM, 8]."""
    words = tl.reshape(words, [BM // 16, 8, 4])
    first = tl.join(words & 0xFF, (words >> 8) & 0xFF)
    second = tl.join((words >> 16) & 0xFF, (words >> 24) & 0xFF)
    # slab, row, quarter, block, row half -> (slab, row half, row), (quarter, block)
    s = tl.permute(tl.join(first, second), (0, 4, 1, 2, 3))
    return tl.reshape(multiplier(s, tl.float32), [BM, COLUMNS])
