"""A backend with a layout of its own, to show that nothing else depends on the canonical one."""

from __future__ import annotations

from dataclasses import replace

import torch

from mxfp4_compile.ops.arguments import Slot
from mxfp4_compile.ops.backends.cpu import CpuBackend
from mxfp4_compile.ops.registry import known_backends, register_backend


class ToyBackend(CpuBackend):
    """One tensor per weight, packed bytes and scales side by side and upside down; biases negated."""

    name = "toy"

    def plan(self, request, target):
        return "sideways"

    def prepare(self, packed, scales, slot, *, k):
        assert slot.layout == "sideways"
        return [torch.cat([packed, scales], dim=2).flip(1)]

    def recover(self, tensors, slot, *, n, k):
        whole = tensors[0].flip(1)
        return whole[..., : (k + 1) // 2].contiguous(), whole[..., (k + 1) // 2 :].contiguous()

    def prepare_bias(self, bias, slot):
        return -bias

    def recover_bias(self, bias, slot, *, n):
        return -bias

    def moe(self, inputs):
        weights = {}
        for role in ("up", "down"):
            _, n, k = inputs.params.shape(role)
            weights[role] = self.recover(getattr(inputs, role), inputs.slot(role), n=n, k=k)
            bias = getattr(inputs, f"{role}_bias")
            weights[f"{role}_bias"] = None if bias is None else -bias
        return super().moe(replace(inputs, **weights, layout="canonical"))

    def grouped_linear(self, inputs):
        slot = Slot(None, None, inputs.layout)
        weight = self.recover(inputs.weight, slot, n=inputs.n, k=inputs.x.shape[1])
        return super().grouped_linear(replace(inputs, weight=weight, layout="canonical"))


def register() -> str:
    if "toy" not in known_backends():
        register_backend(ToyBackend())
    return "toy"
