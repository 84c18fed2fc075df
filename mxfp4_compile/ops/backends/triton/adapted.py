"""The steps of a layer with adapters, by the native kernels on prepared weights; nothing waits for the device.

Columns of y are in the order of prepared rows, so that the tiles are read as they lie; what adapters add is arranged
alike.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....spec import MoEParams, Role
from ...adapted import Parts, Rows
from ...backend import current
from . import layout as layouts
from .backward import activation_step, linear_backward_into
from .gradients import activate_rows
from .launch import Step
from .moe import activation_constants, linear_into, power_of_two
from .select import Tiles, architecture, choose_backward


class NativeParts(Parts):
    """``Parts`` of the native backend."""

    def arranged(self, role: Role, rows: Tensor) -> Tensor:
        """[E, N, ...] -> [E, W, ...]: of the up-projection whole slabs."""
        return rows if role == "down" else layouts.rows_to_slabs(rows, self.inputs.slot(role)).flatten(1, 3)

    def restored(self, role: Role, rows: Tensor) -> Tensor:
        """Inverse of ``arranged``."""
        if role == "down":
            return rows
        return layouts.slabs_to_rows(rows.unflatten(1, (-1, 2, 8)), self.params.up_rows, self.inputs.slot(role))

    def project(self, role: Role, rows: Tensor, ends: Tensor) -> Tensor:
        """[S, K] -> [S, W]."""
        weight, bias = self._weight(role)
        out = rows.new_empty((rows.shape[0], self._width(role)), dtype=self.params.round_dtype)
        return linear_into(out, rows, weight, bias, ends, self.inputs.layout)

    def project_backward(self, role: Role, grad: Tensor, ends: Tensor) -> Tensor:
        """[S, W] -> [S, K]."""
        out = grad.new_empty((grad.shape[0], self.params.shape(role)[2]))
        return linear_backward_into(out, grad, ends, self._weight(role)[0], self.inputs.layout, self._tiles(role, grad))

    def activate(self, y: Tensor, rows: Rows) -> Tensor:
        """y [S, W] -> h [S, I]."""
        h = y.new_empty((y.shape[0], self.params.intermediate))
        step, block = _activate_step(self.params, y.dtype)
        if y.shape[0]:
            with current(y.device):
                step((y.shape[0], -(-self.params.intermediate // block), 1), y, rows.ends, h)
        return h

    def through_activation(self, y: Tensor, q: Tensor, grad: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """One kernel: h, the gradient of y, and that of the routing weights."""
        inputs = self.inputs
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        ids, bias = inputs.topk_ids.contiguous(), inputs.down_bias
        weights = None if self.params.weight_on_input else inputs.topk_weights.contiguous()
        dw = torch.zeros(ids.shape, dtype=inputs.topk_weights.dtype, device=ids.device)
        h, dy = torch.empty_like(q), torch.empty_like(y)
        dtypes = tuple(None if t is None else t.dtype for t in (y, q, grad, ids, weights, bias))
        step = _gradient_step(self.params, ids.shape[1], grad.stride(0), dtypes)
        if y.shape[0]:
            order, ends = rows.sorted.order, rows.ends
            with current(y.device):
                step((y.shape[0], 1, 1), q, y, order, ends, weights, ids, grad, bias, dy, dw, h)
        return h, dy, dw

    def _width(self, role: Role) -> int:
        if role == "down":
            return self.params.hidden
        return layouts.slabs(self.params.up_rows, self.params.activation.gated) * layouts.SLAB

    def _tiles(self, role: Role, grad: Tensor) -> Tiles:
        p = self.params
        choice = choose_backward(
            architecture(grad.device), p.num_experts, grad.shape[0], p.hidden * p.intermediate,
            grad.dtype == torch.bfloat16,
        )  # fmt: skip
        return choice.up if role == "up" else choice.down


# The dtypes are part of the keys because a Step's compiled kernel is for one set of them.
@lru_cache(maxsize=1024)
def _activate_step(params: MoEParams, dtype: torch.dtype) -> tuple[Step, int]:  # noqa: ARG001
    block = min(max(power_of_two(params.intermediate), 16), 1024)
    constants = {
        "E": params.num_experts, "SLABS": layouts.slabs(params.up_rows, params.activation.gated),
        "N": params.intermediate, **activation_constants(params), "BLOCK": block,
    }  # fmt: skip
    return Step(activate_rows, constants, 4, 1), block


@lru_cache(maxsize=1024)
def _gradient_step(params: MoEParams, top_k: int, grad_stride: int, dtypes: tuple[Any, ...]) -> Step:  # noqa: ARG001
    return activation_step(params, top_k, grad_stride, False)


__all__ = ["NativeParts"]
