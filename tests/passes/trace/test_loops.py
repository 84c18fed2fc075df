"""Experts called in data-dependent loops: rewritten, equal to the original, and put back."""

from __future__ import annotations

import functools
import gc

import loop_models
import pytest
import torch
from loop_models import (
    AllWeightsMoE,
    CalledListMoE,
    CountsMoE,
    E,
    FlatMaskMoE,
    GatedMLP,
    H,
    LoopMoE,
    MaskMoE,
    Model,
    NormedMLP,
    OffsetsMoE,
    OneHotMoE,
    PlainMLP,
    RemoteMoE,
    SortedExperts,
)
from torch import nn

import mxfp4_compile
from mxfp4_compile import OptimizeError, planning
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.passes.build.rewrite import count_ops
from mxfp4_compile.passes.calls import describe
from mxfp4_compile.passes.match import FusedMatch, match
from mxfp4_compile.passes.trace.traced import call_pattern
from mxfp4_compile.passes.trace.unroll import trace_loop


class DropsSmallMoE(MaskMoE):
    """Fills by a mask that chooses no rows."""

    def kept(self, weights):
        weights = weights.clone()
        weights[weights < 0.2] = 0.0
        return weights


STYLES = {
    "remote code, sorted slices": RemoteMoE,
    "remote code, list called": CalledListMoE,
    "mask.any()": MaskMoE,
    "rows by a mask": functools.partial(MaskMoE, by_tokens=True),
    "torch.any(mask)": functools.partial(MaskMoE, "torch.any", by_tokens=True),
    "mask.sum() > 0": functools.partial(MaskMoE, "sum"),
    "count_nonzero(mask)": functools.partial(MaskMoE, "count"),
    "where(mask), asks nothing": functools.partial(MaskMoE, "nothing"),
    "rows by a mask, asks nothing": functools.partial(MaskMoE, "nothing", by_tokens=True),
    "mask made anew": FlatMaskMoE,
    "mask made anew, asks nothing": functools.partial(FlatMaskMoE, asks=False),
    "not mask.sum().eq(0)": functools.partial(MaskMoE, "sum is zero"),
    "mask.sum().item() and mask.any().item()": functools.partial(MaskMoE, "items"),
    "if mask.sum()": functools.partial(MaskMoE, "truth"),
    "one-hot mask": OneHotMoE,
    "weights filled by another mask": DropsSmallMoE,
    "counts as a tensor": CountsMoE,
    "slices of packed weights": OffsetsMoE,
    "weights of all experts": AllWeightsMoE,
    "all experts": LoopMoE,
    "hit experts": functools.partial(LoopMoE, hit=True),
    "biases, gelu, no gate": functools.partial(LoopMoE, PlainMLP),
    "gated with biases in a dict": functools.partial(LoopMoE, functools.partial(GatedMLP, bias=True), named=True),
}


