"""The launches of one MoE layer and of one grouped projection, for prepared weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....spec import MoEParams
from ...arguments import LinearInputs, MoEInputs
from . import layout as layouts
from .combine import combine
from .fp8 import quantize_rows
from .instruction import MMA_SYNC, expected
from .launch import Launch, Step, launch
from .matmul import scan_matmul, sorted_matmul
from .routing import sort_pairs
from .select import TileChoice, Tiles, architecture, choose, choose_linear
from .vector import vector_down, vector_up

# Bytes of intermediates (activations between the projections, rows before the combination) that one
# call may take; longer inputs go in chunks of tokens.
MAX_INTERMEDIATE = 2 << 30


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def dot_dtype() -> Any:
    import triton.language as tl

    return tl.float32 if interpreted() else tl.bfloat16


def activation_constants(params: MoEParams) -> dict[str, Any]:
    act = params.activation
    return {
        "KIND": act.kind,
        "GATED": act.gated,
        "ALPHA": float(act.alpha),
        "BETA": float(act.beta),
        "GATE_LIMIT": None if math.isinf(act.gate_limit) else float(act.gate_limit),
        "UP_LIMIT": None if math.isinf(act.up_limit) else float(act.up_limit),
    }


NO_ACTIVATION = {
    "KIND": None,
    "GATED": False,
    "ALPHA": 1.0,
    "BETA": 0.0,
    "GATE_LIMIT": None,
    "UP_LIMIT": None,
}


def product_step(kernel: Any, tiles: Tiles, arch: str, **constants: Any) -> Step:
    """A kernel's step on ``arch``, as select.py names it."""
    sizes = dict(tiles.sizes)
    product = pipeline = None
    # Configurations say with QUADS that a kernel is for mma.sync; which order of K that takes is the compiler's.
    if sizes.get("QUADS") and arch.startswith("sm"):
        product = expected(sizes["BM"], sizes["BT"], sizes["AHEAD"])
        # The only architecture where wgmma would be chosen.
        pipeline = MMA_SYNC if arch == "sm90" else None
    # Configurations count the registers of bf16 tokens and whole steps: halves of tokens and masks take more.
    whole = not constants.get("SPLIT") and constants["K"] % layouts.STEP == 0
    registers = tiles.registers if whole else 0
    return Step(kernel, {**constants, **sizes}, tiles.warps, tiles.stages, registers, product, pipeline)


