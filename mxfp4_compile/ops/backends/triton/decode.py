"""E2M1 codes to floating point inside kernels.

A code's sign at the top and its three low bits at the bottom of the exponent and the top of the
mantissa is the value times 2^-126, zero and the subnormal 0.5 included: one multiplication by a power
of two finishes the conversion, exactly. The block scale is folded into that power.

``BITS`` says where a 32-bit word holds the bits of its eight codes (layout.py, ``BIT_ORDERS``): as plain nibbles
(0, for targets without PTX), where two masks and a shift bring two codes at a time into place as bf16 (1), or where
a byte permutation looks four codes at a time up as e4m3 (2; as bf16 they take four instructions more).
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
# The same of BITS 2: by how much the low bits and the sign of each of the four pairs are shifted left.
_SHIFTS = ((6, 8), (2, 0), (-2, 12), (-6, 4))
_SHIFTED_MASKS = "".join(
    f"""
    {"shl" if low > 0 else "shr"}.b32 t, $4, {abs(low)};
    and.b32 ${i}, t, 0x01C001C0;
    shl.b32 t, $4, {sign};
    and.b32 t, t, 0x80008000;
    or.b32 ${i}, ${i}, t;
"""
    for i, (low, sign) in enumerate(_SHIFTS)
)


def _raw(masks: str) -> str:
    return "{\n.reg .b32 t;" + masks + "}"


def _scaled(masks: str) -> str:
    """The same times a bf16 multiplier."""
    products = "".join(f"fma.rn.bf16x2 ${i}, ${i}, m, z;\n" for i in range(4))
    return "{\n.reg .b32 t, m, z;\nmov.b32 m, {$5, $5};\nmov.b32 z, 0x80008000;" + masks + products + "}"


_UNTWIDDLE_RAW = tl.constexpr(_raw(_MASKS))
_UNTWIDDLE = tl.constexpr(_scaled(_MASKS))
_UNSELECT_RAW = tl.constexpr(_raw(_SHIFTED_MASKS))
_UNSELECT = tl.constexpr(_scaled(_SHIFTED_MASKS))

# e4m3 of the magnitudes 0 to 6 times 2^-5, and with every step of the second word's multiplier times two.
# A word of BITS 2 in, its eight codes out, four to a register.
_SELECT = tl.constexpr("""{
    .reg .b32 low, high, s, t;
    mad.lo.u32 low, $3, 0x08080800, 0x14100800;
    mad.lo.u32 high, $3, 0x08080808, 0x24201C18;
    and.b32 s, $2, 0x77777777;
    prmt.b32 s, s, s, 0x3120;
    shr.u32 t, s, 16;
    prmt.b32 s, low, high, s;
    prmt.b32 t, low, high, t;
    and.b32 low, $2, 0x80808080;
    or.b32 $0, low, s;
    shl.b32 high, $2, 4;
    and.b32 high, high, 0x80808080;
    or.b32 $1, high, t;
}""")


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
def _code(word, NIBBLE: tl.constexpr, HALF: tl.constexpr, PARITY: tl.constexpr, BITS: tl.constexpr):
    """A code of each word in the low four bits; those of BITS 1 are not put together again anywhere."""
    tl.static_assert(BITS != 1)
    if BITS == 0:
        code = word >> (HALF * 16 + PARITY * 8 + NIBBLE * 4)
    else:
        SIGN: tl.constexpr = PARITY * 16 + HALF * 8 + (3 if NIBBLE else 7)
        code = ((word >> (PARITY * 16 + NIBBLE * 8 + HALF * 4)) & 7) | (((word >> SIGN) & 1) << 3)
    return code


@triton.jit
def _nibbles(word, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The eight codes of each word, times 2^-126; their digits count nibble, half, parity."""
    return (
        _nibble(_code(word, 0, 0, 0, BITS), DTYPE),
        _nibble(_code(word, 0, 0, 1, BITS), DTYPE),
        _nibble(_code(word, 0, 1, 0, BITS), DTYPE),
        _nibble(_code(word, 0, 1, 1, BITS), DTYPE),
        _nibble(_code(word, 1, 0, 0, BITS), DTYPE),
        _nibble(_code(word, 1, 0, 1, BITS), DTYPE),
        _nibble(_code(word, 1, 1, 0, BITS), DTYPE),
        _nibble(_code(word, 1, 1, 1, BITS), DTYPE),
    )


