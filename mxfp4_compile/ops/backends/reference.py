"""The reference backend: the specification of both ops in plain torch.

Projections accumulate in fp32 (fp64 for fp64 tokens) and round where the original model rounds: after
each projection, after its bias, after the activation, after weighting; the sum over a token's experts
is taken in ``accum_dtype``. Only experts that are hit are dequantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import mx
from ..arguments import LinearInputs, MoEInputs
from ..backend import Backend, Requirement, check_activation_dtype, check_parallel
from ..target import Request, Target


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_ids(topk_ids: Tensor) -> None:
    if topk_ids.numel() and int(topk_ids.min()) < 0:
        raise IndexError(f"topk_ids holds {int(topk_ids.min())}: expert ids must be >= 0")


@dataclass(frozen=True)
class _Projection:
    """Canonical weights (packed [E, N, K/2], scales), a bias [E, N] or None, and the dtype that results round to."""

    weight: Sequence[Tensor]
    bias: Tensor | None
    round_dtype: torch.dtype

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """x [r, K] (wide dtype) -> [r, N], rounded as the model rounds, wide."""
        packed, scales = self.weight
        y = (x @ mx.dequantize(packed[expert], scales[expert], x.shape[1], x.dtype).T).to(self.round_dtype)
        if self.bias is not None:
            y = y + self.bias[expert].to(self.round_dtype)
        return y.to(x.dtype)


class ReferenceBackend(Backend):
    """Plain torch on any device; correct, not quick."""

    name = "reference"

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        meta = target.arch == "meta"
        return [
            Requirement("device", not meta, f"{target.arch} has {'no ' * meta}data"),
            check_activation_dtype(request, "bf16"),
            check_parallel(request),
        ]

    def moe(self, inputs: MoEInputs) -> Tensor:
        x, params = inputs.x, inputs.params
        _check_ids(inputs.topk_ids)
        tokens, top_k = inputs.topk_ids.shape
        wide = _wide(x.dtype)
        rounded = params.round_dtype
        pairs = x.new_zeros((tokens * top_k, params.hidden), dtype=params.accum_dtype)
        flat_ids = inputs.topk_ids.reshape(-1)
        flat_weights = inputs.topk_weights.reshape(-1)
        up = _Projection(inputs.up, inputs.up_bias, rounded)
        down = _Projection(inputs.down, inputs.down_bias, rounded)
        for expert in flat_ids.unique().tolist():
            if expert >= params.num_experts:
                continue
            rows = (flat_ids == expert).nonzero().squeeze(1)
            weight = flat_weights[rows].unsqueeze(1)
            seen = x[rows // top_k]
            if params.weight_on_input:
                seen = (seen * weight).to(rounded)
            hidden = params.activate(up(seen.to(wide), expert)).to(rounded).to(wide)
            out = down(hidden, expert).to(params.accum_dtype)
            pairs[rows] = out if params.weight_on_input else out * weight.to(params.accum_dtype)
        return pairs.view(tokens, top_k, params.hidden).sum(1).to(x.dtype)

    def gradient_dtype(self, dtype: torch.dtype, round_dtype: torch.dtype) -> torch.dtype:
        """Gradients are the specification, too: as wide as the forward's products."""
        return _wide(dtype)

    def grouped_linear(self, inputs: LinearInputs) -> Tensor:
        x, rounded = inputs.x, inputs.round_dtype
        out = x.new_zeros((x.shape[0], inputs.n), dtype=rounded)
        projection = _Projection(inputs.weight, None, rounded)
        for expert, rows in inputs.of_experts():
            out[rows] = projection(x[rows].to(_wide(x.dtype)), expert)
        return out


BACKEND = ReferenceBackend()
