"""One MoE layer with random weights and tokens, for benchmarks and for tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import mx
from ..spec import Activation, MoEParams, Role
from .arguments import MoEInputs, Slot
from .backend import Backend
from .target import Request, Target

# Bytes of packed weights that are prepared at a time: what a layout needs beside them is several times as much.
_PREPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class LayerShape:
    """A layer by its sizes: E experts, K of them for each token, hidden size H, intermediate size I.

    ``gated`` and ``biased`` are silu(gate) * up against silu(x), and whether both projections have biases;
    ``dtype`` is that of the tokens and of every rounding.
    """

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    gated: bool = True
    biased: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if min(self.sizes) < 1 or self.top_k > self.num_experts:
            raise ValueError(f"E,K,H,I = {self.sizes}: all must be at least 1, and K no more than E")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(E, K, H, I)."""
        return self.num_experts, self.top_k, self.hidden, self.intermediate

    @property
    def params(self) -> MoEParams:
        """What ``mxfp4::moe`` needs to know of it."""
        return MoEParams(
            self.num_experts,
            self.hidden,
            self.intermediate,
            Activation("silu", self.gated),
            "halves" if self.gated else "none",
            0,
            False,
            self.dtype,
            self.dtype,
        )

    @property
    def request(self) -> Request:
        """What such a site asks of a backend."""
        return Request(self.params, biases=self.biased)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        extra = ("" if self.gated else ", not gated") + (", biases" if self.biased else "")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"E={self.num_experts} K={self.top_k} H={self.hidden} I={self.intermediate}, {dtype}{extra}"


def parse_shape(text: str) -> LayerShape:
    """ "128,8,2048,768" -> the silu layer of these E, K, H, I; ValueError says what is wrong."""
    parts = [p.strip() for p in text.split(",")]
    if len(parts) != 4 or not all(p.isdecimal() for p in parts):
        raise ValueError(f"{text!r} is not a shape E,K,H,I (experts, experts per token, hidden, intermediate size)")
    experts, top_k, hidden, intermediate = map(int, parts)
    return LayerShape(experts, top_k, hidden, intermediate)


QWEN3_30B_A3B = LayerShape(128, 8, 2048, 768)


@dataclass(frozen=True)
class Layer:
    """Canonical random weights of a shape: (packed, scales) and, where it has biases, [E, N] of each projection."""

    shape: LayerShape
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True)
class Prepared:
    """A layer's weights and biases as a backend's ``moe`` takes them."""

    up: Sequence[Tensor]
    down: Sequence[Tensor]
    up_bias: Tensor | None
    down_bias: Tensor | None
    layout: str


@dataclass(frozen=True)
class Inputs:
    """x [T, H], topk_ids int64 [T, K], topk_weights [T, K] in x's dtype."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    @property
    def experts_hit(self) -> int:
        """Experts with at least one pair."""
        return int(self.ids.unique().numel())


def random_layer(shape: LayerShape, device: torch.device, seed: int = 0) -> Layer:
    """Random codes, and scales that keep a layer's outputs near the size of its inputs."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(role: Role) -> tuple[Tensor, Tensor]:
        e, n, k = shape.params.shape(role)
        packed = torch.randint(0, 256, (e, n, -(-k // 2)), generator=generator, dtype=torch.uint8, device=device)
        if k % 2:
            packed[..., -1] &= 0xF
        exponent = 126 - int(math.log2(k) / 2)
        size = (e, n, -(-k // mx.BLOCK))
        scales = torch.randint(exponent - 2, exponent + 1, size, generator=generator, dtype=torch.uint8, device=device)
        return packed, scales

    def bias(role: Role) -> Tensor | None:
        e, n, _ = shape.params.shape(role)
        return torch.randn((e, n), generator=generator, device=device).to(shape.dtype) if shape.biased else None

    return Layer(shape, weight("up"), weight("down"), bias("up"), bias("down"))


def prepare(layer: Layer, backend: Backend, device: torch.device) -> Prepared:
    """The layer in the layout that ``backend`` plans for it, a few experts at a time."""
    params = layer.shape.params
    layout = backend.plan(layer.shape.request, Target.of(device))

    def weight(role: Role, packed: Tensor, scales: Tensor) -> list[Tensor]:
        slot, k = Slot(role, params, layout), params.shape(role)[2]
        count = max(_PREPARE_BYTES // packed[0].numel(), 1)
        parts = [
            backend.prepare(p, s, slot, k=k) for p, s in zip(packed.split(count), scales.split(count), strict=True)
        ]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def bias(role: Role, values: Tensor | None) -> Tensor | None:
        return None if values is None else backend.prepare_bias(values, Slot(role, params, layout))

    return Prepared(
        weight("up", *layer.up),
        weight("down", *layer.down),
        bias("up", layer.up_bias),
        bias("down", layer.down_bias),
        layout,
    )


def random_inputs(shape: LayerShape, tokens: int, device: torch.device, experts: int | None = None) -> Inputs:
    """Uniform routing over the first ``experts`` experts (default all) and weights of sum one; equal for equal T."""
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn((tokens, shape.hidden), generator=generator, device=device).to(shape.dtype)
    among = torch.rand((tokens, experts or shape.num_experts), generator=generator, device=device)
    weights, ids = among.topk(shape.top_k, -1)
    return Inputs(x, ids, (weights / weights.sum(-1, keepdim=True)).to(shape.dtype))


def moe_inputs(shape: LayerShape, prepared: Prepared, inputs: Inputs) -> MoEInputs:
    """The call of a backend's ``moe`` on it."""
    p = prepared
    return MoEInputs(inputs.x, inputs.ids, inputs.weights, p.up, p.down, p.up_bias, p.down_bias, shape.params, p.layout)


def call(backend: Backend, shape: LayerShape, prepared: Prepared, inputs: Inputs) -> Tensor:
    """``backend.moe`` on it: [T, H]."""
    return backend.moe(moe_inputs(shape, prepared, inputs))
