"""The layer of ``mxfp4::moe`` with low-rank terms on its projections, and its gradients.

::

    rows by expert --up--> y [S, W] --+ terms--> activation --> h [S, I] --down--> --+ terms--> sums [T, H]

Contract: the weights stay packed. Nothing of the forward is saved but its inputs: y and h are computed again, a chunk
of tokens at a time. Gradients reach tokens, routing weights and the terms; for a row of expert e, with routing weight
w, g the gradient of its token's output, and the terms of a projection as one A, B::

    q   = g Wdown + (g B2) A2
    dw  = <q, h> + <g, b_down>
    dB2 = sum w g^T (h A2^T)          dA2 = sum w (g B2)^T h
    dy  = act'(y) (w q)
    dB1 = sum dy^T (x A1^T)           dA1 = sum (dy B1)^T x
    dx  = dy Wup + (dy B1) A1         summed over the experts of a token, in the order of its pairs

The same inputs give the same bits. Ids outside [0, E) contribute nothing, and their rows, which lie behind all others,
may hold anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..spec import Role
from . import gradients, ragged
from .arguments import LinearInputs, MoEInputs, Slot
from .low_rank import LowRank, Term, products_of_rows, rows_times

# Bytes of rows that lie in memory together; more tokens go in chunks.
MAX_ROWS_BYTES = 1 << 30


class Projections(Protocol):
    """What ``Backend`` has and is needed of it here."""

    def recover(self, tensors: Sequence[Tensor], slot: Slot, *, n: int, k: int) -> tuple[Tensor, Tensor]: ...
    def recover_bias(self, bias: Tensor, slot: Slot, *, n: int) -> Tensor: ...
    def grouped_linear(self, inputs: LinearInputs) -> Tensor: ...
    def gradient_dtype(self, dtype: torch.dtype, round_dtype: torch.dtype) -> torch.dtype: ...
    def parts(self, inputs: MoEInputs) -> Parts: ...
    def grouped_linear_backward(
        self, grad: Tensor, offsets: Tensor, weight: Sequence[Tensor], k: int, dtype: torch.dtype, layout: str
    ) -> Tensor: ...


class Parts:
    """The steps of a layer between which terms are added, by a backend's weights.

    Columns of y and of its gradient, [S, W], are in an order of the backend's own, W at least N; h is [S, I].
    """

    def __init__(self, backend: Projections, inputs: MoEInputs) -> None:
        self.backend, self.inputs, self.params = backend, inputs, inputs.params

    def arranged(self, role: Role, rows: Tensor) -> Tensor:  # noqa: ARG002
        """[E, N, ...], the rows of a projection, -> [E, W, ...] in the order of its columns here."""
        return rows

    def restored(self, role: Role, rows: Tensor) -> Tensor:  # noqa: ARG002
        """Inverse of ``arranged``."""
        return rows

    def project(self, role: Role, rows: Tensor, ends: Tensor) -> Tensor:
        """[S, K] -> the frozen projection with its bias, in ``round_dtype``."""
        n = self.params.shape(role)[1]
        weight, bias = self._weight(role)
        dtype = self.params.round_dtype
        if self.inputs.layout == "canonical":
            out = self.backend.grouped_linear(LinearInputs(rows, ends, weight, n, dtype, "canonical"))
        else:
            out = rows.new_zeros((rows.shape[0], n), dtype=dtype)
            dense = self._dense(role, rows.dtype)
            groups = gradients.Groups.of_ends(ends)
            size = gradients.SCRATCH_BYTES // (rows.itemsize * n * rows.shape[1])
            for chosen, part, count in groups.chunks(max(1, size)):
                out[part] = gradients.grouped(rows[part], dense(chosen).mT, count).to(dtype)
        if bias is None:
            return out
        of_row = torch.searchsorted(ends, torch.arange(rows.shape[0], device=ends.device, dtype=ends.dtype), right=True)
        plain = self.backend.recover_bias(bias, self.inputs.slot(role), n=n)
        return out + plain.to(dtype).index_select(0, of_row.clamp(max=len(ends) - 1))

    def project_backward(self, role: Role, grad: Tensor, ends: Tensor) -> Tensor:
        """The gradient [S, W] of a projection -> that of its rows, [S, K] in the same dtype."""
        k, dtype = self.params.shape(role)[2], grad.dtype
        if self.inputs.layout == "canonical":
            weight, _ = self._weight(role)
            return self.backend.grouped_linear_backward(grad, ends, weight, k, dtype, "canonical")
        products = self.backend.gradient_dtype(dtype, dtype)
        return gradients.linear_backward(grad, ends, self._dense(role, products), k, dtype, products)

    def activate(self, y: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        """y [S, W] -> h [S, I]."""
        return self.params.activate(y.to(_wide(y))).to(self.params.round_dtype)

    def through_activation(self, y: Tensor, q: Tensor, grad: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """h, the gradient of y, and that of the routing weights [T, K], which is nobody's if they are on the input.

        y [S, W]; q [S, I], the gradient of h but for the weight on the output; grad [T, H].
        """
        params, inputs = self.params, self.inputs
        wide = _wide(y)
        gate, up = params.split_gate(y.to(wide))
        h = params.activation(gate, up).to(params.round_dtype)
        q = q.to(wide)
        dh = q if params.weight_on_input else q * rows.weights.to(wide)
        dy = params.join_gate(*params.activation.gradient(gate, up, dh)).to(y.dtype)
        dots = (q * h.to(wide)).sum(1)
        dw = rows.of_pairs(dots)
        if inputs.down_bias is not None and not params.weight_on_input:
            bias = self.backend.recover_bias(inputs.down_bias, inputs.slot("down"), n=params.hidden).to(wide)
            ids = rows.ids.clamp(0, params.num_experts - 1)
            dw = dw + torch.where(rows.known, torch.einsum("th,tkh->tk", grad.to(wide), bias[ids]), 0)
        return h, dy, dw

    def _weight(self, role: Role) -> tuple[Sequence[Tensor], Tensor | None]:
        i = self.inputs
        return (i.up, i.up_bias) if role == "up" else (i.down, i.down_bias)

    def _dense(self, role: Role, dtype: torch.dtype) -> gradients.Dense:
        _, n, k = self.params.shape(role)
        recover = lambda t: self.backend.recover(t, self.inputs.slot(role), n=n, k=k)
        return gradients.dense_weights(recover, self._weight(role)[0], k, dtype)


@dataclass(frozen=True)
class Rows:
    """The pairs of a chunk of tokens by expert."""

    inputs: MoEInputs
    sorted: ragged.Sorted

    @property
    def ids(self) -> Tensor:
        """[T, K]."""
        return self.inputs.topk_ids

    @cached_property
    def ends(self) -> Tensor:
        """int32 [E]: the end row of each expert; a tensor of its own, since kernels want 16 bytes' alignment."""
        return self.sorted.offsets[1:].clone()

    @cached_property
    def token(self) -> Tensor:
        """[S]: the token of each row."""
        return torch.div(self.sorted.order, self.ids.shape[1], rounding_mode="trunc")

    @cached_property
    def weights(self) -> Tensor:
        """[S, 1]: the routing weight of each row."""
        return self.inputs.topk_weights.reshape(-1).index_select(0, self.sorted.order).unsqueeze(1)

    @cached_property
    def known(self) -> Tensor:
        """[T, K]: which ids are experts."""
        return (self.ids >= 0) & (self.ids < self.inputs.params.num_experts)

    def seen(self) -> Tensor:
        """What the experts see, [S, H]."""
        rows = self.inputs.x.index_select(0, self.token)
        return (rows * self.weights).to(self.inputs.params.round_dtype) if self.inputs.params.weight_on_input else rows

    def of_pairs(self, values: Tensor) -> Tensor:
        """Values of rows [S] -> [T, K], zero where an id is no expert."""
        return torch.where(self.known, values.index_select(0, self.sorted.place).view(self.ids.shape), 0)

    def summed(self, rows: Tensor, weighted: bool) -> Tensor:
        """rows [S, H] -> their sum over a token's experts, times the routing weights or not, [T, H] in x's dtype."""
        inputs, dtype = self.inputs, self.inputs.x.dtype
        weights = inputs.topk_weights if weighted else None
        if rows.is_cuda and rows.dtype != torch.float64:
            return ragged.combine(rows, self.sorted, self.ids, weights, inputs.params.num_experts, dtype)
        pairs = rows.to(inputs.params.accum_dtype).index_select(0, self.sorted.place).view(*self.ids.shape, -1)
        if weights is not None:
            pairs = pairs * weights.to(pairs.dtype).unsqueeze(-1)
        return torch.where(self.known.unsqueeze(-1), pairs, 0).sum(1).to(dtype)


