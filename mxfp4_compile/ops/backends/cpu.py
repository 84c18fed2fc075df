"""The CPU backend: quick enough that a CPU is usable for checking a model.

Nothing is cached between calls: each call dequantizes the experts it hits. Few pairs (decoding) are
served by one gather and two batched products; many by a loop over the experts that are hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from ... import mx
from ..arguments import LinearInputs, MoEInputs
from ..backend import Backend, Requirement, check_activation_dtype, check_parallel
from ..target import Request, Target
from .reference import _check_ids

# Above this many bytes of gathered weights a loop over experts is quicker and leaner than one gather.
_GATHER_BYTES = 16 << 20


@lru_cache(maxsize=8)
def _tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mx's look-up tables: the two values of each byte as one integer [256], and 2^e of each scale byte [256]."""
    cpu = torch.device("cpu")
    return mx.pair_table(dtype, cpu), mx.scale_table(dtype, cpu)


def _dequantize(weight: Sequence[Tensor], k: int, dtype: torch.dtype) -> Tensor:
    """mx.dequantize in three passes without its chunks; same bits. (packed [..., ceil(K/2)], scales) -> [..., K]."""
    packed, scales = weight
    if k % mx.BLOCK or dtype not in (torch.bfloat16, torch.float32):
        return mx.dequantize(packed, scales, k, dtype)
    pairs, factors = _tables(dtype)
    values = pairs.index_select(0, packed.reshape(-1).to(torch.int32)).view(dtype).view(*scales.shape, mx.BLOCK)
    factor = factors.index_select(0, scales.reshape(-1).to(torch.int32)).view(*scales.shape, 1)
    return values.mul_(factor).view(*packed.shape[:-1], k)


class CpuBackend(Backend):
    """Plain torch, arranged for CPUs."""

    name = "cpu"

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        return [
            Requirement("device", target.arch == "cpu", f"device is {target.arch}, needs cpu"),
            check_activation_dtype(request, "bf16"),
            check_parallel(request),
        ]

    def moe(self, inputs: MoEInputs) -> Tensor:
        params = inputs.params
        _check_ids(inputs.topk_ids)
        tokens, top_k = inputs.topk_ids.shape
        pairs = tokens * top_k
        if pairs == 0:
            return torch.zeros_like(inputs.x)
        x = inputs.x.to(params.round_dtype)
        flat_ids = inputs.topk_ids.reshape(-1)
        weights = inputs.topk_weights.reshape(-1, 1)
        matrix = params.up_rows * params.hidden + params.hidden * params.intermediate
        if pairs * matrix * x.itemsize <= _GATHER_BYTES and int(flat_ids.max()) < params.num_experts:
            seen = x if top_k == 1 else x.repeat_interleave(top_k, 0)
            if params.weight_on_input:
                seen = (seen * weights).to(params.round_dtype)
            out = _gathered(seen, flat_ids, inputs)
        else:
            out = _looped(x, flat_ids, weights, inputs)
        out = out.to(params.accum_dtype)
        if not params.weight_on_input:
            out = out * weights.to(params.accum_dtype)
        if top_k > 1:
            out = out.view(tokens, top_k, -1).sum(1)
        return out.to(inputs.x.dtype)

    def grouped_linear(self, inputs: LinearInputs) -> Tensor:
        x = inputs.x
        out = x.new_zeros((x.shape[0], inputs.n), dtype=inputs.round_dtype)
        for expert, rows in inputs.of_experts():
            out[rows] = linear(x[rows], _dequantize([t[expert] for t in inputs.weight], x.shape[1], x.dtype))
        return out


def _gathered(x: Tensor, ids: Tensor, inputs: MoEInputs) -> Tensor:
    """x [S, H], ids [S] -> [S, H]; every pair brings its own copy of its expert."""
    of = lambda tensors: [t.index_select(0, ids) for t in tensors]
    w = _dequantize(of(inputs.up), inputs.params.hidden, x.dtype)
    y = torch.bmm(w, x.unsqueeze(-1)).squeeze(-1)
    if inputs.up_bias is not None:
        y = y + inputs.up_bias.index_select(0, ids).to(x.dtype)
    h = inputs.params.activate(y)
    w = _dequantize(of(inputs.down), inputs.params.intermediate, x.dtype)
    y = torch.bmm(w, h.unsqueeze(-1)).squeeze(-1)
    return y if inputs.down_bias is None else y + inputs.down_bias.index_select(0, ids).to(x.dtype)


def _looped(x: Tensor, ids: Tensor, weights: Tensor, inputs: MoEInputs) -> Tensor:
    """x [T, H] in the dtype that results round to, ids [S], weights [S, 1] -> [S, H], pair by pair."""
    params, top_k = inputs.params, inputs.topk_ids.shape[1]
    sorted_ids, order = ids.sort(stable=True)
    experts, counts = sorted_ids.unique_consecutive(return_counts=True)
    out = x.new_zeros((ids.shape[0], params.hidden))
    start = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        rows = order[start : start + count]
        start += count
        if expert >= params.num_experts:
            continue
        seen = x.index_select(0, rows // top_k)
        if params.weight_on_input:
            seen = (seen * weights.index_select(0, rows)).to(params.round_dtype)
        w = _dequantize([t[expert] for t in inputs.up], params.hidden, x.dtype)
        y = linear(seen, w)
        if inputs.up_bias is not None:
            y = y + inputs.up_bias[expert].to(y.dtype)
        h = params.activate(y)
        w = _dequantize([t[expert] for t in inputs.down], params.intermediate, x.dtype)
        y = linear(h, w)
        out[rows] = y if inputs.down_bias is None else y + inputs.down_bias[expert].to(y.dtype)
    return out


BACKEND = CpuBackend()
