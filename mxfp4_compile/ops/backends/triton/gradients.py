"""The kernels of a backward between its products: through the activation, and of routing weights on the input."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, gradient


@triton.jit
def activation_gradient(
    q,  # [rows, I]: the gradient of h but for the routing weight, sorted by expert
    y,  # [rows, SLABS*16]: the up-projection in the order of prepared rows
    order,  # int32 [rows]: the pair at each sorted row
    offsets,  # int32 [E]
    weights,  # [pairs], or None: on the input
    ids,  # [pairs]
    grad,  # [T, H] of row stride GRAD_STRIDE, read for the bias
    bias,  # [E, BIAS_ROWS] of the down-projection, or None
    dy,  # [rows, SLABS*16]: the gradient of y, with REORDERED in the order of ``transposed_matmul``'s FIRST
    dw,  # [pairs]: the gradient of the routing weights, written unless they are on the input
    again,  # [rows, I]: h, written unless it is None
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLABS: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    REORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row of the sorted order; N is I, BLOCK columns of h at a time, a multiple of 16."""
    row = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = SLABS * 16
    EACH: tl.constexpr = 2 * BLOCK if GATED else BLOCK
    if row < tl.load(offsets + E - 1):
        pair = tl.load(order + row)
        w = 1.0
        if weights is not None:
            w = tl.load(weights + pair).to(tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for at in range(0, N, BLOCK):
            i = at + tl.arange(0, BLOCK)
            n = at // BLOCK * EACH + tl.arange(0, EACH)
            dh = tl.load(q + row * N + i, mask=i < N, other=0.0).to(tl.float32)
            both = tl.load(y + row * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)
            if GATED:
                gate, up = tl.split(tl.permute(tl.reshape(both, [BLOCK // 8, 2, 8]), (0, 2, 1)))
                gate = tl.reshape(gate, [BLOCK])
                up = tl.reshape(up, [BLOCK])
            else:
                gate = both
                up = both
            h, dgate, dup = gradient(gate, up, dh * w, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT)
            h = h.to(y.dtype.element_ty)
            products += dh * h.to(tl.float32)
            if again is not None:
                tl.store(again + row * N + i, h, mask=i < N)
            if GATED:
                d = tl.reshape(tl.join(dgate, dup), [BLOCK // 8, 2, 2, 2, 2])
                d = tl.permute(d, (0, 1, 4, 3, 2) if REORDERED else (0, 4, 1, 2, 3))
            else:
                d = tl.reshape(dgate, [BLOCK // 16, 2, 2, 2, 2])
                d = tl.permute(d, (0, 2, 1, 4, 3) if REORDERED else (0, 1, 2, 3, 4))
            tl.store(dy + row * WIDTH + n, tl.reshape(d, [EACH]).to(dy.dtype.element_ty), mask=n < WIDTH)
        if weights is not None:
            total = tl.sum(products, 0)
            if bias is not None:
                expert = tl.load(ids + pair).to(tl.int64)
                grad += (pair // TOP_K).to(tl.int64) * GRAD_STRIDE
                products = tl.zeros([BLOCK], tl.float32)
                for at in range(0, HIDDEN, BLOCK):
                    n = at + tl.arange(0, BLOCK)
                    b = tl.load(bias + expert * BIAS_ROWS + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
                    products += b * tl.load(grad + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
                total += tl.sum(products, 0)
            tl.store(dw + pair, total.to(dw.dtype.element_ty))


@triton.jit
def activate_rows(
    y,  # [rows, SLABS*16]: the up-projection in the order of prepared rows
    offsets,  # int32 [E]
    h,  # [rows, I]
    E: tl.constexpr,
    SLABS: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (row of the sorted order, BLOCK columns of h); N is I."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK
    WIDTH: tl.constexpr = SLABS * 16
    EACH: tl.constexpr = 2 * BLOCK if GATED else BLOCK
    if row < tl.load(offsets + E - 1):
        i = at + tl.arange(0, BLOCK)
        n = at // BLOCK * EACH + tl.arange(0, EACH)
        both = tl.load(y + row * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(both, [BLOCK // 8, 2, 8]), (0, 2, 1)))
            gate = tl.reshape(gate, [BLOCK])
            up = tl.reshape(up, [BLOCK])
        else:
            gate = both
            up = both
        out = activate(gate, up, KIND, GATED, ALPHA, BETA, GATE_LIMIT, UP_LIMIT)
        tl.store(h + row * N + i, out.to(h.dtype.element_ty), mask=i < N)


@triton.jit
def weight_gradient(
    rows,  # [pairs, H]: the gradient of what the experts saw; those of pairs whose id is no expert hold anything
    x,  # [T, H], row stride X_STRIDE
    ids,  # [pairs]
    dw,  # [pairs]
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of routing weights on the input, dw = <rows, x>: one program per pair."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids + pair)
    if (expert >= 0) & (expert < E):
        products = tl.zeros([BLOCK], tl.float32)
        for at in range(0, HIDDEN, BLOCK):
            n = at + tl.arange(0, BLOCK)
            seen = tl.load(x + pair // TOP_K * X_STRIDE + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
            products += seen * tl.load(rows + pair * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
        tl.store(dw + pair, tl.sum(products, 0).to(dw.dtype.element_ty))
