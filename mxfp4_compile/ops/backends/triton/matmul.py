"""Grouped matrix products on tensor cores, weights decoded in registers as the first operand.

The output is computed transposed, [weight rows, tokens]: tensor cores of Hopper take only their first
operand from registers, and few tokens then fill a narrow tile rather than a mostly empty one. Two
kernels share the main loop: ``scan_matmul`` finds an expert's pairs by scanning the ids (one launch, no
routing step), ``sorted_matmul`` reads them from the routing of routing.py, and may multiply e4m3 (fp8.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .decode import SCALE, decode_operand, fp8_operand, multiplier, quads, raw_operand
from .dependent import let_next_start, wait_for_previous

# Columns of the narrowest tensor-core operation. Tiles of fewer tokens fill them with blocks of K.
_COLUMNS = tl.constexpr(8)


@triton.jit
def _after_wgmma(words):
    """``words``, once no wgmma runs any more.

    wgmma reads its first operand from registers after it was issued, and Triton leaves some in flight from one
    iteration to the next: they must be done before the registers are reused.
    """
    return words | tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _product(
    acc, tail_acc, words, scales, bases, x, tail_x,
    TAIL: tl.constexpr, SPLIT: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """acc + decoded weights [BM, 64] @ x [BT, 64]^T, and with TAIL the same of ``tail_x``.

    With ``bases`` (as for ``fp8_operand``, else None) weights and x are e4m3.
    """
    if WAIT:
        words = _after_wgmma(words)
    if len(scales.shape) == 1:
        scales = tl.reshape(scales, [words.shape[0], 8, 4])
    else:
        scales = scales[:, :, None]
    if bases is not None:
        w = fp8_operand(words, scales, bases, words.shape[0], DTYPE)
    else:
        w = decode_operand(words, scales, words.shape[0], QUADS, BITS, DTYPE)
    acc = _dot(acc, w, x, SPLIT, QUADS, DTYPE)
    if TAIL:
        tail_acc = _dot(tail_acc, w, tail_x, SPLIT, QUADS, DTYPE)
    return acc, tail_acc


@triton.jit
def _dot(acc, w, x, SPLIT: tl.constexpr, QUADS: tl.constexpr, DTYPE: tl.constexpr):
    """acc + w [BM, 64] @ x [BT, 64]^T."""
    if QUADS:
        x = quads(x, x.shape[0])
    if SPLIT:
        # fp16 and fp32 activations as the sum of two bf16: about 16 bits of mantissa.
        high = x.to(tl.bfloat16)
        low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(w, tl.trans(low), acc)
        acc = tl.dot(w, tl.trans(high), acc)
    elif DTYPE == tl.float32:  # noqa: SIM300
        acc = tl.dot(w, tl.trans(x.to(tl.float32)), acc, input_precision="ieee")
    else:
        acc = tl.dot(w, tl.trans(x), acc)
    return acc


@triton.jit
def _accumulate(
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

    With ``bases`` these are of weights times 2^-5 over their base, and of x over its scale: ``_row_scales`` makes up
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
            acc, tail_acc = _product(acc, tail_acc, c0, s0, base, x0, tail0, TAIL, SPLIT, QUADS, BITS, DTYPE, WAIT)
            acc, tail_acc = _product(acc, tail_acc, c1, s1, base, x1, tail1, TAIL, SPLIT, QUADS, BITS, DTYPE, WAIT)
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
            acc, tail_acc = _product(acc, tail_acc, c, s, base, x, tail, TAIL, SPLIT, QUADS, BITS, DTYPE, WAIT)
            code_ptrs += 128
            scale_ptrs += 8
            x_ptrs += 64
    if bases is None:
        acc *= SCALE
        tail_acc *= SCALE
    return acc, tail_acc


@triton.jit
def _row_scales(acc, bases, x_scales, source, slab0, SLABS, BM: tl.constexpr):
    """e4m3 sums [BM, BT] -> what they are of: times the rows' bases and the scales of x at ``source``."""
    row = slab0 * 16 + tl.arange(0, BM)
    base = tl.load(bases + row, mask=row < SLABS * 16, other=0).to(tl.int32)
    # A prepared scale is biased by 127 + 94, and a code times 2^-5 (layout.py, fp8_operand). Rows of next to nothing
    # are made 2^-126 at least.
    scale = (tl.maximum(base - (94 - 5), 1) << 23).to(tl.float32, bitcast=True)
    return acc * tl.load(x_scales + source)[None, :] * scale[:, None]


