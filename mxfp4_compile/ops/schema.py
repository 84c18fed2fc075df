"""Every op once: signature, fake implementation, tags, and dispatch to the backend named in the call.

Importing this module registers ``torch.ops.mxfp4.*``. Eager calls dispatch to the backend too, since
``generate`` runs its prefill eagerly. Gradients of ``moe`` and ``grouped_linear`` are ops too (``gradients`` says
what they compute); the other ops have none, and a backward through them raises and names the op.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import mx
from ..spec import MOE_SCALARS, MoEParams, Role, moe_params
from ..spec import moe_scalars as moe_scalars  # of an op call, for those who write one
from . import collective as _collective
from . import route as _route
from .adapted import Adapted
from .arguments import LinearInputs, MoEInputs, Slot
from .backend import BackendError
from .low_rank import Term, low_rank, low_rank_backward
from .registry import get_backend

# needs_fixed_stride_order: Inductor may otherwise hand kernels a layout that eager never produces.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_LIB = torch.library.Library("mxfp4", "DEF")
_LIB.define("quantize(Tensor weight, str scale_rule) -> (Tensor, Tensor)", tags=_TAGS)
_LIB.define("dequantize(Tensor packed, Tensor scales, int size, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIB.define(
    f"prepare_moe(Tensor packed, Tensor scales, int k, str role, {MOE_SCALARS}, str backend, str layout) -> Tensor[]",
    tags=_TAGS,
)
_LIB.define("prepare_linear(Tensor packed, Tensor scales, int k, str backend, str layout) -> Tensor[]", tags=_TAGS)
_LIB.define(
    "moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] up, Tensor[] down, Tensor? up_bias, "
    f"Tensor? down_bias, {MOE_SCALARS}, str backend, str layout) -> Tensor",
    tags=_TAGS,
)
_LIB.define(
    "grouped_linear(Tensor x, Tensor offsets, Tensor[] weight, int n, ScalarType round_dtype, str backend, "
    "str layout) -> Tensor",
    tags=_TAGS,
)
_LIB.define(
    "moe_backward(Tensor grad, Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] up, Tensor[] down, "
    f"Tensor? up_bias, Tensor? down_bias, {MOE_SCALARS}, str backend, str layout) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "grouped_linear_backward(Tensor grad, Tensor offsets, Tensor[] weight, int k, ScalarType dtype, str backend, "
    "str layout) -> Tensor",
    tags=_TAGS,
)
# Adapters: ``of_up`` terms of the up-projection, then those of the down-projection.
_TERMS = "Tensor[] a, Tensor[] b, float[] scalings, int[] starts, int of_up"
_ADAPTED = (
    "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] up, Tensor[] down, Tensor? up_bias, Tensor? down_bias, "
    f"{_TERMS}, {MOE_SCALARS}, str backend, str layout"
)
_LIB.define(f"adapted_moe({_ADAPTED}) -> Tensor", tags=_TAGS)
# The gradients of x and topk_weights, then of every a, then of every b.
_LIB.define(f"adapted_moe_backward(Tensor grad, {_ADAPTED}) -> Tensor[]", tags=_TAGS)
_LIB.define("low_rank(Tensor x, Tensor ends, Tensor a, Tensor b, float scaling) -> Tensor", tags=_TAGS)
_LIB.define(
    "low_rank_backward(Tensor grad, Tensor x, Tensor ends, Tensor a, Tensor b, float scaling) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "route(Tensor logits, int k, str before, str after, float eps, ScalarType dtype) -> (Tensor, Tensor)", tags=_TAGS
)
_LIB.define("reduce(Tensor x, str group) -> Tensor", tags=_TAGS)


def _quantize(weight: Tensor, scale_rule: str) -> tuple[Tensor, Tensor]:
    return mx.quantize(weight, scale_rule)


def _quantize_fake(weight: Tensor, scale_rule: str) -> tuple[Tensor, Tensor]:
    mx.check_scale_rule(scale_rule)
    *lead, k = weight.shape
    new = lambda last: weight.new_empty((*lead, last), dtype=torch.uint8)
    return new((k + 1) // 2), new((k + mx.BLOCK - 1) // mx.BLOCK)


def _dequantize(packed: Tensor, scales: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return mx.dequantize(packed, scales, size, dtype)


def _dequantize_fake(packed: Tensor, _scales: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], size), dtype=dtype)


def _fresh(tensors: list[Tensor], packed: Tensor, scales: Tensor) -> list[Tensor]:
    # An op may not return its inputs; a canonical layout would.
    return [t.clone() if t is packed or t is scales else t for t in tensors]


def _prepare_moe(packed: Tensor, scales: Tensor, k: int, role: Role, *rest: Any) -> list[Tensor]:
    *scalars, backend, layout = rest
    tensors = get_backend(backend).prepare(packed, scales, Slot(role, moe_params(*scalars), layout), k=k)
    return _fresh(tensors, packed, scales)


def _prepare_linear(packed: Tensor, scales: Tensor, k: int, backend: str, layout: str) -> list[Tensor]:
    tensors = get_backend(backend).prepare(packed, scales, Slot(None, None, layout), k=k)
    return _fresh(tensors, packed, scales)


def _moe_inputs(*given: Any) -> tuple[MoEInputs, str]:
    """The arguments of an op call as a backend takes them, and the backend's name."""
    x, topk_ids, topk_weights, up, down, up_bias, down_bias, *scalars, backend, layout = given
    params = moe_params(*scalars)
    return MoEInputs(x, topk_ids, topk_weights, up, down, up_bias, down_bias, params, layout), backend


