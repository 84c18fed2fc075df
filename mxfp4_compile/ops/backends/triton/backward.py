"""The launches of a backward of one MoE layer and of one grouped projection, for prepared weights.

What ``ops/gradients.py`` says, in seven kernels: pairs sorted by expert, the up-projection computed again, the
gradient through the down-projection, through the activation (with the routing weights' gradient), through the
up-projection, and the sum over a token's experts in the order of its pairs. No atomics and no wait for the device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....spec import MoEParams
from ...arguments import MoEInputs
from . import layout as layouts
from .combine import combine
from .gradients import activation_gradient, weight_gradient
from .launch import Launch, Step, launch
from .matmul import sorted_matmul, transposed_matmul
from .moe import (
    MAX_INTERMEDIATE,
    NO_ACTIVATION,
    NOTHING,
    activation_constants,
    dot_dtype,
    interpreted,
    power_of_two,
    product_step,
    sort_step,
    sorted_class,
)
from .select import BackwardChoice, Tiles, architecture, choose, choose_backward, choose_linear


def _transposed_step(
    tiles: Tiles, e: int, n: int, slabs: int, k: int, stride: int, split: bool, bits: int, top_k: int,
    gather: bool, scatter: bool,
) -> Step:  # fmt: skip
    constants: dict[str, Any] = {
        "E": e, "E_PADDED": power_of_two(e), "TOP_K": top_k, "G_STRIDE": stride, "SLABS": slabs,
        "STEPS": layouts.steps(k), "N": n, "K": k, "GATHER": gather, "SCATTER": scatter,
        "SPLIT": split and not interpreted(), "BITS": bits, "DTYPE": dot_dtype(), **dict(tiles.sizes),
    }  # fmt: skip
    return Step(transposed_matmul, constants, tiles.warps, tiles.stages, tiles.registers)


def _grid(k: int, tiles: Tiles, rows: int, e: int) -> tuple[int, int, int]:
    return -(-layouts.steps(k) * layouts.STEP // tiles["BM"]) * (rows // tiles["BT"] + e), 1, 1


class BackwardPlan:
    """Everything about a backward that does not change from call to call with the same shapes and dtypes."""

    def __init__(
        self, arch: str, params: MoEParams, top_k: int, x_stride: int, grad_stride: int, dtypes: tuple[Any, ...],
        bits: int, again: Tiles, choice: BackwardChoice, pairs_class: int,
    ) -> None:  # fmt: skip
        e, h, i = params.num_experts, params.hidden, params.intermediate
        x_dtype, grad_dtype = dtypes[:2]
        up_slabs, down_slabs = layouts.slabs(params.up_rows, params.activation.gated), layouts.slabs(h, False)
        split = params.round_dtype != torch.bfloat16
        self.up_width = up_slabs * layouts.SLAB
        self.sort = sort_step(pairs_class, 0)
        self.again_tiles = -(-self.up_width // again["BM"])
        self.again = product_step(
            sorted_matmul, again.with_size("PDL", 0).with_size("SPLIT_K", 1), arch,
            E=e, E_PADDED=power_of_two(e), TOP_K=top_k, X_STRIDE=x_stride, SLABS=up_slabs, STEPS=layouts.steps(h),
            N=self.up_width, K=h, GATHER_X=True, SCATTER_OUT=False,
            SPLIT=x_dtype != torch.bfloat16 and not interpreted(), BITS=bits, DTYPE=dot_dtype(), **NO_ACTIVATION,
        )  # fmt: skip
        # Columns in another order lie in rows of whole slabs.
        reordered = choice.down["FIRST"]
        g_width, g_stride = (down_slabs * layouts.SLAB,) * 2 if reordered else (h, grad_stride)
        self.down = _transposed_step(
            choice.down, e, g_width, down_slabs, i, g_stride, grad_dtype != torch.bfloat16, bits, top_k, True, False
        )
        self.up = _transposed_step(
            choice.up, e, self.up_width, up_slabs, h, self.up_width, split, bits, top_k, False, True
        )
        self.activation = activation_step(params, top_k, grad_stride, bool(choice.up["FIRST"]))
        block = min(power_of_two(h), 1024)
        constants = {"E": e, "TOP_K": top_k, "X_STRIDE": x_stride, "HIDDEN": h, "BLOCK": block}
        self.weights = Step(weight_gradient, constants, 4, 1)
        self.combine_tiles = -(-h // block)
        constants = {"E": e, "TOP_K": top_k, "SPLIT_K": 1, "N": h, "BLOCK": block, "PDL": 0}
        self.combine = Step(combine, constants, 4, 1)


def activation_step(params: MoEParams, top_k: int, grad_stride: int, order_of_first: bool) -> Step:
    """The gradient through the activation."""
    h, i = params.hidden, params.intermediate
    constants = {
        "E": params.num_experts, "TOP_K": top_k, "GRAD_STRIDE": grad_stride,
        "BIAS_ROWS": layouts.slabs(h, False) * layouts.SLAB, "HIDDEN": h,
        "SLABS": layouts.slabs(params.up_rows, params.activation.gated), "N": i, **activation_constants(params),
        "REORDERED": order_of_first, "BLOCK": min(max(power_of_two(i), 16), 1024),
    }  # fmt: skip
    return Step(activation_gradient, constants, 4, 1)


# dtypes is part of the key because a Step's compiled kernel is for one set of them.
_plan = lru_cache(maxsize=1024)(BackwardPlan)


def moe_backward(grad: Tensor, inputs: MoEInputs, choice: BackwardChoice | None = None) -> tuple[Tensor, Tensor]:
    """``Backend.moe_backward``; ``choice`` overrides the tuned rules."""
    x, ids, weights, params = inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.params
    tokens, top_k = ids.shape
    dx = torch.empty((tokens, params.hidden), dtype=x.dtype, device=x.device)
    # Pairs whose id is no expert keep the zero.
    dw = torch.zeros((tokens, top_k), dtype=weights.dtype, device=x.device)
    if tokens == 0 or top_k == 0:
        return dx.zero_(), dw
    plain = lambda t: t if t.stride(1) == 1 else t.contiguous()
    inputs = replace(inputs, x=plain(x), topk_ids=ids.contiguous(), topk_weights=weights.contiguous())
    grad = plain(grad)
    width = layouts.slabs(params.up_rows, params.activation.gated) * layouts.SLAB
    per_token = top_k * (2 * width + max(params.hidden, params.intermediate)) * params.round_dtype.itemsize
    chunk = max(min(MAX_INTERMEDIATE // per_token, (1 << 24) // top_k), 1)
    with torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else NOTHING:
        for at in range(0, tokens, chunk):
            part = slice(at, min(at + chunk, tokens))
            _chunk(grad[part], inputs.of_tokens(part), dx[part], dw[part], choice)
    return dx, dw


def _chunk(grad: Tensor, inputs: MoEInputs, dx: Tensor, dw: Tensor, choice: BackwardChoice | None) -> None:
    x, ids, weights, params = inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.params
    e, h, i = params.num_experts, params.hidden, params.intermediate
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    arch = architecture(x.device)
    bf16 = x.dtype == grad.dtype == params.round_dtype == torch.bfloat16
    if choice is None:
        choice = choose_backward(arch, e, pairs, h * i, bf16)
    forward = choose(arch, e, top_k, h, i, tokens, bf16, x.device, x.dtype if x.dtype == params.round_dtype else None)
    again = forward.up if forward.up_regime == "sorted" else choose_linear(arch, e, pairs, bf16)
    biases = (inputs.up_bias, inputs.down_bias)
    dtypes = (x.dtype, grad.dtype, ids.dtype, weights.dtype, *(None if b is None else b.dtype for b in biases))
    plan: BackwardPlan = _plan(
        arch, params, top_k, x.stride(0), grad.stride(0), dtypes, layouts.BIT_ORDERS[inputs.layout], again, choice,
        sorted_class(pairs),
    )  # fmt: skip
    new = lambda rows, width: torch.empty((rows, width), dtype=params.round_dtype, device=x.device)
    offsets = torch.empty(e + pairs, dtype=torch.int32, device=x.device)
    order = offsets[e:]
    y, dy = new(pairs, plan.up_width), new(pairs, plan.up_width)
    # The gradient of h is read before that of x is written.
    room = new(pairs, max(h, i)).view(-1)
    q, rows = room[: pairs * i].view(pairs, i), room[: pairs * h].view(pairs, h)
    on_input = params.weight_on_input
    (up_codes, up_scales), (down_codes, down_scales) = inputs.up[:2], inputs.down[:2]
    g = reordered(grad) if choice.down["FIRST"] else grad
    launches: list[Launch] = [
        (plan.sort, (e, 1, 1), (ids, offsets, order, pairs)),
        (
            plan.again,
            (plan.again_tiles * (pairs // again["BT"] + e), 1, 1),
            (x, up_codes, up_scales, inputs.up_bias, offsets, order, weights if on_input else None, y, None, None),
        ),
        (plan.down, _grid(i, choice.down, pairs, e), (g, down_codes, down_scales, offsets, order, q)),
        (
            plan.activation,
            (pairs, 1, 1),
            (q, y, order, offsets, None if on_input else weights, ids, grad, inputs.down_bias, dy, dw, None),
        ),
        (plan.up, _grid(h, choice.up, pairs, e), (dy, up_codes, up_scales, offsets, order, rows)),
        (plan.combine, (tokens, plan.combine_tiles, 1), (rows, ids, weights if on_input else None, dx)),
    ]
    if on_input:
        launches.append((plan.weights, (pairs, 1, 1), (rows, x, ids, dw)))
    launch(launches)


def reordered(grad: Tensor) -> Tensor:
    """[rows, N] -> [rows, whole slabs], its columns in the order of ``transposed_matmul``'s FIRST."""
    rows, n = grad.shape
    slabs = layouts.slabs(n, False)
    if n % layouts.SLAB:
        grad = torch.nn.functional.pad(grad, (0, slabs * layouts.SLAB - n))
    bits = grad.reshape(rows, slabs, 2, 2, 2, 2)  # half, 2, 1, 0
    return bits.permute(0, 1, 3, 2, 5, 4).reshape(rows, slabs * layouts.SLAB)


