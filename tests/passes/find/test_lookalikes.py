"""What looks like a mixture of experts and is none is not rewritten, nor does it make strict raise."""

from __future__ import annotations

import pytest
import torch
from lookalikes import LOOKALIKES, H
from loop_models import Model
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile.passes.find.discover import find_candidates, record_calls


class Known(nn.Module):
    """A mixture of experts, so that a model has one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.empty(4, H, H)), nn.Parameter(torch.empty(4, H, H))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, H)
        weights, ids = self.router(rows).topk(2, -1)
        out = torch.zeros_like(rows)
        for e in range(4):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, torch.relu(rows[token] @ self.up[e]) @ self.down[e] * weights[token, slot, None])
        return out.view(x.shape)


class Beside(Model):
    """Blocks that all take the same rows, of usual size."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.layers]).sum(0)


def model_of(blocks: list[object]) -> Model:
    waiting = iter(blocks)
    return Beside(lambda: next(waiting)(), torch.float32, layers=len(blocks))  # type: ignore[operator]


def inputs() -> Tensor:
    return torch.randn(2, 9, H, generator=torch.Generator().manual_seed(0))


def test_there_are_fifty() -> None:
    assert len(LOOKALIKES) >= 50


@pytest.mark.slow
def test_none_is_rewritten_and_strict_does_not_raise() -> None:
    model = model_of([*LOOKALIKES.values(), Known])
    mxfp4_compile.optimize(model, example_inputs=(inputs(),), strict=True)
    last = f"layers.{len(LOOKALIKES)}"
    names = list(LOOKALIKES)
    seen = {names[int(s.names[0].split(".")[1])]: s.outcome for s in model.mxfp4_report.sites if s.names[0] != last}
    assert set(seen.values()) <= {"dense"}, seen
    assert [s.outcome for s in model.mxfp4_report.sites if s.names[0] == last] == ["fused"]


@pytest.mark.parametrize("found", ["block", "model"])
def test_the_known_one_is_seen_by_its_weights_alone(found: str) -> None:
    """The same weights, in a list for each projection: only what they are multiplied with tells."""

    class Apart(Known):
        def __init__(self) -> None:
            super().__init__()
            del self.up, self.down
            self.up, self.down = (nn.ParameterList(nn.Parameter(torch.empty(H, H)) for _ in range(4)) for _ in range(2))

    model = model_of([Apart]) if found == "block" else Apart().eval()
    if found == "model":
        for p in model.parameters():
            nn.init.normal_(p, std=H**-0.5, generator=torch.Generator().manual_seed(1))
    candidates = find_candidates(model)
    record_calls(model, candidates, (inputs(),))
    assert [c.kind for c in candidates] == ["block"]
    assert ("the model itself" in candidates[0].refusal) == (found == "model")