def _moe(*given: Any) -> Tensor:
    inputs, backend = _moe_inputs(*given)
    _check_moe(inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.params)
    return _call("moe", backend, inputs.layout, inputs.x, lambda: _site(inputs), inputs)  # type: ignore[no-any-return]


def _site(inputs: MoEInputs) -> str:
    return f"top-k {inputs.topk_ids.shape[1]}, {inputs.params}"


def _check_moe(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, params: MoEParams) -> None:
    if x.dim() != 2 or x.shape[1] != params.hidden:
        raise ValueError(f"mxfp4::moe: x must be [T, {params.hidden}], got {list(x.shape)}")
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            "mxfp4::moe: topk_ids and topk_weights must both be [T, K] with T rows of x, got "
            f"{list(topk_ids.shape)} and {list(topk_weights.shape)} for x {list(x.shape)}"
        )
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"mxfp4::moe: topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if not topk_weights.is_floating_point():
        raise TypeError(f"mxfp4::moe: topk_weights must be floating point, got {topk_weights.dtype}")


def _moe_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: list[Tensor],
    n: int,
    round_dtype: torch.dtype,
    backend: str,
    layout: str,
) -> Tensor:
    inputs = LinearInputs(x, offsets, weight, n, round_dtype, layout)
    return _call("grouped_linear", backend, layout, x, lambda: f"N {n}", inputs)  # type: ignore[no-any-return]


# What the caller did wrong, and what callers handle, goes through as it is.
_OWN = (IndexError, torch.cuda.OutOfMemoryError, BackendError)


def _uncast(x: Tensor) -> AbstractContextManager[Any]:
    """Within it autocast is off: dtypes are in the op's arguments, and nothing inside is to be cast."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


def _call(op: str, backend: str, layout: str, x: Tensor, site: Callable[[], str], *given: Any) -> Any:
    """The method ``op`` of a backend; what it raises names the backend, the op, and what it was given."""
    method = getattr(get_backend(backend), op)
    try:
        with _uncast(x):
            return method(*given)
    except _OWN:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".strip()
        raise BackendError(
            f"backend {backend!r} (layout {layout}) failed in mxfp4::{op} on {x.device} for x {list(x.shape)} "
            f"{x.dtype}, {site()}: {what}"
        ) from error


def _grouped_linear_fake(
    x: Tensor, _offsets: Tensor, _weight: list[Tensor], n: int, round_dtype: torch.dtype, *_: Any
) -> Tensor:
    return x.new_empty((x.shape[0], n), dtype=round_dtype)


def _moe_backward(grad: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    inputs, backend = _moe_inputs(*given)
    site = lambda: _site(inputs)
    return _call("moe_backward", backend, inputs.layout, inputs.x, site, grad, inputs)  # type: ignore[no-any-return]


def _moe_backward_fake(_grad: Tensor, x: Tensor, _ids: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _grouped_linear_backward(
    grad: Tensor, offsets: Tensor, weight: list[Tensor], k: int, dtype: torch.dtype, backend: str, layout: str
) -> Tensor:
    given = (grad, offsets, weight, k, dtype, layout)
    return _call("grouped_linear_backward", backend, layout, grad, lambda: f"K {k}", *given)  # type: ignore[no-any-return]


def _grouped_linear_backward_fake(
    grad: Tensor, _offsets: Tensor, _weight: list[Tensor], k: int, dtype: torch.dtype, *_: Any
) -> Tensor:
    return grad.new_empty((grad.shape[0], k), dtype=dtype)


# adapters


def _adapted(*given: Any) -> tuple[Adapted, str]:
    """The layer and terms of an op call, and the backend's name."""
    *of_moe, a, b, scalings, starts, of_up = given[:12]
    inputs, name = _moe_inputs(*of_moe, *given[12:])
    terms = [Term(*one) for one in zip(a, b, scalings, starts, strict=True)]
    return Adapted(get_backend(name), inputs, terms[:of_up], terms[of_up:]), name