@triton.jit
def scaled_codes(words, m, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The eight codes of each word times its multiplier ``m``; their digits count nibble, half, parity."""
    if BITS > 0 and DTYPE == tl.bfloat16:  # noqa: SIM300
        ASSEMBLY: tl.constexpr = _UNTWIDDLE if BITS == 1 else _UNSELECT
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY,
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
        w000, w001, w010, w011, w100, w101, w110, w111 = _nibbles(words, BITS, DTYPE)
        w000 *= m
        w001 *= m
        w010 *= m
        w011 *= m
        w100 *= m
        w101 *= m
        w110 *= m
        w111 *= m
    return w000, w001, w010, w011, w100, w101, w110, w111


@triton.jit
def decode_operand(words, scales, SLABS: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """words int32 [SLABS, 128], scales int32 [SLABS, 8, 1 or 4] -> DTYPE [SLABS*16, 64] / SCALE: a K step.

    A slab's 128 words are, for each of 32 lanes (row of eight, quarter of a fragment), the four it
    decodes: (row half, block), each eight codes. A coalesced load thus lands every code in the thread
    whose tensor-core fragment it belongs to, and the reshapes below move no data.
    """
    m = multiplier(_block_exponents(scales), DTYPE)
    m = tl.reshape(tl.broadcast_to(m, [SLABS, 8, 4, 2, 2]), [SLABS, 128])
    w000, w001, w010, w011, w100, w101, w110, w111 = scaled_codes(words, m, BITS, DTYPE)
    return _arrange(w000, w001, w010, w011, w100, w101, w110, w111, SLABS, QUADS)


@triton.jit
def _block_exponents(scales):
    """Scale words int32 [SLABS, 8, 1 or 4] -> their bytes [SLABS, 8, 1 or 4, row half, block]."""
    first = tl.join(scales & 0xFF, (scales >> 8) & 0xFF)
    second = tl.join((scales >> 16) & 0xFF, (scales >> 24) & 0xFF)
    return tl.permute(tl.join(first, second), (0, 1, 2, 4, 3))


@triton.jit
def fp8_operand(words, scales, bases, SLABS: tl.constexpr, DTYPE: tl.constexpr):
    """Words of BITS 2 -> e4m3 [SLABS*16, 64], a K step in the order of fp8.py.

    Values are times 2^-5 and the ratio of their block's scale to that of the row's base; ``bases`` are the prepared
    scale bytes of these, int32 [SLABS, 8, 1, row half]. Blocks of smaller scales take the base's (layout.py). With
    DTYPE fp32 the same values as fp32.
    """
    shift = tl.maximum(_block_exponents(scales) - bases[:, :, :, :, None], 0)
    shift = tl.reshape(tl.broadcast_to(shift, [SLABS, 8, 4, 2, 2]), [SLABS, 128])
    if DTYPE == tl.float32:  # noqa: SIM300
        w000, w001, w010, w011, w100, w101, w110, w111 = _nibbles(words, 2, DTYPE)
        # 2^126 times that is more than fp32 holds: the rest at the end.
        m = ((shift + (127 + 126 - 31 - 5)) << 23).to(tl.float32, bitcast=True)
        w = _digits(w000 * m, w001 * m, w010 * m, w011 * m, w100 * m, w101 * m, w110 * m, w111 * m, SLABS)
        w *= 2147483648.0
    else:
        a, b = tl.inline_asm_elementwise(
            _SELECT, "=&r,=&r,r,r", [words, shift], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        w = tl.reshape(tl.join(_bytes(a), _bytes(b)), [SLABS, 8, 4, 2, 2, 2, 2, 2]).to(tl.float8e4nv, bitcast=True)
    # To rows (slab, row half, row), K (block, nibble, quarter, parity, half).
    return tl.reshape(tl.permute(w, (0, 3, 1, 4, 7, 2, 5, 6)), [SLABS * 16, 64])


@triton.jit
def _bytes(word):
    """int32 -> its four bytes, int8 [..., 2, 2]: the last digit counts neighbours."""
    low = tl.join(word.to(tl.int8), (word >> 16).to(tl.int8))
    high = tl.join((word >> 8).to(tl.int8), (word >> 24).to(tl.int8))
    return tl.join(low, high)


@triton.jit
def raw_operand(words, SLABS: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """``decode_operand`` without scales: values times 2^-126.

    Tensor cores multiply subnormal bf16 exactly, so that scales can wait for the sums over their blocks.
    """
    if BITS > 0 and DTYPE == tl.bfloat16:  # noqa: SIM300
        ASSEMBLY: tl.constexpr = _UNTWIDDLE_RAW if BITS == 1 else _UNSELECT_RAW
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY,
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
        w000, w001, w010, w011, w100, w101, w110, w111 = _nibbles(words, BITS, DTYPE)
    return _arrange(w000, w001, w010, w011, w100, w101, w110, w111, SLABS, QUADS)


@triton.jit
def _halves(pair):
    """int32 of two bf16 -> (low, high). Registers of the assembly that hold one bf16 each would cost moves."""
    return (
        pair.to(tl.int16).to(tl.bfloat16, bitcast=True),
        (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True),
    )


@triton.jit
def _digits(w000, w001, w010, w011, w100, w101, w110, w111, SLABS: tl.constexpr):
    """Eight codes per word (digits: nibble, half, parity), [SLABS, 128] each -> [SLABS, 8, 4, 2, 2, 2, 2, 2].

    Slab, row, quarter, row half, block, parity, half, nibble.
    """
    low = tl.join(tl.join(w000, w001), tl.join(w010, w011))
    high = tl.join(tl.join(w100, w101), tl.join(w110, w111))
    return tl.reshape(tl.join(low, high), [SLABS, 8, 4, 2, 2, 2, 2, 2])


@triton.jit
def _arrange(w000, w001, w010, w011, w100, w101, w110, w111, SLABS: tl.constexpr, QUADS: tl.constexpr):
    """As for ``_digits`` -> [SLABS*16, 64]."""
    w = _digits(w000, w001, w010, w011, w100, w101, w110, w111, SLABS)
    # To rows (slab, row half, row), K (block, nibble, half, quarter, parity), or with QUADS (block, nibble, quarter,
    # half, parity).
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
def code_bits(word, POSITION: tl.constexpr, BITS: tl.constexpr):
    """Code POSITION (pair*2 + parity) of each int32 word, as fp32: its value times 2^-126."""
    PAIR: tl.constexpr = POSITION // 2
    ODD: tl.constexpr = POSITION % 2
    if BITS == 1:
        if PAIR < 3:
            bits = (word << ((1 - ODD) * 16 + PAIR * 3)) & -0x7E400000  # 0x81C00000
        elif ODD:
            bits = ((word << 1) & -0x80000000) | ((word >> 3) & 0x01800000) | ((word >> 7) & 0x00400000)
        else:
            bits = ((word << 17) & -0x80000000) | ((word << 13) & 0x01800000) | ((word << 9) & 0x00400000)
    elif BITS == 2:
        LEFT: tl.constexpr = 22 - ODD * 16 - PAIR * 4
        low = word << LEFT if LEFT >= 0 else word >> -LEFT
        SIGN: tl.constexpr = ODD * 16 + (PAIR % 2) * 8 + (7 if PAIR < 2 else 3)
        bits = (low & 0x01C00000) | ((word << (31 - SIGN)) & -0x80000000)
    else:
        code = _code(word, PAIR // 2, PAIR % 2, ODD, BITS)
        bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True)
