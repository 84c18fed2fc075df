"""Other libraries' kernels as backends, on a GPU, all through one suite (``pytest -m gpu``).

Against the fp32 product of dequantized weights; then from ``optimize(model, backend=...)`` on tiny models,
eager, compiled, and captured in a CUDA graph. humming compiles for every shape, so there are few.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model_activations import GPT_OSS

import mxfp4_compile
from mxfp4_compile.mx import dequantize, quantize
from mxfp4_compile.ops import schema
from mxfp4_compile.ops.arguments import Slot
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.ops.selection import choose, requirements
from mxfp4_compile.ops.target import Request, Target
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.spec import Activation, MoEParams
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16 = torch.bfloat16
BACKENDS = ("triton", "triton_kernels", "humming")
TOLERANCE = {"triton": 6e-3, "triton_kernels": 1e-2, "humming": 1e-2}
ACTIVATIONS = (
    Activation("silu"),
    GPT_OSS,
    Activation("silu", gate_limit=1.0, up_limit=0.5),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu"),
    Activation("relu2"),
)
PLAIN = (Activation("relu2", gated=False), Activation("gelu", gated=False), Activation("silu", gated=False))
SHAPE, ODD = (8, 2, 64, 32), (6, 3, 201, 72)  # E, K, H, I; the first is that of the tiny models
FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3")


@pytest.fixture(params=BACKENDS)
def name(request) -> str:
    target = Target.of(torch.device("cuda", 0))
    unmet = [str(r) for r in requirements(request.param, Request(), target) if not r.met]
    if unmet:
        pytest.skip(f"{request.param}: {', '.join(unmet)}")
    return request.param


class Layer:
    """One random layer, prepared for a backend, and its canonical weights for the reference."""

    def __init__(self, name, shape, activation, *, layout="halves", half=0, bias=False, on_input=False, seed=0):
        e, self.top_k, h, i = shape
        gated = activation.gated
        self.params = MoEParams(
            e, h, i, activation, layout if gated else "none", half if gated else 0, on_input, BF16, BF16
        )
        self.name, self.backend = name, get_backend(name)
        self.layout = choose(self.params, torch.device("cuda", 0), name).layout
        g = self.g = torch.Generator("cuda").manual_seed(seed)
        self.canonical, self.prepared, self.bias, self.prepared_bias = {}, {}, {}, {}
        for role in ("up", "down"):
            _, n, k = self.params.shape(role)
            slot = Slot(role, self.params, self.layout)
            w = quantize(torch.randn((e, n, k), generator=g, device="cuda") / math.sqrt(k))
            self.canonical[role] = w
            self.prepared[role] = [t.contiguous() for t in self.backend.prepare(*w, slot, k=k)]
            back = self.backend.recover(self.prepared[role], slot, n=n, k=k)
            assert all(torch.equal(a, b) for a, b in zip(back, w, strict=True))
            self.bias[role] = self.prepared_bias[role] = None
            if bias:
                b = torch.randn((e, n), generator=g, device="cuda").to(BF16)
                self.bias[role], self.prepared_bias[role] = b, self.backend.prepare_bias(b, slot)
                assert torch.equal(self.backend.recover_bias(self.prepared_bias[role], slot, n=n), b)

    def inputs(self, tokens, *, sentinels=False, skew=False, id_dtype=torch.int64, weight_dtype=torch.float32):
        p = self.params
        x = torch.randn((tokens, p.hidden), generator=self.g, device="cuda").to(BF16)
        scores = torch.rand((tokens, p.num_experts), generator=self.g, device="cuda")
        if skew:
            scores[:, 2] += 2.0
        ids = scores.topk(self.top_k, -1).indices
        weights = torch.rand((tokens, self.top_k), generator=self.g, device="cuda") + 0.05
        if sentinels:
            drop = torch.rand(ids.shape, generator=self.g, device="cuda") < 0.3
            ids, weights = torch.where(drop, p.num_experts + 5, ids), torch.where(drop, math.nan, weights)
        return x, ids.to(id_dtype), weights.to(weight_dtype)

    def __call__(self, x, ids, weights):
        return schema.moe(
            x, ids, weights, self.prepared["up"], self.prepared["down"], self.prepared_bias["up"],
            self.prepared_bias["down"], *schema.moe_scalars(self.params), self.name, self.layout,
        )  # fmt: skip

    def reference(self, x, ids, weights):
        p = self.params
        out = torch.zeros(x.shape, device="cuda")
        for e in ids[ids < p.num_experts].unique().tolist():
            token, slot = (ids == e).nonzero(as_tuple=True)
            w = weights[token, slot].float().unsqueeze(1)
            y = x[token].float()
            if p.weight_on_input:
                y = y * w
            for role in ("up", "down"):
                packed, scales = self.canonical[role]
                y = y @ dequantize(packed[e], scales[e], y.shape[1], torch.float32).T
                if self.bias[role] is not None:
                    y = y + self.bias[role][e].float()
                if role == "up":
                    y = p.activate(y)
            out.index_add_(0, token, y if p.weight_on_input else y * w)
        return out


def poison():
    """Leave NaN in the memory that the next allocations get."""
    blocks = [torch.full((n,), math.nan, device="cuda") for n in (1 << 12, 1 << 16, 1 << 20, 1 << 22)]
    del blocks


def check(layer: Layer, tokens: int, **inputs) -> float:
    x, ids, weights = layer.inputs(tokens, **inputs)
    want = layer.reference(x, ids, weights)
    poison()
    got = layer(x, ids, weights)
    assert got.shape == x.shape and got.dtype == x.dtype and got.isfinite().all()
    error = float((got.float() - want).norm() / want.norm().clamp(min=1e-9))
    assert error <= TOLERANCE[layer.name], (layer.params, tokens, inputs, error)
    return error


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(name: str, activation: Activation) -> None:
    for number, (layout, half) in enumerate((("halves", 0), ("interleaved", 0), ("halves", 1), ("interleaved", 1))):
        layer = Layer(name, SHAPE, activation, layout=layout, half=half, seed=number)
        for tokens in (1, 19):
            check(layer, tokens)


def test_plain_activations(name: str) -> None:
    for activation in PLAIN:
        check(Layer(name, SHAPE, activation), 21)


def test_biases_and_odd_shapes(name: str) -> None:
    layer = Layer(name, ODD, GPT_OSS, layout="interleaved", bias=True)
    for tokens in (1, 7, 300):
        check(layer, tokens)
        check(layer, tokens, skew=True, id_dtype=torch.int32, weight_dtype=BF16)


def test_routing_edges(name: str) -> None:
    layer = Layer(name, SHAPE, ACTIVATIONS[0])
    for tokens in (1, 19, 200):
        check(layer, tokens, sentinels=True)
    check(layer, 40, skew=True)
    x, ids, weights = layer.inputs(9)
    assert not layer(x, torch.full_like(ids, 8), weights).any()
    assert layer(x[:0], ids[:0], weights[:0]).shape == (0, 64)
    wide = torch.zeros((9, 128), device="cuda", dtype=BF16)
    wide[:, ::2] = x
    assert torch.equal(layer(wide[:, ::2], ids, weights), layer(x, ids, weights))


def test_weight_on_the_input(name: str) -> None:
    layer = Layer(name, SHAPE, ACTIVATIONS[0], on_input=True)
    for tokens in (1, 19):
        check(layer, tokens, sentinels=tokens > 1)


def test_repeats_bit_for_bit(name: str) -> None:
    layer = Layer(name, SHAPE, ACTIVATIONS[0])
    for tokens in (1, 200):
        inputs = layer.inputs(tokens)
        first = layer(*inputs)
        for _ in range(3):
            poison()
            assert torch.equal(layer(*inputs), first)


def test_captured(name: str) -> None:
    layer = Layer(name, SHAPE, ACTIVATIONS[0])
    for tokens in (1, 19):
        inputs = layer.inputs(tokens)
        for _ in range(2):
            layer(*inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(*inputs)
        other = layer.inputs(tokens, skew=True)
        for target, source in zip(inputs, other, strict=True):
            target.copy_(source)
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, layer(*other))


def test_grouped_linear(name: str) -> None:
    g = torch.Generator("cuda").manual_seed(3)
    e, n, k, rows = 6, 72, 201, 301
    packed, scales = quantize(torch.randn((e, n, k), generator=g, device="cuda"))
    layout = choose(None, torch.device("cuda", 0), name, Request(shapes=((e, n, k),))).layout
    weight = get_backend(name).prepare(packed, scales, Slot(None, None, layout), k=k)
    x = torch.randn((rows, k), generator=g, device="cuda").to(BF16)
    ends = [0, 17, 17, 200, 201, 290]
    poison()
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    got = schema.grouped_linear(x, offsets, weight, n, BF16, name, layout)
    want = torch.zeros((rows, n), device="cuda")
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        want[start:end] = x[start:end].float() @ dequantize(packed[i], scales[i], k, torch.float32).T
    assert float((got.float() - want).norm() / want.norm()) <= TOLERANCE[name]
    assert not got[290:].any()


def test_layouts_are_the_librarys_own() -> None:
    """humming's permutations against its own, which need a GPU."""
    pytest.importorskip("humming")
    from humming import dtypes
    from humming.schema import HummingInputSchema
    from humming.schema.mxfp4 import Mxfp4WeightSchema
    from humming.transform import prepare_and_transform_humming_tensors

    backend, (e, n, k) = get_backend("humming"), (3, 160, 224)
    packed = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(100, 140, (e, n, k // 32), dtype=torch.uint8, device="cuda")
    bias = torch.randn(e, n, device="cuda", dtype=BF16)
    _, theirs = prepare_and_transform_humming_tensors(
        {"weight": packed.view(torch.int32), "weight_scale": scales.view(torch.float8_e8m0fnu), "bias": bias},
        shape_n=n, shape_k=k, weight_schema=Mxfp4WeightSchema().to_humming_schema(BF16),
        input_schema=HummingInputSchema(a_dtype=dtypes.bfloat16), num_experts=e, pad_n_to_multiple=256,
        pad_k_to_multiple=128, has_bias=True, torch_dtype=BF16, device=packed.device,
    )  # fmt: skip
    layout = backend.plan(Request(), Target.of(torch.device("cuda", 0)))
    words, ours = backend.prepare(packed, scales, Slot(None, None, layout), k=k)
    assert torch.equal(words.flatten(), theirs["weight"].flatten())
    assert torch.equal(ours.flatten(), theirs["weight_scale"].view(torch.uint8).flatten())
    prepared = backend.prepare_bias(bias, Slot(None, None, layout))
    assert torch.equal(prepared.flatten(), theirs["bias"].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_models(name: str, family: str) -> None:
    sizes = {"intermediate_size": SHAPE[3]} if family in ("gpt_oss", "mixtral") else {}
    model = tiny_model(family, dtype=BF16, **sizes).cuda()
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in tiny_inputs(model).items()}
    mxfp4_compile.optimize(model, backend=name)
    assert {site.backend for site in mxfp4_sites(model).values()} == {name}
    for site in model.mxfp4_report.sites:
        assert site.rewritten and site.error is not None and site.error <= TOLERANCE[name], site
    ordinary = mxfp4_compile.restore(copy.deepcopy(model))
    experts, originals = list(mxfp4_sites(model).values()), _experts_of(ordinary, model)
    # The same experts on the same tokens: routers would magnify rounding.
    for site, original in zip(experts, originals, strict=True):
        arguments = _arguments(site)
        with torch.no_grad():
            eager = site(*arguments)
            want = _float_run(original, arguments)
            compiled = torch.compile(site, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):
                captured = compiled(*arguments).clone()
        assert torch.equal(captured, eager)
        assert float((eager.float() - want).norm() / want.norm()) <= 2 * TOLERANCE[name]
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    state = model.state_dict()
    model.cpu()
    assert all(torch.equal(value, state[key].cpu()) for key, value in model.state_dict().items())


def _experts_of(ordinary, model):
    return [ordinary.get_submodule(path) for path in mxfp4_sites(model)]


def _arguments(site):
    """Arguments as the site was called: its pattern's leaves with fresh values of 19 tokens."""
    g = torch.Generator("cuda").manual_seed(5)
    params, top_k = site.plan.params, site.plan.spec.top_k
    leaves = []
    for leaf in site.plan.pattern.leaves:
        if not leaf.dtype.is_floating_point:
            scores = torch.rand((19, params.num_experts), generator=g, device="cuda")
            leaves.append(scores.topk(top_k, -1).indices.to(leaf.dtype))
        elif leaf.shape[-1] == params.hidden:
            leaves.append(torch.randn((19, params.hidden), generator=g, device="cuda").to(leaf.dtype))
        else:
            leaves.append(torch.rand((19, top_k), generator=g, device="cuda").to(leaf.dtype))
    return leaves


def _float_run(original, arguments):
    wide = copy.deepcopy(original).float()
    return wide(*[a.float() if a.dtype.is_floating_point else a for a in arguments]).float()
