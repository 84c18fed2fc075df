"""Experts called in data-dependent loops: rewritten, equal to the original, and put back."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from loop_models import AllWeightsMoE, CountsMoE, E, GatedMLP, H, LoopMoE, Model, OffsetsMoE, PlainMLP, RemoteMoE
from torch import nn

import mxfp4_compile
from mxfp4_compile import OptimizeError

STYLES = {
    "remote code, sorted slices": RemoteMoE,
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


SLOW = {"counts as a tensor", "weights of all experts"}


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
        return out if e == 3 else super().step(e, x, weights, out, column, token)


@pytest.mark.parametrize(("block", "reason"), [(OtherActivation, "expert 5"), (Missing, "expert 3")])
def test_refused_with_the_reason(block: type[nn.Module], reason: str) -> None:
    model = Model(block)
    with pytest.raises(OptimizeError, match=reason) as raised:
        mxfp4_compile.optimize(model, example_inputs=(inputs(),))
    assert "layers.0" in str(raised.value)
    assert isinstance(model.layers[0], block)


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
