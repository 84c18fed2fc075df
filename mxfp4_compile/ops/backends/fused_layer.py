"""What the adapters of ready-made fused layers share: padding, routing without sentinels, per-expert constants."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_last

from ...spec import Activation, MoEParams
from ..arguments import LinearInputs, MoEInputs, Slot
from ..backend import Backend, Requirement
from ..permutations import RowOrder, arrange_rows, pad, recover_rows, round_up
from ..target import Request

GPT_OSS = Activation("silu", alpha=1.702, beta=1.0, gate_limit=7.0, up_limit=7.0)


@dataclass(frozen=True)
class Rounding:
    """Multiples that H and I are filled up to, the rows of a gated up-projection, and the byte that fills up scales."""

    hidden: int
    intermediate: int
    rows: RowOrder
    scale: int = 0

    def sizes(self, params: MoEParams) -> tuple[int, int]:
        """(H, I) filled up."""
        return round_up(params.hidden, self.hidden), round_up(params.intermediate, self.intermediate)


class FusedLayerBackend(Backend):
    """A library that computes a whole MoE layer from finished ids and weights.

    Subclasses say how rows are ordered and filled up (``rounding``), permute padded weights, and call the
    library on padded tokens. No grouped_linear.
    """

    rounding: Rounding

    @abstractmethod
    def swizzle(self, packed: Tensor, scales: Tensor, slot: Slot) -> list[Tensor]:
        """Arranged and padded packed [e, N, K/2], scales [e, N, K/32] -> prepared weights."""

    @abstractmethod
    def unswizzle(self, tensors: Sequence[Tensor], n: int, k: int, slot: Slot) -> tuple[Tensor, Tensor]:
        """Inverse of ``swizzle``; ``n``, ``k`` are the padded sizes."""

    def swizzle_bias(self, bias: Tensor) -> Tensor:
        """Arranged and padded bias [e, N] -> as the kernel reads it, same dtype."""
        return bias

    def unswizzle_bias(self, bias: Tensor) -> Tensor:
        """Inverse of ``swizzle_bias``."""
        return bias

    @abstractmethod
    def layer(self, inputs: MoEInputs) -> Tensor:
        """-> [T, H padded]. Of ``inputs`` x is bf16 [T, H padded] contiguous, ids int32 in [0, E), weights fp32."""

    def prepare(self, packed: Tensor, scales: Tensor, slot: Slot, *, k: int) -> list[Tensor]:
        """[codes, scales] in the library's order."""
        _, columns = self._padded(slot)
        value = self.rounding.scale
        packed = pad(self._arrange(packed, slot, 0), 2, columns // 2)
        scales = pad(self._arrange(scales, slot, value), 2, columns // 32, value)
        return self.swizzle(packed, scales, slot)

    def recover(self, tensors: Sequence[Tensor], slot: Slot, *, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Prepared -> canonical, bit for bit."""
        packed, scales = self.unswizzle(tensors, *self._padded(slot), slot)
        rows = self.rounding.rows
        return (
            recover_rows(packed[:, :, : (k + 1) // 2], n, slot, rows),
            recover_rows(scales[:, :, : -(-k // 32)], n, slot, rows),
        )

    def prepare_bias(self, bias: Tensor, slot: Slot) -> Tensor:
        """[e, N] -> [e, N padded] in the library's order; cast in the call."""
        return self.swizzle_bias(self._arrange(bias, slot, 0))

    def recover_bias(self, bias: Tensor, slot: Slot, *, n: int) -> Tensor:
        """Inverse of ``prepare_bias``."""
        return recover_rows(self.unswizzle_bias(bias), n, slot, self.rounding.rows)

    def moe(self, inputs: MoEInputs) -> Tensor:
        """x [T, H] bf16 -> [T, H]; no host synchronization."""
        x, hidden = inputs.x, inputs.params.hidden
        if inputs.topk_ids.numel() == 0:
            return torch.zeros_like(x)
        ids, weights = without_sentinels(inputs.topk_ids, inputs.topk_weights, inputs.params.num_experts)
        padded = pad_last(x, (0, self.rounding.sizes(inputs.params)[0] - hidden)).to(torch.bfloat16).contiguous()
        out = self.layer(replace(inputs, x=padded, topk_ids=ids, topk_weights=weights))
        return out[:, :hidden].to(x.dtype).contiguous()

    def grouped_linear(self, inputs: LinearInputs) -> Tensor:
        raise NotImplementedError(f"backend {self.name!r} computes whole MoE layers only")

    def _arrange(self, x: Tensor, slot: Slot, value: int) -> Tensor:
        multiple = self.rounding.intermediate if slot.role == "up" else self.rounding.hidden
        return arrange_rows(x, slot, self.rounding.rows, multiple, value)

    def _padded(self, slot: Slot) -> tuple[int, int]:
        """(rows, columns) of a projection as stored."""
        if slot.params is None:
            raise NotImplementedError(f"backend {self.name!r} computes whole MoE layers only")
        hidden, inner = self.rounding.sizes(slot.params)
        return (2 * inner if slot.gated else inner, hidden) if slot.role == "up" else (hidden, inner)


def without_sentinels(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids int32 and weights fp32 in which a pair whose id is no expert is expert 0 with weight 0."""
    ok = (topk_ids >= 0) & (topk_ids < num_experts)
    return torch.where(ok, topk_ids, 0).int(), torch.where(ok, topk_weights, 0).float()


def check_fused(request: Request) -> Requirement:
    """A fused layer has no grouped_linear."""
    split = request.params is None and bool(request.shapes)
    return Requirement("fused", not split, "computes whole MoE layers; this site is split around a middle of its own")


def check_dtype(params: MoEParams) -> Requirement:
    """bf16 models only."""
    return Requirement("dtype", params.round_dtype == torch.bfloat16, f"{params.round_dtype}; offered for bf16")


def check_weight_on_output(params: MoEParams) -> Requirement:
    """Routing weights that scale the experts' output."""
    return Requirement("weight_on_output", not params.weight_on_input, "routing weights scale the experts' output only")


def swiglu_constants(params: MoEParams, device: torch.device) -> dict[str, Any]:
    """alpha, beta and limit, fp32 [E] each; None where they are those of plain silu.

    Made anew in every call: a tensor kept from one could belong to a CUDA graph.
    """
    act = params.activation

    def per_expert(value: float) -> Tensor:
        return torch.full((params.num_experts,), value, dtype=torch.float32, device=device)

    plain = act.alpha == 1.0 and act.beta == 0.0
    limited = act.gate_limit != float("inf")
    return {
        "alpha": None if plain else per_expert(act.alpha),
        "beta": None if plain else per_expert(act.beta),
        "limit": per_expert(act.gate_limit) if limited else None,
    }


def check_swiglu(params: MoEParams) -> Requirement:
    """silu of one half times the other, with one limit for both: what these libraries call swiglu."""
    act = params.activation
    met = act.kind == "silu" and act.gated and act.gate_limit == act.up_limit
    return Requirement("activation", met, f"{act}; offers silu(gate)*up with alpha, beta and one limit for both halves")


def check_swiglu_layer(request: Request) -> list[Requirement]:
    """A bf16 layer of one piece with that activation, whose routing weights scale the experts' output."""
    p = request.params
    own = [] if p is None else [check_dtype(p), check_swiglu(p), check_weight_on_output(p)]
    return [check_fused(request), *own]