class LaunchPlan:
    """Everything about a call that does not change from call to call with the same shapes and dtypes."""

    def __init__(
        self,
        arch: str,
        params: MoEParams,
        top_k: int,
        x_stride: int,
        split: bool,
        bits: int,
        choice: TileChoice,
        pairs_class: int,
        by_expert: bool,
    ) -> None:
        e, h, i = params.num_experts, params.hidden, params.intermediate
        self.choice = choice
        self.by_expert = by_expert
        self.split_k = 1
        up: dict[str, Any] = {
            "E": e, "TOP_K": top_k, "X_STRIDE": x_stride, "BITS": bits,
            "SLABS": layouts.slabs(params.up_rows, params.activation.gated), "STEPS": layouts.steps(h),
            "N": i, "K": h,
            **activation_constants(params),
        }  # fmt: skip
        down: dict[str, Any] = {
            "E": e, "TOP_K": top_k, "X_STRIDE": i, "BITS": bits,
            "SLABS": layouts.slabs(h, False), "STEPS": layouts.steps(i), "N": h, "K": i,
            **NO_ACTIVATION,
        }  # fmt: skip
        if choice.fp8:
            # Quantized rows are whole steps.
            padded = [step["STEPS"] * layouts.STEP for step in (up, down)]
            pdl = choice.up["PDL"]
            self.quantize_x = _quantize_step(x_stride, h, padded[0], pdl)
            self.quantize_h = _quantize_step(i, i, padded[1], pdl)
            split = False
            for step, k in zip((up, down), padded, strict=True):
                step["X_STRIDE"] = step["K"] = k
        dot = {"SPLIT": split and not interpreted(), "DTYPE": dot_dtype()}
        scan = {"PAIRS": pairs_class, "BY_EXPERT": self.by_expert, **dot}
        ragged = {"E_PADDED": power_of_two(e), **dot}
        if choice.up_regime == "vector":
            self.up = product_step(vector_up, choice.up, arch, **up)
            self.up_tiles = up["SLABS"] * (8 // choice.up["ROWS"])
        else:
            self.up_tiles = -(-up["SLABS"] * 16 // choice.up["BM"])
            # Its activation needs whole sums.
            whole = choice.up.with_size("SPLIT_K", 1)
            if choice.up_regime == "scan":
                self.up = product_step(scan_matmul, whole, arch, X_BY_TOKEN=True, **scan, **up)
            else:
                self.up = product_step(sorted_matmul, whole, arch, GATHER_X=True, SCATTER_OUT=False, **ragged, **up)
        if choice.down_regime == "vector":
            del down["X_STRIDE"]
            for name in NO_ACTIVATION:
                del down[name]
            self.down = product_step(vector_down, choice.down, arch, TOP_K_PADDED=power_of_two(top_k), **down)
            self.down_tiles = down["SLABS"] * (8 // choice.down["ROWS"])
        else:
            self.down_tiles = -(-down["SLABS"] * 16 // choice.down["BM"])
            self.split_k = choice.down["SPLIT_K"]
            if choice.down_regime == "scan":
                self.down = product_step(scan_matmul, choice.down, arch, X_BY_TOKEN=False, **scan, **down)
            else:
                self.down = product_step(
                    sorted_matmul, choice.down, arch, GATHER_X=False, SCATTER_OUT=True, **ragged, **down
                )
            self.combine_block = min(power_of_two(h), 1024)
            self.combine_tiles = -(-h // self.combine_block)
            constants = {"E": e, "TOP_K": top_k, "SPLIT_K": self.split_k, "N": h, "BLOCK": self.combine_block}
            constants["PDL"] = choice.down["PDL"]
            self.combine = Step(combine, constants, 4, 1)
        if choice.up_regime == "sorted":
            self.sort = sort_step(pairs_class, choice.up["PDL"])


def _quantize_step(x_stride: int, k: int, padded: int, pdl: int) -> Step:
    block = power_of_two(padded)
    constants = {"X_STRIDE": x_stride, "K": k, "PADDED": padded, "BLOCK": block}
    constants |= {"INTERPRETED": interpreted(), "PDL": pdl}
    return Step(quantize_rows, constants, max(min(block // 1024, 8), 1), 1)


def _quantize(step: Step, x: Tensor, rows: int) -> Launch:
    """x [rows, K] -> its last two arguments, e4m3 in the order of fp8.py, and a scale for each row."""
    q = torch.empty((rows, step.constants["PADDED"]), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    return step, (rows, 1, 1), (x, q, scales)


@lru_cache(maxsize=4096)
def launch_plan(
    arch: str,
    params: MoEParams,
    top_k: int,
    x_stride: int,
    dtypes: tuple[torch.dtype | None, ...],
    bits: int,
    choice: TileChoice,
    pairs_class: int,
    by_expert: bool,
) -> LaunchPlan:
    # dtypes is part of the key because a Step's compiled kernel is for one set of them.
    split = dtypes[0] != torch.bfloat16 or params.round_dtype != torch.bfloat16
    return LaunchPlan(arch, params, top_k, x_stride, split, bits, choice, pairs_class, by_expert)


def moe(inputs: MoEInputs, choice: TileChoice | None = None) -> Tensor:
    """``Backend.moe``; ``choice`` overrides the tuned rules."""
    x, params = inputs.x, inputs.params
    tokens, top_k = inputs.topk_ids.shape
    out = torch.empty((tokens, params.hidden), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    if top_k == 0:
        return out.zero_()
    ids, weights = inputs.topk_ids, inputs.topk_weights
    if x.stride(1) != 1 or not ids.is_contiguous() or not weights.is_contiguous():
        plain = x if x.stride(1) == 1 else x.contiguous()
        inputs = replace(inputs, x=plain, topk_ids=ids.contiguous(), topk_weights=weights.contiguous())
    per_token = top_k * (params.hidden + params.intermediate) * params.round_dtype.itemsize
    if inputs.layout == "sm89_fp8":
        per_token += top_k * params.intermediate + params.hidden
    # Row numbers times widths are 64-bit in the kernels; row numbers and tile numbers are 32-bit.
    chunk = max(min(MAX_INTERMEDIATE // per_token, (1 << 24) // top_k), 1)
    with torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else NOTHING:
        if chunk >= tokens:
            _chunk(inputs, out, choice)
        else:
            for at in range(0, tokens, chunk):
                part = slice(at, min(at + chunk, tokens))
                _chunk(inputs.of_tokens(part), out[part], choice)
    return out


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


NOTHING = _Nothing()


def _chunk(inputs: MoEInputs, out: Tensor, choice: TileChoice | None) -> None:
    x, ids, weights, params, layout = inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.params, inputs.layout
    up_bias, down_bias = inputs.up_bias, inputs.down_bias
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    arch = architecture(x.device)
    if choice is None:
        choice = choose(
            arch, params.num_experts, top_k, params.hidden, params.intermediate, tokens,
            x.dtype == params.round_dtype == torch.bfloat16, x.device,
            x.dtype if x.dtype == params.round_dtype else None, layout == "sm89_fp8",
        )  # fmt: skip
    dtypes = (
        x.dtype,
        ids.dtype,
        weights.dtype,
        None if up_bias is None else up_bias.dtype,
        None if down_bias is None else down_bias.dtype,
    )
    plan = launch_plan(
        arch, params, top_k, x.stride(0), dtypes, layouts.BIT_ORDERS[layout], choice, pairs_class(choice, pairs),
        pairs >= params.num_experts,
    )  # fmt: skip
    h = torch.empty((pairs, params.intermediate), dtype=params.round_dtype, device=x.device)
    in_weights, out_weights = (weights, None) if params.weight_on_input else (None, weights)
    up_codes, up_scales = inputs.up[:2]
    down_codes, down_scales = inputs.down[:2]
    e = params.num_experts
    # Parts of sums are added before they are rounded.
    y_dtype = params.round_dtype if plan.split_k == 1 else torch.float32
    if choice.up_regime == "sorted":
        offsets = torch.empty(e + pairs, dtype=torch.int32, device=x.device)
        order = offsets[e:]
        y = torch.empty((pairs, plan.split_k, params.hidden), dtype=y_dtype, device=x.device)
        up_grid = (plan.up_tiles * (pairs // choice.up["BT"] + e), 1, 1)
        down_grid = (plan.down_tiles * (pairs // choice.down["BT"] + e), plan.split_k, 1)
        sort: Launch = (plan.sort, (e, 1, 1), (ids, offsets, order, pairs))
        combined: Launch = (plan.combine, (tokens, plan.combine_tiles, 1), (y, ids, out_weights, out))
        sorted_up = (up_codes, up_scales, up_bias, offsets, order, in_weights, h)
        sorted_down = (down_codes, down_scales, down_bias, offsets, order, None, y)
        if choice.fp8:
            quantize_x, quantize_h = _quantize(plan.quantize_x, x, tokens), _quantize(plan.quantize_h, h, pairs)
            (_, x8, x_scales), (_, h8, h_scales) = quantize_x[2], quantize_h[2]
            launch((
                sort, quantize_x, (plan.up, up_grid, (x8, *sorted_up, x_scales, inputs.up[2])),
                quantize_h, (plan.down, down_grid, (h8, *sorted_down, h_scales, inputs.down[2])), combined,
            ))  # fmt: skip
        else:
            launch((
                sort, (plan.up, up_grid, (x, *sorted_up, None, None)),
                (plan.down, down_grid, (h, *sorted_down, None, None)), combined,
            ))  # fmt: skip
        return
    programs = e if plan.by_expert else pairs
    up_args = (x, up_codes, up_scales, up_bias, ids, in_weights, h)
    if choice.up_regime == "vector":
        up_launch: Launch = (plan.up, (plan.up_tiles, pairs, 1), up_args)
    else:
        up_launch = (plan.up, (plan.up_tiles, programs, 1), (*up_args, pairs))
    down_args = (h, down_codes, down_scales, down_bias, ids)
    if choice.down_regime == "vector":
        launch((up_launch, (plan.down, (plan.down_tiles, tokens, 1), (*down_args, out_weights, out))))
        return
    y = torch.empty((pairs, plan.split_k, params.hidden), dtype=y_dtype, device=x.device)
    launch((
        up_launch, (plan.down, (plan.down_tiles, programs, plan.split_k), (*down_args, None, y, pairs)),
        (plan.combine, (tokens, plan.combine_tiles, 1), (y, ids, out_weights, out)),
    ))  # fmt: skip


def pairs_class(choice: TileChoice, pairs: int) -> int:
    """What kernels are specialized for in place of the number of pairs: a power of two."""
    if choice.up_regime == "sorted":
        return sorted_class(pairs)
    if choice.up_regime == choice.down_regime == "vector":
        return 0
    return max(power_of_two(pairs), 16)


def sorted_class(pairs: int) -> int:
    """Ids that ``sort_pairs`` scans at a time: the whole list, or as many as a program holds well."""
    return 512 if pairs <= 512 else 2048 if pairs <= 4096 else 16384


def sort_step(block: int, pdl: int) -> Step:
    """``sort_pairs`` for the class of pairs ``block``."""
    return Step(sort_pairs, {"BLOCK": block, "PDL": pdl}, max(min(block // 512, 16), 4), 1)


# The dtypes of rows, results and bias are part of the key because a Step's compiled kernel is for one set of them.
@lru_cache(maxsize=1024)
def linear_step(
    arch: str, e: int, n: int, k: int, x_stride: int, dtypes: tuple[torch.dtype | None, ...], bits: int, tiles: Tiles
) -> Step:
    """One projection of rows sorted by expert."""
    return product_step(
        sorted_matmul,
        # What comes before it is not known.
        tiles.with_size("PDL", 0).with_size("SPLIT_K", 1),
        arch,
        E=e,
        E_PADDED=power_of_two(e),
        TOP_K=1,
        X_STRIDE=x_stride,
        SLABS=layouts.slabs(n, False),
        STEPS=layouts.steps(k),
        N=n,
        K=k,
        GATHER_X=False,
        SCATTER_OUT=False,
        SPLIT=dtypes[0] != torch.bfloat16 and not interpreted(),
        BITS=bits,
        DTYPE=dot_dtype(),
        **NO_ACTIVATION,
    )


def grouped_linear(inputs: LinearInputs) -> Tensor:
    """``Backend.grouped_linear``."""
    # Rows beyond the last expert's are nobody's, and must be zero.
    out = torch.zeros((inputs.x.shape[0], inputs.n), dtype=inputs.round_dtype, device=inputs.x.device)
    return linear_into(out, inputs.x, inputs.weight, None, inputs.offsets, inputs.layout)


def linear_into(
    out: Tensor, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, ends: Tensor, layout: str
) -> Tensor:
    """x [S, K] sorted by expert -> out [S, N]; rows of no expert are left as they are. Returns ``out``."""
    rows, k = x.shape
    if rows == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    codes, scales = weight[:2]
    e, n = codes.shape[0], out.shape[1]
    arch = architecture(x.device)
    tiles = choose_linear(arch, e, rows, x.dtype == torch.bfloat16)
    dtypes = (x.dtype, out.dtype, None if bias is None else bias.dtype)
    step = linear_step(arch, e, n, k, x.stride(0), dtypes, layouts.BIT_ORDERS[layout], tiles)
    grid = (-(-layouts.slabs(n, False) * 16 // tiles["BM"]) * (rows // tiles["BT"] + e), 1, 1)
    with torch.cuda.device(x.device) if x.is_cuda else NOTHING:
        step(grid, x, codes, scales, bias, ends.contiguous(), None, None, out, None, None)
    return out
