"""Gradients through frozen MXFP4 experts, against autograd on the dequantized weights in fp64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import mxfp4_compile  # noqa: F401  (registers the ops)
from mxfp4_compile import mx
from mxfp4_compile.ops import gradients, schema
from mxfp4_compile.ops.arguments import Slot
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.spec import Activation, MoEParams

GPT_OSS = Activation("silu", alpha=1.702, beta=1.0, gate_limit=0.7, up_limit=0.7)
ACTIVATIONS = (
    Activation("silu"), Activation("gelu"), Activation("gelu_tanh"), GPT_OSS,
    Activation("relu2", gated=False), Activation("relu", gated=False), Activation("silu", gated=False, gate_limit=0.5),
)  # fmt: skip
ARRANGEMENTS = (("halves", 0), ("halves", 1), ("interleaved", 0), ("interleaved", 1))
VARIANTS = [
    (activation, arrangement, on_input, bias)
    for activation in ACTIVATIONS
    for arrangement in (ARRANGEMENTS if activation.gated else (("none", 0),))
    for on_input, bias in itertools.product((False, True), repeat=2)
]


@dataclass(frozen=True)
class Layer:
    """A random layer: canonical weights, their values in fp64, biases or None."""

    params: MoEParams
    packed: tuple[list[Tensor], list[Tensor]]
    dense: tuple[Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None]


def random_layer(
    activation: Activation, arrangement: tuple[str, int], on_input: bool, bias: bool, dtype: torch.dtype, seed: int = 0
) -> Layer:
    g = torch.Generator().manual_seed(seed)
    layout, half = arrangement
    params = MoEParams(5, 34, 20, activation, layout, half, on_input, dtype, dtype)  # type: ignore[arg-type]
    packed, dense, biases = [], [], []
    for role in ("up", "down"):
        e, n, k = params.shape(role)
        codes, scales = mx.quantize(torch.randn(e, n, k, generator=g) / k**0.5)
        packed.append([codes, scales])
        dense.append(mx.dequantize(codes, scales, k, torch.float64))
        biases.append(torch.randn(e, n, generator=g).to(dtype) if bias else None)
    return Layer(params, tuple(packed), tuple(dense), tuple(biases))  # type: ignore[arg-type]


def random_call(layer: Layer, tokens: int, top_k: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, ids (some of no expert, expert 3 without tokens), routing weights, the gradient of the result."""
    g = torch.Generator().manual_seed(seed)
    dtype, hidden = layer.params.round_dtype, layer.params.hidden
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    ids = torch.randint(7, (tokens, top_k), generator=g)
    ids[ids == 3] = 5
    weights = torch.rand(tokens, top_k, generator=g).to(dtype)
    return x, ids, weights, torch.randn(tokens, hidden, generator=g).to(dtype)


def run(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor, backend: str) -> Tensor:
    up, down = layer.packed
    return schema.moe(x, ids, weights, up, down, *layer.biases, *schema.moe_scalars(layer.params), backend, "canonical")


