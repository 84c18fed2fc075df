"""The activations of ``spec.Activation`` inside kernels, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def function(gate, alpha, gate_limit, KIND: tl.constexpr):
    """f(min(gate, gate_limit)). A limit that is infinite is None, or an argument that passes everything."""
    # `where` rather than minimum: NaN passes through, as it does in torch.clamp.
    if gate_limit is not None:
        gate = tl.where(gate > gate_limit, gate_limit, gate)
    if KIND == "silu":
        out = gate / (1.0 + tl.exp(-alpha * gate))
    elif KIND == "gelu":
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2z), without the cancellation.
        z = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
        out = gate / (1.0 + tl.exp(-z))
    elif KIND == "relu":
        out = tl.where(gate < 0.0, 0.0, gate)
    else:
        tl.static_assert(KIND == "relu2")
        out = tl.where(gate < 0.0, 0.0, gate)
        out = out * out
    return out


@triton.jit
def activate(
    gate,
    up,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
):
    """f(min(gate, GATE_LIMIT)) * (clamp(up, -UP_LIMIT, UP_LIMIT) + BETA); limits are None if infinite."""
    out = function(gate, ALPHA, GATE_LIMIT, KIND)
    if GATED:
        if UP_LIMIT is not None:
            up = tl.where(up > UP_LIMIT, UP_LIMIT, tl.where(up < -UP_LIMIT, -UP_LIMIT, up))
        out = out * (up + BETA)
    return out


@triton.jit
def _derivative(gate, alpha, KIND: tl.constexpr):
    """(f, f') of ``gate``."""
    if KIND == "silu":
        s = 1.0 / (1.0 + tl.exp(-alpha * gate))
        f = gate * s
        df = s * (1.0 + alpha * gate * (1.0 - s))
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        f = gate * cdf
        df = cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        square = gate * gate
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * gate * (1.0 + 0.044715 * square)))
        f = gate * s
        df = s + f * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    elif KIND == "relu":
        f = tl.where(gate < 0.0, 0.0, gate)
        df = tl.where(gate > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(KIND == "relu2")
        f = tl.where(gate < 0.0, 0.0, gate)
        df = 2.0 * f
        f = f * f
    return f, df


@triton.jit
def gradient(
    gate,
    up,
    dh,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
):
    """``activate`` and, given the gradient of its result, those of ``gate`` and ``up``: (h, dgate, dup).

    A limit passes the gradient up to and at it, as torch's clamp does.
    """
    limited = gate
    if GATE_LIMIT is not None:
        limited = tl.where(gate > GATE_LIMIT, GATE_LIMIT, gate)
    h, df = _derivative(limited, ALPHA, KIND)
    if GATE_LIMIT is not None:
        df = tl.where(gate > GATE_LIMIT, 0.0, df)
    dgate = dh * df
    dup = dgate
    if GATED:
        dup = dh * h
        if UP_LIMIT is not None:
            dup = tl.where((up > UP_LIMIT) | (up < -UP_LIMIT), 0.0, dup)
            up = tl.where(up > UP_LIMIT, UP_LIMIT, tl.where(up < -UP_LIMIT, -UP_LIMIT, up))
        h = h * (up + BETA)
        dgate = dgate * (up + BETA)
    return h, dgate, dup
