"""The functions f of an activation, one row each: formula, derivative, and C++ for kernels that are compiled from it.

A row is all that matching, the reference, the CPU, gradients and humming need. Triton spells the same functions once,
in ``ops/backends/triton/activation.py``, for the native kernels and for triton_kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Function:
    """One f: R -> R, element by element, in the dtype of its argument g (any float, any shape).

    ``value``: (g, alpha) -> f(g). ``derivative``: (g, alpha) -> (f(g), f'(g)). ``cpp``: f of the float ``{a}`` as an
    expression, with ``{alpha}`` where it counts. ``alpha`` is a number of silu alone: the others take and ignore it.
    """

    value: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], tuple[Tensor, Tensor]]
    cpp: str


def _silu(g: Tensor, alpha: float) -> Tensor:
    # F.silu is one fused pass where alpha allows it.
    return F.silu(g) if alpha == 1.0 else g * torch.sigmoid(g * alpha)


def _silu_derivative(g: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(g * alpha)
    return g * s, s * (1 + alpha * g * (1 - s))


def _gelu_derivative(g: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
    return g * cdf, cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)


def _gelu_tanh_derivative(g: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    c, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (g + cubic * g**3))
    return 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * cubic * g * g)


# silu: g * sigmoid(alpha * g). gelu: the exact one. gelu_tanh: its tanh form. relu2: relu squared.
FUNCTIONS: dict[str, Function] = {
    "silu": Function(_silu, _silu_derivative, "({a} / (1.0f + __expf(-{alpha}f * {a})))"),
    "gelu": Function(
        lambda g, alpha: F.gelu(g), _gelu_derivative, "(0.5f * {a} * (1.0f + erff({a} * 0.7071067811865476f)))"
    ),
    "gelu_tanh": Function(
        lambda g, alpha: F.gelu(g, approximate="tanh"),
        _gelu_tanh_derivative,
        # 0.5 * (1 + tanh(z)) is sigmoid(2z).
        "({a} / (1.0f + __expf(-1.5957691216057308f * {a} * (1.0f + 0.044715f * {a} * {a}))))",
    ),
    "relu": Function(
        lambda g, alpha: g.relu(), lambda g, alpha: (g.relu(), (g > 0).to(g.dtype)), "({a} < 0.0f ? 0.0f : {a})"
    ),
    "relu2": Function(
        lambda g, alpha: g.relu().square(),
        lambda g, alpha: (g.relu().square(), 2 * g.relu()),
        "({a} < 0.0f ? 0.0f : {a} * {a})",
    ),
}


def function(kind: str) -> Function:
    """The row of a kind; ValueError, with the known ones, for another."""
    found = FUNCTIONS.get(kind)
    if found is None:
        raise ValueError(f"unknown activation kind {kind!r}; known: {', '.join(FUNCTIONS)}")
    return found
