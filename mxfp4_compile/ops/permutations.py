"""Index permutations that prepared layouts are made of, each with its inverse.

Every library stores the same codes and scales in another order. Written as reshape, permute, reshape they
are exact, run on any device, and the way back is the same permutation the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import GateLayout, MoEParams
from .arguments import Slot


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is >= ``n``."""
    return -(-n // multiple) * multiple


def pad(x: Tensor, dim: int, size: int, value: int = 0) -> Tensor:
    """``x`` with dimension ``dim`` filled up to ``size`` entries."""
    missing = size - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, value)], dim)


def fold(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """[e, ...] -> contiguous [e, *sizes permuted by order]; the dimensions after the first are read as ``sizes``."""
    return x.reshape(x.shape[0], *sizes).permute(0, *[1 + o for o in order]).contiguous()


def unfold(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Inverse of ``fold``: [e, *sizes]."""
    inverse = [0] * len(order)
    for position, source in enumerate(order):
        inverse[source] = position
    return x.reshape(x.shape[0], *[sizes[o] for o in order]).permute(0, *[1 + i for i in inverse]).contiguous()


def codes(packed: Tensor) -> Tensor:
    """[..., K/2] bytes -> [..., K] codes, one a byte, low nibble first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def bytes_of(code: Tensor) -> Tensor:
    """Inverse of ``codes``."""
    pairs: Tensor = code.unflatten(-1, (code.shape[-1] // 2, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


@dataclass(frozen=True)
class RowOrder:
    """The rows of a gated up-projection as a kernel reads them: halves or pairs, and which of the two is activated."""

    gate: GateLayout
    activated: int


def arrange_rows(x: Tensor, slot: Slot, order: RowOrder, multiple: int, value: int = 0) -> Tensor:
    """[e, N, ...] in the model's row order -> the rows as a kernel reads them, padded with ``value``.

    Either half of a gated up-projection is filled up to ``multiple`` rows. Other projections are filled up to
    ``multiple`` rows in their order.
    """
    if not slot.gated:
        return pad(x, 1, round_up(x.shape[1], multiple), value)
    both = halves(x, slot)
    if order.activated == 1:
        both = both.flip(1)
    both = pad(both, 2, round_up(both.shape[2], multiple), value)
    return _of_gate(both, order.gate)


def recover_rows(x: Tensor, n: int, slot: Slot, order: RowOrder) -> Tensor:
    """Inverse of ``arrange_rows``; ``n`` is the model's number of rows."""
    if not slot.gated:
        return x[:, :n].contiguous()
    both = _to_halves(x, order.gate)
    if order.activated == 1:
        both = both.flip(1)
    return of_halves(both[:, :, : n // 2], slot)


def halves(x: Tensor, slot: Slot) -> Tensor:
    """Rows [e, N, ...] of a gated up-projection in the model's order -> [e, 2 (activated, other), N/2, ...]."""
    params = _params(slot)
    both = _to_halves(x, params.gate_layout)
    return both.flip(1) if params.activated_half == 1 else both


def of_halves(both: Tensor, slot: Slot) -> Tensor:
    """Inverse of ``halves``."""
    params = _params(slot)
    return _of_gate(both.flip(1) if params.activated_half == 1 else both, params.gate_layout)


def _params(slot: Slot) -> MoEParams:
    assert slot.params is not None
    return slot.params


def _to_halves(x: Tensor, gate: GateLayout) -> Tensor:
    half = x.shape[1] // 2
    both: Tensor = x.unflatten(1, (2, half)) if gate == "halves" else x.unflatten(1, (half, 2)).transpose(1, 2)
    return both


def _of_gate(both: Tensor, gate: GateLayout) -> Tensor:
    return (both if gate == "halves" else both.transpose(1, 2)).flatten(1, 2).contiguous()


def twiddle(x: Tensor) -> Tensor:
    """[..., 4m] bytes -> the same number: of each four, the bits where Hopper's decoding masks expect them.

    triton_kernels and FlashInfer's CUTLASS kernels share this order.
    """
    x = x.unflatten(-1, (x.shape[-1] // 4, 4)).to(torch.int64)

    def spread(byte: Tensor) -> Tensor:
        halves = [((c & 8) << 12) | ((c & 7) << 6) for c in (byte & 15, byte >> 4)]
        return halves[0] | (halves[1] << 16)

    def spread_fourth(byte: Tensor) -> Tensor:
        halves = [((c & 8) << 11) | ((c & 6) << 9) | ((c & 1) << 13) for c in (byte & 15, byte >> 4)]
        return halves[0] | (halves[1] << 16)

    words = spread(x[..., 0]) | (spread(x[..., 1]) >> 3) | (spread(x[..., 2]) >> 6) | spread_fourth(x[..., 3])
    return torch.stack([(words >> (8 * i)) & 255 for i in range(4)], -1).to(torch.uint8).flatten(-2)


def untwiddle(x: Tensor) -> Tensor:
    """Inverse of ``twiddle``."""
    x = x.unflatten(-1, (x.shape[-1] // 4, 4)).to(torch.int64)
    words = x[..., 0] | (x[..., 1] << 8) | (x[..., 2] << 16) | (x[..., 3] << 24)

    def gather(half: Tensor, shift: int) -> Tensor:
        half = half << shift
        return ((half >> 12) & 8) | ((half >> 6) & 7)

    def gather_fourth(half: Tensor) -> Tensor:
        return ((half >> 11) & 8) | ((half >> 9) & 6) | ((half >> 13) & 1)

    low, high = words & 0xFFFF, words >> 16
    out = [gather(low, s) | (gather(high, s) << 4) for s in (0, 3, 6)]
    out.append(gather_fourth(low) | (gather_fourth(high) << 4))
    return torch.stack(out, -1).to(torch.uint8).flatten(-2)


# Marlin's order, which humming shares: what one thread feeds to a 16x16 tensor-core tile lies together.


def marlin_codes(packed: Tensor, *, native: bool = False) -> Tensor:
    """packed [e, N, K/2] -> int32 [e, K/16, 2N]; N % 64 = K % 16 = 0.

    In a word even codes come before odd ones, for decoding by masks; ``native`` leaves them in turns.
    """
    e, n, k2 = packed.shape
    code = fold(codes(packed), *_marlin_fold(n, 2 * k2, native)).view(e, k2 // 8, 16 * n)
    return bytes_of(code).contiguous().view(torch.int32)


def packed_of_marlin(words: Tensor, n: int, k: int, *, native: bool = False) -> Tensor:
    """Inverse of ``marlin_codes``."""
    code = codes(words.contiguous().view(torch.uint8))
    return bytes_of(unfold(code, *_marlin_fold(n, k, native)).view(words.shape[0], n, k))


def _marlin_fold(n: int, k: int, native: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows are (64s, 4, 2, 8 lanes), columns (16s, 2, 4 lanes, 2)."""
    word = (2, 5, 7) if native else (7, 2, 5)
    return (n // 64, 4, 2, 8, k // 16, 2, 4, 2), (4, 0, 3, 6, 1, *word)


def marlin_bias(bias: Tensor) -> Tensor:
    """bias [e, N] -> [e, N], permuted in blocks of 32."""
    return fold(bias, *_bias_fold(bias.shape[1])).view_as(bias)


def bias_of_marlin(bias: Tensor) -> Tensor:
    """Inverse of ``marlin_bias``."""
    return unfold(bias, *_bias_fold(bias.shape[1])).view_as(bias)


def _bias_fold(n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (n // 32, 4, 4, 2), (0, 2, 1, 3)
