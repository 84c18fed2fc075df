"""What experts get: the rows of each one, a few at a time for all of them at once, and sums over them.

Contract: nothing here depends on how rows were recorded; sums are taken in a fixed order, without atomics, so that the
same rows give the same bits on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import fp32_products, products_of

# Elements of one batch of rows, and how many rows of an expert it has at the least and the most.
_ELEMENTS = {"cpu": 1 << 20}
_ELEMENTS_DEVICE = 1 << 27
_ROWS_LEAST, _ROWS_MOST, _ROWS_MOST_DEVICE = 32, 1024, 2048

IN_PLACE = ("cuda",)
"""Devices on which a product is added where it lies, in the order of tiles."""


@dataclass(frozen=True)
class Tile:
    """The next few rows of some experts. ``experts`` [m] int64; ``token`` [m, R] int64: rows of x; ``weight`` [m, R]
    fp32: of each row's output, 0 where an expert has no more rows.
    """

    experts: Tensor
    token: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Rows:
    """Pairs of a token and an expert, sorted by expert.

    ``x`` [T, K]: inputs of any float dtype. ``token`` [S] int64: the row of x; ``weight`` [S] fp32: of its output;
    ``counts``: pairs of each expert. ``scaled``: the weight multiplies the input instead, and outputs count alike.
    """

    x: Tensor
    token: Tensor
    weight: Tensor
    counts: tuple[int, ...]
    scaled: bool = False

    @classmethod
    def of_pairs(cls, x: Tensor, ids: Tensor, weights: Tensor, experts: int, *, scaled: bool = False) -> Rows:
        """x [T, K], ids and weights [T, k]; ids of E and more are nobody's."""
        flat = ids.flatten().long()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat.clamp(max=experts), minlength=experts + 1)[:experts].tolist()
        order = order[: sum(counts)]
        token = order // ids.shape[1]
        return cls(x, token, weights.flatten().float()[order], tuple(counts), scaled)

    def __len__(self) -> int:
        return int(self.token.shape[0])

    def only(self, tokens: Tensor) -> Rows:
        """The pairs of the tokens where ``tokens`` [T] bool is true."""
        kept = tokens[self.token]
        expert = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts)).to(kept.device)
        counts = torch.bincount(expert[kept], minlength=len(self.counts)).tolist()
        return Rows(self.x, self.token[kept], self.weight[kept], tuple(counts), self.scaled)

    def first(self, most: int) -> Rows:
        """At most so many pairs of each expert."""
        counts = torch.tensor(self.counts)
        number = torch.arange(len(self)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        kept = (number < most).to(self.token.device)
        fewer = tuple(min(c, most) for c in self.counts)
        return Rows(self.x, self.token[kept], self.weight[kept], fewer, self.scaled)

    def tiles(self, experts: slice) -> Iterator[Tile]:
        """Batches of rows of a range of experts, until each has had all of its own; numbers from the range's start."""
        counts = torch.tensor(self.counts)
        starts = (counts.cumsum(0) - counts)[experts]
        counts = counts[experts]
        order = torch.argsort(counts, descending=True, stable=True)
        limit = _ELEMENTS.get(self.x.device.type, _ELEMENTS_DEVICE)
        most = _ROWS_MOST if self.x.device.type in _ELEMENTS else _ROWS_MOST_DEVICE
        size = max(_ROWS_LEAST, min(most, limit // max(1, len(counts) * self.x.shape[1])))
        for first in range(0, int(counts.max()) if len(counts) else 0, size):
            some = order[: int((counts > first).sum())]
            place = first + torch.arange(size)
            valid = place < counts[some, None]
            index = (starts[some, None] + place).clamp_(max=len(self) - 1).to(self.token.device)
            weight = self.weight[index] * valid.to(self.weight.device)
            yield Tile(some.to(self.token.device), self.token[index], weight)

    def inputs(self, tile: Tile, x: Tensor | None = None) -> Tensor:
        """[m, R, K] fp32: what the experts of a tile multiply, of ``x`` in place of one's own if given."""
        values = (self.x if x is None else x)[tile.token].float()
        return values * tile.weight[..., None] if self.scaled else values

    def factor(self, tile: Tile) -> Tensor:
        """[m, R] fp32: what multiplies the output; 0 for rows that are none."""
        return (tile.weight != 0).float() if self.scaled else tile.weight


Reads = Callable[[Tile], Tensor]
"""A tile's values [m, R, K] fp32: inputs, or something made of them."""


def hessian(rows: Rows, experts: slice, reads: Reads, k: int, others: Reads | None = None) -> tuple[Tensor, Tensor]:
    """Sums of f^2 v v^T over the rows of some experts, [e, k, k] fp32, where f multiplies the row's output.

    others: values ``u`` in place of ``v``: the second result is then the sum of f^2 (u - v) v^T, else it is empty.
    """
    count = len(range(*experts.indices(len(rows.counts))))
    sums = _Products(count, k, rows.x.device)
    cross = _Products(count if others is not None else 0, k, rows.x.device)
    with fp32_products(products_of(rows.x)):
        for tile in rows.tiles(experts):
            factor = rows.factor(tile)[..., None]
            plain = reads(tile)
            values = plain * factor
            sums.add(tile, values, values)
            if others is not None:
                cross.add(tile, (others(tile) - plain) * factor, values)
    return sums.sums(), cross.sums() if others is not None else torch.zeros(0, device=rows.x.device)


class _Products:
    """Sums of a^T b of each expert over tiles; added in place, they lie in the order of tiles until the end."""

    def __init__(self, experts: int, k: int, device: torch.device) -> None:
        self.total = torch.zeros(experts, k, k, device=device)
        self.order: Tensor | None = None

    def add(self, tile: Tile, a: Tensor, b: Tensor) -> None:
        """a, b: [m, R, K]."""
        if a.device.type in IN_PLACE:
            self.order = tile.experts if self.order is None else self.order  # later tiles are of the first of these
            self.total[: len(tile.experts)].baddbmm_(a.mT, b)
        else:
            self.total[tile.experts] += a.mT @ b

    def sums(self) -> Tensor:
        """[e, K, K], by expert."""
        if self.order is None:
            return self.total
        out = torch.zeros_like(self.total)
        out[self.order] = self.total[: len(self.order)]
        return out


def output_errors(rows: Rows, experts: slice, truth: Reads, tried: list[Reads]) -> tuple[list[Tensor], Tensor]:
    """Sums of f^2 |y - truth|^2 of each output that is tried, and of f^2 |truth|^2: each [e] float64."""
    count = len(range(*experts.indices(len(rows.counts))))
    noise = [torch.zeros(count, dtype=torch.float64, device=rows.x.device) for _ in tried]
    power = torch.zeros(count, dtype=torch.float64, device=rows.x.device)
    with fp32_products(products_of(rows.x)):
        for tile in rows.tiles(experts):
            factor = rows.factor(tile)[..., None]
            right = truth(tile)
            power[tile.experts] += (right * factor).square().sum((1, 2)).double()
            for total, read in zip(noise, tried, strict=True):
                total[tile.experts] += ((read(tile) - right) * factor).square().sum((1, 2)).double()
    return noise, power


__all__ = ["Reads", "Rows", "Tile", "hessian", "output_errors"]
