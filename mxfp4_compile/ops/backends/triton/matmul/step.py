"""One step of K, 64 columns of weights, times tokens on tensor cores: codes are decoded to the first operand."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode import SCALE, decode_operand, fp8_operand, quads, raw_operand

# Columns of the narrowest tensor-core operation. Tiles of fewer tokens fill them with blocks of K.
COLUMNS = tl.constexpr(8)


@triton.jit
def after_wgmma(words):
    """``words``, once no wgmma runs any more.

    wgmma reads its first operand from registers after it was issued, and Triton leaves some in flight from one
    iteration to the next: they must be done before the registers are reused.
    """
    return words | tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def product(
    acc, tail_acc, words, scales, bases, x, tail_x,
    TAIL: tl.constexpr, SPLIT: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """acc + decoded weights [BM, 64] @ x [BT, 64]^T, and with TAIL the same of ``tail_x``.

    With ``bases`` (as for ``fp8_operand``, else None) weights and x are e4m3.
    """
    if WAIT:
        words = after_wgmma(words)
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
def raw_product(
    acc, words, x,
    SPLIT: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """acc + codes [BM, 64] @ x [8, 64]^T, times 2^-126 of the codes and SCALE of the activations."""
    if WAIT:
        words = after_wgmma(words)
    w = raw_operand(words, words.shape[0], QUADS, BITS, DTYPE)
    if QUADS:
        x = quads(x, COLUMNS)
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