def inputs(batch: int = 2, length: int = 9, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


SLOW = {
    "counts as a tensor", "weights of all experts", "torch.any(mask)", "mask.sum() > 0", "count_nonzero(mask)",
    "where(mask), asks nothing", "rows by a mask, asks nothing", "mask made anew, asks nothing", "not mask.sum().eq(0)",
    "mask.sum().item() and mask.any().item()", "if mask.sum()", "one-hot mask", "weights filled by another mask",
    "remote code, list called", "rows by a mask", "mask made anew", "hit experts", "biases, gelu, no gate",
}  # fmt: skip


@pytest.mark.parametrize("style", [pytest.param(s, marks=[pytest.mark.slow] if s in SLOW else []) for s in STYLES])
def test_rewritten_and_equal(style: str) -> None:
    model = Model(STYLES[style], torch.float32)
    keys = set(model.state_dict())
    mxfp4_compile.optimize(model, example_inputs=(inputs(dtype=torch.float32),))
    assert [s.outcome for s in model.mxfp4_report.sites] == ["fused", "fused"]
    assert all(s.error is not None for s in model.mxfp4_report.sites)
    calls = [inputs(b, n, seed, torch.float32) for seed, (b, n) in enumerate(((1, 9), (3, 9), (2, 9), (7, 9)))]
    with torch.no_grad():
        ours = [model(x) for x in calls]
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        assert any(k.endswith("_packed") for k in saved)
        model.load_state_dict(saved)
        assert torch.equal(model(calls[0]), ours[0])
        mxfp4_compile.restore(model)
        assert set(model.state_dict()) == keys
        assert isinstance(getattr(model.layers[0], "experts", nn.ModuleList()), (nn.ModuleList, nn.ModuleDict))
        for x, y in zip(calls, ours, strict=True):
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


def test_bf16_and_shared_experts() -> None:
    model = Model(RemoteMoE)
    x = inputs()
    mxfp4_compile.optimize(model, example_inputs=(x,))
    site = model.layers[0]
    assert "shared_experts.up_proj.weight" in site.state_dict()
    for report in model.mxfp4_report.sites:
        assert report.error <= 1.5 * report.original_error + 2e-3
    with torch.no_grad():
        ours = model(x)
        theirs = mxfp4_compile.restore(model)(x)
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_no_second_copy_remains() -> None:
    model = Model(RemoteMoE)
    experts = sum(p.numel() * 2 for n, p in model.named_parameters() if ".experts." in n)
    mxfp4_compile.optimize(model, example_inputs=(inputs(),))
    gc.collect()
    live = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta")
    rest = sum(p.numel() * 2 for n, p in model.named_parameters())
    assert live <= rest + 0.28 * experts


class OtherActivation(LoopMoE):
    def __init__(self) -> None:
        super().__init__()
        self.experts[E - 1].activate = torch.tanh


class Missing(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return out if e == 2 else super().step(e, x, weights, out, column, token)


@pytest.mark.parametrize(("block", "reason"), [(OtherActivation, "expert 3"), (Missing, "expert 2")])
def test_refused_with_the_reason(block: type[nn.Module], reason: str) -> None:
    model = Model(block)
    with pytest.raises(OptimizeError, match=reason) as raised:
        mxfp4_compile.optimize(model, example_inputs=(inputs(),))
    assert "layers.0" in str(raised.value)
    assert isinstance(model.layers[0], block)


class NormedRemote(RemoteMoE):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([NormedMLP() for _ in range(E)])


SPLIT = {
    "a list that is called": (lambda: normed_list(False), torch.float32),
    "a list that is called, with biases": (lambda: normed_list(True), torch.bfloat16),
    "loop": (functools.partial(LoopMoE, NormedMLP), torch.float32),
    "remote code, sorted slices": (NormedRemote, torch.bfloat16),
    "biases in a dict": (
        functools.partial(LoopMoE, functools.partial(NormedMLP, bias=True), named=True, hit=True),
        torch.bfloat16,
    ),
}


def normed_list(bias: bool) -> nn.Module:
    block = CalledListMoE()
    block.experts = SortedExperts([NormedMLP(bias=bias) for _ in range(E)])
    return block


@pytest.mark.parametrize(
    "style", [pytest.param(s, marks=[] if s in ("loop", "biases in a dict") else [pytest.mark.slow]) for s in SPLIT]
)
def test_split_around_a_middle_no_kernel_knows(style: str) -> None:
    make, dtype = SPLIT[style]
    model = Model(make, dtype)
    keys = set(model.state_dict())
    mxfp4_compile.optimize(model, example_inputs=(inputs(dtype=dtype),))
    assert [s.outcome for s in model.mxfp4_report.sites] == ["split", "split"]
    for site, report in zip(mxfp4_sites(model).values(), model.mxfp4_report.sites, strict=True):
        assert count_ops(site.rewritten) == {"moe": 0, "grouped_linear": 3}
        assert report.error <= 1.5 * report.original_error + 2e-3
    calls = [inputs(b, 9, b, dtype) for b in (1, 2, 7)]
    with torch.no_grad():
        ours = [model.layers[0](x) for x in calls]
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        assert not any(v.device.type == "meta" for v in saved.values())
        assert sum(k.endswith("norm.weight") for k in saved) == 2 * E
        for p in model.layers[0].buffers():
            p.zero_()
        model.load_state_dict(saved)
        mxfp4_compile.restore(model)
        assert set(model.state_dict()) == keys
        for x, y in zip(calls, ours, strict=True):
            a, b = (v[0] if isinstance(v, tuple) else v for v in (y, model.layers[0](x)))
            assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * b.norm()


def test_split_site_reports_unknown_keys() -> None:
    model = Model(SPLIT["loop"][0], torch.float32)
    mxfp4_compile.optimize(model, example_inputs=(inputs(dtype=torch.float32),))
    state = model.state_dict()
    state["layers.0.experts.0.other"] = torch.zeros(1)
    del state["layers.0.experts.1.norm.weight"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*experts.1.norm.weight.*Unexpected.*experts.0.other"):
        model.load_state_dict(state)


def test_hooks_inside_a_block_are_named() -> None:
    model = Model(RemoteMoE, torch.float32)
    seen = []
    model.layers[0].experts[2].register_forward_hook(lambda *_: seen.append("expert"))
    model.layers[1].register_forward_hook(lambda *_: seen.append("block"))
    mxfp4_compile.optimize(model, example_inputs=(inputs(dtype=torch.float32),), verify=False)
    (note,) = [n for n in model.mxfp4_report.notes if "hooks" in n]
    assert "layers.0.experts.2" in note and "layers.1" not in note
    seen.clear()
    with torch.no_grad():
        model(inputs(dtype=torch.float32))
    assert seen == ["block"]


@pytest.mark.slow
@pytest.mark.parametrize("style", ["remote code, sorted slices", "all experts"])
def test_graph_grows_linearly_with_the_experts(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for experts in (4, 6, 8):  # not 2: the router's groups would have one expert each, and a view fewer
        monkeypatch.setattr(loop_models, "E", experts)
        block = STYLES[style]().eval()
        pattern = call_pattern(*(describe((torch.zeros(b, 9, H),), {}) for b in (2, 3)))
        traced = trace_loop(block, pattern)
        sizes.append(len(traced.graph.nodes))
        assert isinstance(match(traced), FusedMatch)
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]


def test_equal_blocks_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    unroll = planning.unroll
    monkeypatch.setattr(planning, "unroll", lambda *a: calls.append(1) or unroll(*a))
    model = Model(RemoteMoE, torch.float32, layers=4)
    mxfp4_compile.optimize(model, example_inputs=(inputs(dtype=torch.float32),), verify=False)
    assert len(model.mxfp4_report.sites) == 4 and len(calls) == 1


# shared and tied experts


def test_shared_blocks_stay_shared() -> None:
    model = Model(RemoteMoE, torch.float32)
    model.layers[1] = model.layers[0]
    x = inputs(dtype=torch.float32)
    mxfp4_compile.optimize(model, example_inputs=(x,))
    assert model.layers[0] is model.layers[1]
    (site,) = model.mxfp4_report.sites
    assert site.names == ("layers.0", "layers.1")
    with torch.no_grad():
        ours = model(x)
        mxfp4_compile.restore(model)
        assert model.layers[0] is model.layers[1] and isinstance(model.layers[0], RemoteMoE)
        torch.testing.assert_close(ours, model(x), rtol=1e-4, atol=1e-4)


def test_one_list_of_experts_in_two_blocks() -> None:
    """Each block has its router; the weights exist once, before and after."""
    model = Model(RemoteMoE, torch.float32)
    model.layers[1].experts = model.layers[0].experts
    x = inputs(dtype=torch.float32)
    mxfp4_compile.optimize(model, example_inputs=(x,))
    first, second = model.layers
    assert first is not second and not torch.equal(first.gate.weight, second.gate.weight)
    for slot in ("up", "down"):
        assert first.weights(slot)[0].data_ptr() == second.weights(slot)[0].data_ptr()
    with torch.no_grad():
        ours = model(x)
        mxfp4_compile.restore(model)
        assert model.layers[0].experts is model.layers[1].experts
        torch.testing.assert_close(ours, model(x), rtol=1e-4, atol=1e-4)


def test_tied_parameters_of_two_lists() -> None:
    model = Model(RemoteMoE, torch.float32)
    for mine, theirs in zip(model.layers[1].experts, model.layers[0].experts, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(mine, name).weight = getattr(theirs, name).weight
    x = inputs(dtype=torch.float32)
    mxfp4_compile.optimize(model, example_inputs=(x,))
    first, second = model.layers
    assert first.weights("up")[0].data_ptr() == second.weights("up")[0].data_ptr()
    with torch.no_grad():
        ours = model(x)
        torch.testing.assert_close(ours, mxfp4_compile.restore(model)(x), rtol=1e-4, atol=1e-4)


def test_an_expert_that_is_in_the_list_twice_is_refused() -> None:
    model = Model(RemoteMoE, torch.float32)
    model.layers[0].experts[3] = model.layers[0].experts[1]
    with pytest.raises(OptimizeError, match=r"layers\.0 \[RemoteMoE\]: .*expert 1"):
        mxfp4_compile.optimize(model, example_inputs=(inputs(dtype=torch.float32),))
    assert isinstance(model.layers[1], RemoteMoE)
