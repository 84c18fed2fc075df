"""Compiled layers for prompts, and recorded prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recording import (
    CountingRecorder,
    compile_with,
    counting_backend,
    recorded,
    windowed,
)

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of, state
from mxfp4_compile.runtime.caches.base import CACHE
from mxfp4_compile.tools.families import tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("largest", [512, 8], ids=["recorded", "compiled"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_prompts_of_all_lengths_share_a_compilation(family: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = counting_backend(monkeypatch)
    model = windowed() if family == "gpt_oss" else mxfp4_compile.optimize(tiny_model(family, layers=3), verify=False)
    runtime_of(model).max_capture_size = largest
    options = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    generator = torch.Generator().manual_seed(5)
    inputs = []
    for rows, length, padded in (
        (1, 7, False), (1, 2, False), (1, 200, False), (1, 1, False), (3, 9, False), (2, 33, False), (5, 5, False),
        (3, 9, True), (2, 40, True),
    ):  # fmt: skip
        mask = torch.ones(rows, length, dtype=torch.int64)
        if padded:
            mask[0, :2] = 0
        inputs.append({"input_ids": torch.randint(3, 60, (rows, length), generator=generator), "attention_mask": mask})
    expected = [model.generate(**i, **options) for i in inputs]
    recorded(model, compiles=True)
    for i, want in zip(inputs, expected, strict=True):
        assert torch.equal(model.generate(**i, **options), want)
    report = runtime_of(model).report
    kinds = {"prompts, one row", "prompts, several rows", "prompts, several rows, padded"}
    assert {p.prompts for p in report.prefills if not p.replay} == kinds
    sizes = {(1, 16), (1, 256), (4, 16), (2, 64), (8, 16)} if largest == 512 else set()
    assert {p.prompts for p in report.prefills if p.replay} == {f"prompts, batch {b}, {n} tokens" for b, n in sizes}
    assert max(p.error for p in report.prefills) < 1e-5
    of_prompts = [g for g in graphs if any(n.op == "output" and len(n.args[0]) >= 3 for n in g.graph.nodes)]
    assert len(of_prompts) == 3, [len(graphs), str(report)]
    before = len(graphs), len(report.prefills)
    for i, want in zip(inputs, expected, strict=True):
        assert torch.equal(model.generate(**i, **options), want)
    assert (len(graphs), len(report.prefills)) == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_do_not_compile_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = windowed(2)
    ids = torch.randint(3, 100, (1, 12))
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = model.generate(ids, **options)

    def fails(graph: Any, inputs: Any) -> Any:
        raise ValueError("no such compiler")

    compile_with(monkeypatch, fails)
    recorded(model, compiles=True)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options), expected)
    report = runtime_of(model).report
    assert not report.prefills
    assert sum("prompts, one row: layers are not compiled" in note for note in report.notes) == 1, str(report)


def test_compiled_layers_that_disagree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            return [o * 1.05 if o.is_floating_point() else o for o in graph.forward(*args)]

        return run

    model = windowed(2)
    ids = torch.randint(3, 100, (1, 12))
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = model.generate(ids, **options)
    compile_with(monkeypatch, wrong)
    recorded(model, compiles=True)
    assert torch.equal(model.generate(ids, **options), expected)
    report = runtime_of(model).report
    assert not report.prefills
    assert any("not compiled (they differ from the eager ones by 0.0" in note for note in report.notes), str(report)


def test_a_prompt_whose_compilation_fails_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run by the layers as they are, cache included, and none is tried after it."""
    counting_backend(monkeypatch)
    model = windowed(4)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    ids = torch.randint(3, 100, (1, 12))
    expected = model.generate(ids, **options)
    recorded(model, compiles=True)
    runtime = runtime_of(model)
    runtime.max_capture_size = 4  # no prompt is recorded
    model.generate(ids, **options)
    (made,) = runtime.prefills.values()
    calls, run = [], made._run

    def breaks(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("recompile limit")
        return run(*args)

    made._run = breaks
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options), expected)
    assert len(calls) == 3
    assert any("not compiled (RuntimeError: recompile limit)" in n for n in runtime.report.notes)


@pytest.mark.slow
def test_prompts_through_inductor() -> None:
    model = windowed(2)
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    inputs = [torch.randint(3, 100, (1, n)) for n in (5, 150)]
    expected = [model.generate(i, **options) for i in inputs]
    recorded(model, compiles=True)
    for i, want in zip(inputs, expected, strict=True):
        assert torch.equal(model.generate(i, **options), want)
    made = runtime_of(model).report.prefills
    assert [p.prompts for p in made] == [
        "prompts, one row", "prompts, batch 1, 16 tokens", "prompts, batch 1, 256 tokens"
    ]  # fmt: skip
    assert max(p.error for p in made) < 1e-5


