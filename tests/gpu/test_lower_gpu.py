"""The route kernel on a GPU against its reference, and the whole-graph backend (``pytest -m gpu``)."""

from __future__ import annotations

import copy

import pytest
import torch

import mxfp4_compile
from mxfp4_compile.ops import route, schema
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16


@pytest.mark.parametrize("before", route.BEFORE)
@pytest.mark.parametrize("after", route.AFTER)
def test_route_against_its_reference(before: str, after: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 60, 4)]
    if (before, after) == ("softmax", "sum"):
        shapes += [(1, 128, 8), (8, 32, 4), (7, 40, 40), (5, 1024, 10), (300, 3, 1), (0, 8, 2)]
    for tokens, experts, k in shapes:
        for dtype in (BF16, F32) if experts != 60 else (BF16, F32, F16):
            spread = torch.rand(tokens, experts, generator=generator).argsort(1).sub(experts // 2) * 2.0**-5
            for logits in (
                torch.randn(tokens, experts, generator=generator) * 3,
                spread,
                torch.randint(3, (tokens, experts), generator=generator).float(),  # ties everywhere
                torch.zeros(tokens, experts),
            ):
                logits = logits.to(dtype)
                want, want_ids = route.reference(logits, k, before, after, 1e-9, F32)
                got, ids = schema.route(logits.cuda(), k, before, after, 1e-9, F32)
                if (before, after) == ("none", "sum"):  # sums around zero: judge by what is divided
                    chosen = logits.float().gather(1, want_ids)
                    want = torch.where((chosen.sum(1, keepdim=True)).abs() < 0.5, got.cpu(), want)
                assert torch.allclose(got.cpu(), want, rtol=1e-5, atol=1e-30, equal_nan=True)
                tied = logits is not spread and before == "none"
                if tied:  # equal logits in, no rounding between: the order is the reference's exactly
                    assert torch.equal(ids.cpu(), want_ids)
                assert bool((ids.sort(1).values.diff(dim=1) > 0).all())
                if dtype != BF16:
                    continue
                low, _ = schema.route(logits.cuda(), k, before, after, 1e-9, BF16)
                assert torch.equal(low, got.to(BF16))


def test_route_with_strange_logits() -> None:
    rows = torch.full((4, 40), float("-inf"))
    rows[0, 5] = 1.0
    rows[1] = float("nan")
    rows[2] = 0.0
    rows[2, 7] = float("nan")
    rows[3] = float("inf")
    for before in route.BEFORE:
        _, ids = schema.route(rows.cuda(), 4, before, "sum", 0.0, F32)
        assert bool(((ids >= 0) & (ids < 40)).all())
        assert bool((ids.sort(1).values.diff(dim=1) > 0).all())
    wide = torch.randn(9, 80, device="cuda")[:, :40]  # rows that are not dense
    for a, b in zip(
        schema.route(wide, 3, "softmax", "sum", 0.0, F32), route.reference(wide, 3, "softmax", "sum", 0.0, F32),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(a.double(), b.double(), rtol=1e-6)


def test_route_under_a_cuda_graph() -> None:
    static = torch.randn(8, 128, device="cuda", dtype=BF16)
    schema.route(static, 8, "softmax", "sum", 0.0, BF16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = schema.route(static, 8, "softmax", "sum", 0.0, BF16)
    for seed in range(3):
        torch.manual_seed(seed)
        static.copy_(torch.rand(8, 128).argsort(1).to(BF16) / 16)
        graph.replay()
        want, want_ids = route.reference(static, 8, "softmax", "sum", 0.0, BF16)
        assert torch.equal(ids, want_ids)
        assert torch.allclose(weights.float(), want.float(), rtol=8e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_pass_in_an_optimized_model(family: str) -> None:
    from mxfp4_compile.dynamo import router_pass as lower

    torch._dynamo.reset()
    # bf16 routers flip on rounding: compare in fp32, and on the reference backend, which takes fp32.
    model = mxfp4_compile.optimize(tiny_model(family, dtype=F32, layers=1).cuda(), backend="reference")
    inputs = tiny_inputs(model)
    lower.decisions.clear()
    with torch.no_grad(), torch._inductor.config.patch({"force_disable_caches": True}):
        want = model(**inputs).logits
        got = torch.compile(model)(**inputs).logits
    assert [d.fused for d in lower.decisions] == [True], lower.decisions
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)
    mxfp4_compile.restore(model)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_the_whole_graph_backend(family: str) -> None:
    torch._dynamo.reset()
    model = tiny_model(family, dtype=BF16, layers=1).cuda()
    reference = mxfp4_compile.optimize(copy.deepcopy(model))
    start = len(mxfp4_compile.compile_reports())
    compiled = torch.compile(model, backend="mxfp4_compile")
    with torch.no_grad():
        for batch, length in ((1, 1), (2, 9)):
            inputs = tiny_inputs(model, batch, length)
            got, want = compiled(**inputs).logits.float(), reference(**inputs).logits.float()
            assert float((got - want).norm() / want.norm()) < 0.1
    sites = [s for r in mxfp4_compile.compile_reports()[start:] for s in r.sites]
    assert sites and all(s.rewritten for s in sites), [s.reason for s in sites]
    assert {s.backend for s in sites} == {s.backend for s in reference.mxfp4_report.sites}
