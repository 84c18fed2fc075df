"""Prepared weights: the order in which the kernels read them, exactly invertible.

Rows come in slabs of 16, K in steps of 64 (both padded with zeros, inside prepared weights only). A slab
of a gated up-projection is 8 activated rows and the 8 other rows of the same columns, so that one thread
ends up with both. A (slab, step) is 512 contiguous bytes of codes and 32 of scales:

    codes  int32 [E, SLABS, STEPS, 128]   (row 8, quarter 4, row half 2, block 2), 4 bytes (half 2, parity 2)
    scales int32 [E, SLABS, STEPS, 8]     (row 8), its 4 bytes (row half 2, block 2), biased

where row = slab*16 + row half*8 + row and k = step*64 + block*32 + nibble*16 + half*8 + quarter*2 +
parity: the 16 bytes of a (row, quarter) are what one thread feeds to m16k16 tensor-core operations.

The layout "sm80" (NVIDIA, from Ampere on) further permutes the bits of each 32-bit word, eight codes,
so that two codes at a time can be masked into place as bf16; "nibbles" leaves them. "sm89_fp8" permutes them so that
four at a time can be looked up as e4m3, times a power of two, and has a third tensor:

    bases  uint8 [E, SLABS*16]                  the scale, prepared alike, at which a row's e4m3 are codes times 2^-5

It is the row's largest scale times 2^-11: e4m3 then holds every code of scales from the base up to the largest exactly.
Codes of smaller scales are taken at the base, an error below 2^-11 of the row's largest scale times the code; they are
exact in kernels that multiply bf16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ...arguments import Slot
from ...permutations import halves, of_halves, pad

# Their orders of bits, as the kernels know them (decode.py).
BIT_ORDERS = {"nibbles": 0, "sm80": 1, "sm89_fp8": 2}
LAYOUTS = tuple(BIT_ORDERS)
SLAB = 16
STEP = 64

# A prepared scale is the canonical byte plus this, the exponent of the multiplier that finishes a code's
# conversion to bf16 (decode.py); it exists for scales up to 2^33, and 255 stays NaN.
_SCALE_BIAS = 94
_MAX_SCALE = 160
_NAN_SCALE = 255

# Scales that e4m3 holds below a row's largest: 6 * 2^-5 * 2^11 is below its 448, 0.5 * 2^-5 is its smallest normal.
_FP8_OCTAVES = 11

# Of the 16 bits that hold the four codes (pairs) of one parity: where each code's sign and low bits lie.
_PLACES = {
    "sm80": ((15, (8, 7, 6)), (12, (5, 4, 3)), (9, (2, 1, 0)), (14, (11, 10, 13))),
    "sm89_fp8": ((7, (2, 1, 0)), (15, (6, 5, 4)), (3, (10, 9, 8)), (11, (14, 13, 12))),
}


def slabs(rows: int, gated: bool) -> int:
    """Slabs of a projection with ``rows`` rows (both halves counted, when gated)."""
    return -(-rows // SLAB) if not gated else -(-(rows // 2) // (SLAB // 2))


def steps(k: int) -> int:
    """K steps of a projection with ``k`` columns."""
    return -(-k // STEP)


def rows_to_slabs(x: Tensor, slot: Slot, value: int = 0) -> Tensor:
    """[e, N, ...] in the model's row order -> [e, SLABS, row half 2, row 8, ...]."""
    e, n, *rest = x.shape
    count = slabs(n, slot.gated)
    if slot.gated:
        return pad(halves(x, slot), 2, count * 8, value).unflatten(2, (count, 8)).transpose(1, 2)
    return pad(x, 1, count * SLAB, value).reshape(e, count, 2, 8, *rest)