def plain(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer from its definition, in differentiable torch, in the dtype of ``x``."""
    params, (up, down) = layer.params, (w.to(x.dtype) for w in layer.dense)
    out = torch.zeros_like(x)
    for e in range(params.num_experts):
        rows, at = (ids == e).nonzero(as_tuple=True)
        w = weights[rows, at, None]
        y = (x[rows] * w if params.weight_on_input else x[rows]) @ up[e].T
        y = y if layer.biases[0] is None else y + layer.biases[0][e].to(x.dtype)
        z = params.activate(y) @ down[e].T
        z = z if layer.biases[1] is None else z + layer.biases[1][e].to(x.dtype)
        out = out.index_add(0, rows, z if params.weight_on_input else z * w)
    return out


def gradients_of(function, x: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    return torch.autograd.grad(function(x, weights), (x, weights), grad)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_variant_in_fp64(backend: str) -> None:
    assert len(VARIANTS) >= 36
    for index, variant in enumerate(VARIANTS):
        layer = random_layer(*variant, torch.float64, seed=index)
        x, ids, weights, grad = random_call(layer, 6, 3, seed=index)
        ours = gradients_of(lambda x, w: run(layer, x, ids, w, backend), x, weights, grad)  # noqa: B023
        exact = gradients_of(lambda x, w: plain(layer, x, ids, w), x, weights, grad)  # noqa: B023
        for a, b in zip(ours, exact, strict=True):
            assert relative(a, b) < 1e-12, variant


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_any_number_of_tokens_and_chunks(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(GPT_OSS, ("interleaved", 0), False, True, torch.float64)
    x, ids, weights, grad = random_call(layer, tokens, 2)
    function = lambda x, w: run(layer, x, ids, w, "reference")
    whole = gradients_of(function, x, weights, grad)
    monkeypatch.setattr(gradients, "SCRATCH_BYTES", 1)  # one expert at a time
    for a, b in zip(gradients_of(function, x, weights, grad), whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    exact = gradients_of(lambda x, w: plain(layer, x, ids, w), x, weights, grad)
    for a, b in zip(whole, exact, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_only_ids_of_no_expert() -> None:
    layer = random_layer(ACTIVATIONS[0], ("halves", 0), False, False, torch.float64)
    x, ids, weights, grad = random_call(layer, 4, 2)
    dx, dw = gradients_of(lambda x, w: run(layer, x, torch.full_like(ids, 9), w, "cpu"), x, weights, grad)
    assert not dx.any() and not dw.any()


def test_gradcheck() -> None:
    layer = random_layer(Activation("silu", gate_limit=0.7), ("halves", 1), False, True, torch.float64)
    x, ids, weights, _ = random_call(layer, 3, 2)
    torch.autograd.gradcheck(
        lambda x, w: run(layer, x, ids, w, "reference"), (x.requires_grad_(), weights.requires_grad_())
    )


@pytest.mark.parametrize("on_input", [False, True])
def test_bf16_is_as_near_to_fp32_as_autograd_is(on_input: bool) -> None:
    layer = random_layer(GPT_OSS, ("interleaved", 0), on_input, True, torch.bfloat16)
    x, ids, weights, grad = random_call(layer, 64, 2)
    exact = gradients_of(lambda x, w: plain(layer, x, ids, w), x.double(), weights.double(), grad.double())
    usual = gradients_of(lambda x, w: plain(layer, x, ids, w), x, weights, grad)
    ours = gradients_of(lambda x, w: run(layer, x, ids, w, "cpu"), x, weights, grad)
    for a, b, c in zip(ours, usual, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a, c) <= 1.25 * relative(b, c)


def test_strided_inputs_and_gradients() -> None:
    layer = random_layer(ACTIVATIONS[0], ("halves", 0), False, False, torch.float64)
    x, ids, weights, grad = random_call(layer, 8, 2)
    spread = lambda t: torch.stack((t, torch.full_like(t, 77)), -1)[..., 0]
    function = lambda x, w: run(layer, x, ids, w, "cpu")
    whole = gradients_of(function, x, weights, grad)
    for a, b in zip(gradients_of(function, spread(x), spread(weights), spread(grad)), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_grouped_linear(backend: str) -> None:
    g = torch.Generator().manual_seed(3)
    codes, scales = mx.quantize(torch.randn(4, 6, 40, generator=g))
    dense = mx.dequantize(codes, scales, 40, torch.float64)
    offsets = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    x = torch.randn(11, 40, generator=g, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(11, 6, generator=g, dtype=torch.float64)
    out = schema.grouped_linear(x, offsets, [codes, scales], 6, torch.float64, backend, "canonical")
    (dx,) = torch.autograd.grad(out, x, grad)
    owner = [0] * 3 + [2] * 5 + [3]
    exact = torch.cat([grad[:9].unsqueeze(1).bmm(dense[owner]).squeeze(1), torch.zeros(2, 40, dtype=torch.float64)])
    assert relative(dx, exact) < 1e-12


def test_opcheck() -> None:
    layer = random_layer(GPT_OSS, ("halves", 0), False, True, torch.float32)
    x, ids, weights, grad = random_call(layer, 4, 2)
    rest = (*layer.packed, *layer.biases, *schema.moe_scalars(layer.params), "cpu", "canonical")
    torch.library.opcheck(schema.moe, (x.requires_grad_(), ids, weights.requires_grad_(), *rest))
    torch.library.opcheck(schema.moe_backward, (grad, x.detach(), ids, weights.detach(), *rest))


def test_opcheck_grouped_linear() -> None:
    codes, scales = mx.quantize(torch.randn(2, 6, 40))
    offsets, weight = torch.tensor([3, 5], dtype=torch.int32), [codes, scales]
    x = torch.randn(5, 40, requires_grad=True)
    torch.library.opcheck(schema.grouped_linear, (x, offsets, weight, 6, torch.float32, "cpu", "canonical"))
    args = (torch.randn(5, 6), offsets, weight, 40, torch.float32, "cpu", "canonical")
    torch.library.opcheck(schema.grouped_linear_backward, args)


def test_compiled_gradients_are_the_eager_ones() -> None:
    layer = random_layer(ACTIVATIONS[0], ("halves", 0), False, False, torch.float32)
    x, ids, weights, grad = random_call(layer, 5, 2)
    function = lambda x, w: run(layer, x * 2, ids, w.softmax(-1), "cpu").tanh()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients_of(compiled, x, weights, grad), gradients_of(function, x, weights, grad), strict=True):
        assert torch.equal(a, b)


def test_same_inputs_same_bits_under_checkpointing() -> None:
    layer = random_layer(GPT_OSS, ("interleaved", 1), False, True, torch.bfloat16)
    x, ids, weights, grad = random_call(layer, 9, 2)
    function = lambda x, w: run(layer, x, ids, w, "cpu")
    again = lambda x, w: torch.utils.checkpoint.checkpoint(function, x, w, use_reentrant=False)
    for a, b in zip(gradients_of(again, x, weights, grad), gradients_of(function, x, weights, grad), strict=True):
        assert torch.equal(a, b)


def test_other_layouts_give_the_same_gradients() -> None:
    params = MoEParams(3, 128, 64, GPT_OSS, "interleaved", 0, False, torch.bfloat16, torch.bfloat16)
    g = torch.Generator().manual_seed(5)
    backend = get_backend("triton_kernels")
    canonical, prepared = [], []
    for role in ("up", "down"):
        e, n, k = params.shape(role)
        codes, scales = mx.quantize(torch.randn(e, n, k, generator=g) / k**0.5)
        canonical.append([codes, scales])
        prepared.append(backend.prepare(codes, scales, Slot(role, params, "strided"), k=k))
    x, grad = (torch.randn(7, 128, generator=g).bfloat16() for _ in range(2))
    ids, weights = torch.randint(3, (7, 2), generator=g), torch.rand(7, 2, generator=g).bfloat16()
    scalars = schema.moe_scalars(params)
    with torch.no_grad():
        other = schema.moe_backward(grad, x, ids, weights, *prepared, None, None, *scalars, "triton_kernels", "strided")
        usual = schema.moe_backward(grad, x, ids, weights, *canonical, None, None, *scalars, "cpu", "canonical")
    for a, b in zip(other, usual, strict=True):
        assert torch.equal(a, b)


def test_what_has_no_gradient_says_so() -> None:
    layer = random_layer(GPT_OSS, ("halves", 0), False, True, torch.float32)
    x, ids, weights, grad = random_call(layer, 4, 2)
    layer.biases[1].requires_grad_()
    with pytest.raises(RuntimeError, match="they are frozen"):
        run(layer, x.requires_grad_(), ids, weights, "cpu")
    layer.biases[1].requires_grad_(False)
    (dx,) = torch.autograd.grad(run(layer, x, ids, weights, "cpu"), x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not served"):
        dx.sum().backward()
