"""What a trace decided by sizes holds for all of them, stays a computation on sizes, or is refused in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mxfp4_compile.passes.calls import Call, TensorInfo
from mxfp4_compile.passes.trace import export
from mxfp4_compile.passes.trace.export import trace
from mxfp4_compile.passes.trace.guards import LARGEST
from mxfp4_compile.passes.trace.program import functional
from mxfp4_compile.passes.trace.traced import TraceError, call_pattern

WIDTH = 4


def _pattern(*shapes):
    """The pattern of two calls; each argument's two shapes."""
    calls = [
        Call(tuple(TensorInfo(both[i], torch.float32, torch.device("cpu")) for both in shapes), {}) for i in (0, 1)
    ]
    return call_pattern(*calls)


TOKENS = _pattern(((18, WIDTH), (33, WIDTH)))
BATCHES = _pattern(((2, 9, WIDTH), (3, 11, WIDTH)))


def _module(function):
    class Module(nn.Module):
        def forward(self, *args):
            return function(*args)

    return Module()


def _run(traced, *args):
    """What a traced graph computes."""
    return torch.fx.Interpreter(torch.fx.GraphModule(nn.Module(), traced.graph)).run(*args)[0]


def _same_at(traced, function, shapes):
    for shape in shapes:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(_run(traced, x), function(x))


def test_no_branch_needs_no_sides():
    traced = trace(_module(lambda x: x.reshape(-1, WIDTH) * 2), BATCHES)
    assert traced.sides == () and traced.branches == ""


@pytest.mark.parametrize(
    ("function", "pattern", "words"),
    [
        (lambda x: x * 2 if x.shape[0] > 512 else x, TOKENS, "the number of tokens: more than 512"),
        (lambda x: x * 2 if x.shape[0] * x.shape[1] > 512 else x, BATCHES, "the number of tokens: more than 512"),
        (lambda x: x * 2 if x.shape[0] >= 8 else x, BATCHES, "the batch size: more than 7"),
        (lambda x: x * 2 if x.shape[1] > 100 else x, BATCHES, "the sequence length: more than 100"),
        (lambda x: x * 2 if x.shape[1] == 40 else x, BATCHES, "the sequence length: exactly 40"),
        (lambda x: x * 2 if x.shape[1] == 9 else x, BATCHES, "the sequence length: exactly 9"),
        (lambda x: x * 2 if x.shape[0] % 2 else x, TOKENS, "the number of tokens, by what it computes of it"),
        (lambda x: x * 2 if x.shape[0] > LARGEST + 9 else x, TOKENS, f"tries up to {LARGEST} tokens"),
        (lambda x: x * 2 if not x.is_contiguous() else x, TOKENS, "memory layout of what it computes on"),
        (lambda x: x * 2 if x.stride(0) > WIDTH else x, TOKENS, "memory layout of what it computes on"),
        (lambda x: x * sum(1 for _ in x), TOKENS, "the number of tokens: exactly 18"),
    ],
)
def test_a_branch_that_matters_is_refused_in_words(function, pattern, words):
    with pytest.raises(TraceError, match=f"it branches on .*{words}"):
        trace(_module(function), pattern)


def test_a_branch_on_the_layout_that_only_copies_does_not_matter():
    function = lambda x: (x if x.is_contiguous() else x.contiguous()) * 2
    assert trace(_module(function), TOKENS).sides == ()


def _two_ways(x):
    """One piece or several: the same function."""
    if x.shape[0] <= 300:
        return x.sin()
    return torch.cat([piece.sin() for piece in x.split(100)])


def test_a_branch_between_two_spellings_of_one_graph_is_verified_on_both_sides():
    traced = trace(_module(_two_ways), TOKENS)
    assert {(1, 300), (1, 301), (1, 100), (1, 101)} <= set(traced.sides)
    assert "more than 300" in traced.branches
    _same_at(traced, _two_ways, [(1, WIDTH), (300, WIDTH), (301, WIDTH), (1000, WIDTH)])


