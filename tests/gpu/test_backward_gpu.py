"""The native backward on a GPU against fp32 gradients of the dequantized weights (``pytest -m gpu``)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from model_activations import GPT_OSS, SILU

from mxfp4_compile.mx import dequantize
from mxfp4_compile.ops import gradients
from mxfp4_compile.ops.arguments import MoEInputs, Slot
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.ops.target import Request, Target
from mxfp4_compile.spec import Activation, MoEParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16 = torch.bfloat16
PLAIN = Activation("relu2", gated=False)
LAYERS = {
    "qwen3": ((128, 8, 2048, 768), SILU, "halves", False, False),
    "gpt-oss": ((32, 4, 2880, 2880), GPT_OSS, "interleaved", True, False),
    "mixtral, narrower": ((8, 2, 4096, 1792), SILU, "halves", False, False),
    "on input": ((16, 1, 512, 1856), SILU, "halves", False, True),
    "not gated": ((60, 4, 1024, 1000), PLAIN, "none", True, False),
    "awkward": ((7, 6, 1000, 72), Activation("gelu_tanh"), "interleaved", True, False),
    "tiny": ((5, 5, 6, 10), Activation("gelu"), "halves", False, True),
}


class Case:
    """A layer with random weights; calls of its backward, native and in fp32."""

    def __init__(self, name: str, dtype: torch.dtype = BF16) -> None:
        (e, self.top_k, h, i), act, layout, biased, on_input = LAYERS[name]
        self.params = MoEParams(e, h, i, act, layout, 0, on_input, dtype, dtype)
        self.backend = get_backend("triton")
        self.layout = self.backend.plan(Request(self.params), Target.of(torch.device("cuda")))
        g = torch.Generator("cuda").manual_seed(e)
        self.canonical, self.prepared, self.biases, self.prepared_biases = [], [], [None, None], [None, None]
        for at, role in enumerate(("up", "down")):
            n, k = self.params.shape(role)[1:]
            packed = torch.randint(0, 256, (e, n, -(-k // 2)), generator=g, device="cuda", dtype=torch.uint8)
            exponent = 126 - int(math.log2(k) / 2)
            size = (e, n, -(-k // 32))
            scales = torch.randint(exponent - 2, exponent + 1, size, generator=g, device="cuda", dtype=torch.uint8)
            slot = Slot(role, self.params, self.layout)
            parts = [
                self.backend.prepare(p, s, slot, k=k)
                for p, s in zip(packed.split(max(e // 8, 1)), scales.split(max(e // 8, 1)), strict=True)
            ]
            self.canonical.append([packed, scales])
            self.prepared.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
            if biased:
                self.biases[at] = torch.randn((e, n), generator=g, device="cuda").to(dtype)
                self.prepared_biases[at] = self.backend.prepare_bias(self.biases[at], slot)

    def inputs(self, tokens: int, kind: str = "uniform", seed: int = 0) -> tuple[torch.Tensor, ...]:
        p = self.params
        g = torch.Generator("cuda").manual_seed(tokens + seed)
        x, grad = (torch.randn((tokens, p.hidden), generator=g, device="cuda").to(p.round_dtype) for _ in range(2))
        ids = torch.rand((tokens, p.num_experts), generator=g, device="cuda").topk(self.top_k, -1).indices
        if kind == "one":
            ids = torch.full_like(ids, p.num_experts - 1)
        if kind == "some":
            ids = torch.where(torch.rand(ids.shape, generator=g, device="cuda") < 0.3, p.num_experts + 3, ids)
        weights = torch.rand(ids.shape, generator=g, device="cuda") + 0.05
        return grad, x, ids, (weights / weights.sum(-1, keepdim=True)).to(p.round_dtype)

    def native(self, grad, x, ids, weights):
        inputs = MoEInputs(x, ids, weights, *self.prepared, *self.prepared_biases, self.params, self.layout)
        return self.backend.moe_backward(grad, inputs)

    def exact(self, grad, x, ids, weights):
        wide = replace(self.params, round_dtype=torch.float32, accum_dtype=torch.float32)
        biases = [None if b is None else b.float() for b in self.biases]
        inputs = MoEInputs(x.float(), ids, weights.float(), *self.canonical, *biases, wide, "canonical")
        return get_backend("reference").moe_backward(grad.float(), inputs)

    def usual(self, grad, x, ids, weights):
        """Autograd through an eager loop over experts in the dtype of x, as models have it."""
        p = self.params
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        out = torch.zeros_like(x)
        for e in range(p.num_experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            up, down = (
                dequantize(packed[e], scales[e], p.shape(role)[2], x.dtype)
                for role, (packed, scales) in zip(("up", "down"), self.canonical, strict=True)
            )
            w = weights[token, slot].unsqueeze(1)
            seen = x[token]
            y = (seen * w if p.weight_on_input else seen) @ up.T
            y = y if self.biases[0] is None else y + self.biases[0][e]
            z = p.activate(y) @ down.T
            z = z if self.biases[1] is None else z + self.biases[1][e]
            out = out.index_add(0, token, z if p.weight_on_input else z * w)
        return torch.autograd.grad(out, (x, weights), grad)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20))


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name):
    case = Case(name)
    for tokens, kind in ((1, "uniform"), (40, "some"), (300, "one"), (1500, "uniform"), (2048, "some")):
        call = case.inputs(tokens, kind)
        for a, b in zip(case.native(*call), case.exact(*call), strict=True):
            assert a.dtype == BF16
            assert relative(a, b) < 2e-2, (tokens, kind)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "on input"])
def test_as_near_to_fp32_as_the_original_is(name):
    case = Case(name)
    call = case.inputs(1024)
    exact = case.exact(*call)
    for a, b, c in zip(case.native(*call), case.usual(*call), exact, strict=True):
        assert relative(a, c) <= 1.25 * relative(b, c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype):
    case = Case("not gated", dtype)
    for tokens in (5, 700):
        call = case.inputs(tokens)
        for a, b in zip(case.native(*call), case.exact(*call), strict=True):
            assert a.dtype == dtype
            assert relative(a, b) < (1e-4 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("first", [0, 1])
def test_either_operand(first, monkeypatch):
    """The product that no rule of this GPU may name, too."""
    from mxfp4_compile.ops.backends.triton import backward
    from mxfp4_compile.ops.backends.triton.select import BackwardChoice, Tiles

    sizes = {"FIRST": first, "BM": 256 if first else 128, "BT": 64, "BN": 64, "WAIT": first, "GROUP": 8}
    tiles = Tiles(4, 3, tuple(sizes.items()))
    monkeypatch.setattr(backward, "choose_backward", lambda *_: BackwardChoice(tiles, tiles))
    for name in ("qwen3", "awkward"):
        case = Case(name)
        call = case.inputs(1500)
        for a, b in zip(case.native(*call), case.exact(*call), strict=True):
            assert relative(a, b) < 2e-2


def test_same_bits_no_synchronization_and_capture():
    case = Case("gpt-oss")
    call = case.inputs(2048)
    want = case.native(*call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = case.native(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.native(*call)
    for _ in range(5):
        graph.replay()
        for a, b, c in zip(want, again, captured, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_chunks_of_tokens(monkeypatch):
    from mxfp4_compile.ops.backends.triton import backward

    case = Case("not gated")
    call = case.inputs(1000)
    exact = case.exact(*call)
    monkeypatch.setattr(backward, "MAX_INTERMEDIATE", 1 << 22)
    for a, b in zip(case.native(*call), exact, strict=True):
        assert relative(a, b) < 2e-2


def test_grouped_linear():
    case = Case("gpt-oss")
    packed, scales = case.canonical[0]
    n, k = case.params.shape("up")[1:]
    slot = Slot(None, None, case.layout)
    prepared = case.backend.prepare(packed[:4], scales[:4], slot, k=k)
    offsets = torch.tensor([100, 100, 350, 351], dtype=torch.int32, device="cuda")
    grad = torch.randn(400, n, device="cuda").to(BF16)
    got = case.backend.grouped_linear_backward(grad, offsets, prepared, k, BF16, case.layout)
    dense = gradients.dense_weights(lambda t: (t[0], t[1]), [packed[:4], scales[:4]], k, torch.float32)
    want = gradients.linear_backward(grad.float(), offsets, dense, k, torch.float32, torch.float32)
    assert relative(got, want) < 2e-2 and not got[351:].any()
