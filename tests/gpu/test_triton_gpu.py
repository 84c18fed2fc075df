"""The native kernels on a GPU against the fp32 product of dequantized weights (``pytest -m gpu``)."""

from __future__ import annotations

import math
import random

import pytest
import torch
from fp8_oracle import as_fp8

from mxfp4_compile.mx import dequantize
from mxfp4_compile.ops.arguments import LinearInputs, MoEInputs, Slot
from mxfp4_compile.ops.target import Request, Target
from mxfp4_compile.spec import Activation, MoEParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16 = torch.bfloat16
ACTIVATIONS = (
    Activation("silu"),
    Activation("silu", alpha=1.702, beta=1.0, gate_limit=7.0, up_limit=7.0),
    Activation("silu", gate_limit=1.0, up_limit=0.5),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu"),
    Activation("relu2"),
    Activation("relu2", gated=False),
    Activation("gelu", gated=False),
)
SHAPES = (  # E, K, H, I: real models' and awkward ones
    (128, 8, 2048, 768),
    (32, 4, 2880, 2880),
    (8, 2, 4096, 1792),
    (64, 6, 2048, 1408),
    (60, 4, 1024, 1000),
    (16, 10, 512, 1856),
    (1, 1, 64, 48),
    (3, 2, 70, 100),
    (256, 8, 256, 128),
    (1024, 8, 128, 64),
    (7, 6, 1000, 72),
    (5, 5, 6, 10),
    (3, 2, 5000, 6200),
)
TOKENS = (0, 1, 2, 3, 5, 8, 16, 33, 64, 100, 257, 512, 1500, 4096)
TOLERANCE = {BF16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-4}


def backend():
    from mxfp4_compile.ops.backends.triton import BACKEND

    return BACKEND


