"""Low-rank products of rows sorted by expert: what adapters of experts add to a frozen projection.

For a row x of expert e an adapter adds ``scaling * x A_e^T B_e^T``: two narrow grouped products, never a dense sum.
Contract: a [E, r, K], b [E, N, r], ``ends`` int32 [E], the end row of each expert. Rows at or beyond the last end are
nobody's: what is written there may be anything, and they add nothing to a gradient of a or b. In bf16 on a GPU nothing
waits for the device; elsewhere the ends are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Term:
    """One adapter of one projection: a [E, r, K] and b [E, n, r], whose product times ``scaling`` is added.

    ``start``: the row of the projection that b begins at, where it lies in several parameters.
    """

    a: Tensor
    b: Tensor
    scaling: float
    start: int = 0


@dataclass(frozen=True)
class LowRank:
    """All terms of a projection as one: a [E, R, K], scalings in it, and b [E, N, R]; R of all terms, padded to 8."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, terms: Sequence[Term], rows: int, dtype: torch.dtype) -> LowRank:
        """Of a projection with ``rows`` rows; in ``dtype``."""
        missing = -sum(t.a.shape[1] for t in terms) % 8
        a = torch.cat([(t.a * t.scaling).to(dtype) for t in terms], 1)
        b = torch.cat([pad(t.b.to(dtype), (0, 0, t.start, rows - t.start - t.b.shape[1])) for t in terms], 2)
        return cls(pad(a, (0, 0, 0, missing)), pad(b, (0, missing)))

    def gradients(self, da: Tensor, db: Tensor, terms: Sequence[Term]) -> list[tuple[Tensor, Tensor]]:
        """Those of each term's a and b, given those of this a and b."""
        found, at = [], 0
        for t in terms:
            r, n = t.a.shape[1], t.b.shape[1]
            a = (da[:, at : at + r] * t.scaling).to(t.a.dtype)
            found.append((a, db[:, t.start : t.start + n, at : at + r].to(t.b.dtype, copy=True)))
            at += r
        return found


def rows_times(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [S, K] times weight [E, K, M] of each row's expert -> [S, M]."""
    if _grouped(x, weight):
        k, m = weight.shape[1], weight.shape[2]
        if k % 8 or m % 8:  # rows of 16 bytes
            x, weight = pad(x, (0, -k % 8)), pad(weight, (0, -m % 8, 0, -k % 8))
        return torch.nn.functional.grouped_mm(_aligned(x), _aligned(weight), offs=ends)[:, :m]
    *parts, rest = x.split(_counts(ends, x.shape[0]))
    products = [part @ w for part, w in zip(parts, weight, strict=True) if part.shape[0]]
    return torch.cat([*products, x.new_zeros(rest.shape[0], weight.shape[2])])


def products_of_rows(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a [S, M], b [S, N] -> [E, M, N]: the sum over each expert's rows of a_row^T b_row; zeros where it has none."""
    if _grouped(a, b):
        m, n = a.shape[1], b.shape[1]
        a, b = _aligned(pad(a, (0, -m % 8))), _aligned(pad(b, (0, -n % 8)))
        found = torch.nn.functional.grouped_mm(a.mT, b, offs=ends)
        some = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
        return torch.where(some.view(-1, 1, 1), found, 0)[:, :m, :n]
    counts = _counts(ends, a.shape[0])[:-1]
    pairs = zip(a.split([*counts, a.shape[0] - sum(counts)]), b.split([*counts, b.shape[0] - sum(counts)]), strict=True)
    return torch.stack([left.mT @ right for left, right in list(pairs)[:-1]])


def low_rank(x: Tensor, ends: Tensor, term: Term) -> Tensor:
    """x [S, K] -> what the term adds, [S, n] in x's dtype; zeros for rows of no expert."""
    low = rows_times(x, (term.a * term.scaling).to(x.dtype).mT, ends)
    out = rows_times(low, term.b.to(x.dtype).mT, ends)
    return torch.where(_of_some(ends, x), out, 0)


def low_rank_backward(grad: Tensor, x: Tensor, ends: Tensor, term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [S, K], a and b, given that of what ``low_rank`` returned."""
    a, b, g = (term.a * term.scaling).to(x.dtype), term.b.to(x.dtype), grad.to(x.dtype)
    low, dlow = rows_times(x, a.mT, ends), rows_times(g, b, ends)
    dx = torch.where(_of_some(ends, x), rows_times(dlow, a, ends), 0)
    da = products_of_rows(dlow, x, ends) * term.scaling
    db = products_of_rows(g, low, ends)
    return dx, da.to(term.a.dtype), db.to(term.b.dtype)


def _grouped(x: Tensor, y: Tensor) -> bool:
    return x.is_cuda and x.dtype == y.dtype == torch.bfloat16 and x.shape[0] > 0


def _aligned(tensor: Tensor) -> Tensor:
    """With rows that begin at multiples of 16 bytes along the one dimension whose stride is not 1."""
    one, pitch = sorted((tensor.stride(-2), tensor.stride(-1)))
    kept = one == 1 and pitch % 8 == 0 and tensor.data_ptr() % 16 == 0
    return tensor if kept else tensor.contiguous()


def _counts(ends: Tensor, rows: int) -> list[int]:
    """Rows of each expert, then of none; waits for the device."""
    listed = ends.tolist()
    counts = [max(0, end - begin) for begin, end in zip([0, *listed], listed, strict=False)]
    return [*counts, rows - sum(counts)]


def _of_some(ends: Tensor, x: Tensor) -> Tensor:
    return (torch.arange(x.shape[0], device=x.device) < ends[-1]).unsqueeze(1)


__all__ = ["LowRank", "Term", "low_rank", "low_rank_backward", "products_of_rows", "rows_times"]
