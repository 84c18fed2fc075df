"""Recorded decode steps on two ranks: a stand-in on the CPU calls the step where a graph would be replayed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks_models as models
import torch
from ranks_models import checkpoint
from ranks_pool import Pool

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.runtime.graphs import EagerRecorder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


def compiled_without_inductor(options: dict[str, Any]) -> Any:
    """``layer_backend`` with AOTAutograd alone in Inductor's place: what is compiled runs as it was traced."""
    from torch._dynamo.backends.debugging import aot_eager

    from mxfp4_compile.ranks.recorded import _Backend

    backend = _Backend(options)

    def compile_with(graph: Any, inputs: Any) -> Any:
        plain = lambda module, inputs, config_patches: aot_eager(module, inputs)
        with mock.patch("torch._inductor.compile_fx.compile_fx", plain):
            return backend(graph, inputs)

    return compile_with


class Compiling(EagerRecorder):
    compiles = True


def recorded(rank: int, path: Path, options: dict[str, Any], dtype: torch.dtype, compiles: bool) -> dict[str, Any]:
    """Tokens of the plain loop and of recorded steps; what was recorded; messages where nothing is left to record."""
    from torch._dynamo.utils import counters

    from mxfp4_compile.ranks.recorded import StepRanks

    model = mxfp4_compile.load(path, progress=False, dtype=dtype, **options)
    runtime = runtime_of(model)
    plain = models.answer(model, new=20)
    runtime.recorder = Compiling() if compiles else EagerRecorder()
    counters.clear()
    with mock.patch.object(StepRanks, "layer_backend", lambda self, options: compiled_without_inductor(options)):
        first = [models.answer(model, batch, new=20) for batch in (2, 1)]
    messages: list[str] = []
    with (
        mock.patch.object(torch.distributed, "all_gather", _counted(torch.distributed.all_gather, messages, "small")),
        mock.patch.object(StepRanks, "together", None),
        mock.patch("mxfp4_compile.ranks.agree.Agreement.exchange", None),
    ):
        again = [models.answer(model, batch, new=20) for batch in (2, 1)]
    torch.manual_seed(rank)
    sampled = models.answer(model, new=20, do_sample=True)
    report = model.mxfp4_report.runtime
    return {
        "plain": plain,
        "tokens": [*first, *again],
        "sampled": sampled,
        "captures": [(c.batch, c.made, c.error) for c in report.captures],
        "notes": report.notes,
        "messages": messages,
        "graphs": counters["stats"]["unique_graphs"],
    }


def _counted(function: Any, calls: list[str], name: str) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize(
    ("family", "options", "dtype", "compiles"),
    [
        ("qwen3_moe", {"tp_plan": "auto"}, torch.bfloat16, False),
        ("gpt_oss", {"tp_plan": "auto"}, torch.float32, False),
        ("qwen3_moe", {"tp_plan": "auto", "experts": "tensor"}, torch.float32, True),
    ],
)
def test_recorded_steps_say_what_the_model_says(
    pool: Pool, folder: Path, family: str, options: dict[str, Any], dtype: torch.dtype, compiles: bool
) -> None:
    first, second = pool.run(recorded, checkpoint(folder, family), options, dtype, compiles)
    assert [c[0] for c in first["captures"]] == [2, 1], first["notes"]
    how = "compiled" if compiles else "eager"
    assert {c[1] for c in first["captures"]} == {f"{how} layers, own attention"}, first["notes"]
    assert not [note for note in first["notes"] if "whole logits" in note or "not used" in note]
    if compiles:
        assert first["graphs"] == 2  # one for each size, whatever the number of layers
    if dtype == torch.float32:
        for tokens in first["tokens"]:
            assert torch.equal(tokens, first["plain"][: tokens.shape[0]])
    for ours, theirs in zip(first["tokens"], second["tokens"], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first["sampled"], second["sampled"])  # from other seeds
    assert first["messages"] == ["small"] * 2  # one for each generate, none for a step


# one rank that fails


class Short(EagerRecorder):
    """Says that little memory is free."""

    def free_bytes(self) -> int | None:
        return 1 << 20


