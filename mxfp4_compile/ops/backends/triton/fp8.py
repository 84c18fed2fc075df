"""Activations quantized to e4m3, one scale a token, for the kernels that multiply weights as e4m3.

A row's K elements lie in the order in which a thread of a tensor core wants them: of every 16, the first eight and the
last eight in turns (0, 8, 1, 9, ...), as the codes of layout "sm89_fp8" are looked up (decode.py). Rows are padded
with zeros to whole steps of 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dependent import let_next_start, wait_for_previous

# The largest e4m3.
_LARGEST = tl.constexpr(448.0)


@triton.jit
def _e4m3(x, INTERPRETED: tl.constexpr):
    """fp32 -> the nearest e4m3."""
    if INTERPRETED:
        # The interpreter loses carries when it rounds: three bits of mantissa, to even, beforehand.
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFFF + ((bits >> 20) & 1)
        x = (bits & -0x100000).to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def quantize_rows(
    x,  # [rows, K], row stride X_STRIDE
    out,  # e4m3 [rows, PADDED] contiguous
    scales,  # fp32 [rows]
    X_STRIDE: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row: x = out * scale, the scale such that the row's largest becomes 448."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK // 2)
    k = i // 8 * 16 + i % 8
    wait_for_previous(PDL)
    let_next_start(PDL, 2)
    first = tl.load(x + row * X_STRIDE + k, mask=k < K, other=0.0).to(tl.float32)
    second = tl.load(x + row * X_STRIDE + k + 8, mask=k + 8 < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0)
    # The multiplier must be finite; a row of next to nothing becomes one of zeros.
    scale = tl.maximum(largest, 1e-30) / _LARGEST
    first = _e4m3(first / scale, INTERPRETED)
    second = _e4m3(second / scale, INTERPRETED)
    p = tl.arange(0, BLOCK)
    let_next_start(PDL, 1)
    tl.store(out + row * PADDED + p, tl.interleave(first, second), mask=p < PADDED)
    tl.store(scales + row, scale)