def random_weight(e, n, k, generator):
    packed = torch.randint(0, 256, (e, n, (k + 1) // 2), generator=generator, device="cuda", dtype=torch.uint8)
    exponent = 126 - int(math.log2(max(k, 2)) / 2)
    shape = (e, n, -(-k // 32))
    scales = torch.randint(exponent - 2, exponent + 1, shape, generator=generator, device="cuda", dtype=torch.uint8)
    return packed, scales


def poison():
    """Leave NaN in the memory that the next allocations get."""
    blocks = [torch.full((n,), math.nan, device="cuda") for n in (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26)]
    del blocks


class Layer:
    """One random layer: prepared weights for the backend, canonical ones for the reference."""

    def __init__(
        self, shape, activation, *, layout="halves", half=0, bias=False, on_input=False, dtype=BF16, seed=0,
        fp8=False, spread=0,
    ):  # fmt: skip
        e, self.top_k, h, i = shape
        gated = activation.gated
        self.params = MoEParams(
            e, h, i, activation, layout if gated else "none", half if gated else 0, on_input, dtype, dtype
        )
        self.dtype = dtype
        self.g = torch.Generator("cuda").manual_seed(seed)
        request = Request(self.params, activation_dtype="fp8" if fp8 else "bf16")
        self.layout = backend().plan(request, Target.of(torch.device("cuda")))
        self.canonical, self.prepared, self.bias, self.prepared_bias = {}, {}, {}, {}
        for role in ("up", "down"):
            n, k = self.params.shape(role)[1:]
            slot = Slot(role, self.params, self.layout)
            w = random_weight(e, n, k, self.g)
            if spread:
                w[1].sub_(torch.randint(0, spread, w[1].shape, generator=self.g, device="cuda", dtype=torch.uint8))
            self.canonical[role] = w
            self.prepared[role] = backend().prepare(*w, slot, k=k)
            self.bias[role] = self.prepared_bias[role] = None
            if bias:
                b = torch.randn((e, n), generator=self.g, device="cuda").to(dtype)
                self.bias[role], self.prepared_bias[role] = b, backend().prepare_bias(b, slot)

    def inputs(self, tokens, skew=0.0, *, id_dtype=torch.int64, weight_dtype=torch.float32, sentinels=False):
        e = self.params.num_experts
        x = torch.randn((tokens, self.params.hidden), generator=self.g, device="cuda").to(self.dtype)
        noise = -torch.log(-torch.log(torch.rand((tokens, e), generator=self.g, device="cuda").clamp(1e-6, 1 - 1e-6)))
        popularity = -skew * torch.arange(e, device="cuda").float().add(1).log()
        ids = (noise + popularity).topk(self.top_k, -1).indices
        weights = torch.rand((tokens, self.top_k), generator=self.g, device="cuda") + 0.05
        weights /= weights.sum(-1, keepdim=True)
        if sentinels:
            drop = torch.rand(ids.shape, generator=self.g, device="cuda") < 0.25
            ids, weights = torch.where(drop, e + 5, ids), torch.where(drop, math.nan, weights)
        return x, ids.to(id_dtype), weights.to(weight_dtype)

    def __call__(self, x, ids, weights):
        weights_and_biases = [of[role] for of in (self.prepared, self.prepared_bias) for role in ("up", "down")]
        return backend().moe(MoEInputs(x, ids, weights, *weights_and_biases, self.params, self.layout))

    @property
    def quantized_from(self):
        return backend().quantizes_from(self.layout, self.params, self.top_k, torch.device("cuda")) or math.inf

    def reference(self, x, ids, weights, fp8=False):
        """In fp32; with fp8 the activations of both products go through e4m3."""
        p = self.params
        out = torch.zeros(x.shape, device="cuda")
        for e in ids[ids < p.num_experts].unique().tolist():
            token, slot = (ids == e).nonzero(as_tuple=True)
            w = weights[token, slot].float().unsqueeze(1)
            y = as_fp8(x[token]) if fp8 else x[token].float()
            if p.weight_on_input:
                y = y * w
            for role in ("up", "down"):
                packed, scales = self.canonical[role]
                if fp8 and role == "down":
                    y = as_fp8(y.to(self.dtype))
                y = y @ dequantize(packed[e], scales[e], y.shape[1], torch.float32).T
                if self.bias[role] is not None:
                    y = y + self.bias[role][e].float()
                if role == "up":
                    y = p.activate(y)
            out.index_add_(0, token, y if p.weight_on_input else y * w)
        return out


def error(got, want):
    assert got.isfinite().all()
    if not want.any():
        return float(got.float().abs().sum())
    return float((got.float() - want).norm() / want.norm())


def random_case(seed):
    r = random.Random(seed)
    shape = r.choice(SHAPES)
    options = {
        "layout": r.choice(("halves", "interleaved")),
        "half": r.randrange(2),
        "bias": r.random() < 0.4,
        "on_input": r.random() < 0.15,
        "dtype": r.choice((BF16, BF16, BF16, BF16, torch.float16, torch.float32)),
        "seed": seed,
    }
    inputs = {
        "skew": r.choice((0.0, 0.0, 1.0, 3.0)),
        "id_dtype": r.choice((torch.int32, torch.int64)),
        "weight_dtype": r.choice((torch.float32, BF16, torch.float16)),
        "sentinels": r.random() < 0.15,
    }
    return shape, r.choice(ACTIVATIONS), r.choice(TOKENS), options, inputs


@pytest.mark.parametrize("seed", range(200))
def test_random(seed):
    shape, activation, tokens, options, inputs = random_case(seed)
    layer = Layer(shape, activation, **options)
    x, ids, weights = layer.inputs(tokens, **inputs)
    want = layer.reference(x, ids, weights)
    poison()
    got = layer(x, ids, weights)
    assert got.shape == x.shape and got.dtype == x.dtype
    assert error(got, want) <= TOLERANCE[options["dtype"]]


@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 300, 3000])
def test_repeats_bit_for_bit(tokens):
    layer = Layer((128, 8, 512, 256), ACTIVATIONS[0])
    inputs = layer.inputs(tokens, skew=1.0)
    first = layer(*inputs)
    for _ in range(5):
        poison()
        assert torch.equal(layer(*inputs), first)


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_strided_inputs(tokens):
    layer = Layer((8, 2, 256, 128), ACTIVATIONS[0])
    x, ids, weights = layer.inputs(tokens)
    want = layer(x, ids, weights)
    wide = torch.empty((tokens, 512), device="cuda", dtype=BF16)
    wide[:, ::2] = x
    assert torch.equal(layer(wide[:, ::2], ids, weights), want)
    wide[:, 3:259] = x  # contiguous rows at an address that is not a multiple of 16 bytes
    assert torch.equal(layer(wide[:, 3:259], ids, weights), want)
    assert torch.equal(layer(x, ids.T.contiguous().T, weights.T.contiguous().T), want)


def replayed_for_others(layer, x, ids, weights):
    """A call recorded as a CUDA graph, replayed for other tokens to other experts: its result, and these inputs."""
    layer(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = layer(x, ids, weights)
    others = layer.inputs(x.shape[0], skew=2.0)
    for recorded, other in zip((x, ids, weights), others, strict=True):
        recorded.copy_(other)
    out.fill_(math.nan)
    graph.replay()
    return out, others


@pytest.mark.parametrize("tokens", [1, 8, 64, 700])
def test_cuda_graph(tokens):
    layer = Layer((32, 4, 512, 384), ACTIVATIONS[1], bias=True)
    out, others = replayed_for_others(layer, *layer.inputs(tokens))
    assert torch.equal(out, layer(*others))


@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 700])
def test_layers_that_follow_each_other(tokens):
    """Kernels start before the one before them has ended: none may read too early, nor write over what is read."""
    layers = [Layer((32, 4, 512, 384), ACTIVATIONS[0], seed=seed) for seed in range(3)] * 4
    x, ids, weights = layers[0].inputs(tokens)
    want = x
    for layer in layers:
        want = layer(want, ids, weights)
        torch.cuda.synchronize()
        want = want / want.float().std()
        want = want.to(BF16)
    assert want.isfinite().all() and want.any()

    def chain():
        out = x
        for layer in layers:
            # Freed memory goes to the next layer at once.
            out = layer(out, ids, weights)
            out = out / out.float().std()
            out = out.to(BF16)
        return out

    def rows(kernels):
        """The same layers with nothing between their kernels: each on the tokens themselves."""
        return torch.stack([kernels[i](x, ids, weights) for i in range(len(kernels))])

    alone = []
    for layer in layers:
        alone.append(layer(x, ids, weights))
        torch.cuda.synchronize()
    alone = torch.stack(alone)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        chained, together = chain(), rows(layers)
    for _ in range(20):
        chained.fill_(math.nan), together.fill_(math.nan)
        graph.replay()
        assert torch.equal(chained, want)
        assert torch.equal(together, alone)


def test_no_host_synchronization():
    layer = Layer((32, 4, 512, 384), ACTIVATIONS[0])
    cases = [layer.inputs(t) for t in (1, 8, 700)]
    for c in cases:
        layer(*c)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for c in cases:
            layer(*c)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_chunks_give_the_same(monkeypatch):
    from mxfp4_compile.ops.backends.triton import moe as implementation

    layer = Layer((16, 4, 256, 128), ACTIVATIONS[0])
    inputs = layer.inputs(4000)
    want = layer.reference(*inputs)
    monkeypatch.setattr(implementation, "MAX_INTERMEDIATE", 1 << 20)
    assert error(layer(*inputs), want) <= TOLERANCE[BF16]


def test_many_tokens():
    layer = Layer((8, 2, 128, 64), ACTIVATIONS[0])
    inputs = layer.inputs(65536, skew=1.0)
    assert error(layer(*inputs), layer.reference(*inputs)) <= TOLERANCE[BF16]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(96, 128), (1000, 2880), (40, 10)])
