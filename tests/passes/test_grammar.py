"""Blocks of a grammar of spellings: none is silently wrong or unseen; those that no size decides are all rewritten.

Any two choices meet in one of the blocks (185 of them); to these come 120 random ones, 213 in all without a branch.
"Wrong" is judged by running the optimized model beside the original on dequantized weights, at several sizes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from grammar import H, Spelled, Spelling, spellings, together
from hypothesis import HealthCheck, Phase, given, seed, settings
from loop_models import Model
from torch import Tensor

import mxfp4_compile
from mxfp4_compile import OptimizeError

pytestmark = pytest.mark.slow

# So that several processes share them.
PARTS, RANDOM_PARTS, EACH = 12, 10, 8
SIZES = ((1, 1), (1, 2), (2, 9), (3, 37), (1, 41), (1, 201), (2, 300))


random = settings(
    max_examples=EACH, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def inputs(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(length))


def outcome(spelling: Spelling) -> str:
    """Optimizes one block, and asserts that what becomes of it is right; what that is."""
    model = Model(lambda: Spelled(spelling), torch.float32, layers=1)
    # As small as a trained one: a router that sends all tokens to the same experts shows none (docs/limits.md).
    model.layers[0].bias.data.mul_(0.1)  # type: ignore[union-attr, operator]
    before = dict(model.named_parameters())
    try:
        mxfp4_compile.optimize(model, example_inputs=(inputs(2, 9),))
    except OptimizeError as error:
        after = dict(model.named_parameters())
        assert before.keys() == after.keys() and all(after[n] is p for n, p in before.items()), spelling
        return str(error)
    assert [s.names[0] for s in model.mxfp4_report.sites] == ["layers.0"], spelling
    restored = mxfp4_compile.restore(copy.deepcopy(model))
    with torch.no_grad():
        for batch, length in SIZES:
            x = inputs(batch, length)
            ours, theirs = model(x), restored(x)
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), (spelling, batch, length)
    return model.mxfp4_report.sites[0].outcome


@pytest.mark.parametrize("part", range(PARTS))
def test_rewritten_where_no_size_decides(part: int) -> None:
    for spelling in together(branches=False)[part::PARTS]:
        assert outcome(spelling) in ("fused", "split"), spelling


@pytest.mark.parametrize("part", range(PARTS))
def test_right_or_refused_where_a_size_decides(part: int) -> None:
    for spelling in together(branches=True)[part::PARTS]:
        found = outcome(spelling)
        assert found in ("fused", "split") or "layers.0" in found, spelling


@pytest.mark.parametrize("dispatch", ["unique", "ends on the host"])
def test_a_choice_says_how_many_experts_there_are(dispatch: str) -> None:
    """Where one matrix holds them all, nothing else does."""
    spelling = Spelling("softmax", "flattened", "silu", True, dispatch, "index_add")
    assert outcome(spelling) == "fused"


@pytest.mark.parametrize("part", range(RANDOM_PARTS))
def test_random_blocks_where_no_size_decides(part: int) -> None:
    @seed(part)
    @random
    @given(spellings(branches=False))
    def rewritten(spelling: Spelling) -> None:
        assert outcome(spelling) in ("fused", "split"), spelling

    rewritten()


@pytest.mark.parametrize("part", range(RANDOM_PARTS // 2))
def test_random_blocks_where_a_size_decides(part: int) -> None:
    @seed(1000 + part)
    @random
    @given(spellings(branches=True))
    def right(spelling: Spelling) -> None:
        found = outcome(spelling)
        assert found in ("fused", "split") or "layers.0" in found, spelling

    right()
