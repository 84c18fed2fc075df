"""The kernel of gradients: rows of a gradient times the decoded weights as they are, reduced over the weights' rows.

The same prepared tiles as in the forward's kernels, read across: a product reduces over BN rows of weights at a time,
for BM columns of K. The decoded weights are its second operand, by way of shared memory; or with FIRST the first one,
from registers, and the output is computed transposed, as in the forward. The gradient's columns then come in another
order, in which the words of a slab lie in a warp's lanes as they lie in memory: of the bits of a column within its 16,
(half, 2, 1, 0) become (2, half, 0, 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode import SCALE, decode_operand, multiplier, scaled_codes
from .step import after_wgmma


@triton.jit
def transposed_matmul(
    g,  # [T, N] if GATHER else [rows, N], row stride G_STRIDE; with FIRST its columns in that order
    codes,
    scales,
    offsets,  # int32 [E]: end row of each expert in the sorted order
    order,  # int32 [rows]: the pair at each sorted row, or None
    out,  # [rows, K] contiguous
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    G_STRIDE: tl.constexpr,
    SLABS: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    WAIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[r] = g[r] @ weight[expert of r]: one program per (tile of BT rows, tile of BM columns of K).

    Row r of the sorted order reads g[order[r] // TOP_K] or g[r] and writes row order[r] or r. Programs find their
    expert as in ``sorted_matmul``; GROUP tiles of rows share a tile of weights before the next.
    """
    TILES: tl.constexpr = (STEPS * 64 + BM - 1) // BM
    pid = tl.program_id(0)
    e = tl.arange(0, E_PADDED)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    first_tiles = tl.where(e < E, starts // BT + e, 0x7FFFFFFF)
    expert = tl.sum((first_tiles <= pid // TILES).to(tl.int32), 0) - 1
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    row_tiles = (end - start + BT - 1) // BT
    local = pid - (start // BT + expert) * TILES
    if local < row_tiles * TILES:
        group = local // (GROUP * TILES)
        size = tl.minimum(row_tiles - group * GROUP, GROUP)
        within = local - group * (GROUP * TILES)
        step0 = within // size * (BM // 64)
        slot = start + (group * GROUP + within % size) * BT + tl.arange(0, BT)
        ok = slot < end
        slot = tl.minimum(slot, end - 1)
        source = slot
        if GATHER:
            source = tl.load(order + slot) // TOP_K
        codes += expert.to(tl.int64) * (SLABS * STEPS * 128)
        scales += expert.to(tl.int64) * (SLABS * STEPS * 8)
        acc = _sums(
            g + source.to(tl.int64) * G_STRIDE, codes, scales, step0,
            SLABS, STEPS, N, SPLIT, BITS, DTYPE, FIRST, BM, BT, BN, WAIT,
        )  # fmt: skip
        target = slot
        if SCATTER:
            # Not before the sums: they need the registers.
            target = tl.load(order + slot)
        out_rows = out + target.to(tl.int64) * K
        acc = (acc * SCALE).to(out.dtype.element_ty)
        if FIRST:
            # From nibble, half, step, parity, quarter, block to the order of K.
            acc = tl.reshape(acc, [2, 2, BM // 64, 2, 4, 2, BT])
            acc = tl.reshape(tl.permute(acc, (6, 2, 5, 0, 1, 4, 3)), [BT, BM])
        k = step0 * 64 + tl.arange(0, BM)
        tl.store(out_rows[:, None] + k[None, :], acc, mask=ok[:, None] & (k < K)[None, :])


@triton.jit
def _sums(
    g_rows, codes, scales, step0,
    SLABS: tl.constexpr, STEPS: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Sums over all rows of weights / SCALE: fp32 [BT, BM]; with FIRST [BM, BT], in ``_first_operand``'s order."""
    SN: tl.constexpr = BN // 16
    SK: tl.constexpr = BM // 64
    n = tl.arange(0, BN)
    if FIRST:
        # What is loaded of each step of each slab: [32] words of two rows, four times.
        i = tl.arange(0, SN * 4 * SK)
        slab = i // (4 * SK)
        pair = i // SK % 4
        lane = tl.arange(0, 32)
        word = ((lane & 1) << 4) | ((lane >> 3) << 2) | (lane & 2) | ((lane >> 2) & 1)
        words = (pair * 32)[:, None] + word[None, :]
        rows = (pair * 2)[:, None] + tl.arange(0, 2)[None, :]
    else:
        i = tl.arange(0, SN * SK)
        slab = i // SK
        words = tl.arange(0, 128)[None, :]
        rows = tl.arange(0, 8)[None, :]
    # Steps past the end repeat the last: the store drops them.
    at = slab * STEPS + tl.minimum(step0 + i % SK, STEPS - 1)
    code_ptrs = codes + (at * 128)[:, None] + words
    scale_ptrs = scales + (at * 8)[:, None] + rows
    g_ptrs = g_rows[:, None] + n[None, :]
    if FIRST:
        acc = tl.zeros([BM, BT], tl.float32)
    else:
        acc = tl.zeros([BT, BM], tl.float32)
    WHOLE: tl.constexpr = N % BN == 0 and SLABS % SN == 0
    for slab0 in range(0, SLABS, SN):
        if WHOLE:
            x = tl.load(g_ptrs)
            c = tl.load(code_ptrs)
            s = tl.load(scale_ptrs)
        else:
            x = tl.load(g_ptrs, mask=(slab0 * 16 + n < N)[None, :], other=0.0)
            # What no row of weights meets is multiplied by zeros of the gradient: any finite codes will do.
            inside = slab0 + slab < SLABS
            c = tl.load(code_ptrs, mask=inside[:, None], other=0)
            s = tl.load(scale_ptrs, mask=inside[:, None], other=0)
        if WAIT:
            c = after_wgmma(c)
        if not FIRST:
            w = decode_operand(c, s[:, :, None], SN * SK, False, BITS, DTYPE)
            w = tl.reshape(tl.permute(tl.reshape(w, [SN, SK, 16, 64]), (0, 2, 1, 3)), [BN, BM])
        else:
            w = _first_operand(c, s, SN, SK, BITS, DTYPE)
        acc = _dot(acc, w, x, SPLIT, DTYPE, FIRST)
        g_ptrs += BN
        code_ptrs += SN * STEPS * 128
        scale_ptrs += SN * STEPS * 8
    return acc


@triton.jit
def _first_operand(words, scales, SN: tl.constexpr, SK: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Words [SN*4*SK, 32] and scales [SN*4*SK, 2] -> weights / SCALE [SK*64, SN*16].

    A fragment of tensor cores whose rows are K wants three bits of K and two of the weights' rows in a warp's lanes:
    quarter and block, row half and row 0, a word's lanes from the highest on. K comes in the order nibble, half, step,
    parity, quarter, block: what a word holds then lies in one thread's registers, and what a step holds in one warp.
    """
    R: tl.constexpr = SN * 4 * SK
    shift = (tl.arange(0, 2) * 8)[:, None, None] + (tl.arange(0, 2) * 16)[None, :, None]
    m = multiplier((scales[:, None, None, None, :] >> shift[None, None, :, :, :]) & 0xFF, DTYPE)
    m = tl.reshape(tl.broadcast_to(m, [R, 4, 2, 2, 2]), [R, 32])
    w000, w001, w010, w011, w100, w101, w110, w111 = scaled_codes(words, m, BITS, DTYPE)
    low = tl.join(tl.join(w000, w001), tl.join(w010, w011))
    high = tl.join(tl.join(w100, w101), tl.join(w110, w111))
    # Slab, row 2, row 1, step, quarter, block, row half, row 0, parity, half, nibble.
    w = tl.reshape(tl.join(low, high), [SN, 2, 2, SK, 4, 2, 2, 2, 2, 2, 2])
    return tl.reshape(tl.permute(w, (10, 9, 3, 8, 4, 5, 0, 1, 6, 7, 2)), [SK * 64, SN * 16])


@triton.jit
def _dot(acc, w, x, SPLIT: tl.constexpr, DTYPE: tl.constexpr, FIRST: tl.constexpr):
    """acc + x [BT, BN] @ w [BN, BM], or with FIRST acc + w [BM, BN] @ x^T."""
    if SPLIT:
        # fp16 and fp32 gradients as the sum of two bf16: about 16 bits of mantissa.
        high = x.to(tl.bfloat16)
        low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        if FIRST:
            acc = tl.dot(w, tl.trans(low), acc)
            acc = tl.dot(w, tl.trans(high), acc)
        else:
            acc = tl.dot(low, w, acc)
            acc = tl.dot(high, w, acc)
    elif DTYPE == tl.float32:  # noqa: SIM300
        if FIRST:
            acc = tl.dot(w, tl.trans(x.to(tl.float32)), acc, input_precision="ieee")
        else:
            acc = tl.dot(x.to(tl.float32), w, acc, input_precision="ieee")
    elif FIRST:
        acc = tl.dot(w, tl.trans(x), acc)
    else:
        acc = tl.dot(x, w, acc)
    return acc
