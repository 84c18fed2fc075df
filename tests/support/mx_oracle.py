"""A second, slow implementation of MXFP4 to hold `mxfp4_compile.mx` against.

It shares no code and no method with it: floats are decoded from their bits into Python integers that count
2^-149, the smallest float32, scale exponents come from the definitions of the rules on those integers, and an
element's code is the nearest of the eight by exhaustive search. Nothing here rounds.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

UNIT = 149
E_MIN, E_MAX, E_MAX_FP16 = -127, 125, 13
TWICE_CODE = (0, 1, 2, 3, 4, 6, 8, 12)
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# format -> (mantissa bits, exponent bits, the exponent of a subnormal's last bit)
FORMATS = {"bf16": (7, 8, -133), "fp16": (10, 5, -24), "fp32": (23, 8, -149)}


def decode(bits: int, fmt: str) -> tuple[int, int | None]:
    """Sign (0 or 1) and magnitude in units of 2^-149, None for Inf and NaN."""
    mantissa_bits, exponent_bits, last = FORMATS[fmt]
    mantissa = bits & ((1 << mantissa_bits) - 1)
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = bits >> (mantissa_bits + exponent_bits)
    if exponent == (1 << exponent_bits) - 1:
        return sign, None
    magnitude = mantissa if exponent == 0 else (mantissa | 1 << mantissa_bits) << (exponent - 1)
    return sign, magnitude << (last + UNIT)


def nearest(magnitude: int, e: int) -> int:
    """The code 0..7 nearest to magnitude / 2^e, of two equally near the even one."""
    step = 1 << (e - 1 + UNIT)
    return min(range(8), key=lambda c: (abs(magnitude - TWICE_CODE[c] * step), c & 1))


def squared_error(magnitudes: list[int], e: int) -> int:
    step = 1 << (e - 1 + UNIT)
    return sum(min(abs(m - c * step) for c in TWICE_CODE) ** 2 for m in magnitudes if m)


# T * 2^e for every e there is, in units of 2^-149.
_SEVENS = [7 << (e + UNIT) for e in range(E_MIN, E_MAX + 1)]
_SIXES = [6 << (e + UNIT) for e in range(E_MIN, E_MAX + 1)]


def exponent(magnitudes: list[int], rule: str, fmt: str) -> int:
    """Scale exponent of a block."""
    top = E_MAX_FP16 if fmt == "fp16" else E_MAX

    def clamp(e: int) -> int:
        return max(E_MIN, min(e, top))

    amax = max(magnitudes)
    if amax == 0:
        return E_MIN
    floor = amax.bit_length() - 1 - UNIT - 2
    if rule == "floor":
        return clamp(floor)
    if rule == "even":
        return clamp(E_MIN + bisect_right(_SEVENS, amax))
    if rule == "round_up":
        return clamp(E_MIN + bisect_left(_SIXES, amax))
    assert rule == "mse"
    low, high = clamp(floor), clamp(floor + 1)
    return high if squared_error(magnitudes, high) < squared_error(magnitudes, low) else low


def quantize(bits: npt.NDArray[np.unsignedinteger], fmt: str, rule: str) -> tuple[Bytes, Bytes]:
    """Packed codes and scales of [rows, K] bit patterns."""
    rows, k = bits.shape
    packed = np.zeros((rows, (k + 1) // 2), np.uint8)
    scales = np.zeros((rows, (k + 31) // 32), np.uint8)
    for row in range(rows):
        for start in range(0, k, 32):
            block = [decode(b, fmt) for b in bits[row, start : start + 32].tolist()]
            magnitudes = [m for _, m in block if m is not None]
            if len(magnitudes) < len(block):
                scales[row, start // 32] = 255
                continue
            e = exponent(magnitudes, rule, fmt)
            scales[row, start // 32] = e + 127
            for i, (sign, magnitude) in enumerate(block, start):
                code = sign << 3 | (nearest(magnitude, e) if magnitude else 0)
                packed[row, i // 2] |= code << (4 * (i % 2))
    return packed, scales


def dequantize(packed: Bytes, scales: Bytes, k: int) -> npt.NDArray[np.float64]:
    """Exact values, [rows, k]."""
    out = np.empty((packed.shape[0], k))
    for row in range(packed.shape[0]):
        for i in range(k):
            code = int(packed[row, i // 2]) >> (4 * (i % 2)) & 15
            byte = int(scales[row, i // 32])
            value = math.nan if byte == 255 else math.ldexp(VALUES[code & 7], byte - 127)
            out[row, i] = -value if code & 8 else value
    return out