def _capacity(x):
    """Rows past max(16, 1.25 n / 4) count for nothing."""
    n = x.shape[0] * x.shape[1]
    capacity = max(16, int(1.25 * n / 4))
    place = torch.ones(n).cumsum(0) - 1
    return x.reshape(-1, WIDTH) * (place < min(capacity, 700))[:, None]


def test_a_capacity_stays_a_computation():
    traced = trace(_module(_capacity), BATCHES)
    # 1.25 n / 4 is 16 from 52 tokens on, and more than 700 from 2244 on.
    assert traced.sides == ((1, 51), (1, 52), (1, 2243), (1, 2244))
    assert "the number of tokens" in traced.branches
    _same_at(traced, _capacity, [(1, 1, WIDTH), (2, 9, WIDTH), (5, 11, WIDTH), (7, 40, WIDTH), (2, 1500, WIDTH)])


def _split(x):
    return torch.cat([piece.softmax(-1) for piece in x.split(32)])


def _chunk(x):
    return torch.cat([piece.softmax(-1) for piece in x.chunk(3)])


def _slices(x):
    out = []
    for start in range(0, x.shape[0], 32):
        out.append(x[start : start + 32].softmax(-1))
    return torch.cat(out, 0)


def _ends(x):
    out = torch.zeros_like(x)
    for start in range(0, x.shape[0], 32):
        end = min(start + 32, x.shape[0])
        out[start:end] = x[start:end].softmax(-1)
    return out


@pytest.mark.parametrize("function", [_split, _chunk, _slices, _ends])
def test_pieces_of_the_tokens_are_taken_as_one(function):
    traced = trace(_module(function), TOKENS)
    many = 3 if function is _chunk else 32
    assert {(1, many), (1, many + 1), (1, 2 * many + 1)} <= set(traced.sides)
    _same_at(traced, function, [(1, WIDTH), (31, WIDTH), (33, WIDTH), (100, WIDTH)])


@pytest.mark.parametrize(("function", "pattern"), [(_capacity, BATCHES), (_split, TOKENS), (torch.sin, TOKENS)])
def test_only_a_trace_that_is_kept_is_made_functional(monkeypatch, function, pattern):
    made = []
    monkeypatch.setattr(export, "functional", lambda program: made.append(program) or functional(program))
    trace(_module(function), pattern)
    assert len(made) == 1


def test_what_cannot_be_made_functional_is_traced_in_the_other_way(monkeypatch):
    """Equal sizes as one size come first; each by itself is what is left."""
    made = []

    def fails_at_first(program):
        made.append(program)
        if len(made) < 3:
            raise RuntimeError("no kernel")
        return functional(program)

    monkeypatch.setattr(export, "functional", fails_at_first)
    pattern = _pattern(((18, WIDTH), (33, WIDTH)), ((18, WIDTH), (33, WIDTH)))
    traced = trace(_module(lambda x, y: x.sin() + y), pattern)
    assert len(made) == 3
    assert torch.equal(_run(traced, torch.ones(5, WIDTH), torch.ones(5, WIDTH)), torch.ones(5, WIDTH).sin() + 1)
    monkeypatch.setattr(export, "functional", lambda program: 1 / 0)
    with pytest.raises(TraceError, match="does not trace"):
        trace(_module(lambda x, y: x.sin() + y), pattern)


def test_sizes_that_follow_from_each_other_are_no_branch():
    """Rows and weights of rows as separate arguments: that there are as many is no decision."""
    pattern = _pattern(((2, 9, WIDTH), (3, 11, WIDTH)), ((18, 1), (33, 1)))
    traced = trace(_module(lambda x, w: x.reshape(-1, WIDTH) * w), pattern)
    assert traced.sides == () and len(traced.inputs) == 2


def test_failures_print_nothing(capfd):
    def fails(x):
        raise RuntimeError("of its own")

    with pytest.raises(TraceError, match="of its own"):
        trace(_module(fails), TOKENS)
    with pytest.raises(TraceError):
        trace(_module(lambda x: x * 2 if x.sum() > 0 else x), TOKENS)
    assert capfd.readouterr() == ("", "")