@triton.jit
def _weights(
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
def _load_steps(code_ptrs, scale_ptrs, live, COUNT: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr):
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
def _accumulate_direct(
    x_rows, code_ptrs, scale_ptrs, c, s,
    STEPS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, AHEAD: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """``_accumulate`` without a tail, weights straight to registers, AHEAD steps before their use.

    ``c`` and ``s`` are the first AHEAD steps as ``_load_steps`` left them.
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
                acc, _ = _product(acc, acc, c[j], s[j], None, x, x, False, SPLIT, QUADS, BITS, DTYPE, WAIT)
            c = next_c
            s = next_s
            x_ptrs += AHEAD * 64
    for j in tl.static_range(STEPS - WIDE):
        x = tl.load(x_ptrs + j * 64, mask=((WIDE + j) * 64 + k < K)[None, :], other=0.0)
        acc, _ = _product(acc, acc, c[j], s[j], None, x, x, False, SPLIT, QUADS, BITS, DTYPE, WAIT)
    return acc * SCALE


@triton.jit
def _part(part, STEPS: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, SPLIT_K: tl.constexpr):
    """First step of a part of K, and the step that ends its whole turns of STRIDE steps."""
    WHOLE: tl.constexpr = STEPS if K % 64 == 0 else STEPS - 1
    TURNS: tl.constexpr = WHOLE // STRIDE
    return part * TURNS // SPLIT_K * STRIDE, (part + 1) * TURNS // SPLIT_K * STRIDE


@triton.jit
def _accumulate_blocks(
    x_cols,  # [8] pointers to the first element of each column's token
    code_ptrs,  # of step ``first``, as from ``_weights``
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
    """``_accumulate`` for fewer than eight tokens, over a part of K: -> fp32 [BM, BT].

    A tensor-core operation has eight columns. They hold (token, block): the token's activations within one
    of 8 / BT neighbouring blocks of 32, zeros elsewhere. The sums of a block then lie in a column of their
    own, and its scale multiplies them there, once for all 32 weights, rather than every weight.
    """
    BLOCKS: tl.constexpr = _COLUMNS // BT
    GROUP: tl.constexpr = BLOCKS // 2  # K steps
    STRIDE: tl.constexpr = GROUP * UNROLL
    k = tl.arange(0, 64)
    x_ptrs = x_cols[:, None] + k[None, :] + first * 64
    block = (tl.arange(0, _COLUMNS) % BLOCKS)[:, None] - (k // 32)[None, :]
    total = tl.zeros([BM, _COLUMNS], tl.float32)
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
                acc = tl.zeros([BM, _COLUMNS], tl.float32)
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
                    acc = _raw_product(acc, words, x, SPLIT, QUADS, BITS, DTYPE, WAIT)
                total += acc * _block_scales(now, BM)
            c = next_c
            x_ptrs += STRIDE * 64
    if part == SPLIT_K - 1:
        for rest in tl.static_range(WIDE, STEPS, GROUP):
            inside = rest + tl.arange(0, BM // 16 * 32) % 4 % GROUP < STEPS
            now = tl.load(scale_ptrs, mask=inside, other=0)
            acc = tl.zeros([BM, _COLUMNS], tl.float32)
            for i in tl.static_range(GROUP):
                if rest + i < STEPS:
                    words = tl.load(code_ptrs + i * 128, eviction_policy="evict_first")
                    own = (block == i * 2) & ((rest + i) * 64 + k < K)[None, :]
                    x = tl.load(x_ptrs + i * 64, mask=own, other=0.0)
                    acc = _raw_product(acc, words, x, SPLIT, QUADS, BITS, DTYPE, WAIT)
            total += acc * _block_scales(now, BM)
            code_ptrs += GROUP * 128
            scale_ptrs += GROUP * 8
            x_ptrs += GROUP * 64
    return tl.sum(tl.reshape(total, [BM, BT, BLOCKS]), 2)


@triton.jit
def _token_of_column(BT: tl.constexpr):
    """Which of BT tokens each column of ``_accumulate_blocks`` belongs to."""
    return tl.arange(0, _COLUMNS) // (_COLUMNS // BT)


@triton.jit
def _raw_product(
    acc, words, x,
    SPLIT: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """acc + codes [BM, 64] @ x [8, 64]^T, times 2^-126 of the codes and SCALE of the activations."""
    if WAIT:
        words = _after_wgmma(words)
    w = raw_operand(words, words.shape[0], QUADS, BITS, DTYPE)
    if QUADS:
        x = quads(x, _COLUMNS)
    if SPLIT:
        wide = x.to(tl.float32) * SCALE
        high = wide.to(tl.bfloat16)
        low = (wide - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(w, tl.trans(low), acc)
        acc = tl.dot(w, tl.trans(high), acc)
    elif DTYPE == tl.float32:  # noqa: SIM300
        acc = tl.dot(w, tl.trans(x.to(tl.float32) * SCALE), acc, input_precision="ieee")
    else:
        acc = tl.dot(w, tl.trans(x * SCALE), acc)
    return acc


@triton.jit
def _block_scales(words, BM: tl.constexpr):
    """words int32 [BM/16 * 32] -> what finishes the sums of each row and column, fp32 [BM, 8]."""
    words = tl.reshape(words, [BM // 16, 8, 4])
    first = tl.join(words & 0xFF, (words >> 8) & 0xFF)
    second = tl.join((words >> 16) & 0xFF, (words >> 24) & 0xFF)
    # slab, row, quarter, block, row half -> (slab, row half, row), (quarter, block)
    s = tl.permute(tl.join(first, second), (0, 4, 1, 2, 3))
    return tl.reshape(multiplier(s, tl.float32), [BM, _COLUMNS])


@triton.jit
def _finish(
    acc,
    weights,  # [pairs] or None: scales the columns
    pair,  # [BT] the pair of each column
    bias,  # pointer to the expert's bias, or None
    out_rows,  # [BT] pointers
    out_ok,
    slab0,
    part,  # the first has the bias
    SLABS,
    N: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """Weight on input, bias and activation on fp32 [BM, BT]; stores [BT, N] at ``out_rows``."""
    if weights is not None:
        acc = acc * tl.load(weights + pair).to(tl.float32)[None, :]
    if bias is not None:
        row = slab0 * 16 + tl.arange(0, BM)
        b = tl.load(bias + row, mask=row < (1 - part) * (SLABS * 16), other=0.0)
        acc += b.to(tl.float32)[:, None]
    if KIND is not None:
        if GATED:
            # A slab is 8 activated rows and 8 others: rows r and r+8, which one thread holds.
            both = tl.permute(tl.reshape(acc, [BM // 16, 2, 8, BT]), (0, 2, 3, 1))
            gate, up = tl.split(both)
            gate = tl.reshape(gate, [BM // 2, BT])
            up = tl.reshape(up, [BM // 2, BT])
            acc = activate(gate, up, KIND, True, ALPHA, BETA, GATE_LIMIT, UP_LIMIT)
            n = slab0 * 8 + tl.arange(0, BM // 2)
        else:
            acc = activate(acc, acc, KIND, False, ALPHA, BETA, GATE_LIMIT, UP_LIMIT)
            n = slab0 * 16 + tl.arange(0, BM)
    else:
        n = slab0 * 16 + tl.arange(0, BM)
    tl.store(
        out_rows[None, :] + n[:, None],
        acc.to(out_rows.dtype.element_ty),
        mask=(n < N)[:, None] & out_ok[None, :],
    )


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
    tl.static_assert(SPLIT_K == 1 or (BT < _COLUMNS and KIND is None))
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
    GROUP: tl.constexpr = 4 // BT if BT < _COLUMNS else 1
    FIRST: tl.constexpr = (AHEAD if BT >= _COLUMNS else UNROLL * GROUP) if AHEAD > 0 else 0
    if BY_EXPERT:
        live = count
    else:
        # Weights are on their way before it is known whether another program has this expert.
        live = ((expert >= 0) & (expert < E)).to(tl.int32)
        expert = expert * live
    first = 0
    last = 0
    if BT < _COLUMNS:
        first, last = _part(part, STEPS, K, UNROLL * GROUP, SPLIT_K)
    DIRECT: tl.constexpr = BT < _COLUMNS or AHEAD > 0
    if DIRECT:
        code_ptrs, scale_ptrs = _weights(codes, scales, expert, slab0, SLABS, STEPS, BM, GROUP)
        code_ptrs += first * 128
        scale_ptrs += first * 8
        c, s = _load_steps(code_ptrs, scale_ptrs, live, FIRST, GROUP, STEPS)
    if count > 0:
        place = tl.cumsum(mine.to(tl.int32), 0) - 1
        if not X_BY_TOKEN:
            wait_for_previous(PDL)
        if not DIRECT:
            codes += expert.to(tl.int64) * (SLABS * STEPS * 128)
            scales += expert.to(tl.int64) * (SLABS * STEPS * 8)
        if bias is not None:
            bias += expert.to(tl.int64) * (SLABS * 16)
        for start in range(0, count, BT):
            slot = start + tl.arange(0, BT)
            pair = _pair_at(slot, place, mine, p)
            ok = slot < count
            source = pair
            if BT < _COLUMNS:
                source = _pair_at(start + _token_of_column(BT), place, mine, p)
            if X_BY_TOKEN:
                source = source // TOP_K
            x_rows = x + source.to(tl.int64) * X_STRIDE
            if BT < _COLUMNS:
                acc = _accumulate_blocks(
                    x_rows, code_ptrs, scale_ptrs, c, s, part, first, last, STEPS, K, SPLIT, QUADS, BITS, DTYPE,
                    BM, BT, UNROLL, WAIT, SPLIT_K, AHEAD,
                )  # fmt: skip
            elif AHEAD > 0:
                acc = _accumulate_direct(
                    x_rows, code_ptrs, scale_ptrs, c, s, STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, AHEAD, WAIT
                )
            else:
                acc, _ = _accumulate(
                    x_rows, None,
                    codes, scales, None, slab0, 0, SLABS, STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, UNROLL, WAIT, 1,
                )  # fmt: skip
            # The last of its sums, but for experts of very many rows.
            let_next_start(PDL, 1)
            _finish(
                acc, weights, pair, bias, out + (pair.to(tl.int64) * SPLIT_K + part) * N, ok, slab0, part,
                SLABS, N,
                KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT, BM, BT,
            )  # fmt: skip
            if DIRECT:
                again = (start + BT < count).to(tl.int32)
                c, s = _load_steps(code_ptrs, scale_ptrs, again, FIRST, GROUP, STEPS)


@triton.jit
def _pair_at(slot, place, mine, p):
    """The pair of each of an expert's slots, without a scatter: exactly one pair has the slot as its place."""
    hit = (place[:, None] == slot[None, :]) & mine[:, None]
    return tl.sum(tl.where(hit, p[:, None], 0), 0)


@triton.jit
def sorted_matmul(
    x,  # [T, K] if TOP_K else [rows, K], row stride X_STRIDE
    codes,
    scales,
    bias,
    offsets,  # int32 [E]: end row of each expert in the sorted order
    order,  # int32 [rows]: the pair at each sorted row, or None
    weights,  # [pairs] or None: scales the input
    out,  # [rows, SPLIT_K, N] contiguous
    x_scales,  # fp32 [T or rows], where x is e4m3 in the order of fp8.py, divided by these; or None
    bases,  # then uint8 [E, SLABS*16] (layout.py), or None
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
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
    GATHER_X: tl.constexpr,
    SCATTER_OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    QUADS: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    UNROLL: tl.constexpr,
    WAIT: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    MERGE: tl.constexpr,
    FINE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (token tile, row tile). Row r of the sorted order reads x[order[r] // TOP_K] or x[r].

    Expert e owns token-tile numbers from start_e // BT + e on: enough for its rows whatever the others
    hold, so that no table of tiles is needed; programs of unused numbers return at once. Within an
    expert, GROUP token tiles share a row tile's weights before the next row tile, to stay within L2.
    SPLIT_K programs, on the second grid axis, share a row's sum where the combination finishes it (BT >= 8 and no
    AHEAD). An expert's last tile is often nearly empty: up to TAIL rows take a narrow one, or with MERGE go with the
    tile before, whose weights are then decoded for both. With FINE it is as wide as its rows need, in quarters of BT.
    """
    TILES: tl.constexpr = (SLABS * 16 + BM - 1) // BM
    tl.static_assert(SPLIT_K == 1 or (BT >= _COLUMNS and AHEAD == 0 and KIND is None))
    tl.static_assert(SPLIT_K == 1 or TAIL == 0 or TAIL >= _COLUMNS)
    tl.static_assert((bases is None) or (SPLIT_K == 1 and AHEAD == 0 and BT >= _COLUMNS))
    tl.static_assert((bases is None) or TAIL == 0 or TAIL >= _COLUMNS)
    tl.static_assert(FINE == 0 or BT >= 4 * _COLUMNS)
    pid = tl.program_id(0)
    e = tl.arange(0, E_PADDED)
    if GATHER_X:
        wait_for_previous(PDL)
    let_next_start(PDL, 2)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    first_tiles = tl.where(e < E, starts // BT + e, 0x7FFFFFFF)
    expert = tl.sum((first_tiles <= pid // TILES).to(tl.int32), 0) - 1
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    rows = end - start
    token_tiles = tl.maximum((rows - MERGE * TAIL + BT - 1) // BT, tl.minimum(rows, 1))
    local = pid - (start // BT + expert) * TILES
    if local < token_tiles * TILES:
        group = local // (GROUP * TILES)
        size = tl.minimum(token_tiles - group * GROUP, GROUP)
        within = local - group * (GROUP * TILES)
        slab0 = within // size * (BM // 16)
        first = start + (group * GROUP + within % size) * BT
        if bias is not None:
            bias += expert.to(tl.int64) * (SLABS * 16)
        codes += expert.to(tl.int64) * (SLABS * STEPS * 128)
        scales += expert.to(tl.int64) * (SLABS * STEPS * 8)
        if bases is not None:
            bases += expert.to(tl.int64) * (SLABS * 16)
        left = end - first
        data = (x, codes, scales, bias, order, weights, out, x_scales, bases, first, end, slab0)
        if TAIL > 0 and left <= TAIL:
            _tile(
                *data, TOP_K, X_STRIDE, SLABS, STEPS, N, K, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT,
                GATHER_X, SCATTER_OUT, SPLIT, QUADS, BITS, DTYPE, BM, TAIL if TAIL > 0 else BT, 0,
                UNROLL, WAIT, SPLIT_K, AHEAD, PDL,
            )  # fmt: skip
        elif MERGE and (left > BT) & (left <= BT + TAIL):
            _tile(
                *data, TOP_K, X_STRIDE, SLABS, STEPS, N, K, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT,
                GATHER_X, SCATTER_OUT, SPLIT, QUADS, BITS, DTYPE, BM, BT, TAIL,
                UNROLL, WAIT, SPLIT_K, AHEAD, PDL,
            )  # fmt: skip
        elif FINE and left <= BT // 4:
            _tile(
                *data, TOP_K, X_STRIDE, SLABS, STEPS, N, K, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT,
                GATHER_X, SCATTER_OUT, SPLIT, QUADS, BITS, DTYPE, BM, BT // 4, 0,
                UNROLL, WAIT, SPLIT_K, AHEAD, PDL,
            )  # fmt: skip
        elif FINE and left <= BT // 2:
            _tile(
                *data, TOP_K, X_STRIDE, SLABS, STEPS, N, K, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT,
                GATHER_X, SCATTER_OUT, SPLIT, QUADS, BITS, DTYPE, BM, BT // 2, 0,
                UNROLL, WAIT, SPLIT_K, AHEAD, PDL,
            )  # fmt: skip
        elif FINE and left <= BT // 4 * 3:
            _tile(
                *data, TOP_K, X_STRIDE, SLABS, STEPS, N, K, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT,
                GATHER_X, SCATTER_OUT, SPLIT, QUADS, BITS, DTYPE, BM, BT // 2, BT // 4,
                UNROLL, WAIT, SPLIT_K, AHEAD, PDL,
            )  # fmt: skip
        else:
            _tile(
                *data, TOP_K, X_STRIDE, SLABS, STEPS, N, K, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT,
                GATHER_X, SCATTER_OUT, SPLIT, QUADS, BITS, DTYPE, BM, BT, 0,
                UNROLL, WAIT, SPLIT_K, AHEAD, PDL,
            )  # fmt: skip


@triton.jit
def _places(
    slot, end, x, order,
    TOP_K: tl.constexpr, X_STRIDE: tl.constexpr, ROW: tl.constexpr, GATHER_X: tl.constexpr, SCATTER_OUT: tl.constexpr,
):  # fmt: skip
    """Of rows of the sorted order: rows they read, where, row offsets to write to, which exist, and their pairs."""
    ok = slot < end
    slot = tl.minimum(slot, end - 1)
    pair = slot
    if order is not None:
        pair = tl.load(order + slot)
    if GATHER_X:
        source = pair // TOP_K
    else:
        source = slot
    if SCATTER_OUT:
        target = pair
    else:
        target = slot
    return source, x + source.to(tl.int64) * X_STRIDE, target.to(tl.int64) * ROW, ok, pair


@triton.jit
def _tile(
    x, codes, scales, bias, order, weights, out, x_scales, bases, first, end, slab0,
    TOP_K: tl.constexpr, X_STRIDE: tl.constexpr, SLABS: tl.constexpr, STEPS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, GATE_LIMIT: tl.constexpr, UP_LIMIT: tl.constexpr, GATHER_X: tl.constexpr,
    SCATTER_OUT: tl.constexpr, SPLIT: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, TAIL: tl.constexpr, UNROLL: tl.constexpr,
    WAIT: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows first .. min(first + BT + TAIL, end) of the sorted order, weight rows from ``slab0`` on."""
    part = 0
    if SPLIT_K > 1:
        part = tl.program_id(1)
        out += part * N
    slot = first + tl.arange(0, BT)
    source, x_rows, target, ok, pair = _places(slot, end, x, order, TOP_K, X_STRIDE, SPLIT_K * N, GATHER_X, SCATTER_OUT)
    # Weights are no other kernel's: the first of them may come while h is still written.
    FIRST: tl.constexpr = 0 if AHEAD == 0 or TAIL > 0 else AHEAD if BT >= _COLUMNS else UNROLL * (4 // BT)
    GROUP: tl.constexpr = 4 // BT if BT < _COLUMNS else 1
    code_ptrs, scale_ptrs = _weights(codes, scales, tl.zeros([], tl.int64), slab0, SLABS, STEPS, BM, GROUP)
    c, s = _load_steps(code_ptrs, scale_ptrs, 1, FIRST, GROUP, STEPS)
    if not GATHER_X:
        wait_for_previous(PDL)
    if BT < _COLUMNS:
        _, columns, _, _, _ = _places(
            first + _token_of_column(BT), end, x, order, TOP_K, X_STRIDE, SPLIT_K * N, GATHER_X, SCATTER_OUT
        )
        first_step, last_step = _part(0, STEPS, K, UNROLL * GROUP, 1)
        acc = _accumulate_blocks(
            columns,
            code_ptrs,
            scale_ptrs,
            c,
            s,
            0,
            first_step,
            last_step,
            STEPS,
            K,
            SPLIT,
            QUADS,
            BITS,
            DTYPE,
            BM,
            BT,
            UNROLL,
            WAIT,
            1,
            AHEAD,
        )
    elif TAIL > 0:
        tail_source, tail_rows, tail_target, tail_ok, tail_pair = _places(
            first + BT + tl.arange(0, TAIL), end, x, order, TOP_K, X_STRIDE, SPLIT_K * N, GATHER_X, SCATTER_OUT
        )
        acc, tail = _accumulate(
            x_rows, tail_rows, codes, scales, bases,
            slab0, part, SLABS, STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, UNROLL, WAIT, SPLIT_K,
        )  # fmt: skip
        if bases is not None:
            tail = _row_scales(tail, bases, x_scales, tail_source, slab0, SLABS, BM)
        _finish(
            tail, weights, tail_pair, bias, out + tail_target, tail_ok, slab0, part, SLABS, N,
            KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT, BM, TAIL,
        )  # fmt: skip
    elif AHEAD > 0:
        acc = _accumulate_direct(
            x_rows, code_ptrs, scale_ptrs, c, s, STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, AHEAD, WAIT
        )
    else:
        acc, _ = _accumulate(
            x_rows, None, codes, scales, bases,
            slab0, part, SLABS, STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, UNROLL, WAIT, SPLIT_K,
        )  # fmt: skip
    let_next_start(PDL, 1)
    if bases is not None:
        acc = _row_scales(acc, bases, x_scales, source, slab0, SLABS, BM)
    _finish(
        acc, weights, pair, bias, out + target, ok, slab0, part, SLABS, N,
        KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT, BM, BT,
    )  # fmt: skip
