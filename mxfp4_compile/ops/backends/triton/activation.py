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
