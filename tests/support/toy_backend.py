"""A backend with a layout of its own, to show that nothing else depends on the canonical one."""

from __future__ import annotations

import torch

from mxfp4_compile.ops.backends.cpu import CpuBackend
from mxfp4_compile.ops.registry import known_backends, register_backend


class ToyBackend(CpuBackend):
    """One tensor per weight, packed bytes and scales side by side and upside down; biases negated."""

    name = "toy"

    def plan(self, request, target):
        return "sideways"

    def prepare(self, packed, scales, *, k, role, params, layout):
        assert layout == "sideways"
        return [torch.cat([packed, scales], dim=2).flip(1)]

    def recover(self, tensors, *, n, k, role, params, layout):
        whole = tensors[0].flip(1)
        return whole[..., : (k + 1) // 2].contiguous(), whole[..., (k + 1) // 2 :].contiguous()

    def prepare_bias(self, bias, *, role, params, layout):
        return -bias

    def recover_bias(self, bias, *, n, role, params, layout):
        return -bias

    def moe(self, x, topk_ids, topk_weights, up, down, up_bias, down_bias, params, layout):
        up = self.recover(up, n=params.up_rows, k=params.hidden, role="up", params=params, layout=layout)
        down = self.recover(down, n=params.hidden, k=params.intermediate, role="down", params=params, layout=layout)
        up_bias = None if up_bias is None else -up_bias
        down_bias = None if down_bias is None else -down_bias
        return super().moe(x, topk_ids, topk_weights, up, down, up_bias, down_bias, params, "canonical")

    def grouped_linear(self, x, offsets, weight, n, round_dtype, layout):
        weight = self.recover(weight, n=n, k=x.shape[1], role=None, params=None, layout=layout)
        return super().grouped_linear(x, offsets, weight, n, round_dtype, "canonical")


def register() -> str:
    if "toy" not in known_backends():
        register_backend(ToyBackend())
    return "toy"
