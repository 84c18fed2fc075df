"""What the adapters of ready-made fused layers share: padding, routing without sentinels, per-expert constants."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_last

from ...spec import Activation, MoEParams, Role
from ..backend import Backend, Requirement
from ..permutations import arrange_rows, pad, recover_rows, round_up
from ..target import Request

GPT_OSS = Activation("silu", alpha=1.702, beta=1.0, gate_limit=7.0, up_limit=7.0)


@dataclass(frozen=True)
class Rounding:
    """Multiples that H and I are filled up to, and the rows of a gated up-projection as the kernel reads them.

    ``layout`` and ``activated`` as in ``refold.arrange_rows``; ``scale``: the byte that fills up scales.
    """

    hidden: int
    intermediate: int
    layout: str
    activated: int
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
    def swizzle(self, packed: Tensor, scales: Tensor, role: Role, params: MoEParams, layout: str) -> list[Tensor]:
        """Arranged and padded packed [e, N, K/2], scales [e, N, K/32] -> prepared weights."""

    @abstractmethod
    def unswizzle(
        self, tensors: Sequence[Tensor], n: int, k: int, role: Role, params: MoEParams, layout: str
    ) -> tuple[Tensor, Tensor]:
        """Inverse of ``swizzle``; ``n``, ``k`` are the padded sizes."""

    def swizzle_bias(self, bias: Tensor, role: Role, params: MoEParams) -> Tensor:
        """Arranged and padded bias [e, N] -> as the kernel reads it, same dtype."""
        return bias

    def unswizzle_bias(self, bias: Tensor, role: Role, params: MoEParams) -> Tensor:
        """Inverse of ``swizzle_bias``."""
        return bias

    @abstractmethod
    def layer(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        params: MoEParams,
        layout: str,
    ) -> Tensor:
        """x bf16 [T, H padded] contiguous, ids int32 [T, K] in [0, E), weights fp32 [T, K] -> [T, H padded]."""

    def prepare(
        self, packed: Tensor, scales: Tensor, *, k: int, role: Role | None, params: MoEParams | None, layout: str
    ) -> list[Tensor]:
        """[codes, scales] in the library's order."""
        role, params = self._fused(role, params)
        _, columns = self._padded(role, params)
        value = self.rounding.scale
        packed = pad(self._arrange(packed, role, params, 0), 2, columns // 2)
        scales = pad(self._arrange(scales, role, params, value), 2, columns // 32, value)
        return self.swizzle(packed, scales, role, params, layout)

    def recover(
        self, tensors: Sequence[Tensor], *, n: int, k: int, role: Role | None, params: MoEParams | None, layout: str
    ) -> tuple[Tensor, Tensor]:
        """Prepared -> canonical, bit for bit."""
        role, params = self._fused(role, params)
        packed, scales = self.unswizzle(tensors, *self._padded(role, params), role, params, layout)
        back = {"layout": self.rounding.layout, "activated": self.rounding.activated}
        return (
            recover_rows(packed[:, :, : (k + 1) // 2], n, role, params, **back),  # type: ignore[arg-type]
            recover_rows(scales[:, :, : -(-k // 32)], n, role, params, **back),  # type: ignore[arg-type]
        )

    def prepare_bias(self, bias: Tensor, *, role: Role | None, params: MoEParams | None, layout: str) -> Tensor:
        """[e, N] -> [e, N padded] in the library's order; cast in the call."""
        role, params = self._fused(role, params)
        return self.swizzle_bias(self._arrange(bias, role, params, 0), role, params)

    def recover_bias(self, bias: Tensor, *, n: int, role: Role | None, params: MoEParams | None, layout: str) -> Tensor:
        """Inverse of ``prepare_bias``."""
        role, params = self._fused(role, params)
        rounding = self.rounding
        plain = self.unswizzle_bias(bias, role, params)
        return recover_rows(plain, n, role, params, layout=rounding.layout, activated=rounding.activated)

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
        """x [T, H] bf16 -> [T, H]; no host synchronization."""
        if topk_ids.numel() == 0:
            return torch.zeros_like(x)
        ids, weights = without_sentinels(topk_ids, topk_weights, params.num_experts)
        hidden = params.hidden
        inputs = pad_last(x, (0, self.rounding.sizes(params)[0] - hidden)).to(torch.bfloat16).contiguous()
        out = self.layer(inputs, ids, weights, up, down, up_bias, down_bias, params, layout)
        return out[:, :hidden].to(x.dtype).contiguous()

    def grouped_linear(
        self, x: Tensor, offsets: Tensor, weight: Sequence[Tensor], n: int, round_dtype: torch.dtype, layout: str
    ) -> Tensor:
        raise NotImplementedError(f"backend {self.name!r} computes whole MoE layers only")

    def _arrange(self, x: Tensor, role: Role, params: MoEParams, value: int) -> Tensor:
        rounding = self.rounding
        multiple = rounding.intermediate if role == "up" else rounding.hidden
        return arrange_rows(
            x, role, params, layout=rounding.layout, activated=rounding.activated, multiple=multiple, value=value
        )

    def _padded(self, role: Role, params: MoEParams) -> tuple[int, int]:
        """(rows, columns) of a projection as stored."""
        hidden, inner = self.rounding.sizes(params)
        return (2 * inner if params.activation.gated else inner, hidden) if role == "up" else (hidden, inner)

    def _fused(self, role: Role | None, params: MoEParams | None) -> tuple[Role, MoEParams]:
        if role is None or params is None:
            raise NotImplementedError(f"backend {self.name!r} computes whole MoE layers only")
        return role, params


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