def test_a_recorded_prompt_leaves_out_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds the prompt's tokens alone, past the window too, and belongs to the caller."""
    counting_backend(monkeypatch)
    model = windowed(2)
    ids = torch.randint(3, 100, (3, model.config.sliding_window + 7))
    options = {"max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = getattr(model.generate(ids, **options, return_dict_in_generate=True), CACHE)
    recorded(model, compiles=True)
    got = getattr(model.generate(ids, **options, return_dict_in_generate=True), CACHE)
    kept = [layer.keys.clone() for layer in got.layers]
    model.generate(ids.flip(1), **options)
    assert any(p.replay for p in runtime_of(model).report.prefills)
    for ours, theirs, before in zip(got.layers, expected.layers, kept, strict=True):
        assert torch.equal(ours.keys, before)
        assert ours.keys.shape == theirs.keys.shape
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
        assert torch.allclose(ours.values, theirs.values, atol=1e-5)


def test_probes_ask_for_the_last_logits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of 512 rows and a large vocabulary would be gigabytes."""
    counting_backend(monkeypatch)
    model = windowed(2)
    made: list[torch.Size] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: made.append(out.shape))
    runtime = runtime_of(model)
    recorded(model, compiles=True)
    assert runtime.step(4, 30) is not None
    assert runtime.prefill(4, None) is not None
    hook.remove()
    assert made
    assert {shape[1] for shape in made} == {1}


class _Recorded:
    """What stands in for a recording: nothing is compiled or run."""

    error, seconds, bytes = 0.0, 0.0, 0

    def __init__(self, model: Any, rows: int, length: int, recorder: Any, prefill: Any) -> None:
        self.size = rows, length


@pytest.fixture(scope="module")
def runtime() -> Any:
    """Of a model whose prompts are recorded as ``_Recorded`` has it."""
    return runtime_of(mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=2), verify=False))


@pytest.fixture
def stubbed(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(state, "RecordedPrompt", _Recorded)
    monkeypatch.setattr(runtime, "prefill", lambda batch, mask: SimpleNamespace(keys_alone=True))
    monkeypatch.setattr(runtime, "recorder", CountingRecorder(compiles=True))
    monkeypatch.setattr(runtime, "record_prompts", None)
    runtime.drop()
    runtime.report.notes.clear()
    return runtime


def test_a_prompt_is_recorded_the_second_time_that_one_of_its_size_comes(stubbed: Any) -> None:
    assert stubbed.recorded_prompt(1, 9) is None
    assert stubbed.recorded_prompt(1, 40) is None  # of another size
    made = stubbed.recorded_prompt(1, 16)
    assert made.size == (1, 16)
    assert stubbed.recorded_prompt(1, 2) is made
    assert stubbed.recorded_prompt(1, 33).size == (1, 64)
    assert stubbed.recorded_prompt(3, 100, ahead=True).size == (4, 128)
    assert [stubbed.recorded_prompt(1, n) for n in (1, 1, 513, 513)] == [None] * 4  # a step, and too long
    assert not stubbed.report.notes


@pytest.mark.slow
def test_generate_records_a_prompt_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counting_backend(monkeypatch)
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=2), verify=False)
    options = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    ids = torch.randint(3, 60, (1, 14))
    expected = [model.generate(ids[:, :n], **options) for n in (9, 14)]
    recorded(model, compiles=True)
    runtime_of(model).record_prompts = None
    for count in (0, 1, 1):
        for n, want in zip((9, 14), expected, strict=True) if count else [(9, expected[0])]:
            assert torch.equal(model.generate(ids[:, :n], **options), want)
        assert sum(bool(p.replay) for p in runtime_of(model).report.prefills) == count


def test_prompts_are_recorded_at_once_or_never_as_is_asked_for(stubbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, wanted in (("1", True), ("0", False), ("", None)):
        monkeypatch.setenv(state.RECORD_PROMPTS, value)
        stubbed.record_prompts = state.Runtime(stubbed.model, 512, stubbed.report).record_prompts
        assert stubbed.record_prompts is wanted
        stubbed.drop()
        assert [stubbed.recorded_prompt(1, 9) is not None for _ in range(2)] == [wanted is True, wanted is not False]
        stubbed.drop()
        assert (stubbed.recorded_prompt(1, 9, ahead=True) is not None) == (wanted is not False)


def test_a_prompt_for_which_memory_is_short_is_not_recorded_and_said(stubbed: Any) -> None:
    need = stubbed._prompt_bytes(1, 16)
    assert need > 0
    stubbed.recorder.free = (1 << 30) + need - 1
    assert [stubbed.recorded_prompt(1, 9) for _ in range(3)] == [None] * 3
    assert [n.split(", about")[0] for n in stubbed.report.notes] == ["prompts, batch 1, 16 tokens: not recorded"]
    stubbed.drop()
    stubbed.recorder.free += 1
    assert stubbed.recorded_prompt(1, 9, ahead=True).size == (1, 16)


def test_prompts_that_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of the user's, embeddings, a single token, more tokens than max_capture_size: as without recordings."""
    counting_backend(monkeypatch)
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=2), verify=False)
    options = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    ids = torch.randint(3, 60, (1, 9))
    inputs: list[dict[str, Any]] = [
        {"input_ids": ids, "position_ids": torch.arange(9)[None] + 5},
        {"inputs_embeds": model.get_input_embeddings()(ids).detach()},
        {"input_ids": ids[:, :1]},
        {"input_ids": torch.randint(3, 60, (1, 530))},
    ]
    expected = [model.generate(**i, **options) for i in inputs]
    recorded(model, compiles=True)
    for i, want in zip(inputs, expected, strict=True):
        assert torch.equal(model.generate(**i, **options), want)
    assert not any(p.replay for p in runtime_of(model).report.prefills), str(runtime_of(model).report)
