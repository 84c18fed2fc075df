"""E2M1 codes to floating point inside kernels.

A code's sign at the top and its three low bits at the bottom of the exponent and the top of the
mantissa is the value times 2^-126, zero and the subnormal 0.5 included: one multiplication by a power
of two finishes the conversion, exactly. The block scale is folded into that power.

``TWIDDLED`` weights (see layout.py) hold the bits of a 32-bit word where two masks and a shift bring
two codes at a time into place; otherwise a byte is two plain nibbles, for targets without PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tensor-core operands are scaled by 2^-32, so that every block scale up to 2^33 has a bf16 multiplier.
OPERAND_UNSCALE = tl.constexpr(4294967296.0)

# Vector kernels scale activations by 2^64 (a code alone is subnormal), undone in the block multiplier.
VECTOR_SCALE = tl.constexpr(18446744073709551616.0)

_UNTWIDDLE = tl.constexpr(
    """{
    .reg .b32 w, m, z, a, b, c, d, t;
    mov.b32 w, $4;
    mov.b32 m, $5;
    mov.b32 z, 0x80008000;
    and.b32 a, w, 0x81C081C0;
    shl.b32 t, w, 3;
    and.b32 b, t, 0x81C081C0;
    shl.b32 t, w, 6;
    and.b32 c, t, 0x81C081C0;
    shl.b32 t, w, 1;
    and.b32 d, t, 0x80008000;
    shr.u32 t, w, 3;
    and.b32 t, t, 0x01800180;
    or.b32 d, d, t;
    shr.u32 t, w, 7;
    and.b32 t, t, 0x00400040;
    or.b32 d, d, t;
    fma.rn.bf16x2 $0, a, m, z;
    fma.rn.bf16x2 $1, b, m, z;
    fma.rn.bf16x2 $2, c, m, z;
    fma.rn.bf16x2 $3, d, m, z;
}"""
)


@triton.jit
def _multiplier(scale, DTYPE: tl.constexpr):
    """Block scale byte (int32) -> 2^126 * 2^(scale - 127) / OPERAND_UNSCALE; NaN above 2^33 and for 255."""
    if DTYPE == tl.bfloat16:
        bits = tl.where(scale > 160, 0x7FC0, (scale + 94) << 7).to(tl.int16)
    else:
        bits = tl.where(scale > 160, 0x7FC00000, (scale + 94) << 23)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _nibble(code, DTYPE: tl.constexpr):
    """A code in the low four bits of an int32 -> its value times 2^-126."""
    if DTYPE == tl.bfloat16:
        bits = (((code & 8) << 12) | ((code & 7) << 6)).to(tl.int16)
    else:
        bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def decode_operand(
    codes, scales, ROWS: tl.constexpr, STEPS: tl.constexpr, TWIDDLED: tl.constexpr, DTYPE: tl.constexpr
):
    """codes uint8 [ROWS, STEPS*32], scales int16 [ROWS, STEPS] -> DTYPE [ROWS, STEPS*64] / OPERAND_UNSCALE.

    The bytes of one row of a step are (lane 4, block 2, half 2, parity 2), each with two codes 16 apart
    along K, so that the eight bytes of a lane are the fragments a tensor core wants from one thread: the
    reshapes below move no data.
    """
    s = scales.to(tl.int32)
    m = _multiplier(tl.join(s & 0xFF, (s >> 8) & 0xFF), DTYPE)
    m = tl.reshape(m, [ROWS, STEPS, 1, 2, 1])
    m = tl.reshape(tl.broadcast_to(m, [ROWS, STEPS, 4, 2, 4]), [ROWS, STEPS * 32])
    if TWIDDLED:
        low, high = tl.inline_asm_elementwise(
            _UNTWIDDLE, "=r,=r,=r,=r,r,r,r", [codes, m], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        c = codes.to(tl.int32)
        low = _nibble(c, DTYPE) * m
        high = _nibble(c >> 4, DTYPE) * m
    w = tl.reshape(tl.join(low, high), [ROWS, STEPS, 4, 2, 2, 2, 2])
    return tl.reshape(tl.permute(w, (0, 1, 3, 6, 4, 2, 5)), [ROWS, STEPS * 64])


@triton.jit
def code_bits(word, POSITION: tl.constexpr, TWIDDLED: tl.constexpr):
    """Code POSITION (pair*2 + parity) of each int32 word, as fp32: its value times 2^-126."""
    PAIR: tl.constexpr = POSITION // 2
    ODD: tl.constexpr = POSITION % 2
    if TWIDDLED:
        if PAIR < 3:
            bits = (word << ((1 - ODD) * 16 + PAIR * 3)) & -0x7E400000  # 0x81C00000
        elif ODD:
            bits = ((word << 1) & -0x80000000) | ((word >> 3) & 0x01800000) | ((word >> 7) & 0x00400000)
        else:
            bits = ((word << 17) & -0x80000000) | ((word << 13) & 0x01800000) | ((word << 9) & 0x00400000)
    else:
        # byte (half, parity), nibble = which 16 of the 32: pair = nibble*2 + half
        SHIFT: tl.constexpr = (PAIR % 2) * 16 + ODD * 8 + (PAIR // 2) * 4
        code = word >> SHIFT
        bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def block_multiplier(scale):
    """Block scale byte (int32) -> 2^126 * 2^(scale - 127) / VECTOR_SCALE as fp32; NaN above 2^33."""
    return tl.where(scale > 160, 0x7FC00000, (scale + 62) << 23).to(tl.float32, bitcast=True)
