"""The launches of one MoE layer and of one grouped projection, for prepared weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...spec import MoEParams
from . import layout as layouts
from .combine import combine
from .launch import Step
from .matmul import scan_matmul, sorted_matmul
from .routing import sort_pairs
from .select import Choice, Tiles, choose, choose_linear
from .vector import vector_down, vector_up

# Bytes of intermediates (activations between the projections, rows before the combination) that one
# call may take; longer inputs go in chunks of tokens.
_MAX_INTERMEDIATE = 2 << 30


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=None)
def architecture(device: torch.device) -> str:
    """The name under which configs/ files this device's tuned data."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _dot_dtype() -> Any:
    import triton.language as tl

    return tl.float32 if interpreted() else tl.bfloat16


def _activation(params: MoEParams) -> dict[str, Any]:
    act = params.activation
    return {
        "KIND": act.kind,
        "GATED": act.gated,
        "ALPHA": float(act.alpha),
        "BETA": float(act.beta),
        "GATE_LIMIT": None if math.isinf(act.gate_limit) else float(act.gate_limit),
        "UP_LIMIT": None if math.isinf(act.up_limit) else float(act.up_limit),
    }


_NO_ACTIVATION = {"KIND": None, "GATED": False, "ALPHA": 1.0, "BETA": 0.0, "GATE_LIMIT": None, "UP_LIMIT": None}


def _step(kernel: Any, tiles: Tiles, **constants: Any) -> Step:
    return Step(kernel, {**constants, **dict(tiles.sizes)}, tiles.warps, tiles.stages, tiles.registers)


