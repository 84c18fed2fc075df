"""Routers in compiled graphs become one op: found by structure, proven on probes, cached, undone."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import mxfp4_compile
from mxfp4_compile.dynamo import router_pass as lower
from mxfp4_compile.dynamo.router_pass import HOOK, Chain, LowerPass, match_router
from mxfp4_compile.ops import route, schema
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def clean_hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if no model had been optimized in this process."""
    torch._dynamo.reset()
    monkeypatch.setattr(lower, "_guards", weakref.WeakSet())
    monkeypatch.setattr(lower, "_installed", None)
    with inductor.patch({HOOK: None}):
        yield
    torch._dynamo.reset()


# the op


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("before", route.BEFORE)
@pytest.mark.parametrize("after", route.AFTER)
def test_reference_against_torch(dtype: torch.dtype, before: str, after: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, experts, k in ((1, 8, 2), (5, 60, 4), (3, 1024, 10), (4, 7, 7), (0, 8, 2)):
        logits = torch.rand(tokens, experts, generator=generator).argsort(1).sub(experts // 2).mul(2.0**-5).to(dtype)
        if (before, after) == ("none", "sum"):
            logits = (logits - logits.min() + 1) if tokens else logits  # a sum around zero says nothing
        scores = logits.float()
        scores = {"none": scores, "softmax": scores.softmax(-1), "sigmoid": scores.sigmoid()}[before]
        values, ids = scores.topk(k, -1)
        values = values.double()
        want = {"none": values, "sum": values / values.sum(-1, keepdim=True), "softmax": values.softmax(-1)}[after]
        weights, got_ids = schema.route(logits, k, before, after, 0.0, F32)
        assert torch.allclose(weights.double(), want, rtol=1e-5)
        assert torch.equal(scores.gather(1, got_ids), values)
        if experts <= 256:
            assert torch.equal(got_ids, ids)


def test_ties_take_the_lowest_expert_and_nan_stays_in_range() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    _, ids = schema.route(logits, 4, "softmax", "sum", 0.0, F32)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    weights, ids = schema.route(torch.tensor([[0.0, float("nan"), 1.0]]), 2, "none", "none", 0.0, F32)
    assert ids.tolist() == [[1, 2]] and weights.isnan().tolist() == [[True, False]]
    with pytest.raises(ValueError, match="k must lie in 1 to 3"):
        schema.route(torch.zeros(2, 3), 4, "none", "none", 0.0, F32)
    torch.library.opcheck(schema.route, (torch.randn(3, 8), 2, "softmax", "sum", 0.0, BF16))


# matching


def _graph(function: Any, dtype: torch.dtype, experts: int = 16) -> fx.Graph:
    gm = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(
        torch.randn(5, experts, dtype=dtype)
    )
    gm.graph.eliminate_dead_code()
    return gm.graph


def _topk(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.target == torch.ops.aten.topk.default)


def qwen(x: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(torch.softmax(x, -1, dtype=F32), 4, dim=-1)
    return (values / values.sum(-1, keepdim=True)).to(x.dtype), ids


def olmoe(x: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(torch.softmax(x, -1, dtype=F32), 4, dim=-1)
    return values.to(x.dtype), ids


def mixtral(x: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(torch.softmax(x.float(), -1), 2, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    return values, ids


def gpt_oss(x: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(x, 4, dim=-1)
    return torch.softmax(values, 1, dtype=values.dtype), ids


def sigmoid_eps(x: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(x.float().sigmoid(), 3, dim=-1, sorted=False)
    return values / (values.sum(-1, keepdim=True) + 1e-9), ids


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("function", "form"),
    [
        (qwen, ("softmax", "sum")),
        (olmoe, ("softmax", "none")),
        (mixtral, ("softmax", "sum")),
        (gpt_oss, ("none", "softmax")),
        (sigmoid_eps, ("sigmoid", "sum")),
    ],
)
def test_known_routers(function: Any, form: tuple[str, str], dtype: torch.dtype) -> None:
    graph = _graph(function, dtype)
    found = match_router(_topk(graph))
    assert not isinstance(found, str), found
    assert (found.before, found.after) == form
    assert found.logits.op == "placeholder" and found.logits.meta["val"].dtype == dtype
    lower.replace_router(graph, found)
    graph.eliminate_dead_code()
    assert [n.target for n in graph.nodes if n.op == "call_function" and "getitem" not in n.name] == [schema.route]
    run = fx.GraphModule(torch.nn.Module(), graph)
    x = torch.rand(9, 16).argsort(1).to(dtype) / 4
    for got, want in zip(run(x), function(x), strict=True):
        assert got.dtype == want.dtype
        got, want = got.sort(1).values, want.sort(1).values  # sorted=False leaves the order open
        assert torch.allclose(got.double(), want.double(), rtol=1e-6 if dtype == F32 else 8e-3)


def _scaled(x: Tensor) -> Any:
    values, ids = torch.topk(torch.softmax(x, -1, dtype=F32), 4, dim=-1)
    return values * 2.5, ids


def _smallest(x: Tensor) -> Any:
    return torch.topk(torch.softmax(x, -1, dtype=F32), 4, dim=-1, largest=False)


def _rounded_scores(x: Tensor) -> Any:
    values, ids = torch.topk(torch.softmax(x, -1).to(BF16).float(), 4, dim=-1)
    return values / values.sum(-1, keepdim=True), ids


def _temperature(x: Tensor) -> Any:
    values, ids = torch.topk(torch.softmax(x / 1.01, -1, dtype=F32), 4, dim=-1)
    return values, ids


def _squared(x: Tensor) -> Any:
    values, ids = torch.topk(torch.softmax(x, -1, dtype=F32), 4, dim=-1)
    values = values * values
    return values / values.sum(-1, keepdim=True), ids


def _over_tokens(x: Tensor) -> Any:
    values, ids = torch.topk(torch.softmax(x, -1, dtype=F32), 4, dim=-1)
    return values / values.sum(0, keepdim=True), ids


@pytest.mark.parametrize("function", [_scaled, _smallest, _rounded_scores, _temperature, _squared, _over_tokens])
def test_lookalikes_keep_what_they_compute(function: Any) -> None:
    graph = _graph(function, F32)
    x = torch.rand(9, 16).argsort(1).float() / 4
    expected = function(x)
    found = match_router(_topk(graph))
    if isinstance(found, str):
        return
    # A part of it may be a router (the softmax and top-k of _scaled); the whole must compute the same.
    lower.replace_router(graph, found)
    graph.eliminate_dead_code()
    for got, e in zip(fx.GraphModule(torch.nn.Module(), graph)(x), expected, strict=True):
        assert torch.allclose(got.double(), e.double(), rtol=1e-6)


# in compiled models


@pytest.mark.slow
def test_compiled_models_with_fused_routers(clean_hook: None) -> None:
    for family, form in (("qwen3_moe", "softmax, top-2"), ("gpt_oss", "none, top-2, softmax")):
        model = mxfp4_compile.optimize(tiny_model(family, dtype=F32, layers=1))
        inputs = tiny_inputs(model)
        lower.decisions.clear()
        with torch.no_grad(), inductor.patch({HOOK: LowerPass(("cpu",)), "force_disable_caches": True}):
            want = model(**inputs).logits
            got = torch.compile(model, fullgraph=True)(**inputs).logits
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
        assert [d.fused for d in lower.decisions] == [True], lower.decisions
        assert lower.decisions[0].reason.startswith(form)
        mxfp4_compile.restore(model)


def test_installed_beside_a_users_pass_and_undone(clean_hook: None) -> None:
    def own(graph: fx.Graph) -> None:
        pass

    setattr(inductor, HOOK, own)
    first, second = (mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=1)) for _ in range(2))
    chain = getattr(inductor, HOOK)
    assert isinstance(chain, Chain) and chain.passes[0] is own and isinstance(chain.passes[1], LowerPass)
    assert len(chain.passes) == 2 and chain.uuid() is None  # a plain function has no identity for a cache
    assert Chain([LowerPass(), LowerPass()]).uuid()
    mxfp4_compile.restore(first)
    assert getattr(inductor, HOOK) is chain
    mxfp4_compile.restore(second)
    assert getattr(inductor, HOOK) is own
    third = mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=1))
    setattr(inductor, HOOK, None)  # configured over ours: not undone
    mxfp4_compile.restore(third)
    assert getattr(inductor, HOOK) is None


def test_the_pass_on_a_graph_with_our_op(clean_hook: None) -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=F32, layers=1))
    seen: list[tuple[fx.GraphModule, Any]] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append((gm, inputs))
        return gm.forward

    inputs = tiny_inputs(model)
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(**inputs)
        ((gm, example),) = seen
        graph = make_fx(gm, decomposition_table=select_decomp_table())(*example).graph
    lower.decisions.clear()
    LowerPass(("cuda",))(graph)
    assert [(d.fused, d.reason) for d in lower.decisions] == [(False, "routers are not fused on cpu")]
    LowerPass(("cpu",))(graph)
    assert lower.decisions[-1].fused and lower.decisions[-1].reason.startswith("softmax, top-2")
    targets = [n.target for n in graph.nodes]
    assert targets.count(schema.route) == targets.count(schema.moe) == 1 and torch.ops.aten.topk.default not in targets


def test_fusing_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lower.ENVIRONMENT_VARIABLE, raising=False)
    assert LowerPass().devices == ("cuda",)
    monkeypatch.setenv(lower.ENVIRONMENT_VARIABLE, "0")
    assert LowerPass().devices == ()
    assert LowerPass().uuid() != LowerPass(("cuda",)).uuid()


def test_other_graphs_are_not_touched(clean_hook: None) -> None:
    graph = _graph(qwen, F32)
    before = str(graph)
    LowerPass(("cpu",))(graph)
    assert str(graph) == before


_CACHED = """
import torch, mxfp4_compile
from torch._dynamo.utils import counters
from mxfp4_compile.tools.families import tiny_inputs, tiny_model
model = mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=torch.float32, layers=1))
with torch.no_grad():
    torch.compile(model)(**tiny_inputs(model))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_bypass"],
      counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_bypass"])
"""


@pytest.mark.slow
def test_caches_hit_in_a_second_process(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    runs = [
        subprocess.run([sys.executable, "-c", _CACHED], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = ([int(n) for n in r.stdout.split()[-4:]] for r in runs)
    assert first == [0, 0, 0, 0]
    assert second[1] == second[3] == 0 and second[0] + second[2] >= 1, second
