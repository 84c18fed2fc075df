"""Other MXFP4 libraries as providers of moe_layer.py, each with routing built by torch operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

Run = Callable[[], Any]


@triton.jit
def _silu_mul(x):
    """Interleaved gate and up columns -> silu(gate) * up."""
    gate, up = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)


def triton_kernels(shape: tuple[int, int, int, int], weight_of: Callable[[str, int], Any]) -> Callable[..., Run]:
    """OpenAI's triton_kernels of the 3.6 generation (matmul_ogs, ragged metadata), swizzled for this GPU."""
    from triton_kernels.matmul_ogs import (
        FusedActivation,
        GatherIndx,
        PrecisionConfig,
        RoutingData,
        ScatterIndx,
        matmul_ogs,
    )
    from triton_kernels.specialize import FnSpecs
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout
    from triton_kernels.tensor_details.ragged_tensor import make_ragged_tensor_metadata

    e, top_k, _, inner = shape
    w_layout, w_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    s_layout, s_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)

    def weight(role: str) -> tuple[Any, Any]:
        both = [weight_of(role, i) for i in range(e)]
        packed, scales = (torch.cat(part) for part in zip(*both, strict=True))
        if role == "up":  # gate and up rows alternate
            packed, scales = (t.unflatten(1, (2, inner)).transpose(1, 2).flatten(1, 2) for t in (packed, scales))
        packed = packed.transpose(-2, -1)
        # Its scale layout reads groups in fours.
        scales = torch.nn.functional.pad(scales, (0, -scales.shape[-1] % 4)).transpose(-2, -1)
        w = convert_layout(wrap_torch_tensor(packed, dtype=FP4), w_layout, **w_options)
        return w, PrecisionConfig(
            weight_scale=convert_layout(wrap_torch_tensor(scales), s_layout, **s_options)
        )

    w1, p1 = weight("up")
    w2, p2 = weight("down")
    activation = FusedActivation(FnSpecs("silu_mul", _silu_mul, (), reduction_n=2), ())

    def at(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Run:
        pairs = ids.numel()

        def run() -> Any:
            flat = ids.flatten()
            order = flat.argsort(stable=True)
            inverse = order.argsort().int()
            order = order.int()
            counts = torch.histc(flat.float(), bins=e, min=0, max=e - 1).int()
            gates = weights.flatten()[order]
            metadata = make_ragged_tensor_metadata(counts, pairs)
            routing = RoutingData(gates, counts, e, top_k, metadata)
            h = matmul_ogs(
                x, w1, None, routing, gather_indx=GatherIndx(order, inverse),
                precision_config=p1, fused_activation=activation,
            )  # fmt: skip
            return matmul_ogs(
                h,
                w2,
                None,
                routing,
                scatter_indx=ScatterIndx(inverse, order),
                precision_config=p2,
                gammas=gates,
            )

        return run

    return at
