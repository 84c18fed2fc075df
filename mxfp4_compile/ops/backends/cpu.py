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
from ...spec import MoEParams
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


def _dequantize(packed: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """mx.dequantize in three passes without its chunks; same bits. Weights [..., ceil(K/2)] -> [..., K]."""
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

    def moe(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        params: MoEParams,
        layout: str,
    ) -> Tensor:
        _check_ids(topk_ids)
        tokens, top_k = topk_ids.shape
        pairs = tokens * top_k
        if pairs == 0:
            return torch.zeros_like(x)
        result_dtype = x.dtype
        x = x.to(params.round_dtype)
        flat_ids = topk_ids.reshape(-1)
        weights = topk_weights.reshape(-1, 1)
        matrix = params.up_rows * params.hidden + params.hidden * params.intermediate
        if pairs * matrix * x.itemsize <= _GATHER_BYTES and int(flat_ids.max()) < params.num_experts:
            inputs = x if top_k == 1 else x.repeat_interleave(top_k, 0)
            if params.weight_on_input:
                inputs = (inputs * weights).to(params.round_dtype)
            out = _gathered(inputs, flat_ids, up, down, up_bias, down_bias, params)
        else:
            out = _looped(x, flat_ids, weights, top_k, up, down, up_bias, down_bias, params)
        out = out.to(params.accum_dtype)
        if not params.weight_on_input:
            out = out * weights.to(params.accum_dtype)
        if top_k > 1:
            out = out.view(tokens, top_k, -1).sum(1)
        return out.to(result_dtype)

    def grouped_linear(
        self,
        x: Tensor,
        offsets: Tensor,
        weight: Sequence[Tensor],
        n: int,
        round_dtype: torch.dtype,
        layout: str,
    ) -> Tensor:
        out = x.new_zeros((x.shape[0], n), dtype=round_dtype)
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                w = _dequantize(weight[0][expert], weight[1][expert], x.shape[1], x.dtype)
                out[start:end] = linear(x[start:end], w)
            start = max(start, end)
        return out


def _gathered(
    inputs: Tensor,
    ids: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    params: MoEParams,
) -> Tensor:
    """inputs [S, H], ids [S] -> [S, H]; every pair brings its own copy of its expert."""
    dtype = inputs.dtype
    w = _dequantize(up[0].index_select(0, ids), up[1].index_select(0, ids), params.hidden, dtype)
    y = torch.bmm(w, inputs.unsqueeze(-1)).squeeze(-1)
    if up_bias is not None:
        y = y + up_bias.index_select(0, ids).to(dtype)
    h = params.activate(y)
    w = _dequantize(down[0].index_select(0, ids), down[1].index_select(0, ids), params.intermediate, dtype)
    y = torch.bmm(w, h.unsqueeze(-1)).squeeze(-1)
    return y if down_bias is None else y + down_bias.index_select(0, ids).to(dtype)


def _looped(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    top_k: int,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    params: MoEParams,
) -> Tensor:
    """x [T, H], ids [S] -> [S, H] in the pairs' order; rows of ids >= E are zero."""
    sorted_ids, order = ids.sort(stable=True)
    experts, counts = sorted_ids.unique_consecutive(return_counts=True)
    out = x.new_zeros((ids.shape[0], params.hidden))
    start = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        rows = order[start : start + count]
        start += count
        if expert >= params.num_experts:
            continue
        inputs = x.index_select(0, rows // top_k)
        if params.weight_on_input:
            inputs = (inputs * weights.index_select(0, rows)).to(params.round_dtype)
        w = _dequantize(up[0][expert], up[1][expert], params.hidden, x.dtype)
        y = linear(inputs, w)
        if up_bias is not None:
            y = y + up_bias[expert].to(y.dtype)
        h = params.activate(y)
        w = _dequantize(down[0][expert], down[1][expert], params.intermediate, x.dtype)
        y = linear(h, w)
        out[rows] = y if down_bias is None else y + down_bias[expert].to(y.dtype)
    return out


BACKEND = CpuBackend()
