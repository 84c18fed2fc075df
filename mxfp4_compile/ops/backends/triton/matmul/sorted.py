"""The kernel of rows sorted by expert, as routing.py leaves them; it may multiply e4m3 (fp8.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dependent import let_next_start, wait_for_previous
from .direct import token_of_column
from .finish import finish
from .pipelined import row_scales
from .step import COLUMNS
from .sums import first_weights, sums


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
    tl.static_assert(SPLIT_K == 1 or (BT >= COLUMNS and AHEAD == 0 and KIND is None))
    tl.static_assert(SPLIT_K == 1 or TAIL == 0 or TAIL >= COLUMNS)
    tl.static_assert((bases is None) or (SPLIT_K == 1 and AHEAD == 0 and BT >= COLUMNS))
    tl.static_assert((bases is None) or TAIL == 0 or TAIL >= COLUMNS)
    tl.static_assert(FINE == 0 or BT >= 4 * COLUMNS)
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
    code_ptrs, scale_ptrs, c, s, first_step, last_step = first_weights(
        codes, scales, tl.zeros([], tl.int64), slab0, 0, 1, SLABS, STEPS, K, BM, BT, TAIL, UNROLL, 1, AHEAD
    )
    if not GATHER_X:
        wait_for_previous(PDL)
    if BT < COLUMNS:
        _, x_rows, _, _, _ = _places(
            first + token_of_column(BT), end, x, order, TOP_K, X_STRIDE, SPLIT_K * N, GATHER_X, SCATTER_OUT
        )
    tail_rows = None
    if TAIL > 0:
        tail_source, tail_rows, tail_target, tail_ok, tail_pair = _places(
            first + BT + tl.arange(0, TAIL), end, x, order, TOP_K, X_STRIDE, SPLIT_K * N, GATHER_X, SCATTER_OUT
        )
    acc, tail = sums(
        x_rows, tail_rows, codes, scales, bases, code_ptrs, scale_ptrs, c, s, first_step, last_step,
        slab0, part, SLABS, STEPS, K, SPLIT, QUADS, BITS, DTYPE, BM, BT, UNROLL, WAIT, SPLIT_K, AHEAD,
    )  # fmt: skip
    if TAIL > 0:
        if bases is not None:
            tail = row_scales(tail, bases, x_scales, tail_source, slab0, SLABS, BM)
        finish(
            tail, weights, tail_pair, bias, out + tail_target, tail_ok, slab0, part, SLABS, N,
            KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT, BM, TAIL,
        )  # fmt: skip
    let_next_start(PDL, 1)
    if bases is not None:
        acc = row_scales(acc, bases, x_scales, source, slab0, SLABS, BM)
    finish(
        acc, weights, pair, bias, out + target, ok, slab0, part, SLABS, N,
        KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT, BM, BT,
    )  # fmt: skip