def slabs_to_rows(x: Tensor, n: int, slot: Slot) -> Tensor:
    """Inverse of ``rows_to_slabs``."""
    if slot.gated:
        return of_halves(x.transpose(1, 2).flatten(2, 3)[:, :, : n // 2], slot)
    return x.flatten(1, 3)[:, :n]


def twiddle(words: Tensor, layout: str) -> Tensor:
    """int32 words of plain nibbles -> the same codes with their bits where ``layout`` wants them."""
    return _move_bits(words, [(plain, there) for plain, there in _bit_places(layout)])


def untwiddle(words: Tensor, layout: str) -> Tensor:
    """Inverse of ``twiddle``."""
    return _move_bits(words, [(there, plain) for plain, there in _bit_places(layout)])


def _bit_places(layout: str) -> list[tuple[int, int]]:
    """Of each bit of a word: where it lies among plain nibbles, and where in ``layout``."""
    if layout == "nibbles":
        return [(bit, bit) for bit in range(32)]
    return [
        ((pair % 2) * 16 + parity * 8 + (pair // 2) * 4 + bit, place + 16 * parity)
        for parity in range(2)
        for pair, (sign, low) in enumerate(_PLACES[layout])
        for bit, place in zip((3, 2, 1, 0), (sign, *low), strict=True)
    ]


def _move_bits(words: Tensor, moves: list[tuple[int, int]]) -> Tensor:
    wide = words.to(torch.int64)
    out = torch.zeros_like(wide)
    # Bits that move by the same distance move together.
    masks: dict[int, int] = {}
    for source, target in moves:
        masks[target - source] = masks.get(target - source, 0) | 1 << source
    for distance, mask in masks.items():
        out |= (wide & mask) << distance if distance >= 0 else (wide & mask) >> -distance
    return out.to(torch.int32)


def prepare(packed: Tensor, scales: Tensor, k: int, slot: Slot) -> list[Tensor]:
    """Canonical uint8 [e, N, ceil(K/2)] and [e, N, ceil(K/32)] -> the tensors of the module's text."""
    e, layout = packed.shape[0], slot.layout
    s = steps(k)
    # [e, slab, row half, row, step, block, nibble, half, quarter, byte]: a canonical byte is two neighbours.
    c = rows_to_slabs(pad(packed, 2, s * STEP // 2), slot)
    c = c.unflatten(-1, (s, 2, 2, 2, 4))
    low, high = c & 0xF, c >> 4  # parity 0 and 1
    codes = torch.stack([low, high], -1)  # [..., block, nibble, half, quarter, parity]
    codes = codes[:, :, :, :, :, :, 0] | (codes[:, :, :, :, :, :, 1] << 4)
    # [e, slab, row half, row, step, block, half, quarter, parity]
    codes = codes.permute(0, 1, 4, 3, 7, 2, 5, 6, 8).contiguous()
    codes = codes.view(e, -1, s, 512).view(torch.int32)
    if layout != "nibbles":
        codes = twiddle(codes, layout)
    _check_scales(scales, layout)
    t = torch.where(scales == _NAN_SCALE, scales, scales + _SCALE_BIAS)
    t = rows_to_slabs(pad(t, 2, s * 2), slot)
    t = t.unflatten(-1, (s, 2)).permute(0, 1, 4, 3, 2, 5).contiguous()
    tensors = [codes, t.view(e, -1, s, 32).view(torch.int32)]
    if layout == "sm89_fp8":
        tensors.append(_bases(packed, scales, slot))
    return tensors


def recover(tensors: Sequence[Tensor], n: int, k: int, slot: Slot) -> tuple[Tensor, Tensor]:
    """Inverse of ``prepare``, bit for bit."""
    codes, scales = (t.contiguous() for t in tensors[:2])
    e, slab_count, s = codes.shape[:3]
    if slot.layout != "nibbles":
        codes = untwiddle(codes, slot.layout)
    codes = codes.view(torch.uint8).view(e, slab_count, s, 8, 4, 2, 2, 2, 2)
    # -> [e, slab, row half, row, step, block, half, quarter, parity] -> nibble after block
    codes = codes.permute(0, 1, 5, 3, 2, 6, 7, 4, 8)
    codes = torch.stack([codes & 0xF, codes >> 4], 6)
    packed = codes[..., 0] | (codes[..., 1] << 4)
    packed = slabs_to_rows(packed.flatten(4), n, slot)[:, :, : (k + 1) // 2]
    t = scales.view(torch.uint8).view(e, slab_count, s, 8, 2, 2).permute(0, 1, 4, 3, 2, 5)
    t = slabs_to_rows(t.flatten(4), n, slot)[:, :, : -(-k // 32)]
    t = torch.where(t == _NAN_SCALE, t, t - _SCALE_BIAS)
    return packed.contiguous(), t.contiguous()


def _bases(packed: Tensor, scales: Tensor, slot: Slot) -> Tensor:
    """Canonical -> uint8 [e, SLABS*16]. The scale of a block of zeros says nothing."""
    values = pad(packed & 0x77, 2, scales.shape[2] * 16).unflatten(2, (-1, 16))
    largest = torch.where((values != 0).any(-1), scales, 0).amax(-1)
    bases = (largest + _SCALE_BIAS).clamp(min=_FP8_OCTAVES) - _FP8_OCTAVES
    return rows_to_slabs(bases, slot).flatten(1).contiguous()


def _check_scales(scales: Tensor, layout: str) -> None:
    if is_fake(scales) or not scales.numel():
        return
    if layout == "sm89_fp8" and bool((scales == _NAN_SCALE).any()):
        raise ValueError("backend triton: a block's scale is NaN, which fp8 weights cannot express")
    largest = int(torch.where(scales == _NAN_SCALE, 0, scales).max())
    if largest > _MAX_SCALE:
        raise ValueError(
            f"backend triton: a block has scale 2^{largest - 127}; its layout holds scales up to "
            f"2^{_MAX_SCALE - 127}, weights of about 5e10. Use backend='reference'."
        )


def prepare_bias(bias: Tensor, slot: Slot) -> Tensor:
    """[e, N] -> [e, SLABS*16] in the order of the prepared rows."""
    return rows_to_slabs(bias, slot).flatten(1).contiguous()


def recover_bias(bias: Tensor, n: int, slot: Slot) -> Tensor:
    """Inverse of ``prepare_bias``."""
    return slabs_to_rows(bias.view(bias.shape[0], -1, 2, 8), n, slot).contiguous()
