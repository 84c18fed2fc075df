"""The silu gate for triton_kernels, whose own activation is gpt-oss's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu_mul(x):
    """Interleaved gate and up columns -> silu(gate) * up."""
    gate, up = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
