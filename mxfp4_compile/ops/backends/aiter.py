"""AMD's aiter on gfx950: its fused layer with bf16 activations, which knows gpt-oss's activation only.

Not run on hardware by this project. Prepared weights, H and I filled up to 256, rows [gate; up]::

    codes uint8 [e, N, K/2]    scales uint8 [e, N, K/32], both in the order of its 16x16 tiles
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...spec import Role
from ..arguments import MoEInputs, Slot
from ..backend import Requirement, check_activation_dtype, check_parallel
from ..library import find
from ..permutations import RowOrder, fold, unfold
from ..target import Request, Target
from .fused_layer import GPT_OSS, FusedLayerBackend, Rounding, check_dtype, check_fused, check_weight_on_output

INSTALL = "pip install amd-aiter"


class AiterBackend(FusedLayerBackend):
    """aiter's ``fused_moe`` with 4-bit weights in blocks of 32."""

    name = "aiter"
    rounding = Rounding(256, 256, RowOrder("halves", 0))

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        """aiter, gfx950, gpt-oss's activation (the only one it has for bf16 tokens)."""
        found = find("aiter", "amd-aiter")
        right = found.mentions("ops/shuffle.py", "def shuffle_weight_a16w4(") and found.has("fused_moe.py")
        reason = str(found) if right or found.folder is None else f"{found} has no a16w4 layer, or is another package"
        requirements = [
            Requirement("library", right, reason, "" if right else INSTALL if found.folder is None else ""),
            Requirement("device", target.arch == "gfx950", f"{target.arch}, needs gfx950"),
            check_activation_dtype(request, "bf16"),
            check_parallel(request),
            check_fused(request),
        ]
        p = request.params
        if p is not None:
            requirements += [
                check_dtype(p),
                check_weight_on_output(p),
                Requirement("activation", p.activation == GPT_OSS, f"{p.activation}; offers {GPT_OSS}"),
            ]
        return requirements

    def plan(self, request: Request, target: Target) -> str:
        """One layout."""
        return "a16w4"

    def swizzle(self, packed: Tensor, scales: Tensor, slot: Slot) -> list[Tensor]:
        _, n, k2 = packed.shape
        return [
            fold(packed, *_value_fold(n, k2, slot.role)).view_as(packed),
            fold(scales, *_scale_fold(n, scales.shape[2], slot.role)).view_as(scales),
        ]

    def unswizzle(self, tensors: Sequence[Tensor], n: int, k: int, slot: Slot) -> tuple[Tensor, Tensor]:
        values, scales = tensors
        return (
            unfold(values, *_value_fold(n, k // 2, slot.role)).view_as(values),
            unfold(scales, *_scale_fold(n, k // 32, slot.role)).view_as(scales),
        )

    def layer(self, inputs: MoEInputs) -> Tensor:
        from aiter import ActivationType, QuantType
        from aiter.fused_moe import fused_moe

        def fp4(codes: Tensor) -> Tensor:
            shuffled = codes.view(torch.float4_e2m1fn_x2)
            shuffled.is_shuffled = True  # type: ignore[attr-defined]  # how it knows the order
            return shuffled

        experts, up, down = inputs.params.num_experts, inputs.up, inputs.down
        up_bias, down_bias = inputs.biases(torch.float32)
        out: Tensor = fused_moe(
            inputs.x,
            fp4(up[0]),
            fp4(down[0]),
            inputs.topk_weights,
            inputs.topk_ids,
            activation=ActivationType.Swiglu,
            quant_type=QuantType.per_1x32,
            doweight_stage1=False,
            w1_scale=up[1].reshape(experts * up[1].shape[1], -1),
            w2_scale=down[1].reshape(experts * down[1].shape[1], -1),
            bias1=up_bias,
            bias2=down_bias,
        )
        return out


def _value_fold(n: int, k2: int, role: Role | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """16 rows of 4 x 16 bytes; of the up-projection gate and up tiles in turns."""
    if role == "up":
        return (2, n // 32, 16, k2 // 64, 4, 16), (1, 0, 3, 4, 2, 5)
    return (n // 16, 16, k2 // 64, 4, 16), (0, 2, 3, 1, 4)


def _scale_fold(n: int, groups: int, role: Role | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if role == "up":
        return (2, n // 32, 16, groups // 8, 2, 4), (1, 3, 5, 2, 4, 0)
    return (n // 32, 2, 16, groups // 8, 2, 4), (0, 3, 5, 2, 4, 1)


BACKEND = AiterBackend()
