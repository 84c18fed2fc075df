"""The vocabulary every room shares: what a mixture-of-experts site computes.

A spec says everything semantic and nothing about kernels. Imports nothing of ours but the table of activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from . import activations

GateLayout = Literal["none", "halves", "interleaved"]
Role = Literal["up", "down"]

ACTIVATION_KINDS = tuple(activations.FUNCTIONS)


@dataclass(frozen=True)
class Activation:
    """The function between the up- and the down-projection.

    With ``g`` the activated and ``u`` the other half of the up-projection's output::

        gated:      h = f(min(g, gate_limit)) * (clamp(u, -up_limit, up_limit) + beta)
        not gated:  h = f(min(g, gate_limit))

    where ``f`` is the function of ``kind`` in ``activations.FUNCTIONS``. ``alpha`` only enters silu. gpt-oss is silu,
    alpha 1.702, beta 1, both limits 7.
    """

    kind: str
    gated: bool = True
    alpha: float = 1.0
    beta: float = 0.0
    gate_limit: float = math.inf
    up_limit: float = math.inf

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Evaluate in the dtype of ``gate`` (any float); ``up`` has the same shape, or is None if not gated."""
        if math.isfinite(self.gate_limit):
            gate = gate.clamp(max=self.gate_limit)
        out = activations.function(self.kind).value(gate, self.alpha)
        if not self.gated:
            return out
        if up is None:
            raise ValueError("a gated activation needs both halves of the up-projection")
        if math.isfinite(self.up_limit):
            up = up.clamp(-self.up_limit, self.up_limit)
        if self.beta:
            up = up + self.beta
        return out * up

    def gradient(self, gate: Tensor, up: Tensor | None, dh: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``gate`` and ``up`` (None if not gated), given ``dh``, that of the result; all of one shape.

        A clamp passes the gradient up to and at its limit, as torch's does.
        """
        g = gate.clamp(max=self.gate_limit) if math.isfinite(self.gate_limit) else gate
        f, df = activations.function(self.kind).derivative(g, self.alpha)
        if math.isfinite(self.gate_limit):
            df = df * (gate <= self.gate_limit)
        if not self.gated:
            return dh * df, None
        if up is None:
            raise ValueError("a gated activation needs both halves of the up-projection")
        dup = dh * f
        if math.isfinite(self.up_limit):
            dup = dup * (up.abs() <= self.up_limit)
            up = up.clamp(-self.up_limit, self.up_limit)
        return dh * df * (up + self.beta), dup

    def __str__(self) -> str:
        numbers = [
            f"{name}={value:g}"
            for name, value, plain in (
                ("alpha", self.alpha, 1.0),
                ("beta", self.beta, 0.0),
                ("gate_limit", self.gate_limit, math.inf),
                ("up_limit", self.up_limit, math.inf),
            )
            if value != plain
        ]
        form = f"{self.kind}(gate)*up" if self.gated else f"{self.kind}(x)"
        return form + (f" [{', '.join(numbers)}]" if numbers else "")


@dataclass(frozen=True)
class MoEParams:
    """Everything ``mxfp4::moe`` needs besides tensors: the part of a spec that reaches a kernel.

    ``num_experts`` E, ``hidden`` H, ``intermediate`` I (columns of the down-projection; the up-projection
    has 2*I rows when gated, else I). ``activated_half`` is 0 if the first half (or the even rows, when
    interleaved) goes through the activation, else 1. ``weight_on_input`` scales the token before the
    up-projection instead of the expert's output. ``round_dtype`` is the dtype the original model rounds
    each projection to; ``accum_dtype`` the one in which it weights and sums the experts' outputs.
    """

    num_experts: int
    hidden: int
    intermediate: int
    activation: Activation
    gate_layout: GateLayout
    activated_half: int
    weight_on_input: bool
    round_dtype: torch.dtype
    accum_dtype: torch.dtype

    @property
    def up_rows(self) -> int:
        """Rows N of the up-projection weight [E, N, H]."""
        return 2 * self.intermediate if self.activation.gated else self.intermediate

    def shape(self, role: Role) -> tuple[int, int, int]:
        """[E, N, K] of the canonical weight of ``role``."""
        if role == "up":
            return self.num_experts, self.up_rows, self.hidden
        return self.num_experts, self.hidden, self.intermediate

    def split_gate(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., N] up-projection output -> (activated half [..., I], other half [..., I] or None)."""
        if self.gate_layout == "none":
            return y, None
        if self.gate_layout == "halves":
            first, second = y[..., : self.intermediate], y[..., self.intermediate :]
        else:
            first, second = y[..., 0::2], y[..., 1::2]
        return (first, second) if self.activated_half == 0 else (second, first)

    def join_gate(self, activated: Tensor, other: Tensor | None) -> Tensor:
        """Inverse of ``split_gate``: two halves [..., I] -> [..., N]."""
        if other is None:
            return activated
        first, second = (activated, other) if self.activated_half == 0 else (other, activated)
        if self.gate_layout == "halves":
            return torch.cat((first, second), -1)
        return torch.stack((first, second), -1).flatten(-2)

    def activate(self, y: Tensor) -> Tensor:
        """[..., N] up-projection output -> [..., I], in the dtype of ``y``."""
        return self.activation(*self.split_gate(y))


# The scalars of ``mxfp4::moe`` in the order of its signature: fields of Activation, then of MoEParams, each with
# its declaration in the op's schema. A limit that is infinite is None there.
_ACTIVATION_SCALARS = {
    "kind": "str activation",
    "gated": "bool gated",
    "alpha": "float alpha",
    "beta": "float beta",
    "gate_limit": "float? gate_limit",
    "up_limit": "float? up_limit",
}
_MOE_SCALARS = {
    "gate_layout": "str gate_layout",
    "activated_half": "int activated_half",
    "weight_on_input": "bool weight_on_input",
    "num_experts": "int num_experts",
    "hidden": "int hidden",
    "intermediate": "int intermediate",
    "round_dtype": "ScalarType round_dtype",
    "accum_dtype": "ScalarType accum_dtype",
}
MOE_SCALARS = ", ".join([*_ACTIVATION_SCALARS.values(), *_MOE_SCALARS.values()])
"""The scalars as an op's schema declares them."""


def moe_scalars(params: MoEParams) -> tuple[Any, ...]:
    """The scalar arguments of ``mxfp4::moe`` for ``params``, in the order of ``MOE_SCALARS``."""
    of_activation = [getattr(params.activation, name) for name in _ACTIVATION_SCALARS]
    optional = [declared.startswith("float?") for declared in _ACTIVATION_SCALARS.values()]
    finite = [None if o and v == math.inf else v for o, v in zip(optional, of_activation, strict=True)]
    return (*finite, *[getattr(params, name) for name in _MOE_SCALARS])


@lru_cache(maxsize=1024)
def moe_params(*scalars: Any) -> MoEParams:
    """The MoEParams of an op call's scalars; cached, since eager decoding asks once per layer and token."""
    count = len(_ACTIVATION_SCALARS)
    given = dict(zip(_ACTIVATION_SCALARS, scalars[:count], strict=True))
    of_activation: dict[str, Any] = {name: math.inf if value is None else value for name, value in given.items()}
    return MoEParams(activation=Activation(**of_activation), **dict(zip(_MOE_SCALARS, scalars[count:], strict=True)))


@dataclass(frozen=True)
class WeightSource:
    """Where one projection's weight lies in the original module.

    ``parameters``: names within the site, one packed [E, ., .] parameter, or several that are
    concatenated along N (separate gate and up). ``transposed`` is True for [E, K, N] storage.
    ``bias``: names of the [E, N] biases, one per parameter, or empty.
    """

    parameters: tuple[str, ...]
    transposed: bool
    bias: tuple[str, ...] = ()


@dataclass(frozen=True)
class MoESpec:
    """A fused site: ``params`` plus where its weights come from. ``top_k`` is K of topk_ids [T, K]."""

    params: MoEParams
    up: WeightSource
    down: WeightSource
    top_k: int

    def source(self, role: Role) -> WeightSource:
        """The weight source of ``role``."""
        return self.up if role == "up" else self.down

    def __str__(self) -> str:
        p = self.params
        gate = (
            ""
            if p.gate_layout == "none"
            else f", {p.gate_layout}, {'first' if p.activated_half == 0 else 'second'} activated"
        )
        return (
            f"E={p.num_experts} K={self.top_k} H={p.hidden} I={p.intermediate} {p.activation}{gate}"
            f"{', biases' if self.up.bias or self.down.bias else ''}"
            f"{', weight on input' if p.weight_on_input else ''}, rounds to {str(p.round_dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class LinearSpec:
    """One grouped projection of a split site: y[r] = x[r] @ W[expert(r)].T for rows sorted by expert."""

    num_experts: int
    out_features: int
    in_features: int
    source: WeightSource
    round_dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, N, K] of the canonical weight."""
        return self.num_experts, self.out_features, self.in_features


@dataclass(frozen=True)
class SplitSpec:
    """A site whose middle no fused kernel knows: each projection becomes a ``mxfp4::grouped_linear``.

    ``reason`` says which property keeps it from the fused form.
    """

    linears: tuple[LinearSpec, ...]
    reason: str

    def __str__(self) -> str:
        shapes = ", ".join(f"[{s.num_experts},{s.out_features},{s.in_features}]" for s in self.linears)
        return f"split into {len(self.linears)} grouped_linear {shapes}: {self.reason}"


# a part of a site

EMPTY_PART = 32
"""Columns of the module of a rank that has none: one block, of zeros."""

SHARD = "mxfp4_shard"
"""The attribute by which a module tells its ``Shard``: with it, equal modules have equal parts."""


@dataclass(frozen=True)
class Shard:
    """The part of a site's experts that one rank holds.

    kind: "expert" for whole experts, "tensor" for some of each expert's intermediate columns I. ``parts``: from where
    to where, of every rank, in experts or columns. ``group``: the name of the torch.distributed group that sums.
    """

    kind: Literal["expert", "tensor"]
    rank: int
    parts: tuple[tuple[int, int], ...]
    group: str

    @property
    def start(self) -> int:
        """The first expert or column of this rank."""
        return self.parts[self.rank][0]

    @property
    def stop(self) -> int:
        """One past the last."""
        return self.parts[self.rank][1]

    @property
    def whole(self) -> int:
        """Experts or columns of all ranks."""
        return max(stop for _, stop in self.parts)

    @property
    def count(self) -> int:
        """Experts or columns of this rank's module: those of its part, or a block of zeros where it has none."""
        return self.stop - self.start or EMPTY_PART

    def rows(self, params: MoEParams, parameters: int = 1) -> list[slice]:
        """This rank's rows among all of an up-projection that lies in so many parameters, if it holds columns.

        ``params``: of the whole site or of the part, whose row order is the same. Nothing for a rank without columns.
        """
        start, stop, whole = self.start, self.stop, self.whole
        if start == stop:
            return []
        if params.activation.gated and parameters == 1:
            if params.gate_layout == "halves":
                return [slice(start, stop), slice(whole + start, whole + stop)]
            return [slice(2 * start, 2 * stop)]
        return [slice(start, stop)]

    def __str__(self) -> str:
        what = "experts" if self.kind == "expert" else "columns of each expert"
        if self.start == self.stop:
            return f"none of the {self.whole} {what} (rank {self.rank} of {len(self.parts)})"
        return f"{what} {self.start} to {self.stop - 1} of {self.whole} (rank {self.rank} of {len(self.parts)})"
