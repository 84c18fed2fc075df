"""The orders in which triton_kernels reads MXFP4 weights, as permutations of packed bytes.

Rows are gate and up in turns, N and K filled up to ``multiples``. Its tensors are [E, K, N]; stored here is
the contiguous transpose, which the adapter hands over as a view.

    strided    packed [e, N, K/2], scales [e, N, K/32]
    hopper-wW  packed [e, N/4, 2K] with the bits of each 32-bit word in the order its decoding masks expect,
               scales [e, N/32, K], for kernels of W warps
    hopper256-wW  the same with N filled up to 256, as generation 3.8 wants it
    blackwell  packed [e, N, K/2 filled up to 128 bytes], scales [e, N/128, K/128, 2, 256]
    cdna4      packed as strided, scales [e, N/32, K]
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...arguments import Slot
from ...permutations import RowOrder, arrange_rows, fold, pad, recover_rows, round_up, twiddle, unfold, untwiddle

ROWS = RowOrder("interleaved", 0)
LAYOUTS = ("strided", "hopper-w4", "hopper-w8", "hopper256-w4", "hopper256-w8", "blackwell", "cdna4")


def multiples(layout: str) -> tuple[int, int]:
    """(rows of a projection, columns) are filled up to multiples of these; rows count a gated pair once."""
    return (64, 256) if layout == "cdna4" else (64, 64)


def _warps(layout: str) -> int:
    return int(layout[-1])


def _value_rows(layout: str) -> int:
    return 256 if layout.startswith("hopper256") else 64


def _value_fold(n: int, k2: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and order of Hopper's values [n, k2 bytes]: per thread all bytes of four tensor-core tiles along K."""
    return (n // 16, 2, 4, 2, k2 // 32, 4, 2, 4), (0, 2, 4, 3, 7, 5, 6, 1)


def _scale_fold(n: int, groups: int, warps: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (n // (32 * warps), 2, warps, 2, 8, groups // 2, 2), (0, 2, 5, 1, 4, 6, 3)


def prepare(packed: Tensor, scales: Tensor, k: int, slot: Slot) -> list[Tensor]:
    """Canonical -> [values, scales] in the slot's layout."""
    rows, columns = multiples(slot.layout)
    k_padded = round_up(k, columns)
    packed = pad(arrange_rows(packed, slot, ROWS, rows), 2, k_padded // 2)
    scales = pad(arrange_rows(scales, slot, ROWS, rows), 2, k_padded // 32)
    return [swizzle_values(packed, slot.layout), swizzle_scales(scales, slot.layout)]


def recover(values: Tensor, scales: Tensor, n: int, k: int, slot: Slot) -> tuple[Tensor, Tensor]:
    """Inverse of ``prepare``."""
    rows, columns = multiples(slot.layout)
    n_padded = 2 * round_up(n // 2, rows) if slot.gated else round_up(n, rows)
    k_padded = round_up(k, columns)
    packed = unswizzle_values(values, n_padded, k_padded // 2, slot.layout)[:, :, : (k + 1) // 2]
    plain = unswizzle_scales(scales, n_padded, k_padded // 32, slot.layout)[:, :, : -(-k // 32)]
    return recover_rows(packed, n, slot, ROWS), recover_rows(plain, n, slot, ROWS)


def swizzle_values(packed: Tensor, layout: str) -> Tensor:
    """packed [e, N, K/2] -> stored values."""
    e, n, k2 = packed.shape
    if layout.startswith("hopper"):
        packed = pad(pad(packed, 1, round_up(n, _value_rows(layout))), 2, round_up(k2, 64))
        n, k2 = packed.shape[1:]
        return twiddle(fold(packed, *_value_fold(n, k2)).view(e, n // 4, 4 * k2))
    if layout == "blackwell":
        return pad(packed, 2, round_up(k2, 128)).contiguous()
    return packed.contiguous()


def unswizzle_values(values: Tensor, n: int, k2: int, layout: str) -> Tensor:
    """Inverse of ``swizzle_values``."""
    if layout.startswith("hopper"):
        rows, columns = round_up(n, _value_rows(layout)), round_up(k2, 64)
        plain = unfold(untwiddle(values), *_value_fold(rows, columns)).view(values.shape[0], rows, columns)
        return plain[:, :n, :k2]
    return values[:, :, :k2]


def swizzle_scales(scales: Tensor, layout: str) -> Tensor:
    """scales [e, N, K/32] -> stored scales."""
    e, n, groups = scales.shape
    if layout.startswith("hopper"):
        warps = _warps(layout)
        # Kernels read groups in fours.
        scales = pad(pad(scales, 1, round_up(n, 32 * warps)), 2, round_up(groups, 4))
        n, groups = scales.shape[1:]
        return fold(scales, *_scale_fold(n, groups, warps)).view(e, n // 32, groups * 32)
    if layout == "blackwell":
        scales = pad(pad(scales, 1, round_up(n, 128)), 2, round_up(groups, 8))
        n, groups = scales.shape[1:]
        stored = fold(scales, *_blackwell_fold(n, groups))
        return stored.view(e, n // 128, groups // 4, 2, 256)
    if layout == "cdna4":
        return fold(scales, *_cdna4_fold(n, groups)).view(e, n // 32, groups * 32)
    return scales.contiguous()


def unswizzle_scales(scales: Tensor, n: int, groups: int, layout: str) -> Tensor:
    """Inverse of ``swizzle_scales``."""
    e = scales.shape[0]
    if layout.startswith("hopper"):
        warps = _warps(layout)
        rows, columns = round_up(n, 32 * warps), round_up(groups, 4)
        plain = unfold(scales, *_scale_fold(rows, columns, warps)).view(e, rows, columns)
    elif layout == "blackwell":
        rows, columns = round_up(n, 128), round_up(groups, 8)
        plain = unfold(scales, *_blackwell_fold(rows, columns)).view(e, rows, columns)
    elif layout == "cdna4":
        plain = unfold(scales, *_cdna4_fold(n, groups)).view(e, n, groups)
    else:
        plain = scales
    return plain[:, :n, :groups]


def _blackwell_fold(n: int, groups: int) -> tuple[Sequence[int], Sequence[int]]:
    return (n // 128, 4, 32, groups // 4, 4), (0, 3, 2, 1, 4)


def _cdna4_fold(n: int, groups: int) -> tuple[Sequence[int], Sequence[int]]:
    return (n // 32, 2, 16, groups // 8, 2, 4), (0, 3, 5, 2, 4, 1)
