"""Packed and flattened experts in loops: step3p7, dbrx, longcat_flash, and mutations of such loops."""

from __future__ import annotations

import inspect

import pytest
import torch
from packed_models import OTHERS, E, Flattened, H, K, Model, WithoutWeights
from torch import nn

import mxfp4_compile
from mxfp4_compile import OptimizeError
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.passes.build.rewrite import count_ops
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

FAMILIES = ["step3p7", "dbrx", "longcat_flash"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype, layers=1)
    inputs = tiny_inputs(model)
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    mxfp4_compile.optimize(model, example_inputs=inputs)
    assert {s.outcome for s in model.mxfp4_report.sites} == {"fused"}
    for site in mxfp4_sites(model).values():
        assert count_ops(site.rewritten) == {"moe": 1, "grouped_linear": 0}
        # Sizes that only the device knows would stop a CUDA graph.
        assert not [n for n in site.rewritten.graph.nodes if "nonzero" in str(n.target) or "item" in str(n.target)]
    with torch.no_grad():
        ours = model(**inputs).logits
        theirs = mxfp4_compile.restore(model)(**inputs).logits
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == before
    if dtype == torch.float32:
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


class OtherExpertsMatrix(Flattened):
    def matrices(self, e):
        w1, v1, _ = super().matrices(e)
        return w1, v1, super().matrices((e + 1) % E)[2]


class Swapped(Flattened):
    """Gate and up exchanged: still the same experts."""

    def matrices(self, e):
        w1, v1, w2 = super().matrices(e)
        return v1, w1, w2


class Interleaved(Flattened):
    """Every E-th row is an expert's, not MI after each other."""

    def matrices(self, e):
        w1, v1, w2 = (w.view(-1, E, H)[:, e] for w in (self.w1, self.v1, self.w2))
        return w1, v1, w2


class OneOther(Flattened):
    def expert(self, e, rows):
        return super().expert(e, rows) * (2 if e == 3 else 1)


class Doubled(WithoutWeights):
    def hand_on(self, e, rows):
        return rows * 2


class DoubledByOne(WithoutWeights):
    def hand_on(self, e, rows):
        return rows * 2 if e == E + 1 else rows


class PositiveOnly(WithoutWeights):
    def hand_on(self, e, rows):
        return rows.relu()


class CappedAtLarge(WithoutWeights):
    def hand_on(self, e, rows):
        return rows.clamp(-1e5, 1e5)


class Shifted(WithoutWeights):
    def hand_on(self, e, rows):
        return rows + 1e-3


class MeanOfRows(WithoutWeights):
    def hand_on(self, e, rows):
        return rows - rows.mean(0, keepdim=True)


class ManyRows(WithoutWeights):
    def hand_on(self, e, rows):
        return rows * torch.where(torch.ones_like(rows[:, 0]).sum() > 500, 0.5, 1.0)


class FirstRows(WithoutWeights):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights, out, column[:50], token[:50]) if e >= E else super().step(
            e, x, weights, out, column, token
        )  # fmt: skip


class WithoutItsWeight(WithoutWeights):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights if e < E else torch.ones_like(weights), out, column, token)


class SharesAnExpert(WithoutWeights):
    def hand_on(self, e, rows):
        return super().expert(e - E, rows)


class OwnMatrix(WithoutWeights):
    def hand_on(self, e, rows):
        return rows + nn.functional.linear(rows, self.gate_up_proj[e])[:, :H]


class Scales(WithoutWeights):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights, out * 2 if e == E else out, column, token)


class Forgotten(WithoutWeights):
    def expert(self, e, rows):
        return torch.zeros_like(rows) if e == 2 else super().expert(e, rows)


MUTATIONS = [
    OtherExpertsMatrix, Swapped, Interleaved, OneOther, Doubled, DoubledByOne, PositiveOnly, CappedAtLarge, Shifted,
    MeanOfRows, ManyRows, FirstRows, WithoutItsWeight, SharesAnExpert, OwnMatrix, Scales, Forgotten,
]  # fmt: skip
QUICK = {OtherExpertsMatrix, DoubledByOne, Scales}


@pytest.mark.parametrize(
    "mutation", [pytest.param(m, id=m.__name__, marks=[] if m in QUICK else [pytest.mark.slow]) for m in MUTATIONS]
)
def test_never_silently_wrong(mutation: type) -> None:
    model = Model(mutation, torch.float32)
    example = torch.randn(18, H, generator=torch.Generator().manual_seed(0))
    try:
        mxfp4_compile.optimize(model, example_inputs=(example,))
    except OptimizeError:
        return
    _same_as_restored(model)


@pytest.mark.parametrize("plain", [Flattened, WithoutWeights])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmutated(plain: type, dtype: torch.dtype) -> None:
    model = Model(plain, dtype)
    mxfp4_compile.optimize(model, example_inputs=(torch.randn(18, H, dtype=dtype),))
    (report,) = model.mxfp4_report.sites
    assert report.outcome == "fused"
    (site,) = mxfp4_sites(model).values()
    assert not [n for n in site.rewritten.graph.nodes if "nonzero" in str(n.target)]
    if dtype == torch.float32:
        torch._dynamo.reset()
        x = torch.randn(7, H)
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
            assert torch.equal(compiled, model(x))
        _same_as_restored(model)


def _same_as_restored(model: nn.Module) -> None:
    """Against the dequantized original on many and few tokens, large and small, all kinds of ids."""
    generator = torch.Generator().manual_seed(1)
    calls = []
    for tokens, scale in ((1, 1.0), (13, 1.0), (700, 1.0), (13, 1e6), (9, 1e-3)):
        x = torch.randn(tokens, H, generator=generator) * scale
        weights = torch.rand(tokens, K, generator=generator)
        for low, high in ((0, E), (0, model.choices), (model.choices - 1, model.choices), (E - OTHERS, E)):
            calls.append((x, torch.randint(low, high, (tokens, K), generator=generator), weights))
    with torch.no_grad():
        ours = [model.experts(*call) for call in calls]
        mxfp4_compile.restore(model)
        for call, y in zip(calls, ours, strict=True):
            theirs = model.experts(*call)
            assert (y - theirs).norm() <= 1e-4 * theirs.norm(), "silently wrong"


def test_every_mutation_is_judged() -> None:
    """What is written down here as a loop runs in a test, in the quick or in the slow tier."""
    for value in list(globals().values()):
        if inspect.isclass(value) and issubclass(value, (Flattened, WithoutWeights)) and value.__module__ == __name__:
            assert value in MUTATIONS, f"{value.__name__} is judged by no test"