class _Plan:
    """Everything about a call that does not change from call to call with the same shapes and dtypes."""

    def __init__(
        self, params: MoEParams, top_k: int, x_stride: int, split: bool, twiddled: bool, choice: Choice, pairs_class: int
    ) -> None:
        e, h, i = params.num_experts, params.hidden, params.intermediate
        common = {"E": e, "TOP_K": top_k}
        up_shape = {
            "X_STRIDE": x_stride,
            "SLABS": layouts.slabs(params.up_rows, params.activation.gated),
            "STEPS": layouts.steps(h),
            "N": i,
            "K": h,
        }
        down_shape = {"X_STRIDE": i, "SLABS": layouts.slabs(h, False), "STEPS": layouts.steps(i), "N": h, "K": i}
        self.choice = choice
        act = _activation(params)
        if choice.regime == "vector":
            self.up = _step(vector_up, choice.up, TWIDDLED=twiddled, **common, **up_shape, **act)
            down_shape.pop("X_STRIDE")
            self.down = _step(
                vector_down, choice.down, TWIDDLED=twiddled, TOP_K_PADDED=_power_of_two(top_k), **common, **down_shape
            )
            self.up_tiles = up_shape["SLABS"] * (8 // choice.up["ROWS"])
            self.down_tiles = down_shape["SLABS"] * (8 // choice.down["ROWS"])
            return
        math_ = {"SPLIT": split and not interpreted(), "TWIDDLED": twiddled, "DTYPE": _dot_dtype()}
        if choice.regime == "scan":
            scan = {"PAIRS": pairs_class, "BY_EXPERT": pairs_class >= e}
            self.up = _step(scan_matmul, choice.up, X_BY_TOKEN=True, **scan, **common, **up_shape, **act, **math_)
            self.down = _step(
                scan_matmul, choice.down, X_BY_TOKEN=False, **scan, **common, **down_shape, **_NO_ACTIVATION, **math_
            )
        else:
            self.route = Step(sort_pairs, {"E": e, "BLOCK": 2048 if pairs_class >= 2048 else 512}, 4, 1)
            ragged = {"E_PADDED": _power_of_two(e)}
            self.up = _step(
                sorted_matmul, choice.up, GATHER_X=True, SCATTER_OUT=False, **ragged, **common, **up_shape, **act, **math_
            )
            self.down = _step(
                sorted_matmul,
                choice.down,
                GATHER_X=False,
                SCATTER_OUT=True,
                **ragged,
                **common,
                **down_shape,
                **_NO_ACTIVATION,
                **math_,
            )
        self.up_tiles = -(-up_shape["SLABS"] * 16 // choice.up["BM"])
        self.down_tiles = -(-down_shape["SLABS"] * 16 // choice.down["BM"])
        self.combine_block = min(_power_of_two(h), 1024)
        self.combine_tiles = -(-h // self.combine_block)
        self.combine = Step(combine, {"E": e, "TOP_K": top_k, "N": h, "BLOCK": self.combine_block}, 4, 1)


@lru_cache(maxsize=4096)
def _plan(
    params: MoEParams,
    top_k: int,
    x_stride: int,
    dtypes: tuple[torch.dtype | None, ...],
    twiddled: bool,
    choice: Choice,
    pairs_class: int,
) -> _Plan:
    # dtypes is part of the key because a Step's compiled kernel is for one set of them.
    return _Plan(params, top_k, x_stride, dtypes[0] != torch.bfloat16, twiddled, choice, pairs_class)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    params: MoEParams,
    layout: str,
    choice: Choice | None = None,
) -> Tensor:
    """``Backend.moe``; ``choice`` overrides the tuned rules."""
    tokens = x.shape[0]
    out = torch.empty((tokens, params.hidden), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    top_k = topk_ids.shape[1]
    if top_k == 0:
        return out.zero_()
    if x.stride(1) != 1:
        x = x.contiguous()
    topk_ids = topk_ids.contiguous()
    topk_weights = topk_weights.contiguous()
    per_token = top_k * (params.hidden + params.intermediate) * params.round_dtype.itemsize
    # Row numbers times widths are 64-bit in the kernels; row numbers and tile numbers are 32-bit.
    chunk = max(min(_MAX_INTERMEDIATE // per_token, (1 << 24) // top_k), 1)
    with torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else _NOTHING:
        for at in range(0, tokens, chunk):
            if chunk >= tokens:
                _chunk(x, topk_ids, topk_weights, up, down, up_bias, down_bias, out, params, layout, choice)
            else:
                part = slice(at, min(at + chunk, tokens))
                _chunk(
                    x[part], topk_ids[part], topk_weights[part], up, down, up_bias, down_bias, out[part], params, layout, choice
                )
    return out


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()


def _chunk(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    out: Tensor,
    params: MoEParams,
    layout: str,
    choice: Choice | None,
) -> None:
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    if choice is None:
        choice = choose(architecture(x.device), params.num_experts, top_k, tokens)
    regime = choice.regime
    pairs_class = _power_of_two(pairs) if regime != "sorted" else (2048 if pairs >= 2048 else 512)
    if regime == "vector":
        pairs_class = 0
    dtypes = (
        x.dtype,
        ids.dtype,
        weights.dtype,
        None if up_bias is None else up_bias.dtype,
        None if down_bias is None else down_bias.dtype,
    )
    plan = _plan(params, top_k, x.stride(0), dtypes, layout == "sm80", choice, pairs_class)
    h = torch.empty((pairs, params.intermediate), dtype=params.round_dtype, device=x.device)
    in_weights, out_weights = (weights, None) if params.weight_on_input else (None, weights)
    up_codes, up_scales = up
    down_codes, down_scales = down
    if regime == "vector":
        plan.up((plan.up_tiles, pairs, 1), x, up_codes, up_scales, up_bias, ids, in_weights, h)
        plan.down((plan.down_tiles, tokens, 1), h, down_codes, down_scales, down_bias, ids, out_weights, out)
        return
    y = torch.empty((pairs, params.hidden), dtype=params.round_dtype, device=x.device)
    if regime == "scan":
        programs = min(pairs_class, params.num_experts) if pairs_class >= params.num_experts else pairs
        plan.up((plan.up_tiles, programs, 1), x, up_codes, up_scales, up_bias, ids, in_weights, h, pairs)
        plan.down((plan.down_tiles, programs, 1), h, down_codes, down_scales, down_bias, ids, None, y, pairs)
    else:
        e = params.num_experts
        offsets = torch.empty(e + pairs, dtype=torch.int32, device=x.device)
        order = offsets[e:]
        plan.route((e, 1, 1), ids, offsets, order, pairs)
        slots = pairs // choice.up["BT"] + e
        plan.up(
            (plan.up_tiles * slots, 1, 1), x, up_codes, up_scales, up_bias, offsets, order, in_weights, h
        )
        slots = pairs // choice.down["BT"] + e
        plan.down(
            (plan.down_tiles * slots, 1, 1), h, down_codes, down_scales, down_bias, offsets, order, None, y
        )
    plan.combine((tokens, plan.combine_tiles, 1), y, ids, out_weights, out)


@lru_cache(maxsize=1024)
def _linear_step(e: int, n: int, k: int, x_stride: int, dtype: torch.dtype, twiddled: bool, tiles: Tiles) -> Step:
    return _step(
        sorted_matmul,
        tiles,
        E=e,
        E_PADDED=_power_of_two(e),
        TOP_K=1,
        X_STRIDE=x_stride,
        SLABS=layouts.slabs(n, False),
        STEPS=layouts.steps(k),
        N=n,
        K=k,
        GATHER_X=False,
        SCATTER_OUT=False,
        SPLIT=dtype != torch.bfloat16 and not interpreted(),
        TWIDDLED=twiddled,
        DTYPE=_dot_dtype(),
        **_NO_ACTIVATION,
    )


def grouped_linear(
    x: Tensor, offsets: Tensor, weight: Sequence[Tensor], n: int, round_dtype: torch.dtype, layout: str
) -> Tensor:
    """``Backend.grouped_linear``."""
    rows, k = x.shape
    # Rows beyond the last expert's are nobody's, and must be zero.
    out = torch.zeros((rows, n), dtype=round_dtype, device=x.device)
    if rows == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    codes, scales = weight
    e = codes.shape[0]
    tiles = choose_linear(architecture(x.device), e, rows)
    step = _linear_step(e, n, k, x.stride(0), x.dtype, layout == "sm80", tiles)
    grid = (-(-layouts.slabs(n, False) * 16 // tiles["BM"]) * (rows // tiles["BT"] + e), 1, 1)
    with torch.cuda.device(x.device) if x.is_cuda else _NOTHING:
        step(grid, x, codes, scales, None, offsets.contiguous(), None, None, out)
    return out