class Failing(EagerRecorder):
    """Fails after the warm-up, as a capture does that finds no memory."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def record(self, run: Any, warmups: int) -> Any:
        super().record(run, warmups)
        raise self.error


def failing(rank: int, path: Path) -> list[dict[str, Any]]:
    """What two ranks make of a failure on the second: before, in the midst of and after the warm-up."""
    model = mxfp4_compile.load(path, progress=False, dtype=torch.float32, tp_plan="auto")
    runtime = runtime_of(model)
    plain = models.answer(model)
    outcomes = []

    def fail(*args: Any, **kwargs: Any) -> None:
        if runtime.arena is not None and runtime.steps == {}:
            raise RuntimeError("planted")

    for recorder, where in (
        (Short(), ""),
        (Failing(torch.OutOfMemoryError("no memory")), ""),
        (Failing(RuntimeError("a capture was invalidated")), ""),
        (EagerRecorder(), "in a layer"),
    ):
        runtime.drop()
        runtime.report.notes.clear()
        runtime.recorder = recorder if rank == 1 else EagerRecorder()
        hook = None
        if where and rank == 1:
            hook = mock.patch.object(type(model.model.layers[1].mlp), "forward", fail)
            hook.start()
        started = time.monotonic()
        try:
            runtime.begin()
            step = runtime.step(2, 20)
        finally:
            if hook is not None:
                hook.stop()
        outcomes.append(
            {
                "took": time.monotonic() - started,
                "step": step is not None,
                "notes": list(runtime.report.notes),
                "tokens": torch.equal(models.answer(model), plain),
            }
        )
    return outcomes


def test_what_fails_on_one_rank_is_put_back_on_both(pool: Pool, folder: Path) -> None:
    for ours, theirs in zip(*pool.run(failing, checkpoint(folder, "qwen3_moe")), strict=True):
        assert not ours["step"] and not theirs["step"]
        assert ours["tokens"] and theirs["tokens"]
        assert max(ours["took"], theirs["took"]) < 10
    first, _ = pool.run(failing, checkpoint(folder, "qwen3_moe"))
    memory, capture, invalid, layer = (outcome["notes"] for outcome in first)
    assert any("its cache takes" in note for note in memory)
    assert any("out of memory (rank 1: OutOfMemoryError: no memory)" in note for note in capture)
    assert any("rank 1: RuntimeError: a capture was invalidated" in note for note in invalid)
    assert any("rank 1: RuntimeError: planted" in note for note in layer)


def apart(rank: int, path: Path) -> dict[str, Any]:
    """One rank drops its steps, as after weights that moved: both make them again. And ways to have none."""
    from mxfp4_compile.ranks.recorded import RECORD_RANKS

    model = mxfp4_compile.load(path, progress=False, dtype=torch.float32, tp_plan="auto")
    runtime = runtime_of(model)
    runtime.recorder = EagerRecorder()
    before = models.answer(model)
    if rank == 1:
        runtime.drop()
    again = models.answer(model)
    captured, notes = len(runtime.report.captures), list(runtime.report.notes)
    with mock.patch.dict("os.environ", {RECORD_RANKS: "0"}):
        reason = runtime.begin()
    recorder = EagerRecorder()
    recorder.device = torch.device("cpu")  # as one that really records
    runtime.recorder = recorder
    gloo = runtime.begin()
    model.mxfp4_report.runtime.captures.clear()
    return {"same": torch.equal(before, again), "captured": captured, "notes": notes, "said": [reason, gloo]}


def test_ranks_that_went_apart_begin_again(pool: Pool, folder: Path) -> None:
    for found in pool.run(apart, checkpoint(folder, "qwen3_moe")):
        assert found["same"] and found["captured"] == 1
        assert "the ranks knew other recorded steps: all were dropped" in found["notes"]
        assert found["said"] == [
            "MXFP4_COMPILE_RECORD_RANKS=0, and the model lies on several ranks",
            "the ranks sum by gloo, which cannot be recorded",
        ]


def released(rank: int, path: Path) -> bool:
    """Whether recorded steps, which hold NCCL's communicator, are gone before the process group is."""
    model = mxfp4_compile.load(path, progress=False, dtype=torch.float32, tp_plan="auto")
    runtime_of(model).recorder = EagerRecorder()
    models.answer(model)
    recorded = bool(runtime_of(model).steps)
    with mock.patch.object(torch.distributed.destroy_process_group, "ends") as ends:
        torch.distributed.destroy_process_group()
    return recorded and ends.called and not runtime_of(model).steps


def test_recordings_go_before_their_group(pool: Pool, folder: Path) -> None:
    assert pool.run(released, checkpoint(folder, "qwen3_moe")) == [True, True]
