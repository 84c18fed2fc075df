"""Mutated graphs of real experts: never silently wrong, and what means the same still matches.

Every mutated graph is matched and, if it matches, rewritten on MXFP4 weights; the result is compared with
the eager run of the MUTATED graph on the dequantized weights. No match, a refusal, a split, or a fused op
that computes the mutated function are all fine for a mutation that changes the meaning.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from mutations import (
    CALLS,
    CHANGING,
    PRESERVING,
    Mutation,
    call_inputs,
    distance,
    execute,
    overall,
    quantized,
    run_rewritten,
    with_bias,
)

from mxfp4_compile.passes.build.rewrite import RewriteError
from mxfp4_compile.passes.match.match import FusedMatch, NoMatch, SplitMatch, match

# fp32: both sides sum the same products in another order.
FP32 = 1e-5
# bf16: the rewritten graph's distance from an fp64 run over the mutated graph's own, as in passes.verify.
RATIO, SLACK = 1.5, 4e-3
# bf16 graphs where the mutation is a rounding that the fp64 run does not do are compared with their own run.
OWN = 2e-2


def _changes(mutation: Mutation, captured: object) -> float:
    """How far the mutated graph's function is from the captured one's, at its farthest."""
    src = mutation.source
    worst = 0.0
    for seed, call in enumerate((*CALLS, *mutation.calls)):
        inputs, state = call_inputs(src, call, seed), with_bias(src.state, call.bias)
        wide = src.dtype != torch.float32 and not mutation.narrows
        before = execute(src.captured, state, inputs, wide)
        worst = max(worst, distance(execute(captured, state, inputs, wide), before))
    return worst


def _judge(mutation: Mutation, captured: object, found: FusedMatch | SplitMatch) -> None:
    src = mutation.source
    if mutation.random:
        assert isinstance(found, SplitMatch), "random numbers were fused away"
        return
    state, weights, biases = quantized(src, found)
    for backend in ("reference", "cpu"):
        run = run_rewritten(captured, found, backend, state, weights, biases)
        for seed, call in enumerate((*CALLS, *mutation.calls)):
            inputs, given = call_inputs(src, call, seed), with_bias(state, call.bias)
            ours, eager = run(inputs, call.bias), execute(captured, given, inputs)
            where = f"{backend}, {call}: {getattr(found.spec, 'reason', found.spec)}"
            if src.dtype == torch.float32:
                assert distance(ours, eager) <= FP32, where
            elif mutation.narrows:
                assert overall(ours, eager) <= OWN, where
            else:
                exact = execute(captured, given, inputs, wide=True)
                assert overall(ours, exact) <= RATIO * overall(eager, exact) + SLACK, where


@functools.cache
def _mutated(mutation: Mutation) -> tuple[object, FusedMatch | SplitMatch | NoMatch]:
    captured = mutation.mutate()
    return captured, match(captured)


def _parameters(catalogue: list[Mutation]) -> list[object]:
    """The first graph of every mutation in the fast tier, its other families, forms and dtypes in the slow one."""
    names, out = set(), []
    for m in catalogue:
        out.append(pytest.param(m, id=m.id, marks=[pytest.mark.slow] if m.name in names else []))
        names.add(m.name)
    return out


@pytest.mark.parametrize("mutation", _parameters(CHANGING))
def test_never_silently_wrong(mutation: Mutation) -> None:
    captured, found = _mutated(mutation)
    if not mutation.random:
        assert _changes(mutation, captured) > 1e-4, "this mutation changes nothing"
    if isinstance(found, NoMatch):
        return
    with contextlib.suppress(RewriteError):  # a refusal, which optimize() reports as no match
        _judge(mutation, captured, found)


@pytest.mark.parametrize("mutation", _parameters(PRESERVING))
def test_another_spelling_still_matches(mutation: Mutation) -> None:
    captured, found = _mutated(mutation)
    wide = mutation.source.dtype != torch.float32
    assert _changes(mutation, captured) <= (1e-9 if wide else 1e-5), "this mutation changes the function"
    assert isinstance(found, FusedMatch), getattr(found, "reason", None) or found.spec.reason
    _judge(mutation, captured, found)


def test_the_catalogue_is_large() -> None:
    assert len({m.name for m in CHANGING}) >= 50
    assert len({m.name for m in PRESERVING}) >= 20
    for catalogue in (CHANGING, PRESERVING):
        assert len({m.id for m in catalogue}) == len(catalogue)
