"""Other MXFP4 libraries as providers of moe_layer.py, each with routing built by torch operations.

Each function takes a ``mxfp4_compile.tools.benchmark.Layer`` and returns a function of (x, ids, weights) that
returns the call to time. A library that is absent raises ImportError, which moe_layer.py prints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxfp4_compile.tools.benchmark import At, Layer, Run


def sort_pairs(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs in the order of their experts, where each pair went (both int64), and counts [E] int32."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.histc(flat.float(), bins=experts, min=0, max=experts - 1).int()
    return order, order.argsort(), counts


def triton_kernels(layer: Layer) -> At:
    """OpenAI's triton_kernels of the 3.6 generation (matmul_ogs, ragged metadata), swizzled for this GPU."""
    from silu_mul import silu_mul
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

    shape = layer.shape
    w_layout, w_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    s_layout, s_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)

    def weight(packed: Tensor, scales: Tensor) -> tuple[Any, Any]:
        # Its scale layout reads groups in fours.
        scales = torch.nn.functional.pad(scales, (0, -scales.shape[-1] % 4)).transpose(-2, -1)
        w = convert_layout(wrap_torch_tensor(packed.transpose(-2, -1), dtype=FP4), w_layout, **w_options)
        return w, PrecisionConfig(weight_scale=convert_layout(wrap_torch_tensor(scales), s_layout, **s_options))

    def interleaved(t: Tensor) -> Tensor:
        return t.unflatten(1, (2, shape.intermediate)).transpose(1, 2).flatten(1, 2).contiguous()

    w1, p1 = weight(*(interleaved(t) for t in layer.canonical["up"]))
    w2, p2 = weight(*layer.canonical["down"])
    activation = FusedActivation(FnSpecs("silu_mul", silu_mul, (), reduction_n=2), ())

    def at(x: Tensor, ids: Tensor, weights: Tensor) -> Run:
        def run() -> Any:
            order, inverse, counts = sort_pairs(ids, shape.num_experts)
            gates = weights.flatten()[order]
            order, inverse = order.int(), inverse.int()
            metadata = make_ragged_tensor_metadata(counts, ids.numel())
            routing = RoutingData(gates, counts, shape.num_experts, shape.top_k, metadata)
            h = matmul_ogs(
                x,
                w1,
                None,
                routing,
                gather_indx=GatherIndx(order, inverse),
                precision_config=p1,
                fused_activation=activation,
            )
            scatter = ScatterIndx(inverse, order)
            return matmul_ogs(h, w2, None, routing, scatter_indx=scatter, precision_config=p2, gammas=gates)

        return run

    return at


def humming(layer: Layer) -> At:
    """humming-kernels: sorted rows through ``grouped_contiguous``, its own elementwise kernel between."""
    import humming  # noqa: F401
    from humming import dtypes
    from humming.forward import humming_forward, may_process_input
    from humming.schema import HummingInputSchema
    from humming.schema.mxfp4 import Mxfp4WeightSchema
    from humming.transform import prepare_and_transform_humming_tensors
    from humming.tune import get_heuristics_config

    shape, device = layer.shape, layer.device
    compute = json.dumps({"gemm_type": "grouped_contiguous"})
    locks = 8 * torch.cuda.get_device_properties(device).multi_processor_count

    def prepared(role: str) -> tuple[Any, dict[str, Tensor], str]:
        packed, scales = layer.canonical[role]  # type: ignore[index]
        _, n, k = layer.params.shape(role)  # type: ignore[arg-type]
        config, tensors = prepare_and_transform_humming_tensors(
            {"weight": packed.view(torch.int32), "weight_scale": scales.view(torch.float8_e8m0fnu)},
            shape_n=n,
            shape_k=k,
            weight_schema=Mxfp4WeightSchema().to_humming_schema(torch.bfloat16),
            input_schema=HummingInputSchema(a_dtype=dtypes.bfloat16),
            num_experts=shape.num_experts,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            torch_dtype=torch.bfloat16,
            device=device,
        )
        tuning = get_heuristics_config(layer_config=config, gemm_type="grouped_contiguous", device=device)
        return config, tensors, json.dumps(tuning)

    up, down = prepared("up"), prepared("down")

    def product(x: Tensor, weight: tuple[Any, dict[str, Tensor], str], offsets: Tensor) -> Tensor:
        config, tensors, tuning = weight
        return humming_forward(
            config,
            x,
            tensors["weight"],
            tensors["weight_scale"],
            expert_layout=offsets,
            locks=torch.zeros(locks, dtype=torch.int32, device=x.device),
            valid_shape_m=x.shape[0],
            compute_config=compute,
            tuning_config=tuning,
        )

    def at(x: Tensor, ids: Tensor, weights: Tensor) -> Run:
        tokens, top_k = ids.shape

        def run() -> Any:
            order, inverse, counts = sort_pairs(ids, shape.num_experts)
            offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            rows = x.index_select(0, torch.div(order, top_k, rounding_mode="floor"))
            y = product(rows, up, offsets)
            h, _, _ = may_process_input(
                down[0], y, activation_type="binary_split", activation_impl="a / (1.0f + __expf(-a)) * b"
            )
            out = product(h, down, offsets).index_select(0, inverse)
            return torch.bmm(weights.unsqueeze(1), out.view(tokens, top_k, -1)).squeeze(1)

        return run

    return at
