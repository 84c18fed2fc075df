"""FlashInfer's two fused layers for MXFP4 weights: trtllm-gen on Blackwell, CUTLASS on Hopper.

Neither was run on hardware by this project. Prepared weights:

``flashinfer_trtllm`` (H and I filled up to 256; rows [up0, gate0, up1, ...], then permuted in blocks of 32)::

    codes uint8 [e, N, K/2]    scales uint8 [e, N, K/32] in 128x4 blocks (tcgen05's order)

``flashinfer_cutlass`` (H and I filled up to 128; rows [up; gate])::

    codes uint8 [e, N, K/2], interleaved and with Hopper's bit order    scales uint8 [e, N/64, K/128, 16, 16]
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, float8_e4m3fn, float32

from ..arguments import MoEInputs, Slot
from ..backend import Requirement, check_activation_dtype, check_parallel
from ..library import find
from ..permutations import RowOrder, fold, twiddle, unfold, untwiddle
from ..target import Request, Target
from .fused_layer import (
    FusedLayerBackend,
    Rounding,
    check_swiglu_layer,
    swiglu_constants,
)

INSTALL = "pip install flashinfer-python flashinfer-cubin"

# mxfp8 activations (3 mantissa bits) add about this relative error to a layer's output.
MXFP8_SLACK = 4e-2


def _library(entry: str) -> list[Requirement]:
    """flashinfer with the function ``entry``, and the package that its calls go through."""
    found = find("flashinfer", "flashinfer-python")
    right = found.mentions("fused_moe/core.py", f"def {entry}(")
    old = found.version is not None and not found.at_least(0, 7)
    if found.folder is None:
        reason, install = str(found), INSTALL
    elif not right:
        reason, install = f"{found} has no {entry}", f"{INSTALL} -U"
    else:
        reason, install = f"{found}{', needs 0.7 or newer' if old else ''}", f"{INSTALL} -U"
    met = right and not old
    ffi = find("tvm_ffi", "apache-tvm-ffi")
    return [
        Requirement("library", met, reason, "" if met else install),
        Requirement("tvm_ffi", ffi.folder is not None, str(ffi), "" if ffi.folder else "pip install apache-tvm-ffi"),
    ]


def tile_tokens(tokens: int, top_k: int, num_experts: int) -> int:
    """The tile of tokens of trtllm-gen kernels: the mean of an expert with 1.3 times imbalance, next power of two.

    Clamped to 8..64. For builds whose entry point takes it (``tile_tokens_dim``); 0.7.2 chooses it by itself.
    """
    mean = max(int(tokens * top_k / num_experts * 1.3), 1)
    return min(max(1 << (mean - 1).bit_length(), 8), 64)


@lru_cache(maxsize=8)
def _takes(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


class TrtllmBackend(FusedLayerBackend):
    """trtllm-gen kernels through the entry point that takes finished routing."""

    name = "flashinfer_trtllm"
    rounding = Rounding(256, 256, RowOrder("interleaved", 1))

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        """SM100 or SM103, swiglu, bf16 models; sm_103 has mxfp8 activations only."""
        return [
            *_library("trtllm_fp4_block_scale_routed_moe"),
            Requirement("device", target.sm in (100, 103), f"{target.arch}, needs sm_100 or sm_103"),
            check_activation_dtype(request, *(("mxfp8",) if target.sm == 103 else ("bf16", "mxfp8"))),
            check_parallel(request),
            *check_swiglu_layer(request),
        ]

    def plan(self, request: Request, target: Target) -> str:
        """Activations' dtype and the largest batch to tune for, which the call needs."""
        return f"{request.activation_dtype}-{max(request.max_capture_size, 1)}"

    def slack(self, layout: str) -> float:
        """What mxfp8 activations add."""
        return MXFP8_SLACK if layout.startswith("mxfp8") else 0.0

    def swizzle(self, packed: Tensor, scales: Tensor, slot: Slot) -> list[Tensor]:
        rows = _shuffle_rows(scales)
        e, n, groups = rows.shape
        blocks = fold(rows, *_block_fold(n, groups)).view(e, n, groups)
        return [_shuffle_rows(packed), blocks]

    def unswizzle(self, tensors: Sequence[Tensor], n: int, k: int, slot: Slot) -> tuple[Tensor, Tensor]:
        packed, blocks = tensors
        rows = unfold(blocks, *_block_fold(n, k // 32)).view(blocks.shape[0], n, k // 32)
        return _unshuffle_rows(packed), _unshuffle_rows(rows)

    def swizzle_bias(self, bias: Tensor) -> Tensor:
        return _shuffle_rows(bias.unsqueeze(2)).squeeze(2)

    def unswizzle_bias(self, bias: Tensor) -> Tensor:
        return _unshuffle_rows(bias.unsqueeze(2)).squeeze(2)

    def layer(self, inputs: MoEInputs) -> Tensor:
        from flashinfer.fused_moe import trtllm_fp4_block_scale_routed_moe

        dtype, largest = inputs.layout.split("-")
        x, ids, params = inputs.x, inputs.topk_ids, inputs.params
        scale = None
        if dtype == "mxfp8":
            from flashinfer import mxfp8_quantize

            tokens = x.shape[0]
            x, scale = mxfp8_quantize(x, False)
            scale = scale.view(float8_e4m3fn).reshape(tokens, -1)
        constants = swiglu_constants(params, x.device)
        up_bias, down_bias = inputs.biases(float32)
        tile = {}
        if _takes(trtllm_fp4_block_scale_routed_moe, "tile_tokens_dim"):
            tile = {"tile_tokens_dim": tile_tokens(ids.shape[0], ids.shape[1], params.num_experts)}
        out = trtllm_fp4_block_scale_routed_moe(
            topk_ids=(ids, inputs.topk_weights),
            routing_bias=None,
            hidden_states=x,
            hidden_states_scale=scale,
            gemm1_weights=inputs.up[0],
            gemm1_weights_scale=inputs.up[1].view(float8_e4m3fn),
            gemm1_bias=up_bias,
            gemm1_alpha=constants["alpha"],
            gemm1_beta=constants["beta"],
            gemm1_clamp_limit=constants["limit"],
            gemm2_weights=inputs.down[0],
            gemm2_weights_scale=inputs.down[1].view(float8_e4m3fn),
            gemm2_bias=down_bias,
            output1_scale_scalar=None,
            output1_scale_gate_scalar=None,
            output2_scale_scalar=None,
            num_experts=params.num_experts,
            top_k=ids.shape[1],
            n_group=None,
            topk_group=None,
            intermediate_size=self.rounding.sizes(params)[1],
            local_expert_offset=0,
            local_num_experts=params.num_experts,
            routed_scaling_factor=None,
            # Routing is finished: renormalized, grouped or corrected by the model's own router.
            routing_method_type=1,
            do_finalize=True,
            tune_max_num_tokens=int(largest),
            **tile,
        )
        result: Tensor = out[0] if isinstance(out, (list, tuple)) else out
        return result


class CutlassBackend(FusedLayerBackend):
    """CUTLASS mixed-input kernels on Hopper, compiled at first use (248 files): "auto" takes them ready-made only."""

    name = "flashinfer_cutlass"
    rounding = Rounding(128, 128, RowOrder("halves", 1))

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        """SM90, swiglu, bf16 models, and the compiled module unless asked for by name."""
        module = compiled_module(target)
        return [
            *_library("cutlass_fused_moe"),
            Requirement("device", target.sm == 90, f"{target.arch}, needs sm_90"),
            Requirement(
                "compiled",
                module is not None or request.named,
                str(module)
                if module is not None
                else "its kernels are not compiled here, which takes most of an hour; ask for it by name, or "
                "install flashinfer-jit-cache from FlashInfer's own index",
            ),
            check_activation_dtype(request, "bf16"),
            check_parallel(request),
            *check_swiglu_layer(request),
        ]

    def plan(self, request: Request, target: Target) -> str:
        """The largest batch to tune for, which the call needs."""
        return f"sm90-{max(request.max_capture_size, 1)}"

    def swizzle(self, packed: Tensor, scales: Tensor, slot: Slot) -> list[Tensor]:
        e, n, k2 = packed.shape
        values = twiddle(fold(packed, *_interleave_fold(n, k2)).view(e, n, k2))
        rows, groups = scales.shape[1:]
        folded = fold(scales, *_scale_fold(rows, groups)).view(e, rows // 64, groups // 4, 16, 16)
        return [values, folded]

    def unswizzle(self, tensors: Sequence[Tensor], n: int, k: int, slot: Slot) -> tuple[Tensor, Tensor]:
        values, folded = tensors
        e = values.shape[0]
        packed = unfold(untwiddle(values), *_interleave_fold(n, k // 2)).view(e, n, k // 2)
        return packed, unfold(folded, *_scale_fold(n, k // 32)).view(e, n, k // 32)

    def layer(self, inputs: MoEInputs) -> Tensor:
        from flashinfer.fused_moe import cutlass_fused_moe

        dtype = inputs.x.dtype
        constants = swiglu_constants(inputs.params, inputs.x.device)
        up_bias, down_bias = inputs.biases(dtype)
        out = cutlass_fused_moe(
            input=inputs.x,
            token_selected_experts=inputs.topk_ids,
            token_final_scales=inputs.topk_weights,
            fc1_expert_weights=inputs.up[0],
            fc2_expert_weights=inputs.down[0],
            output_dtype=dtype,
            quant_scales=[inputs.up[1], inputs.down[1]],
            fc1_expert_biases=up_bias,
            fc2_expert_biases=down_bias,
            swiglu_alpha=constants["alpha"],
            swiglu_beta=constants["beta"],
            swiglu_limit=constants["limit"],
            use_w4_group_scaling=True,
            tune_max_num_tokens=int(inputs.layout.split("-")[1]),
            # The fused form adds in any order: same inputs would not give the same bits.
            use_fused_finalize=False,
        )
        result: Tensor = out[0] if isinstance(out, (list, tuple)) else out
        return result


def compiled_module(target: Target) -> Path | None:
    """The compiled CUTLASS module for ``target``, where FlashInfer keeps such modules; None if there is none."""
    if target.sm is None:
        return None
    name = f"fused_moe_{target.sm}"
    package = find("flashinfer").folder
    prebuilt = find("flashinfer_jit_cache").folder
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", Path.home()))
    places = [
        *([] if package is None else [package / "data" / "aot"]),
        *([] if prebuilt is None else [prebuilt]),
        base / ".cache" / "flashinfer",
    ]
    for place in places:
        if place.is_dir():
            found = next(place.rglob(f"{name}/{name}.so"), None)
            if found is not None:
                return found
    return None


# permutations


def _row_fold(n: int, rest: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (n // 32, 8, 4, rest), (0, 2, 1, 3)


def _shuffle_rows(x: Tensor) -> Tensor:
    """[e, N, R] -> the rows permuted in blocks of 32, as a 128-row epilogue tile reads them."""
    return fold(x, *_row_fold(x.shape[1], x.shape[2])).view_as(x)


def _unshuffle_rows(x: Tensor) -> Tensor:
    return unfold(x, *_row_fold(x.shape[1], x.shape[2])).view_as(x)


def _block_fold(n: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Scales in 128x4 blocks."""
    return (n // 128, 4, 32, groups // 4, 4), (0, 3, 2, 1, 4)


def _interleave_fold(n: int, k2: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of 16 rows and 32 bytes: the four bytes that one thread feeds to a tensor-core tile lie together."""
    return (n // 16, 2, 8, k2 // 32, 2, 2, 2, 4), (0, 5, 2, 3, 4, 7, 6, 1)


def _scale_fold(n: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (n // 64, 4, 16, groups // 4, 4), (0, 3, 2, 1, 4)


TRTLLM = TrtllmBackend()
CUTLASS = CutlassBackend()
