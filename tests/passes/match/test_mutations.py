"""Mutated graphs of real experts: never silently wrong, and what means the same still matches.

Every mutated graph is matched and, if it matches, rewritten on MXFP4 weights; the result is compared with
the eager run of the MUTATED graph on the dequantized weights. No match, a refusal, a split, or a fused op
that computes the mutated function are all fine for a mutation that changes the meaning.

The quick tier runs only what is not known: an outcome that was found right before (support/outcomes.py) is not run
again. The slow tier runs every graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable

import mutations
import pytest
import torch
from mutations import (
    CALLS,
    CHANGING,
    PRESERVING,
    QWEN,
    Mutation,
    call_inputs,
    distance,
    execute,
    overall,
    quantized,
    run_rewritten,
    with_bias,
)
from outcomes import known, outcome

from mxfp4_compile.passes.build.rewrite import RewriteError
from mxfp4_compile.passes.match import FusedMatch, NoMatch, SplitMatch, match

# fp32: both sides sum the same products in another order.
FP32 = 1e-5
# bf16: the rewritten graph's distance from an fp64 run over the mutated graph's own, as in passes.verify.
RATIO, SLACK = 1.5, 4e-3
# bf16 graphs where the mutation is a rounding that the fp64 run does not do are compared with their own run.
OWN = 2e-2


def _changes(mutation: Mutation, traced: object) -> float:
    """How far the mutated graph's function is from the traced one's, at its farthest."""
    src = mutation.source
    worst = 0.0
    for seed, call in enumerate((*CALLS, *mutation.calls)):
        inputs, state = call_inputs(src, call, seed), with_bias(src.state, call.bias)
        wide = src.dtype != torch.float32 and not mutation.narrows
        before = execute(src.traced, state, inputs, wide)
        worst = max(worst, distance(execute(traced, state, inputs, wide), before))
    return worst


def _judge(mutation: Mutation, traced: object, found: FusedMatch | SplitMatch) -> None:
    src = mutation.source
    if mutation.random:
        assert isinstance(found, SplitMatch), "random numbers were fused away"
        return
    state, weights, biases = quantized(src, found)
    for backend in ("reference", "cpu"):
        run = run_rewritten(traced, found, backend, state, weights, biases)
        for seed, call in enumerate((*CALLS, *mutation.calls)):
            inputs, given = call_inputs(src, call, seed), with_bias(state, call.bias)
            ours, eager = run(inputs, call.bias), execute(traced, given, inputs)
            where = f"{backend}, {call}: {getattr(found.spec, 'reason', found.spec)}"
            if src.dtype == torch.float32:
                assert distance(ours, eager) <= FP32, where
            elif mutation.narrows:
                assert overall(ours, eager) <= OWN, where
            else:
                exact = execute(traced, given, inputs, wide=True)
                assert overall(ours, exact) <= RATIO * overall(eager, exact) + SLACK, where


@functools.cache
def _mutated(mutation: Mutation) -> tuple[object, FusedMatch | SplitMatch | NoMatch]:
    traced = mutation.mutate()
    return traced, match(traced)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Mutation, str], None]:
    """Write down an outcome that was found right, if the command line names a file."""
    file = request.config.getoption("--record-outcomes")

    def write(mutation: Mutation, text: str) -> None:
        if file:
            with open(file, "a") as lines:
                lines.write(f"{mutation.id}: {text}\n")

    return write


def _parameters(catalogue: list[Mutation]) -> list[object]:
    # Graphs of one source in one process, which traces it and quantizes its weights once.
    of = lambda m: pytest.mark.xdist_group(f"mutations {m.family} {m.dtype} {m.form} {m.overrides}")
    return [pytest.param(m, id=m.id, marks=[pytest.mark.slow, of(m)]) for m in catalogue]


@pytest.mark.parametrize("mutation", _parameters(CHANGING))
def test_never_silently_wrong(mutation: Mutation, record: Callable[[Mutation, str], None]) -> None:
    traced, found = _mutated(mutation)
    if not mutation.random:
        assert _changes(mutation, traced) > 1e-4, "this mutation changes nothing"
    if not isinstance(found, NoMatch):
        with contextlib.suppress(RewriteError):  # a refusal, which optimize() reports as no match
            _judge(mutation, traced, found)
    record(mutation, outcome(traced, found))


@pytest.mark.parametrize("mutation", _parameters(PRESERVING))
def test_another_spelling_still_matches(mutation: Mutation, record: Callable[[Mutation, str], None]) -> None:
    traced, found = _mutated(mutation)
    wide = mutation.source.dtype != torch.float32
    assert _changes(mutation, traced) <= (1e-9 if wide else 1e-5), "this mutation changes the function"
    assert isinstance(found, FusedMatch), getattr(found, "reason", None) or found.spec.reason
    _judge(mutation, traced, found)
    record(mutation, outcome(traced, found))


def _first_of_each_name() -> list[object]:
    """The first graph of every mutation; those that take long, and all other families, forms and dtypes, are slow."""
    firsts: dict[str, Mutation] = {}
    for m in (*CHANGING, *PRESERVING):
        firsts.setdefault(m.name, m)
    return [pytest.param(m, id=m.id) for m in firsts.values() if m.family == QWEN]


@pytest.mark.parametrize("mutation", _first_of_each_name())
def test_outcomes_are_known_or_right(mutation: Mutation) -> None:
    traced, found = _mutated(mutation)
    if mutation in PRESERVING:
        assert isinstance(found, FusedMatch), getattr(found, "reason", None) or found.spec.reason
    if outcome(traced, found) != _known().get(mutation.id) and not isinstance(found, NoMatch):
        with contextlib.suppress(RewriteError):
            _judge(mutation, traced, found)


@functools.cache
def _known() -> dict[str, str]:
    return known()


@pytest.mark.smoke
def test_every_mutation_is_judged() -> None:
    """Each is run by one of the two tests of the slow tier, and has its outcome on record."""
    judged = [*_parameters(CHANGING), *_parameters(PRESERVING)]
    assert {p.id for p in judged} == {m.id for m in (*CHANGING, *PRESERVING)} == set(_known())
    for make in vars(mutations).values():  # what is written down is registered
        if inspect.isfunction(make) and [*inspect.signature(make).parameters.values()][:1] == ["e"]:
            assert make.__name__ in {m.name for m in (*CHANGING, *PRESERVING)}


def test_the_catalogue_is_large() -> None:
    assert len({m.name for m in CHANGING}) >= 50
    assert len({m.name for m in PRESERVING}) >= 20
    for catalogue in (CHANGING, PRESERVING):
        assert len({m.id for m in catalogue}) == len(catalogue)
