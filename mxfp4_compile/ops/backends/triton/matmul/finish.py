"""What becomes of sums: weight on input, bias, activation, and the store."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation import activate


@triton.jit
def finish(
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
