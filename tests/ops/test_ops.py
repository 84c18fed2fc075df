"""The ops: schema, fakes, opcheck, the reference as specification, the cpu backend against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mxfp4_compile  # noqa: F401  (registers the ops)
from mxfp4_compile import mx
from mxfp4_compile.ops import schema
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.spec import Activation, GateLayout, MoEParams

ACTIVATIONS = [
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("silu", gate_limit=1.5, up_limit=1.0),
    Activation("silu", alpha=1.702, beta=1.0, gate_limit=2.0, up_limit=2.0),
    Activation("relu2", gated=False),
    Activation("relu", gated=False),
]


def make_params(
    activation: Activation,
    *,
    experts: int = 5,
    hidden: int = 64,
    intermediate: int = 32,
    layout: GateLayout = "halves",
    half: int = 0,
    on_input: bool = False,
    dtype: torch.dtype = torch.float32,
) -> MoEParams:
    return MoEParams(
        experts,
        hidden,
        intermediate,
        activation,
        layout if activation.gated else "none",
        half if activation.gated else 0,
        on_input,
        dtype,
        dtype,
    )


def make_inputs(params: MoEParams, tokens: int, top_k: int, *, bias: bool, seed: int = 0, index=torch.int64):
    """x, ids, weights, canonical up and down, biases; and the dequantized fp64 weights."""
    g = torch.Generator().manual_seed(seed)
    dtype = params.round_dtype
    x = torch.randn(tokens, params.hidden, generator=g).to(dtype)
    ids = torch.randint(params.num_experts, (tokens, top_k), generator=g).to(index)
    weights = torch.rand(tokens, top_k, generator=g).to(dtype)
    packed, dense = [], []
    for role in ("up", "down"):
        e, n, k = params.shape(role)
        w = torch.randn(e, n, k, generator=g) / k**0.5
        p, s = mx.quantize(w)
        packed.append([p, s])
        dense.append(mx.dequantize(p, s, k, torch.float64))
    biases = [
        torch.randn(params.num_experts, params.shape(r)[1], generator=g).to(dtype) if bias else None
        for r in ("up", "down")
    ]
    return x, ids, weights, packed, biases, dense


def oracle(
    params: MoEParams, x: Tensor, ids: Tensor, weights: Tensor, dense: list[Tensor], biases: list[Tensor | None]
) -> Tensor:
    """One token and expert at a time in fp64, written from the definition."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    act = params.activation
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e, w = int(ids[t, j]), float(weights[t, j])
            if e >= params.num_experts:
                continue
            token = x[t].double() * (w if params.weight_on_input else 1.0)
            y = dense[0][e] @ token + (0 if biases[0] is None else biases[0][e].double())
            if act.gated:
                pair = (
                    (y[: params.intermediate], y[params.intermediate :])
                    if params.gate_layout == "halves"
                    else (y[0::2], y[1::2])
                )
                gate, up = pair if params.activated_half == 0 else pair[::-1]
            else:
                gate, up = y, None
            gate = gate.clamp(max=act.gate_limit)
            f = {
                "silu": lambda g: g / (1 + torch.exp(-act.alpha * g)),
                "gelu": lambda g: 0.5 * g * (1 + torch.erf(g / math.sqrt(2))),
                "gelu_tanh": lambda g: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
                "relu": lambda g: g.clamp(min=0),
                "relu2": lambda g: g.clamp(min=0) ** 2,
            }[act.kind](gate)
            h = f if up is None else f * (up.clamp(-act.up_limit, act.up_limit) + act.beta)
            z = dense[1][e] @ h + (0 if biases[1] is None else biases[1][e].double())
            out[t] += z * (1.0 if params.weight_on_input else w)
    return out