def _adapted_moe(*given: Any) -> Tensor:
    layer, _ = _adapted(*given)
    i = layer.inputs
    _check_moe(i.x, i.topk_ids, i.topk_weights, i.params)
    with _uncast(i.x):
        return layer.forward()


def _adapted_moe_backward(grad: Tensor, *given: Any) -> list[Tensor]:
    layer, _ = _adapted(*given)
    with _uncast(grad):
        dx, dw, of_terms = layer.backward(grad)
    return [dx, dw, *[da for da, _ in of_terms], *[db for _, db in of_terms]]


def _adapted_moe_backward_fake(_grad: Tensor, x: Tensor, _ids: Tensor, weights: Tensor, *rest: Any) -> list[Tensor]:
    a, b = rest[4:6]
    return [t.new_empty(t.shape) for t in (x, weights, *a, *b)]


def _low_rank(x: Tensor, ends: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    with _uncast(x):
        return low_rank(x, ends, Term(a, b, scaling))


def _low_rank_fake(x: Tensor, _ends: Tensor, _a: Tensor, b: Tensor, _scaling: float) -> Tensor:
    return x.new_empty((x.shape[0], b.shape[1]))


def _low_rank_backward(
    grad: Tensor, x: Tensor, ends: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    with _uncast(x):
        return low_rank_backward(grad, x, ends, Term(a, b, scaling))


def _low_rank_backward_fake(_grad: Tensor, x: Tensor, _ends: Tensor, a: Tensor, b: Tensor, *_: Any) -> Any:
    return x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


# gradients


def _no_backward(name: str) -> Any:
    def backward(*_: Any) -> Any:
        if name == "reduce":
            raise NotImplementedError(
                "mxfp4::reduce has no backward: gradients do not pass through experts that lie on several ranks. "
                "Train with all experts on each rank, or run this under torch.no_grad()."
            )
        if name.endswith("_backward"):
            raise NotImplementedError(f"mxfp4::{name} has no gradient of its own: second derivatives are not served.")
        raise NotImplementedError(
            f"mxfp4::{name} has no backward. Run it under torch.no_grad(), or mxfp4_compile.restore(model) before "
            "training what lies before it."
        )

    return backward


def _check_gradients(name: str, backend: str, layout: str, x: Tensor, frozen: list[Tensor | None]) -> None:
    """Errors of a call whose gradients are asked for; a warning, once, where they cost a dequantization."""
    tensors = [t for t in frozen if t is not None]
    if any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"mxfp4::{name}: a weight or bias of MXFP4 experts requires a gradient; they are frozen. "
            "Train adapters or other parameters, or mxfp4_compile.restore(model) for full fine-tuning."
        )
    if any(t.is_inference() for t in (x, *tensors)):
        raise RuntimeError(
            f"mxfp4::{name}: a gradient is asked for, but the tokens or the experts' weights were made under "
            "torch.inference_mode(). Call optimize() or load() outside of it, and train outside of it."
        )
    served = get_backend(backend)
    if served.slack(layout):
        raise NotImplementedError(
            f"mxfp4::{name}: gradients do not pass through activations of 8 bits (backend {backend!r}, layout "
            f"{layout!r}). Optimize with activation_dtype='bf16' to train, or run this under torch.no_grad()."
        )
    if x.is_cuda and not served.native_gradients and backend not in _SAID:
        _SAID.add(backend)
        warnings.warn(
            f"backend {backend!r} has no backward kernels: gradients dequantize the experts that have tokens, a few at "
            "a time, and wait for the GPU. backend='triton' has them.",
            stacklevel=2,
        )


_SAID: set[str] = set()


def _moe_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, ids, weights, up, down, up_bias, down_bias, *rest = inputs
    _check_gradients("moe", rest[-2], rest[-1], x, [*up, *down, up_bias, down_bias])
    ctx.rest, ctx.up, ctx.down = tuple(rest), len(up), len(down)
    ctx.has_up_bias = up_bias is not None
    ctx.save_for_backward(x, ids, weights, *up, *down, *(b for b in (up_bias, down_bias) if b is not None))


def _moe_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, ids, weights, *tensors = ctx.saved_tensors
    up, down = tensors[: ctx.up], tensors[ctx.up : ctx.up + ctx.down]
    biases = tensors[ctx.up + ctx.down :]
    up_bias = biases.pop(0) if ctx.has_up_bias else None
    down_bias = biases.pop(0) if biases else None
    dx, dw = moe_backward(grad, x, ids, weights, up, down, up_bias, down_bias, *ctx.rest)
    return dx, None, dw, [None] * ctx.up, [None] * ctx.down, None, None, *([None] * len(ctx.rest))


def _grouped_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, offsets, weight, _, _, ctx.backend, ctx.layout = inputs
    _check_gradients("grouped_linear", ctx.backend, ctx.layout, x, list(weight))
    ctx.k, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(offsets, *weight)


def _grouped_linear_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, *weight = ctx.saved_tensors
    dx = grouped_linear_backward(grad, offsets, weight, ctx.k, ctx.dtype, ctx.backend, ctx.layout)
    return dx, None, [None] * len(weight), None, None, None, None


def _adapted_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, ids, weights, up, down, up_bias, down_bias, a, b, *rest = inputs
    _check_gradients("adapted_moe", rest[-2], rest[-1], x, [*up, *down, up_bias, down_bias])
    ctx.rest, ctx.counts, ctx.biases = tuple(rest), (len(up), len(down), len(a)), (up_bias, down_bias)
    ctx.save_for_backward(x, ids, weights, *up, *down, *a, *b)


def _adapted_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, ids, weights, *tensors = ctx.saved_tensors
    lists = []
    for count in (*ctx.counts, ctx.counts[-1]):
        lists.append(tensors[:count])
        tensors = tensors[count:]
    up, down, a, b = lists
    dx, dw, *rest = adapted_moe_backward(grad, x, ids, weights, up, down, *ctx.biases, a, b, *ctx.rest)
    nothing = [None] * len(up), [None] * len(down), None, None
    return dx, None, dw, *nothing, rest[: len(a)], rest[len(a) :], *([None] * len(ctx.rest))


def _low_rank_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _low_rank_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx, da, db = low_rank_backward_op(grad, *ctx.saved_tensors, ctx.scaling)
    return dx, None, da, db, None


for _name, _impl, _fake in (
    ("quantize", _quantize, _quantize_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("prepare_moe", _prepare_moe, _prepare_moe),  # plain reshapes: they run on fake tensors as they are
    ("prepare_linear", _prepare_linear, _prepare_linear),
    ("moe", _moe, _moe_fake),
    ("grouped_linear", _grouped_linear, _grouped_linear_fake),
    ("moe_backward", _moe_backward, _moe_backward_fake),
    ("grouped_linear_backward", _grouped_linear_backward, _grouped_linear_backward_fake),
    ("adapted_moe", _adapted_moe, _moe_fake),
    ("adapted_moe_backward", _adapted_moe_backward, _adapted_moe_backward_fake),
    ("low_rank", _low_rank, _low_rank_fake),
    ("low_rank_backward", _low_rank_backward, _low_rank_backward_fake),
    ("route", _route.route, _route.fake),
    ("reduce", _collective.reduce, _collective.fake),
):
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mxfp4::{_name}", _fake, lib=_LIB)
    if _name not in ("moe", "grouped_linear", "adapted_moe", "low_rank"):
        torch.library.register_autograd(f"mxfp4::{_name}", _no_backward(_name), lib=_LIB)
for _name, _gradients, _setup in (
    ("moe", _moe_gradients, _moe_setup),
    ("grouped_linear", _grouped_linear_gradients, _grouped_linear_setup),
    ("adapted_moe", _adapted_gradients, _adapted_setup),
    ("low_rank", _low_rank_gradients, _low_rank_setup),
):
    torch.library.register_autograd(f"mxfp4::{_name}", _gradients, setup_context=_setup, lib=_LIB)

quantize = torch.ops.mxfp4.quantize.default
dequantize = torch.ops.mxfp4.dequantize.default
prepare_moe = torch.ops.mxfp4.prepare_moe.default
prepare_linear = torch.ops.mxfp4.prepare_linear.default
moe = torch.ops.mxfp4.moe.default
grouped_linear = torch.ops.mxfp4.grouped_linear.default
moe_backward = torch.ops.mxfp4.moe_backward.default
grouped_linear_backward = torch.ops.mxfp4.grouped_linear_backward.default
route = torch.ops.mxfp4.route.default
reduce = torch.ops.mxfp4.reduce.default
adapted_moe = torch.ops.mxfp4.adapted_moe.default
adapted_moe_backward = torch.ops.mxfp4.adapted_moe_backward.default
add_low_rank = torch.ops.mxfp4.low_rank.default
low_rank_backward_op = torch.ops.mxfp4.low_rank_backward.default