@dataclass(frozen=True)
class Adapted:
    """A layer and the terms of its projections."""

    backend: Projections
    inputs: MoEInputs
    up: Sequence[Term]
    down: Sequence[Term]

    def forward(self) -> Tensor:
        """[T, H] in x's dtype."""
        out = torch.empty_like(self.inputs.x, memory_format=torch.contiguous_format)
        low = self._low_rank()
        for part, parts, rows in self._chunks():
            y, _ = self._up(parts, rows, rows.seen(), low.get("up"))
            h = parts.activate(y, rows)
            del y
            z = parts.project("down", h, rows.ends)
            if (down := low.get("down")) is not None:
                z += rows_times(rows_times(h, down.a.mT, rows.ends), down.b.mT, rows.ends)
            out[part] = rows.summed(z, not self.inputs.params.weight_on_input)
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Gradients of x, of topk_weights, and of a and b of each term (those of up first), in the dtypes of these."""
        x, weights = self.inputs.x, self.inputs.topk_weights
        dx, dw = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weights)
        low = self._low_rank()
        sums: dict[Role, tuple[Tensor, Tensor]] = {}
        for part, parts, rows in self._chunks():
            dx[part], dw[part] = self._chunk_backward(parts, rows, grad[part], low, sums)
        found = []
        parts = self.backend.parts(self.inputs)
        for role, terms in self._terms():
            if terms:
                one = low[role]
                # Without a token no gradient was summed.
                da, db = sums.get(role) or (torch.zeros_like(one.a), torch.zeros_like(one.b))
                found += one.gradients(da, parts.restored(role, db), terms)
        return dx, dw, found

    def _chunk_backward(
        self, parts: Parts, rows: Rows, grad: Tensor, low: dict[Role, LowRank], sums: dict[Role, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        params, ends = self.inputs.params, rows.ends
        up, down = low.get("up"), low.get("down")
        seen = rows.seen()
        y, narrow = self._up(parts, rows, seen, up)
        g = grad.to(params.round_dtype).index_select(0, rows.token)
        q = parts.project_backward("down", g, ends)
        if down is not None:
            dnarrow = rows_times(g, down.b, ends)
            q += rows_times(dnarrow, down.a, ends)
        h, dy, dw = parts.through_activation(y, q, grad, rows)
        del y, q
        if down is not None:
            again = rows_times(h, down.a.mT, ends)
            if not params.weight_on_input:
                again, dnarrow = (t * rows.weights.to(t.dtype) for t in (again, dnarrow))
            _add(sums, "down", products_of_rows(dnarrow, h, ends), products_of_rows(g, again, ends))
        del g, h
        dseen = parts.project_backward("up", dy, ends)
        if up is not None:
            dnarrow = rows_times(dy, up.b, ends)
            dseen += rows_times(dnarrow, up.a, ends)
            _add(sums, "up", products_of_rows(dnarrow, seen.to(dy.dtype), ends), products_of_rows(dy, narrow, ends))
        if params.weight_on_input:
            wide = _wide(dseen)
            dots = (dseen.to(wide) * rows.inputs.x.index_select(0, rows.token).to(wide)).sum(1)
            dw = rows.of_pairs(dots)
        return rows.summed(dseen, params.weight_on_input), dw

    def _up(self, parts: Parts, rows: Rows, seen: Tensor, low: LowRank | None) -> tuple[Tensor, Any]:
        """y, and the rows between A and B."""
        y = parts.project("up", seen, rows.ends)
        if low is None:
            return y, None
        narrow = rows_times(seen.to(y.dtype), low.a.mT, rows.ends)
        y += rows_times(narrow, low.b.mT, rows.ends)
        return y, narrow

    def _terms(self) -> tuple[tuple[Role, Sequence[Term]], ...]:
        return (("up", self.up), ("down", self.down))

    def _low_rank(self) -> dict[Role, LowRank]:
        """The terms of each projection that has any as one, b in the backend's order."""
        parts, params = self.backend.parts(self.inputs), self.inputs.params
        found: dict[Role, LowRank] = {}
        for role, terms in self._terms():
            if terms:
                one = LowRank.of(terms, params.shape(role)[1], params.round_dtype)
                found[role] = LowRank(one.a, parts.arranged(role, one.b))
        return found

    def _chunks(self) -> Iterator[tuple[slice, Parts, Rows]]:
        inputs, params = self.inputs, self.inputs.params
        tokens, top_k = inputs.topk_ids.shape
        width = 3 * params.hidden + 2 * params.up_rows + 2 * params.intermediate
        size = max(1, MAX_ROWS_BYTES // max(1, top_k * width * params.round_dtype.itemsize))
        for at in range(0, tokens, size):
            part = slice(at, min(at + size, tokens))
            some = inputs.of_tokens(part)
            yield part, self.backend.parts(some), Rows(some, ragged.sort_pairs(some.topk_ids, params.num_experts))


def _add(sums: dict[Role, tuple[Tensor, Tensor]], role: Role, da: Tensor, db: Tensor) -> None:
    if role in sums:
        da, db = (new.add_(old) for new, old in zip((da, db), sums[role], strict=True))
    sums[role] = da, db


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


__all__ = ["Adapted", "Parts", "Rows"]
