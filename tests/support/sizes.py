"""Ways in which the sizes of a call decide what a block computes: capacities, pieces, branches.

``WAYS``: name -> Way; ``Sized(way, limit)`` is the block. ``limit`` is a number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, MI, E, K = 32, 32, 4, 2


@dataclass(frozen=True)
class Way:
    """``run(block, x [B, T, H])``; ``words`` of the refusal, "" for one that must be rewritten."""

    run: Callable[[Sized, Tensor], Tensor]
    words: str = ""


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(H, MI, bias=False), nn.Linear(H, MI, bias=False)
        self.down = nn.Linear(MI, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Sized(nn.Module):
    """A router and a list of experts, whose use the sizes of the call decide."""

    def __init__(self, way: str, limit: int) -> None:
        super().__init__()
        self.way, self.limit = way, limit
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(_Expert() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way].run(self, x).view(x.shape)

    def mixed(self, rows: Tensor, k: int = K, keep: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The mixture on rows [n, H]; ``keep(ids)`` [n, k] says which pairs count."""
        weights, ids = self.router(rows).softmax(-1).topk(k, -1)
        if keep is not None:
            weights = weights * keep(ids)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, H)


def _within(capacity: int) -> Callable[[Tensor], Tensor]:
    """Which pairs of top-1 ids come before their expert is full."""

    def keep(ids: Tensor) -> Tensor:
        chosen = F.one_hot(ids[:, 0], E)
        return ((chosen.cumsum(0) - 1) * chosen).sum(-1, keepdim=True) < capacity

    return keep


def _split(block: Sized, x: Tensor) -> Tensor:
    return torch.cat([block.mixed(piece) for piece in _rows(x).split(block.limit)])


def _chunk(block: Sized, x: Tensor) -> Tensor:
    return torch.cat([block.mixed(piece) for piece in _rows(x).chunk(3)])


def _slices(block: Sized, x: Tensor) -> Tensor:
    rows, done = _rows(x), []
    for start in range(0, rows.shape[0], block.limit):
        done.append(block.mixed(rows[start : start + block.limit]))
    return torch.cat(done)


def _written(block: Sized, x: Tensor) -> Tensor:
    rows = _rows(x)
    out = torch.empty_like(rows)
    for start in range(0, rows.shape[0], block.limit):
        end = min(start + block.limit, rows.shape[0])
        out[start:end] = block.mixed(rows[start:end])
    return out


def _fast_path(block: Sized, x: Tensor) -> Tensor:
    rows = _rows(x)
    if rows.shape[0] <= block.limit:
        return block.mixed(rows)
    return torch.cat([block.mixed(piece) for piece in rows.split(block.limit)])


def _least_capacity(block: Sized, x: Tensor) -> Tensor:
    rows = _rows(x)
    return block.mixed(rows, 1, _within(max(block.limit, int(1.25 * rows.shape[0] / E))))


def _ceiled_capacity(block: Sized, x: Tensor) -> Tensor:
    rows = _rows(x)
    return block.mixed(rows, 1, _within(min(math.ceil(rows.shape[0] / E * 1.25), block.limit)))


def _capacity_of_a_piece(block: Sized, x: Tensor) -> Tensor:
    """Not what it computes without pieces: each has room of its own."""
    pieces = _rows(x).split(block.limit)
    return torch.cat([block.mixed(p, 1, _within(max(2, int(p.shape[0] / E)))) for p in pieces])


def _over_a_piece(block: Sized, x: Tensor) -> Tensor:
    """Not what it computes without pieces: the rows of one depend on each other."""
    return torch.cat([block.mixed(piece - piece.mean(0)) for piece in _rows(x).split(block.limit)])


def _scaled(condition: Callable[[Sized, Tensor], bool]) -> Callable[[Sized, Tensor], Tensor]:
    def run(block: Sized, x: Tensor) -> Tensor:
        out = block.mixed(_rows(x))
        return out * 1.05 if condition(block, x) else out

    return run


WAYS = {
    "split": Way(_split),
    "chunk": Way(_chunk),
    "slices": Way(_slices),
    "written": Way(_written),
    "fast path": Way(_fast_path),
    "least capacity": Way(_least_capacity),
    "ceiled capacity": Way(_ceiled_capacity),
    "capacity of a piece": Way(_capacity_of_a_piece, "number of tokens"),
    "over a piece": Way(_over_a_piece, "number of tokens"),
    "tokens": Way(_scaled(lambda b, x: x.shape[0] * x.shape[1] > b.limit), "number of tokens: more than"),
    "batch": Way(_scaled(lambda b, x: x.shape[0] >= 4), "batch size: more than 3"),
    "length": Way(_scaled(lambda b, x: x.shape[1] > b.limit), "sequence length: more than"),
    "one token": Way(_scaled(lambda b, x: x.shape[1] == 1), "failed verification"),
    "layout": Way(_scaled(lambda b, x: not x.is_contiguous()), "memory layout"),
}
