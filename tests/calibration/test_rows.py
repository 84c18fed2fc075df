"""Sums over rows against loops over experts in fp64, whatever the counts, tiles, weights and ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxfp4_compile.calibration import rows as rows_
from mxfp4_compile.calibration.rows import Rows, hessian, output_errors

T, K, TOP, E = 70, 12, 3, 5


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, K, generator=g).bfloat16()
    ids = torch.randint(0, E + 1, (T, TOP), generator=g)  # E: nobody's
    ids[ids == 3] = 1  # an expert without tokens, and one with many
    return x, ids, torch.rand(T, TOP, generator=g) + 0.1


def of_expert(x: Tensor, ids: Tensor, weights: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """The inputs [n, K] and weights [n, 1] of one expert, in fp64."""
    token, slot = torch.where(ids == e)
    return x[token].double(), weights[token, slot].double()[:, None]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("some", [slice(0, E), slice(1, 4), slice(3, 4)])
def test_hessians(some: slice, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_, "_ROWS_LEAST", 4)  # several tiles
    monkeypatch.setitem(rows_._ELEMENTS, "cpu", 1)
    x, ids, weights = draw(0)
    rows = Rows.of_pairs(x, ids, weights, E, scaled=scaled)
    assert rows.counts == tuple(int((ids == e).sum()) for e in range(E))
    sums, cross = hessian(rows, some, rows.inputs, K)
    assert not cross.numel()
    for place, e in enumerate(range(*some.indices(E))):
        own, weight = of_expert(x, ids, weights, e)
        torch.testing.assert_close(sums[place].double(), (own * weight).mT @ (own * weight), rtol=1e-5, atol=1e-4)
    again, _ = hessian(rows, some, rows.inputs, K)
    assert torch.equal(again, sums)


def test_cross_sums() -> None:
    x, ids, weights = draw(1)
    other = draw(2)[0]
    rows = Rows.of_pairs(x, ids, weights, E)
    _, cross = hessian(rows, slice(0, E), rows.inputs, K, lambda tile: rows.inputs(tile, other))
    for e in range(E):
        own, weight = of_expert(x, ids, weights, e)
        theirs, _ = of_expert(other, ids, weights, e)
        expected = ((theirs - own) * weight).mT @ (own * weight)
        torch.testing.assert_close(cross[e].double(), expected, rtol=1e-5, atol=1e-4)


def test_output_errors_of_a_part_of_the_tokens() -> None:
    x, ids, weights = draw(3)
    held = torch.arange(T) % 4 == 1
    rows = Rows.of_pairs(x, ids, weights, E).only(held)
    g = torch.Generator().manual_seed(4)
    right, wrong = torch.randn(E, 7, K, generator=g), torch.randn(E, 7, K, generator=g)
    reads = [lambda tile, w=w: rows.inputs(tile) @ w[tile.experts].mT for w in (right, wrong)]
    noise, power = output_errors(rows, slice(0, E), reads[0], [reads[0], reads[1]])
    assert not noise[0].any()
    for e in range(E):
        own, weight = of_expert(x[held], ids[held], weights[held], e)
        error = (own @ (wrong[e] - right[e]).double().mT * weight).square().sum()
        torch.testing.assert_close(noise[1][e], error, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(power[e], (own @ right[e].double().mT * weight).square().sum(), rtol=1e-5, atol=1e-5)


def test_no_rows_at_all() -> None:
    x, ids, weights = draw(5)
    rows = Rows.of_pairs(x, torch.full_like(ids, E), weights, E)
    assert len(rows) == 0 and not list(rows.tiles(slice(0, E)))
    assert not hessian(rows, slice(0, E), rows.inputs, K)[0].any()
