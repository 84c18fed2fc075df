"""Marlin, where vLLM is installed: its fused layer, on weights in Marlin's order.

Not run on hardware by this project. Prepared weights, H filled up to 256 and I to 128, rows [gate; up]::

    codes int32 [e, K/16, 2N]    scales uint8 [e, K/32, N], both permuted in blocks of 64 rows
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..arguments import MoEInputs, Slot
from ..backend import Requirement, check_activation_dtype, check_parallel
from ..library import find
from ..permutations import RowOrder, bias_of_marlin, fold, marlin_bias, marlin_codes, packed_of_marlin, unfold
from ..target import Request, Target
from .fused_layer import FusedLayerBackend, Rounding, check_dtype, check_fused

INSTALL = "pip install vllm"

# Where releases of vLLM keep it, newest first.
_MODULES = (
    "model_executor/layers/fused_moe/experts/marlin_moe.py",
    "model_executor/layers/fused_moe/fused_marlin_moe.py",
)


class MarlinBackend(FusedLayerBackend):
    """vLLM's ``fused_marlin_moe``."""

    name = "marlin"
    rounding = Rounding(256, 128, RowOrder("halves", 0))

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        """vLLM, an NVIDIA GPU with bf16."""
        found = find("vllm", "vllm")
        right = any(found.mentions(m, "def fused_marlin_moe(") for m in _MODULES)
        reason = str(found) if right or found.folder is None else f"{found} has no fused_marlin_moe"
        requirements = [
            Requirement("library", right, reason, "" if right else INSTALL + " -U" * (found.folder is not None)),
            Requirement(
                "device",
                target.sm is not None and target.sm >= 80,
                f"{target.arch}, needs sm_80 or newer: for MXFP4 it has bf16 activations only",
            ),
            check_activation_dtype(request, "bf16"),
            check_parallel(request),
            check_fused(request),
        ]
        if request.params is not None:
            requirements.append(check_dtype(request.params))
        return requirements

    def plan(self, request: Request, target: Target) -> str:
        """One layout."""
        return "marlin"

    def swizzle(self, packed: Tensor, scales: Tensor, slot: Slot) -> list[Tensor]:
        e, n, groups = scales.shape
        return [marlin_codes(packed), fold(scales, *_scale_fold(n, groups)).view(e, groups, n)]

    def unswizzle(self, tensors: Sequence[Tensor], n: int, k: int, slot: Slot) -> tuple[Tensor, Tensor]:
        words, scales = tensors
        plain = unfold(scales, *_scale_fold(n, k // 32)).view(scales.shape[0], n, k // 32)
        return packed_of_marlin(words, n, k), plain

    def swizzle_bias(self, bias: Tensor) -> Tensor:
        return marlin_bias(bias)

    def unswizzle_bias(self, bias: Tensor) -> Tensor:
        return bias_of_marlin(bias)

    def layer(self, inputs: MoEInputs) -> Tensor:
        library = _library()
        params = inputs.params
        activation, inner = params.activation, self.rounding.sizes(params)[1]
        up_bias, down_bias = inputs.biases(inputs.x.dtype)

        def activate(_: Any, output: Tensor, y: Tensor, **__: Any) -> None:
            # The library's own know few constants, and gpt-oss's only on rows in turns.
            output.copy_(activation(y[:, :inner], y[:, inner:] if activation.gated else None))

        kinds = library.MoEActivation
        out: Tensor = library.fused_marlin_moe(
            hidden_states=inputs.x,
            w1=inputs.up[0],
            w2=inputs.down[0],
            bias1=up_bias,
            bias2=down_bias,
            w1_scale=inputs.up[1].view(torch.float8_e8m0fnu),
            w2_scale=inputs.down[1].view(torch.float8_e8m0fnu),
            topk_weights=inputs.topk_weights,
            topk_ids=inputs.topk_ids,
            quant_type_id=library.scalar_types.float4_e2m1f.id,
            apply_router_weight_on_input=params.weight_on_input,
            global_num_experts=params.num_experts,
            activation=kinds.SILU if activation.gated else kinds.SILU_NO_MUL,
            activation_func=activate,
        )
        return out


@lru_cache(maxsize=1)
def _library() -> Any:
    """The module with fused_marlin_moe, MoEActivation and scalar_types."""
    import importlib

    found = find("vllm", "vllm")
    path = next(m for m in _MODULES if found.mentions(m, "def fused_marlin_moe("))
    return importlib.import_module("vllm." + path.removesuffix(".py").replace("/", "."))


def _scale_fold(n: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks of 64 rows transposed as 8x8, then the middle two of each four exchanged."""
    return (n // 64, 2, 2, 2, 8, groups), (5, 0, 4, 1, 3, 2)


BACKEND = MarlinBackend()
