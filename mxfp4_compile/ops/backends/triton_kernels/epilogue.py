"""The activations of ``spec.Activation`` as epilogues of triton_kernels' matrix product.

Its own ``swiglu_fn`` is gpt-oss's alone. Constants are run-time arguments, so that one compiled kernel
serves every limit; infinite limits pass everything.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..triton.activation import function

ARGUMENTS = ("act_alpha", "act_beta", "act_gate_limit", "act_up_limit")


@triton.jit
def _gated(x, alpha, beta, gate_limit, up_limit, KIND: tl.constexpr):
    """x [M, 2N], columns gate and up in turns -> [M, N]."""
    gate, up = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    up = tl.where(up > up_limit, up_limit, tl.where(up < -up_limit, -up_limit, up))
    return function(gate, alpha, gate_limit, KIND) * (up + beta)


@triton.jit
def silu_gated(x, alpha, beta, gate_limit, up_limit):
    return _gated(x, alpha, beta, gate_limit, up_limit, "silu")


@triton.jit
def gelu_gated(x, alpha, beta, gate_limit, up_limit):
    return _gated(x, alpha, beta, gate_limit, up_limit, "gelu")


@triton.jit
def gelu_tanh_gated(x, alpha, beta, gate_limit, up_limit):
    return _gated(x, alpha, beta, gate_limit, up_limit, "gelu_tanh")


@triton.jit
def relu_gated(x, alpha, beta, gate_limit, up_limit):
    return _gated(x, alpha, beta, gate_limit, up_limit, "relu")


@triton.jit
def relu2_gated(x, alpha, beta, gate_limit, up_limit):
    return _gated(x, alpha, beta, gate_limit, up_limit, "relu2")


@triton.jit
def silu_plain(x, alpha, beta, gate_limit, up_limit):
    return function(x.to(tl.float32), alpha, gate_limit, "silu")


@triton.jit
def gelu_plain(x, alpha, beta, gate_limit, up_limit):
    return function(x.to(tl.float32), alpha, gate_limit, "gelu")


@triton.jit
def gelu_tanh_plain(x, alpha, beta, gate_limit, up_limit):
    return function(x.to(tl.float32), alpha, gate_limit, "gelu_tanh")


@triton.jit
def relu_plain(x, alpha, beta, gate_limit, up_limit):
    return function(x.to(tl.float32), alpha, gate_limit, "relu")


@triton.jit
def relu2_plain(x, alpha, beta, gate_limit, up_limit):
    return function(x.to(tl.float32), alpha, gate_limit, "relu2")


EPILOGUES: dict[tuple[str, bool], Any] = {
    ("silu", True): silu_gated,
    ("gelu", True): gelu_gated,
    ("gelu_tanh", True): gelu_tanh_gated,
    ("relu", True): relu_gated,
    ("relu2", True): relu2_gated,
    ("silu", False): silu_plain,
    ("gelu", False): gelu_plain,
    ("gelu_tanh", False): gelu_tanh_plain,
    ("relu", False): relu_plain,
    ("relu2", False): relu2_plain,
}
