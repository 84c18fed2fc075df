"""The layer of ``mxfp4::moe`` in its parts, so that low-rank terms can be added to each projection.

::

    rows by expert --up--> y [S, N] --+ A, B of up--> activation --> h [S, I] --down--> --+ A, B of down--> sums [T, H]

Contract: the weights stay packed; what is added is ``h A_e^T B_e^T`` times a scaling, rows of expert e by rows of
expert e, never a dense weight. Rounding is that of the fused op. Gradients reach tokens, routing weights, A and B; the
sums that they need are over the pairs of a token in order, so that the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import gradients, ragged, schema
from ..ops.arguments import Slot
from ..ops.registry import get_backend
from ..spec import MoEParams, Role, moe_params


@dataclass(frozen=True)
class Term:
    """One adapter of one projection: a [E, r, K] and b [E, N, r], whose product times ``scaling`` is added.

    ``start``: the row of the projection that b begins at, where it lies in several parameters.
    """

    a: Tensor
    b: Tensor
    scaling: float
    start: int = 0


def moe(given: Sequence[Any], added: dict[Role, list[Term]]) -> Tensor:
    """``mxfp4::moe`` of the arguments ``given``, with terms added to its projections."""
    x, topk_ids, topk_weights, up, down, up_bias, down_bias, *scalars, name, layout = given
    params = moe_params(*scalars)
    tokens, top_k = topk_ids.shape
    pairs = ragged.sort_pairs(topk_ids, params.num_experts)
    ends, order, place = pairs.offsets[1:], pairs.order.long(), pairs.place.long()
    known = (torch.arange(tokens * top_k, device=x.device) < ends[-1]).unsqueeze(1)
    seen = x.unsqueeze(1).expand(tokens, top_k, x.shape[1]).reshape(tokens * top_k, -1)
    if params.weight_on_input:
        seen = (seen * topk_weights.reshape(-1, 1)).to(params.round_dtype)
    seen = torch.where(known, seen.index_select(0, order), 0)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    of_row = torch.searchsorted(ends, torch.arange(len(order), device=x.device, dtype=ends.dtype), right=True)
    of_row = of_row.clamp(max=params.num_experts - 1)

    def projection(role: Role, rows: Tensor, weight: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        slot = Slot(role, params, layout)
        y = _base(rows, ends, weight, slot, params, name)
        y = plus_terms(y, rows, ends, added.get(role, []))
        if bias is not None:
            plain = get_backend(name).recover_bias(bias, slot, n=params.shape(role)[1])
            y = y + plain.to(y.dtype).index_select(0, of_row)
        return y

    y = projection("up", seen, up, up_bias)
    h = torch.where(known, params.activate(y.to(wide)).to(params.round_dtype), 0)
    out = projection("down", h, down, down_bias).to(params.accum_dtype)
    out = torch.where(known, out, 0).index_select(0, place).view(tokens, top_k, -1)
    ok = (topk_ids >= 0) & (topk_ids < params.num_experts)
    if not params.weight_on_input:
        weights = torch.where(ok, topk_weights, 0).to(params.accum_dtype)
        out = out * weights.unsqueeze(-1)
    return torch.where(ok.unsqueeze(-1), out, 0).sum(1).to(x.dtype)


def linear(given: Sequence[Any], added: list[Term]) -> Tensor:
    """``mxfp4::grouped_linear`` of the arguments ``given``, with terms added."""
    x, offsets = given[0], given[1]
    return plus_terms(schema.grouped_linear(*given), x, offsets, added)


def plus_terms(y: Tensor, x: Tensor, ends: Tensor, added: Sequence[Term]) -> Tensor:
    """y [S, N] of x [S, K], rows sorted by expert, and the terms' products; in the dtype of y."""
    for term in added:
        low = grouped(grouped(x, term.a.to(x.dtype).mT, ends), term.b.to(x.dtype).mT, ends) * term.scaling
        after = y.shape[1] - term.start - low.shape[1]
        y = y + torch.nn.functional.pad(low.to(y.dtype), (term.start, after))
    return y


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [S, K], rows sorted by expert, times weight [E, K, M] of each row's expert -> [S, M]; zeros for other rows.

    ends: int32 [E], the end row of each expert.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        k, m = weight.shape[1], weight.shape[2]
        x, w = _filled(x, -k), torch.nn.functional.pad(weight, (0, -m % 8, 0, -k % 8))
        inside = (torch.arange(x.shape[0], device=x.device) < ends[-1]).unsqueeze(1)
        product = torch.nn.functional.grouped_mm(torch.where(inside, x, 0), w, offs=ends.int())
        filled: Tensor = torch.where(inside, product, 0)
        return filled[:, :m]
    counts = [e - b for b, e in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    *parts, rest = x.split([*counts, x.shape[0] - sum(counts)])
    products = [part @ w for part, w in zip(parts, weight, strict=True) if part.shape[0]]
    return torch.cat([*products, x.new_zeros(rest.shape[0], weight.shape[2])])


def _filled(x: Tensor, missing: int) -> Tensor:
    """x with zero columns up to a multiple of 8, which rows of 16 bytes are."""
    return torch.nn.functional.pad(x, (0, missing % 8))


def _base(rows: Tensor, ends: Tensor, weight: Sequence[Tensor], slot: Slot, params: MoEParams, name: str) -> Tensor:
    """A projection of the packed weights, [S, N] in ``round_dtype``, columns in the model's order."""
    assert slot.role is not None
    _, n, k = params.shape(slot.role)
    if slot.layout == "canonical":
        linear_op: Callable[..., Tensor] = schema.grouped_linear
        return linear_op(rows, ends, list(weight), n, params.round_dtype, name, slot.layout)
    recovered: Any = _Recovered
    out: Tensor = recovered.apply(rows, ends, slot, (n, k), params.round_dtype, name, *weight)
    return out


class _Recovered(torch.autograd.Function):
    """A projection from weights in a layout of the fused op: a few experts at a time are dequantized."""

    @staticmethod
    def _dense(slot: Slot, size: tuple[int, int], name: str, weight: Sequence[Tensor], dtype: torch.dtype) -> Any:
        recover = partial(get_backend(name).recover, slot=slot, n=size[0], k=size[1])
        return gradients.dense_weights(recover, weight, size[1], dtype)

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        rows, ends, slot, size, rounded, name, *weight = given
        n, k = size
        ctx.slot, ctx.size, ctx.name, ctx.dtype = slot, size, name, rows.dtype
        ctx.save_for_backward(ends, *weight)
        groups = gradients.Groups.of_ends(ends)
        dense = _Recovered._dense(slot, size, name, weight, rows.dtype)
        out: Tensor = rows.new_zeros((rows.shape[0], n), dtype=rounded)
        for chosen, part, count in groups.chunks(max(1, gradients.SCRATCH_BYTES // (rows.itemsize * n * k))):
            out[part] = gradients.grouped(rows[part], dense(chosen).mT, count).to(rounded)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ends, *weight = ctx.saved_tensors
        dense = _Recovered._dense(ctx.slot, ctx.size, ctx.name, weight, ctx.dtype)
        dx = gradients.linear_backward(grads[0], ends, dense, ctx.size[1], ctx.dtype, ctx.dtype)
        return (dx, None, None, None, None, None, *([None] * len(weight)))


__all__ = ["Term", "linear", "moe", "plus_terms"]
