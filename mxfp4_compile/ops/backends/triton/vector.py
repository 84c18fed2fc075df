"""Matrix-vector products for few tokens: plain fp32 multiply-adds, weights streamed once.

Two launches for a whole layer: no routing step, and the sum over a token's experts is inside the second
kernel in a fixed order. Lanes lie along K and registers along rows, so that a thread reuses the
activations it holds over all its rows, and the sum across lanes happens once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .decode import SCALE, code_bits, multiplier
from .dependent import let_next_start, wait_for_previous


@triton.jit
def _multiply(words, scales, x, ROWS: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr):
    """words int32 [ROWS, STEPS, 16], scales int32 [ROWS, STEPS], x [STEPS, 64] -> [ROWS, STEPS, 4, 2, 2].

    The last three: quarter, row half, block. Sums each word's eight products and applies its scale.
    """
    w = tl.reshape(words, [ROWS, STEPS, 4, 2, 2])
    # k = (block, nibble, half, quarter, parity) -> (quarter, block, nibble, half, parity)
    xs = tl.permute(tl.reshape(x * SCALE, [STEPS, 2, 2, 2, 4, 2]), (0, 4, 1, 2, 3, 5))
    even, odd = tl.split(xs)
    x00, x10 = tl.split(even)
    x01, x11 = tl.split(odd)
    x000, x100 = tl.split(x00)  # digits: nibble, half, parity
    x010, x110 = tl.split(x10)
    x001, x101 = tl.split(x01)
    x011, x111 = tl.split(x11)
    acc = code_bits(w, 0, BITS) * x000[None, :, :, None, :]
    acc += code_bits(w, 1, BITS) * x001[None, :, :, None, :]
    acc += code_bits(w, 2, BITS) * x010[None, :, :, None, :]
    acc += code_bits(w, 3, BITS) * x011[None, :, :, None, :]
    acc += code_bits(w, 4, BITS) * x100[None, :, :, None, :]
    acc += code_bits(w, 5, BITS) * x101[None, :, :, None, :]
    acc += code_bits(w, 6, BITS) * x110[None, :, :, None, :]
    acc += code_bits(w, 7, BITS) * x111[None, :, :, None, :]
    first = tl.join(scales & 0xFF, (scales >> 8) & 0xFF)
    second = tl.join((scales >> 16) & 0xFF, (scales >> 24) & 0xFF)
    s = tl.permute(tl.join(first, second), (0, 1, 3, 2))  # [ROWS, STEPS, row half, block]
    return acc * multiplier(s, tl.float32)[:, :, None, :, :]


@triton.jit
def _sum(total):
    """[ROWS, STEPS, 4, 2, 2] -> [ROWS, row half].

    One axis at a time: a reshape to sum all at once scatters the summed axis over bits of the lane
    number that are not neighbours, which Triton 3.6 reduces wrongly.
    """
    return tl.sum(tl.sum(tl.sum(total, 4), 1), 1)


@triton.jit
def vector_up(
    x,  # [T, K], row stride X_STRIDE
    codes,  # int32 [E, SLABS, STEPS, 128]
    scales,  # int32 [E, SLABS, STEPS, 8]
    bias,  # [E, SLABS*16] or None
    ids,  # [pairs]
    weights,  # [pairs] or None: scales the input
    out,  # [pairs, N] contiguous
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
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (ROWS of a slab's 8 row pairs, token-expert pair); BLOCK steps of K at a time."""
    PARTS: tl.constexpr = 8 // ROWS
    slab = tl.program_id(0) // PARTS
    r = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1)
    wait_for_previous(PDL)
    let_next_start(PDL, 2)
    expert = tl.load(ids + pair).to(tl.int64)
    if (expert >= 0) & (expert < E):
        base = (expert * SLABS + slab) * STEPS
        x += (pair // TOP_K).to(tl.int64) * X_STRIDE
        step = tl.arange(0, BLOCK)
        w = tl.arange(0, 16)
        k = step[:, None] * 64 + tl.arange(0, 64)[None, :]
        code_ptrs = codes + base * 128 + (r * 16)[:, None, None] + (step * 128)[None, :, None] + w[None, None, :]
        scale_ptrs = scales + base * 8 + r[:, None] + (step * 8)[None, :]
        total = tl.zeros([ROWS, BLOCK, 4, 2, 2], tl.float32)
        for at in range(0, STEPS, BLOCK):
            if STEPS % BLOCK == 0:
                words = tl.load(code_ptrs + at * 128)
                s = tl.load(scale_ptrs + at * 8)
            else:
                inside = at + step < STEPS
                words = tl.load(code_ptrs + at * 128, mask=inside[None, :, None], other=0)
                s = tl.load(scale_ptrs + at * 8, mask=inside[None, :], other=0)
            if K % (64 * BLOCK) == 0:
                xs = tl.load(x + at * 64 + k)
            else:
                xs = tl.load(x + at * 64 + k, mask=at * 64 + k < K, other=0.0)
            total += _multiply(words, s, xs.to(tl.float32), ROWS, BLOCK, BITS)
        let_next_start(PDL, 1)
        y = _sum(total)
        if weights is not None:
            y *= tl.load(weights + pair).to(tl.float32)
        row = slab * 16 + r[:, None] + (tl.arange(0, 2) * 8)[None, :]
        if bias is not None:
            y += tl.load(bias + expert * (SLABS * 16) + row).to(tl.float32)
        out += pair.to(tl.int64) * N
        if GATED:
            gate, up = tl.split(y)
            h = activate(gate, up, KIND, True, ALPHA, BETA, GATE_LIMIT, UP_LIMIT)
            n = slab * 8 + r
            tl.store(out + n, h.to(out.dtype.element_ty), mask=n < N)
        else:
            h = activate(y, y, KIND, False, ALPHA, BETA, GATE_LIMIT, UP_LIMIT)
            tl.store(out + row, h.to(out.dtype.element_ty), mask=row < N)


@triton.jit
def vector_down(
    h,  # [pairs, K] contiguous
    codes,  # int32 [E, SLABS, STEPS, 128]
    scales,  # int32 [E, SLABS, STEPS, 8]
    bias,  # [E, SLABS*16] or None
    ids,  # [T, TOP_K]
    weights,  # [T, TOP_K], or None: all ones
    out,  # [T, N] contiguous
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    SLABS: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (ROWS row pairs, token): the token's experts lie one after the other along K."""
    PARTS: tl.constexpr = 8 // ROWS
    TOTAL: tl.constexpr = TOP_K * STEPS
    slab = tl.program_id(0) // PARTS
    r = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    pair0 = tl.program_id(1) * TOP_K
    w = tl.arange(0, 16)
    total = tl.zeros([ROWS, BLOCK, 4, 2, 2], tl.float32)
    wait_for_previous(PDL)
    for at in range(0, TOTAL, BLOCK):
        flat_step = at + tl.arange(0, BLOCK)
        which = flat_step // STEPS
        step = flat_step % STEPS
        expert = tl.load(ids + pair0 + which, mask=flat_step < TOTAL, other=-1).to(tl.int64)
        ok = (expert >= 0) & (expert < E)
        base = (expert * SLABS + slab) * STEPS + step
        words = tl.load(
            codes + (base * 128)[None, :, None] + (r * 16)[:, None, None] + w[None, None, :],
            mask=ok[None, :, None],
            other=0,
        )
        s = tl.load(scales + (base * 8)[None, :] + r[:, None], mask=ok[None, :], other=0)
        k = step[:, None] * 64 + tl.arange(0, 64)[None, :]
        pair = (pair0 + which).to(tl.int64)
        if K % 64 == 0:
            xs = tl.load(h + (pair * K)[:, None] + k, mask=ok[:, None], other=0.0).to(tl.float32)
        else:
            xs = tl.load(h + (pair * K)[:, None] + k, mask=ok[:, None] & (k < K), other=0.0).to(tl.float32)
        if weights is not None:
            xs *= tl.load(weights + pair, mask=ok, other=0.0).to(tl.float32)[:, None]
        total += _multiply(words, s, xs, ROWS, BLOCK, BITS)
    y = _sum(total)
    row = slab * 16 + r[:, None] + (tl.arange(0, 2) * 8)[None, :]
    if bias is not None:
        which = tl.arange(0, TOP_K_PADDED)
        expert = tl.load(ids + pair0 + which, mask=which < TOP_K, other=-1).to(tl.int64)
        ok = (expert >= 0) & (expert < E)
        b = tl.load(
            bias + (expert * (SLABS * 16))[:, None, None] + row[None, :, :], mask=ok[:, None, None], other=0.0
        ).to(tl.float32)
        if weights is not None:
            b *= tl.load(weights + pair0 + which, mask=ok, other=0.0).to(tl.float32)[:, None, None]
        y += tl.sum(b, 0)
    tl.store(out + tl.program_id(1).to(tl.int64) * N + row, y.to(out.dtype.element_ty), mask=row < N)