@lru_cache(maxsize=1024)
def _linear_step(
    e: int, n: int, k: int, stride: int, width: int, dtypes: tuple[torch.dtype, ...], bits: int, tiles: Tiles
) -> Step:
    split = dtypes[0] != torch.bfloat16
    return _transposed_step(tiles, e, width, layouts.slabs(n, False), k, stride, split, bits, 1, False, False)


def grouped_linear_backward(
    grad: Tensor, offsets: Tensor, weight: Any, k: int, dtype: torch.dtype, layout: str
) -> Tensor:
    """``Backend.grouped_linear_backward``."""
    rows, n = grad.shape
    # Rows beyond the last expert's are nobody's, and must be zero.
    out = torch.zeros((rows, k), dtype=dtype, device=grad.device)
    bf16 = grad.dtype == torch.bfloat16
    e = weight[0].shape[0]
    tiles = choose_backward(architecture(grad.device), e, rows, n * k, bf16).up
    return linear_backward_into(out, grad, offsets, weight, layout, tiles)


def linear_backward_into(out: Tensor, grad: Tensor, ends: Tensor, weight: Any, layout: str, tiles: Tiles) -> Tensor:
    """grad [S, N] sorted by expert -> out [S, K]; rows of no expert are left as they are. Returns ``out``."""
    rows, n = grad.shape
    if rows == 0:
        return out
    codes, scales = weight[:2]
    e, k = codes.shape[0], out.shape[1]
    g = grad if grad.stride(1) == 1 else grad.contiguous()
    if tiles["FIRST"]:
        g = reordered(g)
    dtypes = (grad.dtype, out.dtype)
    step = _linear_step(e, n, k, g.stride(0), g.shape[1], dtypes, layouts.BIT_ORDERS[layout], tiles)
    with torch.cuda.device(grad.device) if grad.is_cuda else NOTHING:
        step(_grid(k, tiles, rows, e), g, codes, scales, ends.contiguous(), None, out)
    return out
