"""A backend in a package of its own: the cpu one with the rows of every weight upside down."""

from __future__ import annotations

from dataclasses import replace

from mxfp4_compile.ops.backends.cpu import CpuBackend


class ExampleBackend(CpuBackend):
    """``automatic``: "auto" may choose it, after this library's own and before the reference."""

    name = "example"
    automatic = True

    def plan(self, request, target):
        return "upside-down"

    def prepare(self, packed, scales, slot, *, k):
        return [packed.flip(1), scales.flip(1)]

    def recover(self, tensors, slot, *, n, k):
        return tensors[0].flip(1), tensors[1].flip(1)

    def moe(self, inputs):
        up, down = [[t.flip(1) for t in w] for w in (inputs.up, inputs.down)]
        return super().moe(replace(inputs, up=up, down=down, layout="canonical"))

    def grouped_linear(self, inputs):
        return super().grouped_linear(replace(inputs, weight=[t.flip(1) for t in inputs.weight], layout="canonical"))
