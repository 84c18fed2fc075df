"""Index permutations that prepared layouts are made of, each with its inverse.

Every library stores the same codes and scales in another order. Written as reshape, permute, reshape they
are exact, run on any device, and the way back is the same permutation the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import MoEParams, Role


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
    pairs = code.unflatten(-1, (code.shape[-1] // 2, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _gated(role: Role | None, params: MoEParams | None) -> bool:
    return role == "up" and params is not None and params.activation.gated


def arrange_rows(
    x: Tensor,
    role: Role | None,
    params: MoEParams | None,
    *,
    layout: str,
    activated: int,
    multiple: int,
    value: int = 0,
) -> Tensor:
    """[e, N, ...] in the model's row order -> the rows as a kernel reads them, padded with ``value``.

    A gated up-projection becomes halves or interleaved pairs (``layout``) with the activated rows first
    (``activated`` 0) or second (1); either half is filled up to ``multiple`` rows. Other projections are
    filled up to ``multiple`` rows in their order.
    """
    if not _gated(role, params):
        return pad(x, 1, round_up(x.shape[1], multiple), value)
    assert params is not None
    halves = _halves(x, params)  # [e, 2 (activated, other), I, ...]
    if activated == 1:
        halves = halves.flip(1)
    halves = pad(halves, 2, round_up(halves.shape[2], multiple), value)
    return (halves if layout == "halves" else halves.transpose(1, 2)).flatten(1, 2).contiguous()


def recover_rows(
    x: Tensor, n: int, role: Role | None, params: MoEParams | None, *, layout: str, activated: int
) -> Tensor:
    """Inverse of ``arrange_rows``; ``n`` is the model's number of rows."""
    if not _gated(role, params):
        return x[:, :n].contiguous()
    assert params is not None
    shape = (2, x.shape[1] // 2) if layout == "halves" else (x.shape[1] // 2, 2)
    halves = x.unflatten(1, shape)
    if layout != "halves":
        halves = halves.transpose(1, 2)
    if activated == 1:
        halves = halves.flip(1)
    halves = halves[:, :, : n // 2]
    if params.activated_half == 1:
        halves = halves.flip(1)
    return (halves if params.gate_layout == "halves" else halves.transpose(1, 2)).flatten(1, 2).contiguous()


def _halves(x: Tensor, params: MoEParams) -> Tensor:
    n = x.shape[1]
    if params.gate_layout == "halves":
        halves = x.unflatten(1, (2, n // 2))
    else:
        halves = x.unflatten(1, (n // 2, 2)).transpose(1, 2)
    return halves.flip(1) if params.activated_half == 1 else halves


def numel(sizes: Sequence[int]) -> int:
    """Product of ``sizes``."""
    return math.prod(sizes)
