"""Mutations of a loop over experts: refused, or rewritten to what the mutated block computes; never silently wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from loop_models import E, GatedMLP, H, K, LoopMoE, Model
from torch import nn

import mxfp4_compile
from mxfp4_compile import OptimizeError


class OtherActivation(LoopMoE):
    def __init__(self):
        super().__init__()
        self.experts[2].activate = torch.nn.functional.gelu


class NextExpert(LoopMoE):
    def expert(self, e):
        return self.experts[(e + 1) % E]


class SameExpert(LoopMoE):
    def expert(self, e):
        return self.experts[0] if e == 1 else self.experts[e]


class WeightTwice(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights * weights, out, column, token)


class WeightTwiceForOne(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights * weights if e == 4 else weights, out, column, token)


class ShiftedTokens(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x.roll(1, 0), weights, out, column, token)


class ShiftedOutput(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        current = self.experts[e](x[token]) * weights[token, column, None]
        return out.index_add_(0, (token + 1) % x.shape[0], current)


class OtherColumn(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights, out, K - 1 - column, token)


class Capped(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights, out, column[:40], token[:40])


class ScaledByCount(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights * (token.numel() / 10), out, column, token)


class ManyTokensOnly(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        scale = torch.where(torch.ones_like(token).sum() > 1000, 0.5, 1.0).to(weights.dtype)
        return super().step(e, x, weights * scale, out, column, token)


class Clamped(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        current = self.experts[e](x[token]).clamp(-1e4, 1e4) * weights[token, column, None]
        return out.index_add_(0, token, current)


class Overwrites(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return out.index_copy(0, token, self.experts[e](x[token]) * weights[token, column, None])


class EmptyAddsSomething(LoopMoE):
    def forward(self, hidden_states):
        out, logits = super().forward(hidden_states)
        ids = logits.topk(K, dim=-1).indices
        for e in range(E):
            if torch.where(ids == e)[0].numel() == 0:
                out = out + 1
        return out, logits


class Residual(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        current = (self.experts[e](x[token]) + x[token]) * weights[token, column, None]
        return out.index_add_(0, token, current)


class UsesOutput(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        return super().step(e, x + out, weights, out, column, token)


class ScaledExpert(GatedMLP):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.scale


class OwnScale(LoopMoE):
    def __init__(self):
        super().__init__(ScaledExpert)


class Positional(LoopMoE):
    def step(self, e, x, weights, out, column, token):
        factor = 1 + token.to(weights.dtype)[:, None] * 1e-2
        return out.index_add_(0, token, self.experts[e](x[token]) * factor * weights[token, column, None])


class Dense(LoopMoE):
    """Skips the last expert's bias-like constant."""

    def step(self, e, x, weights, out, column, token):
        return super().step(e, x, weights, out, column, token) + (0.25 if e == E - 1 else 0)


MUTATIONS = [
    OtherActivation, NextExpert, SameExpert, WeightTwice, WeightTwiceForOne, ShiftedTokens, ShiftedOutput, OtherColumn,
    Capped, ScaledByCount, ManyTokensOnly, Clamped, Overwrites, EmptyAddsSomething, Residual, UsesOutput, OwnScale,
    Positional, Dense,
]  # fmt: skip
QUICK = {OtherActivation, NextExpert, Capped, ScaledByCount, EmptyAddsSomething, ShiftedOutput}


@pytest.mark.parametrize(
    "mutation", [pytest.param(m, id=m.__name__, marks=[] if m in QUICK else [pytest.mark.slow]) for m in MUTATIONS]
)
def test_never_silently_wrong(mutation: type[nn.Module]) -> None:
    model = Model(mutation, torch.float32)
    example = torch.randn(2, 9, H, generator=torch.Generator().manual_seed(0))
    untouched = copy.deepcopy(model)
    try:
        mxfp4_compile.optimize(model, example_inputs=(example,))
    except OptimizeError:
        with torch.no_grad():
            assert torch.equal(model(example), untouched(example))
        return
    calls = [torch.randn(b, 9, H, generator=torch.Generator().manual_seed(b)) for b in (1, 2, 40, 400)]
    calls.append(calls[-1] * 1e5)
    calls.append(calls[1][:, :1].expand(2, 9, H).contiguous())
    with torch.no_grad():
        # One block: a second one's router would turn rounding into other experts.
        ours = [model.layers[0](x)[0] for x in calls]
        mxfp4_compile.restore(model)
        for x, y in zip(calls, ours, strict=True):
            theirs = model.layers[0](x)[0]
            assert (y - theirs).norm() <= 1e-4 * theirs.norm(), "silently wrong"
