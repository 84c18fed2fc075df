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

# Tensor-core operands are scaled by 2^-32, so that block scales from 2^-127 to 2^33 have a bf16 multiplier.
OPERAND_UNSCALE = tl.constexpr(4294967296.0)

# Vector kernels scale activations by 2^64 (a code alone is subnormal), undone in the block multiplier.
VECTOR_SCALE = tl.constexpr(18446744073709551616.0)

# One word in, its eight codes times a bf16 multiplier out, two at a time.
_UNTWIDDLE = tl.constexpr(
    """{
    .reg .b32 m, z, a, b, c, d, t;
    mov.b32 m, {$9, $9};
    mov.b32 z, 0x80008000;
    and.b32 a, $8, 0x81C081C0;
    shl.b32 t, $8, 3;
    and.b32 b, t, 0x81C081C0;
    shl.b32 t, $8, 6;
    and.b32 c, t, 0x81C081C0;
    shl.b32 t, $8, 1;
    and.b32 d, t, 0x80008000;
    shr.u32 t, $8, 3;
    and.b32 t, t, 0x01800180;
    or.b32 d, d, t;
    shr.u32 t, $8, 7;
    and.b32 t, t, 0x00400040;
    or.b32 d, d, t;
    fma.rn.bf16x2 a, a, m, z;
    fma.rn.bf16x2 b, b, m, z;
    fma.rn.bf16x2 c, c, m, z;
    fma.rn.bf16x2 d, d, m, z;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d;
}"""
)


@triton.jit
def _multiplier(scale, DTYPE: tl.constexpr):
    """Prepared scale byte (layout.py) -> 2^126 * block scale / OPERAND_UNSCALE: the byte is the exponent."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = (scale << 7).to(tl.int16)
    else:
        bits = scale << 23
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _nibble(code, DTYPE: tl.constexpr):
    """A code in the low four bits of an int32 -> its value times 2^-126."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = (((code & 8) << 12) | ((code & 7) << 6)).to(tl.int16)
    else:
        bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def decode_operand(
    words, scales, SLABS: tl.constexpr, QUADS: tl.constexpr, TWIDDLED: tl.constexpr, DTYPE: tl.constexpr
):
    """words int32 [SLABS, 128], scales int32 [SLABS, 8] -> DTYPE [SLABS*16, 64] / OPERAND_UNSCALE: a K step.

    A slab's 128 words are, for each of 32 lanes (row of eight, quarter of a fragment), the four it
    decodes: (row half, block), each eight codes. A coalesced load thus lands every code in the thread
    whose tensor-core fragment it belongs to, and the reshapes below move no data.
    """
    first = tl.join(scales & 0xFF, (scales >> 8) & 0xFF)
    second = tl.join((scales >> 16) & 0xFF, (scales >> 24) & 0xFF)
    s = tl.permute(tl.join(first, second), (0, 1, 3, 2))  # [SLABS, 8, row half, block]
    m = tl.reshape(_multiplier(s, DTYPE), [SLABS, 8, 1, 2, 2])
    m = tl.reshape(tl.broadcast_to(m, [SLABS, 8, 4, 2, 2]), [SLABS, 128])
    # digits: nibble, half, parity
    if TWIDDLED:
        w000, w001, w010, w011, w100, w101, w110, w111 = tl.inline_asm_elementwise(
            _UNTWIDDLE,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,h",
            [words, m],
            dtype=(
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
            ),
            is_pure=True,
            pack=1,
        )
    else:
        w000 = _nibble(words, DTYPE) * m
        w001 = _nibble(words >> 8, DTYPE) * m
        w010 = _nibble(words >> 16, DTYPE) * m
        w011 = _nibble(words >> 24, DTYPE) * m
        w100 = _nibble(words >> 4, DTYPE) * m
        w101 = _nibble(words >> 12, DTYPE) * m
        w110 = _nibble(words >> 20, DTYPE) * m
        w111 = _nibble(words >> 28, DTYPE) * m
    low = tl.join(tl.join(w000, w001), tl.join(w010, w011))
    high = tl.join(tl.join(w100, w101), tl.join(w110, w111))
    # slab, row, quarter, row half, block, parity, half, nibble -> rows (slab, row half, row),
    # K (block, nibble, half, quarter, parity), or with QUADS (block, nibble, quarter, half, parity)
    w = tl.reshape(tl.join(low, high), [SLABS, 8, 4, 2, 2, 2, 2, 2])
    if QUADS:
        w = tl.permute(w, (0, 3, 1, 4, 7, 2, 6, 5))
    else:
        w = tl.permute(w, (0, 3, 1, 4, 7, 6, 2, 5))
    return tl.reshape(w, [SLABS * 16, 64])


@triton.jit
def quads(x, BT: tl.constexpr):
    """[BT, 64] in K order -> the order of ``decode_operand`` with QUADS.

    wgmma reads K from shared memory as it lies. mma.sync takes both operands from registers, where
    Triton gives a thread four neighbours along K: then the activations' K is permuted to suit.
    """
    x = tl.permute(tl.reshape(x, [BT, 2, 2, 2, 4, 2]), (0, 1, 2, 4, 3, 5))
    return tl.reshape(x, [BT, 64])


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
    """Prepared scale byte (int32) -> 2^126 * block scale / VECTOR_SCALE as fp32; infinite for a NaN block."""
    exponent = tl.where(scale == 255, 255, tl.maximum(scale - 32, 0))
    return (exponent << 23).to(tl.float32, bitcast=True)
