"""The spellings of remote code are seen whatever holds the weights, and rewritten; or refused with the true reason."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import grammar
import pytest
import torch
import unusual
from grammar import Spelled, Spelling
from loop_models import LoopMoE, Model
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile import OptimizeError
from mxfp4_compile.passes.find.discover import find_candidates, record_calls
from mxfp4_compile.passes.trace.guards import Condition
from mxfp4_compile.passes.weights import WeightPath, families, restacked, stack, unstack

H = grammar.H


def inputs(batch: int = 2, length: int = 9, width: int = H) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(length))


REWRITTEN = {
    "a list for each projection": Spelling("softmax", "lists of linears", "silu", True, "where", "index_add"),
    "lists of parameters, split by counts": Spelling(
        "softmax", "lists of parameters", "silu", True, "split by counts", "index_add"
    ),
    "ends of runs on the host": Spelling("softmax", "modules", "silu", True, "ends on the host", "index_add"),
    "Python lists of rows": Spelling("softmax", "modules", "silu", True, "lists of rows", "index_add"),
    "distinct ids": Spelling("softmax", "modules", "silu", True, "unique", "index_add"),
    "masks of two dimensions": Spelling(
        "masked softmax", "modules", "silu", True, "whole sequences", "index_add"
    ),
    "the dtype of an expert": Spelling("softmax", "modules", "silu", True, "where", "index_add", own_dtype=True),
    "a middle of its own, parameters apart": Spelling(
        "softmax", "dict of parameters", "tanh", False, "lists of rows", "index_add"
    ),
    "a middle of its own, the dtype of an expert": Spelling(
        "softmax", "modules", "tanh", False, "where", "index_add", own_dtype=True
    ),
    "numbered parameters": Spelling("sigmoid", "numbered parameters", "gelu", False, "where", "scatter_add"),
}  # fmt: skip
QUICK = {"lists of parameters, split by counts", "masks of two dimensions", "Python lists of rows"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in REWRITTEN]
)  # fmt: skip
def test_rewritten_and_equal(name: str) -> None:
    model = Model(lambda: Spelled(REWRITTEN[name]), torch.float32, layers=1)
    mxfp4_compile.optimize(model, example_inputs=(inputs(),))
    expected = "split" if "of its own" in name else "fused"
    assert [s.outcome for s in model.mxfp4_report.sites] == [expected]
    restored = mxfp4_compile.restore(copy.deepcopy(model))
    again = Model(lambda: Spelled(REWRITTEN[name]), layers=1)
    assert set(dict(restored.named_parameters())) == set(dict(again.named_parameters()))
    with torch.no_grad():
        for batch, length in ((1, 1), (1, 2), (3, 37), (1, 300)):
            x = inputs(batch, length)
            torch.testing.assert_close(model(x), restored(x), rtol=1e-4, atol=1e-5)


SEEN = [
    unusual.Uneven, unusual.Kinds, unusual.Holders, unusual.FourDimensions, unusual.RowsOfAMatrix, unusual.Padded,
    unusual.Dispatched,
]  # fmt: skip


@pytest.mark.parametrize("block", [*SEEN, lambda: unusual.Dispatched(packed=False)])
def test_seen_wherever_the_weights_lie(block: type[nn.Module]) -> None:
    model = Model(block, torch.float32, layers=1)
    candidates = find_candidates(model)
    record_calls(model, candidates, (inputs(),))
    assert [c.name for c in candidates] == ["layers.0"]
    assert not candidates[0].unrouted and len(candidates[0].calls) == 2


def refusal(model: nn.Module, x: Tensor) -> str:
    before = dict(model.named_parameters())
    with pytest.raises(OptimizeError) as raised:
        mxfp4_compile.optimize(model, example_inputs=(x,))
    assert all(dict(model.named_parameters())[n] is p for n, p in before.items())
    return str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_room_for_each_expert_is_the_reason(packed: bool) -> None:
    model = Model(lambda: unusual.Dispatched(packed), torch.float32, layers=1)
    reason = refusal(model, inputs())
    assert "number of tokens" in reason and "nothing is routed" not in reason


def test_named_beside_layers_that_match() -> None:
    blocks = iter([lambda: Spelled(REWRITTEN["distinct ids"]), unusual.FourDimensions])
    model = Model(lambda: next(blocks)(), torch.float32, layers=2)
    reason = refusal(model, inputs())
    assert "layers.1 [FourDimensions]" in reason and "layers.0" not in reason


def test_a_shared_expert_in_the_list_is_named() -> None:
    reason = refusal(Model(unusual.SharedInTheList, torch.float32, layers=1), inputs())
    assert "expert 0 serves every token: it is shared" in reason


def test_a_condition_that_cannot_be_computed_does_not_hold() -> None:
    condition = Condition("size0 % (size0 // 4) == 0", SimpleNamespace(names=("number of tokens",)))  # type: ignore[arg-type]
    assert [bool(condition.function()(n)) for n in (3, 8, 11)] == [False, True, False]
    assert "number of tokens" in str(condition)


class DistinctOthers(unusual.Uneven):
    """Goes through the distinct values of something else than what chooses rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, H, bias=False), nn.GELU(), nn.Linear(H, H, bias=False)) for _ in range(unusual.E)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        for e in ids[:, 0].contiguous().clone().mul(1).unique().tolist():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](rows[token]) * weights[token, slot, None])
        return out.view(x.shape)


def test_distinct_values_of_something_else_are_refused() -> None:
    reason = refusal(Model(DistinctOthers, torch.float32, layers=1), inputs())
    assert "distinct values of integers that do not choose the experts' rows" in reason


def test_nothing_is_printed_where_a_trace_fails(capfd: pytest.CaptureFixture[str]) -> None:
    mxfp4_compile.optimize(Model(unusual.Padded, torch.float32, layers=1), example_inputs=(inputs(),), strict=False)
    assert capfd.readouterr() == ("", "")


def test_an_exception_in_matching_is_that_site_s_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(mxfp4_compile.planning, "match", fails)
    x = torch.randn(2, 9, 64)
    assert "ZeroDivisionError: of a test" in refusal(Model(LoopMoE, torch.float32, layers=1), x)


@pytest.mark.parametrize("store", ["dict of parameters", "numbered parameters", "attributes", "lists of linears"])
def test_paths_of_weights_apart(store: str) -> None:
    block = Spelled(Spelling("softmax", store, "silu", True, "where", "index_add"))
    for p in block.parameters():
        nn.init.normal_(p)
    names = {path for name, (path, _) in families(block).items() if "up" in name}
    (path,) = names
    assert str(WeightPath.parse(path)) == path and WeightPath.parse(path).apart
    whole = stack(block, path)
    assert whole.shape == (grammar.E, grammar.MI, H)
    values = unstack(block, path, whole[:])
    assert len(values) == grammar.E and all(torch.equal(block.get_parameter(n), v) for n, v in values.items())
    assert torch.equal(restacked(block, path, values, "", grammar.E), whole[:])
