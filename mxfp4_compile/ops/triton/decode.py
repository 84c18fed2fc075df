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

# A prepared scale byte is the exponent of 2^126 * block scale / SCALE, which bf16 and fp32 hold for block scales
# from 2^-127 to 2^33 (layout.py). Where it multiplies the weights, SCALE multiplies the sums in the end; where it
# multiplies the sums of a block, SCALE multiplies the activations first.
SCALE = tl.constexpr(4294967296.0)

# One word in, its eight codes out, two to a register, times 2^-126: subnormal, or nearly so.
_MASKS = """
    and.b32 $0, $4, 0x81C081C0;
    shl.b32 t, $4, 3;
    and.b32 $1, t, 0x81C081C0;
    shl.b32 t, $4, 6;
    and.b32 $2, t, 0x81C081C0;
    shl.b32 t, $4, 1;
    and.b32 $3, t, 0x80008000;
    shr.u32 t, $4, 3;
    and.b32 t, t, 0x01800180;
    or.b32 $3, $3, t;
    shr.u32 t, $4, 7;
    and.b32 t, t, 0x00400040;
    or.b32 $3, $3, t;
"""
_UNTWIDDLE_RAW = tl.constexpr("{\n.reg .b32 t;" + _MASKS + "}")

# The same times a bf16 multiplier.
_UNTWIDDLE = tl.constexpr(
    "{\n.reg .b32 t, m, z;\nmov.b32 m, {$5, $5};\nmov.b32 z, 0x80008000;"
    + _MASKS
    + "".join(f"fma.rn.bf16x2 ${i}, ${i}, m, z;\n" for i in range(4))
    + "}"
)


@triton.jit
def multiplier(scale, DTYPE: tl.constexpr):
    """Prepared scale byte (int32) -> 2^126 * block scale / SCALE; infinite for a NaN block."""
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
    """words int32 [SLABS, 128], scales int32 [SLABS, 8, 1 or 4] -> DTYPE [SLABS*16, 64] / SCALE: a K step.

    A slab's 128 words are, for each of 32 lanes (row of eight, quarter of a fragment), the four it
    decodes: (row half, block), each eight codes. A coalesced load thus lands every code in the thread
    whose tensor-core fragment it belongs to, and the reshapes below move no data.
    """
    first = tl.join(scales & 0xFF, (scales >> 8) & 0xFF)
    second = tl.join((scales >> 16) & 0xFF, (scales >> 24) & 0xFF)
    # [SLABS, 8, 1 or 4, row half, block]
    m = multiplier(tl.permute(tl.join(first, second), (0, 1, 2, 4, 3)), DTYPE)
    m = tl.reshape(tl.broadcast_to(m, [SLABS, 8, 4, 2, 2]), [SLABS, 128])
    # digits: nibble, half, parity
    if TWIDDLED:
        a, b, c, d = tl.inline_asm_elementwise(
            _UNTWIDDLE,
            "=&r,=&r,=&r,=&r,r,h",
            [words, m],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        w000, w001 = _halves(a)
        w010, w011 = _halves(b)
        w100, w101 = _halves(c)
        w110, w111 = _halves(d)
    else:
        w000 = _nibble(words, DTYPE) * m
        w001 = _nibble(words >> 8, DTYPE) * m
        w010 = _nibble(words >> 16, DTYPE) * m
        w011 = _nibble(words >> 24, DTYPE) * m
        w100 = _nibble(words >> 4, DTYPE) * m
        w101 = _nibble(words >> 12, DTYPE) * m
        w110 = _nibble(words >> 20, DTYPE) * m
        w111 = _nibble(words >> 28, DTYPE) * m
    return _arrange(w000, w001, w010, w011, w100, w101, w110, w111, SLABS, QUADS)


@triton.jit
def raw_operand(words, SLABS: tl.constexpr, TWIDDLED: tl.constexpr, DTYPE: tl.constexpr):
    """``decode_operand`` with QUADS and without scales: values times 2^-126.

    Tensor cores multiply subnormal bf16 exactly, so that scales can wait for the sums over their blocks.
    """
    if TWIDDLED:
        a, b, c, d = tl.inline_asm_elementwise(
            _UNTWIDDLE_RAW,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        w000, w001 = _halves(a)
        w010, w011 = _halves(b)
        w100, w101 = _halves(c)
        w110, w111 = _halves(d)
    else:
        w000 = _nibble(words, DTYPE)
        w001 = _nibble(words >> 8, DTYPE)
        w010 = _nibble(words >> 16, DTYPE)
        w011 = _nibble(words >> 24, DTYPE)
        w100 = _nibble(words >> 4, DTYPE)
        w101 = _nibble(words >> 12, DTYPE)
        w110 = _nibble(words >> 20, DTYPE)
        w111 = _nibble(words >> 28, DTYPE)
    return _arrange(w000, w001, w010, w011, w100, w101, w110, w111, SLABS, True)


@triton.jit
def _halves(pair):
    """int32 of two bf16 -> (low, high). Registers of the assembly that hold one bf16 each would cost moves."""
    return (
        pair.to(tl.int16).to(tl.bfloat16, bitcast=True),
        (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True),
    )


@triton.jit
def _arrange(w000, w001, w010, w011, w100, w101, w110, w111, SLABS: tl.constexpr, QUADS: tl.constexpr):
    """Eight codes per word (digits: nibble, half, parity), [SLABS, 128] each -> [SLABS*16, 64]."""
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