def call(params: MoEParams, x, ids, weights, packed, biases, backend: str) -> Tensor:
    with torch.no_grad():
        return schema.moe(
            x,
            ids,
            weights,
            packed[0],
            packed[1],
            biases[0],
            biases[1],
            *schema.moe_scalars(params),
            backend,
            "canonical",
        )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_moe_is_what_it_says(backend: str, activation: Activation, layout: GateLayout, half: int, bias: bool) -> None:
    if not activation.gated and (layout, half) != ("halves", 0):
        pytest.skip("without a gate there is one arrangement")
    params = make_params(activation, layout=layout, half=half)
    for tokens, top_k, on_input, index in (
        (7, 2, False, torch.int64),
        (3, 3, True, torch.int32),
        (40, 1, False, torch.int64),
    ):
        params = make_params(activation, layout=layout, half=half, on_input=on_input)
        x, ids, weights, packed, biases, dense = make_inputs(params, tokens, top_k, bias=bias, index=index)
        expected = oracle(params, x, ids, weights, dense, biases)
        assert relative(call(params, x, ids, weights, packed, biases, backend), expected) < 2e-6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(48, 20), (33, 7), (1000, 1), (96, 95)])
def test_odd_sizes(backend: str, hidden: int, intermediate: int) -> None:
    params = make_params(ACTIVATIONS[0], hidden=hidden, intermediate=intermediate)
    x, ids, weights, packed, biases, dense = make_inputs(params, 9, 2, bias=True)
    assert (
        relative(call(params, x, ids, weights, packed, biases, backend), oracle(params, x, ids, weights, dense, biases))
        < 2e-6
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tokens", [1, 50])
def test_routing_edges(backend: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfp4_compile.ops.backends import cpu

    params = make_params(ACTIVATIONS[0])
    for limit in (0, 1 << 30):  # both paths of the cpu backend
        monkeypatch.setattr(cpu, "_GATHER_BYTES", limit)
        x, ids, weights, packed, biases, dense = make_inputs(params, tokens, 2, bias=True)
        for change in ("none", "all on one", "sentinel", "all sentinels", "repeated"):
            chosen = ids.clone()
            if change == "all on one":
                chosen[:] = 3
            elif change == "sentinel":
                chosen[0, 1], chosen[-1, 0] = params.num_experts, params.num_experts + 77
            elif change == "all sentinels":
                chosen[:] = params.num_experts
            elif change == "repeated":
                chosen[:, 1] = chosen[:, 0]
            expected = oracle(params, x, chosen, weights, dense, biases)
            out = call(params, x, chosen, weights, packed, biases, backend)
            assert (out.double() - expected).abs().max() < 1e-5, change
        empty = call(params, x[:0], ids[:0], weights[:0], packed, biases, backend)
        assert empty.shape == (0, params.hidden)
        wide = torch.randn(tokens, 2 * params.hidden)[:, ::2]
        assert (
            relative(
                call(params, wide, ids, weights, packed, biases, backend),
                oracle(params, wide, ids, weights, dense, biases),
            )
            < 2e-6
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_only_hit_experts_are_read(backend: str) -> None:
    params = make_params(ACTIVATIONS[0])
    x, ids, weights, packed, biases, _ = make_inputs(params, 50, 2, bias=False)
    ids[:] = torch.tensor([1, 2])
    clean = call(params, x, ids, weights, packed, biases, backend)
    for pair in packed:
        pair[1][[0, 3, 4]] = 255  # NaN scales
    assert torch.equal(call(params, x, ids, weights, packed, biases, backend), clean)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_like_a_model(backend: str, dtype: torch.dtype) -> None:
    params = make_params(ACTIVATIONS[0], hidden=128, intermediate=64, dtype=dtype)
    x, ids, weights, packed, biases, dense = make_inputs(params, 64, 2, bias=True)
    out = call(params, x, ids, weights, packed, biases, backend)
    assert out.dtype == dtype
    assert relative(out, oracle(params, x, ids, weights, dense, biases)) < (6e-3 if dtype == torch.bfloat16 else 1e-3)


def test_negative_ids_name_the_value() -> None:
    params = make_params(ACTIVATIONS[0])
    x, ids, weights, packed, biases, _ = make_inputs(params, 4, 2, bias=False)
    ids[2, 1] = -3
    for backend in ("reference", "cpu"):
        with pytest.raises(IndexError, match="-3"):
            call(params, x, ids, weights, packed, biases, backend)


def test_bad_arguments_are_named() -> None:
    params = make_params(ACTIVATIONS[0])
    x, ids, weights, packed, biases, _ = make_inputs(params, 4, 2, bias=False)
    with pytest.raises(ValueError, match=r"unknown backend 'nope'; known: .*reference"):
        call(params, x, ids, weights, packed, biases, "nope")
    with pytest.raises(ValueError, match=r"x must be \[T, 64\]"):
        call(params, x[:, :32], ids, weights, packed, biases, "cpu")
    with pytest.raises(ValueError, match="T rows of x"):
        call(params, x, ids[:2], weights[:2], packed, biases, "cpu")
    with pytest.raises(TypeError, match="int32 or int64"):
        call(params, x, ids.float(), weights, packed, biases, "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_grouped_linear(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 48, 70, generator=g)
    packed, scales = mx.quantize(w)
    dense = mx.dequantize(packed, scales, 70, torch.float64)
    x = torch.randn(20, 70, generator=g)
    offsets = torch.tensor([3, 3, 10, 17, 18], dtype=torch.int32)
    out = schema.grouped_linear(x, offsets, [packed, scales], 48, torch.float32, backend, "canonical")
    starts = [0, 3, 3, 10, 17]
    for e, (a, b) in enumerate(zip(starts, offsets.tolist(), strict=True)):
        torch.testing.assert_close(out[a:b].double(), x[a:b].double() @ dense[e].T, rtol=1e-5, atol=1e-5)
    assert not out[18:].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend: str) -> None:
    params = make_params(ACTIVATIONS[4], layout="interleaved")
    x, ids, weights, packed, biases, _ = make_inputs(params, 6, 2, bias=True)
    scalars = schema.moe_scalars(params)
    torch.library.opcheck(
        schema.moe, (x, ids, weights, packed[0], packed[1], biases[0], biases[1], *scalars, backend, "canonical")
    )
    torch.library.opcheck(
        schema.moe, (x, ids.int(), weights, packed[0], packed[1], None, None, *scalars, backend, "canonical")
    )
    offsets = torch.tensor([1, 1, 4, 5, 6], dtype=torch.int32)
    torch.library.opcheck(
        schema.grouped_linear, (x, offsets, packed[0], params.up_rows, torch.float32, backend, "canonical")
    )
    torch.library.opcheck(schema.prepare_moe, (*packed[0], params.hidden, "up", *scalars, backend, "canonical"))
    torch.library.opcheck(schema.prepare_linear, (*packed[0], params.hidden, backend, "canonical"))


@pytest.mark.parametrize("rule", mx.SCALE_RULES)
def test_opcheck_numerics(rule: str) -> None:
    w = torch.randn(3, 5, 70)
    torch.library.opcheck(schema.quantize, (w, rule))
    packed, scales = schema.quantize(w, rule)
    torch.library.opcheck(schema.dequantize, (packed, scales, 70, torch.bfloat16))
    assert torch.equal(
        schema.dequantize(packed, scales, 70, torch.float32), mx.dequantize(packed, scales, 70, torch.float32)
    )


def test_backward_of_quantization_raises_by_name() -> None:
    weight = torch.randn(2, 4, 32, requires_grad=True)
    packed, scales = schema.quantize(weight, "mse")
    values = schema.dequantize(packed, scales, 32, torch.float32)
    assert not values.requires_grad
    logits = torch.randn(3, 4, requires_grad=True)
    weights, _ = schema.route(logits, 2, "softmax", "none", 0.0, torch.float32)
    with pytest.raises(NotImplementedError, match="mxfp4::route has no backward"):
        weights.sum().backward()


def test_tags() -> None:
    for op in (
        schema.moe,
        schema.grouped_linear,
        schema.moe_backward,
        schema.grouped_linear_backward,
        schema.quantize,
        schema.dequantize,
        schema.prepare_moe,
        schema.prepare_linear,
    ):
        assert torch.Tag.pt2_compliant_tag in op.tags
        assert torch.Tag.needs_fixed_stride_order in op.tags


def test_cpu_backend_keeps_nothing_between_calls() -> None:
    params = make_params(ACTIVATIONS[0])
    x, ids, weights, packed, biases, _ = make_inputs(params, 4, 2, bias=False)
    first = call(params, x, ids, weights, packed, biases, "cpu")
    for pair in packed:
        pair[0].zero_()
    assert not torch.equal(call(params, x, ids, weights, packed, biases, "cpu"), first)
    assert not [v for v in vars(get_backend("cpu")).values() if isinstance(v, Tensor)]