def test_grouped_linear(n, k, dtype):
    g = torch.Generator("cuda").manual_seed(3)
    e, rows = 6, 301
    packed, scales = random_weight(e, n, k, g)
    layout = backend().plan(None, torch.device("cuda"))
    weight = backend().prepare(packed, scales, Slot(None, None, layout), k=k)
    x = torch.randn((rows, k), generator=g, device="cuda").to(dtype)
    ends = [0, 17, 17, 200, 201, 290]
    poison()
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    got = backend().grouped_linear(LinearInputs(x, offsets, weight, n, dtype, layout))
    want = torch.zeros((rows, n), device="cuda")
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        want[start:end] = x[start:end].float() @ dequantize(packed[i], scales[i], k, torch.float32).T
    assert error(got, want) <= TOLERANCE[dtype]
    assert not got[290:].any()


@pytest.mark.parametrize("seed", range(60))
def test_fp8_random(seed):
    """e4m3 activations against a reference that rounds them alike; few tokens are not rounded."""
    shape, activation, _, options, inputs = random_case(1000 + seed)
    layer = Layer(shape, activation, fp8=True, spread=seed % 3 * 4, **options)
    rows = random.Random(seed).choice((1, 40, 70, 130, 200, 500))
    tokens = max(min(-(-rows * shape[0] // shape[1]), 8192), 1)
    x, ids, weights = layer.inputs(tokens, **inputs)
    quantized = tokens >= layer.quantized_from
    assert quantized == (rows >= 40) or tokens == 8192
    want = layer.reference(x, ids, weights, fp8=quantized)
    poison()
    got = layer(x, ids, weights)
    assert got.shape == x.shape and got.dtype == x.dtype
    # Sums in another order fall on the other side of an e4m3 value here and there.
    assert error(got, want) <= (2e-2 if quantized else TOLERANCE[options["dtype"]])
    assert torch.equal(layer(x, ids, weights), got)
    assert error(got, layer.reference(x, ids, weights)) <= 8e-2


@pytest.mark.parametrize("tokens", [300, 700, 3000])
def test_fp8_calls(tokens):
    """Repeated, strided, misaligned, in a CUDA graph for other tokens, without host synchronization."""
    layer = Layer((8, 2, 256, 128), ACTIVATIONS[0], fp8=True)
    assert tokens >= layer.quantized_from
    x, ids, weights = layer.inputs(tokens, skew=1.0)
    want = layer(x, ids, weights)
    poison()
    assert torch.equal(layer(x, ids, weights), want)
    wide = torch.empty((tokens, 512), device="cuda", dtype=BF16)
    wide[:, ::2] = x
    assert torch.equal(layer(wide[:, ::2], ids, weights), want)
    wide[:, 3:259] = x
    assert torch.equal(layer(wide[:, 3:259], ids, weights), want)
    out, others = replayed_for_others(layer, x, ids, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = layer(*others)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, again)


def test_fp8_layers_that_follow_each_other():
    layers = [Layer((32, 4, 512, 384), ACTIVATIONS[0], seed=seed, fp8=True) for seed in range(3)] * 4
    x, ids, weights = layers[0].inputs(700)
    alone = []
    for layer in layers:
        alone.append(layer(x, ids, weights))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = torch.stack([layer(x, ids, weights) for layer in layers])
    for _ in range(20):
        together.fill_(math.nan)
        graph.replay()
        assert torch.equal(together, torch.stack(alone))
