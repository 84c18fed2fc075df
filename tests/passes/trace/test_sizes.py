"""Blocks that a call's sizes decide about are right at every size, or refused in words before anything changed."""

from __future__ import annotations

import copy

import pytest
import torch
from sizes import WAYS, E, H, Sized
from torch import nn

import mxfp4_compile

pytestmark = pytest.mark.slow


class Model(nn.Module):
    def __init__(self, way: str, limit: int) -> None:
        super().__init__()
        self.block = Sized(way, limit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


def _model(way: str, limit: int) -> Model:
    torch.manual_seed(1)
    model = Model(way, limit).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("limit", [24, 150])
@pytest.mark.parametrize("way", WAYS)
def test_right_at_every_size_or_refused(way: str, limit: int) -> None:
    model = _model(way, limit)
    before = copy.deepcopy(model.state_dict())
    example = (torch.randn(2, 9, H, generator=torch.Generator().manual_seed(0)),)
    if WAYS[way].words:
        with pytest.raises(mxfp4_compile.OptimizeError, match=WAYS[way].words) as refusal:
            mxfp4_compile.optimize(model, example_inputs=example)
        assert "Nothing was changed" in str(refusal.value)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
        return
    mxfp4_compile.optimize(model, example_inputs=example)
    restored = mxfp4_compile.restore(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, n) for n in (1, 2, limit - 1, limit, limit + 1, 2 * limit, 3 * limit + 1, limit * E, limit * E + 7)]
    with torch.no_grad():
        for batch, length in [*shapes, (3, limit), (limit, 1), (5, 2)]:
            x = torch.randn(batch, length, H, generator=generator) * 3
            got, want = model.block(x), restored.block(x)
            assert float((got - want).norm() / want.norm()) < 1e-4, (batch, length)
