"""Grouped matrix products on tensor cores, weights decoded in registers as the first operand.

The output is computed transposed, [weight rows, tokens]: tensor cores of Hopper take only their first
operand from registers, and few tokens then fill a narrow tile rather than a mostly empty one. Two
kernels share the main loop: ``scan_matmul`` finds an expert's pairs by scanning the ids (one launch, no
routing step), ``sorted_matmul`` reads them from the routing of routing.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .decode import OPERAND_UNSCALE, decode_operand, quads


@triton.jit
def _product(
    acc, words, scales, x,
    SPLIT: tl.constexpr, QUADS: tl.constexpr, TWIDDLED: tl.constexpr, DTYPE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """acc + decoded weights [BM, 64] @ x [BT, 64]^T."""
    if WAIT:
        # wgmma reads its first operand from registers after it was issued, and Triton leaves some in
        # flight from one iteration to the next: they must be done before the registers are reused.
        words = words | tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;",
            "=r,r",
            [0],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    w = decode_operand(words, scales, words.shape[0], QUADS, TWIDDLED, DTYPE)
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
    codes,  # pointer to the expert's codes, int32 [SLABS, STEPS, 128]
    scales,  # pointer to the expert's scales, int32 [SLABS, STEPS, 8]
    slab0,
    SLABS,
    STEPS: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    QUADS: tl.constexpr,
    TWIDDLED: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    UNROLL: tl.constexpr,
    WAIT: tl.constexpr,
):
    """sum over k of weight[slab0*16 + r, k] * x[t, k] -> fp32 [BM, BT]."""
    k = tl.arange(0, 64)
    # Slabs past the end repeat the last: no mask in the loop, and the store drops them.
    slab = tl.minimum(slab0 + tl.arange(0, BM // 16), SLABS - 1).to(tl.int64) * STEPS
    code_ptrs = codes + (slab * 128)[:, None] + tl.arange(0, 128)[None, :]
    scale_ptrs = scales + (slab * 8)[:, None] + tl.arange(0, 8)[None, :]
    x_ptrs = x_rows[:, None] + k[None, :]
    acc = tl.zeros([BM, BT], tl.float32)
    # Two steps per iteration halve what the loop itself costs: barriers, waits, addresses.
    WIDE: tl.constexpr = STEPS // UNROLL * UNROLL if K % 64 == 0 else 0
    if UNROLL == 2:
        for _ in range(0, WIDE, 2):
            c0 = tl.load(code_ptrs)
            s0 = tl.load(scale_ptrs)
            x0 = tl.load(x_ptrs)
            c1 = tl.load(code_ptrs + 128)
            s1 = tl.load(scale_ptrs + 8)
            x1 = tl.load(x_ptrs + 64)
            acc = _product(acc, c0, s0, x0, SPLIT, QUADS, TWIDDLED, DTYPE, WAIT)
            acc = _product(acc, c1, s1, x1, SPLIT, QUADS, TWIDDLED, DTYPE, WAIT)
            code_ptrs += 256
            scale_ptrs += 16
            x_ptrs += 128
    FROM: tl.constexpr = WIDE if UNROLL == 2 else 0
    if FROM < STEPS:
        for step in range(FROM, STEPS):
            c = tl.load(code_ptrs)
            s = tl.load(scale_ptrs)
            if K % 64 == 0:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(step * 64 + k < K)[None, :], other=0.0)
            acc = _product(acc, c, s, x, SPLIT, QUADS, TWIDDLED, DTYPE, WAIT)
            code_ptrs += 128
            scale_ptrs += 8
            x_ptrs += 64
    return acc * OPERAND_UNSCALE


@triton.jit
def _finish(
    acc,
    column_scale,
    bias,  # pointer to the expert's bias, or None
    out_rows,  # [BT] pointers
    out_ok,
    slab0,
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
    if column_scale is not None:
        acc = acc * column_scale[None, :]
    if bias is not None:
        row = slab0 * 16 + tl.arange(0, BM)
        b = tl.load(bias + tl.minimum(row, SLABS * 16 - 1))
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
    out,  # [pairs, N] contiguous
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
    TWIDDLED: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    UNROLL: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One program per (expert, row tile); ``pairs`` <= PAIRS <= a few hundred.

    The first grid axis is the expert, or, where there are fewer pairs than experts, the pair: the first
    pair of an expert then serves all of them. Results go to the pair's own row.
    """
    which = tl.program_id(1)
    slab0 = tl.program_id(0) * (BM // 16)
    p = tl.arange(0, PAIRS)
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
    if count > 0:
        place = tl.cumsum(mine.to(tl.int32), 0) - 1
        codes += expert.to(tl.int64) * (SLABS * STEPS * 128)
        scales += expert.to(tl.int64) * (SLABS * STEPS * 8)
        if bias is not None:
            bias += expert.to(tl.int64) * (SLABS * 16)
        for start in range(0, count, BT):
            slot = start + tl.arange(0, BT)
            # The pair of each slot, without a scatter: exactly one pair has the slot as its place.
            hit = (place[:, None] == slot[None, :]) & mine[:, None]
            pair = tl.sum(tl.where(hit, p[:, None], 0), 0)
            ok = slot < count
            if X_BY_TOKEN:
                source = pair // TOP_K
            else:
                source = pair
            column_scale = None
            if weights is not None:
                column_scale = tl.load(weights + pair).to(tl.float32)
            acc = _accumulate(
                x + source.to(tl.int64) * X_STRIDE,
                codes, scales, slab0, SLABS, STEPS, K, SPLIT, QUADS, TWIDDLED, DTYPE, BM, BT, UNROLL, WAIT,
            )  # fmt: skip
            _finish(
                acc, column_scale, bias, out + pair.to(tl.int64) * N, ok, slab0, SLABS, N,
                KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT, BM, BT,
            )  # fmt: skip


@triton.jit
def sorted_matmul(
    x,  # [T, K] if TOP_K else [rows, K], row stride X_STRIDE
    codes,
    scales,
    bias,
    offsets,  # int32 [E]: end row of each expert in the sorted order
    order,  # int32 [rows]: the pair at each sorted row, or None
    weights,  # [pairs] or None: scales the input
    out,  # [rows, N] contiguous
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
    TWIDDLED: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    UNROLL: tl.constexpr,
    WAIT: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per (token tile, row tile). Row r of the sorted order reads x[order[r] // TOP_K] or x[r].

    Expert e owns token-tile numbers from start_e // BT + e on: enough for its rows whatever the others
    hold, so that no table of tiles is needed; programs of unused numbers return at once. Within an
    expert, GROUP token tiles share a row tile's weights before the next row tile, to stay within L2.
    """
    TILES: tl.constexpr = (SLABS * 16 + BM - 1) // BM
    pid = tl.program_id(0)
    e = tl.arange(0, E_PADDED)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    first_tiles = tl.where(e < E, starts // BT + e, 0x7FFFFFFF)
    expert = tl.sum((first_tiles <= pid // TILES).to(tl.int32), 0) - 1
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    token_tiles = (end - start + BT - 1) // BT
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
        # An expert's last tile is often nearly empty: then a narrow one does it in less time.
        if TAIL > 0 and end - first <= TAIL:
            _tile(
                x, codes, scales, bias, order, weights, out, first, end, slab0,
                TOP_K, X_STRIDE, SLABS, STEPS, N, K, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT,
                GATHER_X, SCATTER_OUT, SPLIT, QUADS, TWIDDLED, DTYPE, BM, TAIL if TAIL > 0 else BT,
                UNROLL, WAIT,
            )  # fmt: skip
        else:
            _tile(
                x, codes, scales, bias, order, weights, out, first, end, slab0,
                TOP_K, X_STRIDE, SLABS, STEPS, N, K, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT,
                GATHER_X, SCATTER_OUT, SPLIT, QUADS, TWIDDLED, DTYPE, BM, BT, UNROLL, WAIT,
            )  # fmt: skip


@triton.jit
def _tile(
    x, codes, scales, bias, order, weights, out, first, end, slab0,
    TOP_K: tl.constexpr, X_STRIDE: tl.constexpr, SLABS: tl.constexpr, STEPS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, GATE_LIMIT: tl.constexpr, UP_LIMIT: tl.constexpr, GATHER_X: tl.constexpr,
    SCATTER_OUT: tl.constexpr, SPLIT: tl.constexpr, QUADS: tl.constexpr, TWIDDLED: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, UNROLL: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Rows first .. min(first + BT, end) of the sorted order, weight rows from ``slab0`` on."""
    slot = first + tl.arange(0, BT)
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
    column_scale = None
    if weights is not None:
        column_scale = tl.load(weights + pair).to(tl.float32)
    acc = _accumulate(
        x + source.to(tl.int64) * X_STRIDE, codes, scales,
        slab0, SLABS, STEPS, K, SPLIT, QUADS, TWIDDLED, DTYPE, BM, BT, UNROLL, WAIT,
    )  # fmt: skip
    _finish(
        acc, column_scale, bias, out + target.to(tl.int64) * N, ok, slab0, SLABS, N,
        KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT, BM, BT,
    )  # fmt: skip
