"""Calls of ``generate``: which of them use recorded steps, and that all of them give what transformers gives."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from recording import (
    Streamer,
    both,
    plain,
    prompts,
    recorded,
)
from torch import nn
from transformers import DynamicCache, GenerationConfig

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.runtime.caches.base import CACHE
from mxfp4_compile.runtime.step import DecodeStep
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, TEXT_FILE
from mxfp4_compile.tools.families import tiny_model


def test_a_cache_by_an_unknown_name_is_told(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 renamed it: recorded steps may go unused, but not without a word."""
    monkeypatch.setattr("mxfp4_compile.runtime.session.CACHE", "elsewhere")
    want, got, _ = both(trained, prompts(2))
    assert torch.equal(got, want)
    assert not trained.mxfp4_report.runtime.captures
    assert any(f"'{CACHE}', which is not known here" in note for note in trained.mxfp4_report.runtime.notes)


@pytest.mark.slow
def test_continuous_batching_of_transformers(trained: nn.Module) -> None:
    """``generate_batch`` has a paged cache and graphs of its own: it runs on the rewritten experts as they are."""
    plain(trained)
    text = (MODEL_DIRECTORY / TEXT_FILE).read_bytes()
    prompts = [list(text[i : i + n]) for i, n in ((0, 24), (700, 3), (2000, 11))]
    options = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers = trained.generate_batch(inputs=prompts, generation_config=options)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        expected = trained.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :]
        assert answer.generated_tokens == expected.tolist()


def test_returned_scores_and_cache(trained: nn.Module) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 12}
    expected, got, recorder = both(trained, prompts(3), **options)
    assert recorder.replayed > 10
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert type(getattr(got, CACHE)) is DynamicCache
    before = [layer.keys.clone() for layer in getattr(got, CACHE).layers]
    for layer, other in zip(getattr(got, CACHE).layers, getattr(expected, CACHE).layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)
    trained.generate(**prompts(3, seed=1), max_new_tokens=12, do_sample=False, pad_token_id=0)
    for layer, kept in zip(getattr(got, CACHE).layers, before, strict=True):
        assert torch.equal(layer.keys, kept), "a later generation wrote to a cache that was handed out"


def test_hidden_states_need_the_whole_forward(trained: nn.Module) -> None:
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "max_new_tokens": 5}
    expected, got, recorder = both(trained, prompts(2), **options)
    assert len(got.hidden_states) == len(expected.hidden_states) == 5
    torch.testing.assert_close(got.hidden_states[4][-1], expected.hidden_states[4][-1], rtol=1e-4, atol=1e-4)
    assert recorder.replayed == 1
    assert any("output_hidden_states" in note for note in runtime_of(trained).report.notes)


def test_custom_stopping_criteria_see_every_step_once(trained: nn.Module) -> None:
    counts = []

    class Stop:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.calls += 1
            return torch.full((ids.shape[0],), ids.shape[1] >= 31)

    out = []
    for use in (False, True):
        recorded(trained) if use else plain(trained)
        stop = Stop()
        out.append(
            trained.generate(**prompts(2), max_new_tokens=30, do_sample=False, pad_token_id=0, stopping_criteria=[stop])
        )
        counts.append(stop.calls)
    assert torch.equal(*out)
    assert counts[0] == counts[1] == 7


def test_inputs_embeds_and_prefill_chunks(trained: nn.Module) -> None:
    inputs = prompts(2, mixed=False)
    embeds = trained.get_input_embeddings()(inputs["input_ids"])
    expected, got, recorder = both(trained, {"inputs_embeds": embeds}, max_new_tokens=20)
    assert torch.equal(got, expected)
    assert recorder.replayed > 10
    expected, got, recorder = both(trained, prompts(2), prefill_chunk_size=7)
    assert torch.equal(got, expected)
    assert recorder.replayed > 10


def notes(model: nn.Module) -> str:
    return "\n".join(runtime_of(model).report.notes)


def test_assisted_decoding_and_autocast_are_left_alone(trained: nn.Module) -> None:
    expected, got, recorder = both(trained, prompts(1), prompt_lookup_num_tokens=3, max_new_tokens=8)
    assert torch.equal(got, expected)
    assert recorder.recorded == 0
    assert notes(trained).count("generate runs without graphs: assisted decoding") == 1
    recorder = recorded(trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = trained.generate(**prompts(2), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == prompts(2)["input_ids"].shape[1] + 5
    assert recorder.recorded == 0
    assert "autocast is on" in notes(trained)


def test_an_assistant_is_said() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    ids = torch.randint(3, 60, (1, 5))
    inputs = {"input_ids": ids, "assistant_model": tiny_model("qwen3_moe", layers=1)}
    expected, got, recorder = both(model, inputs, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(got, expected)
    assert recorder.recorded == 0
    assert "assisted decoding" in notes(model)


def test_early_exit_is_said() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=2), verify=False)
    inputs = {"input_ids": torch.randint(3, 60, (1, 5)), "assistant_early_exit": 1}
    for _ in range(2):
        expected, got, recorder = both(model, inputs, max_new_tokens=6, eos_token_id=None)
        assert torch.equal(got, expected)
        assert recorder.recorded == 0
    assert notes(model).count("assisted decoding") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "its cache is a StaticCache"),
        ({"disable_compile": True}, "disable_compile"),
    ],
)
def test_what_the_user_decides_is_left_to_transformers_and_said(
    trained: nn.Module, options: dict[str, Any], said: str
) -> None:
    for _ in range(2):
        expected, got, recorder = both(trained, prompts(2, mixed=False), max_new_tokens=5, **options)
        assert torch.equal(got, expected)
        assert recorder.replayed == 0
        assert notes(trained).splitlines() == [f"generate runs without graphs: {said}"]


def test_inference_mode_and_back() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    recorder = recorded(model)
    ids = torch.randint(3, 60, (3, 5))
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    with torch.inference_mode():
        first = model.generate(ids, **options)
        beams = model.generate(ids, **options, num_beams=2)
    assert torch.equal(model.generate(ids, **options), first)
    assert torch.equal(model.generate(ids, **options, num_beams=2), beams)
    assert recorder.recorded == 2


def test_another_thread_gets_the_ordinary_loop() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    recorder = recorded(model)
    ids = torch.randint(3, 60, (2, 5))
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = model.generate(ids, **options)
    count = recorder.replayed
    other: list[torch.Tensor] = []

    class Meanwhile(Streamer):
        def put(self, value: torch.Tensor) -> None:
            if not other:
                thread = threading.Thread(target=lambda: other.append(model.generate(ids, **options)))
                thread.start()
                thread.join()

    got = model.generate(ids[:1], **options, streamer=Meanwhile())
    assert torch.equal(got, expected[:1])
    assert torch.equal(other[0], expected)
    assert recorder.replayed == count + 1 + 7  # the other thread replayed nothing
    assert "while another one of this model ran had no graphs" in notes(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_thread_runs_as_before_while_a_step_is_recorded(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model's own attention and masks, of which both are exchanged for the recording thread."""
    model = tiny_model("mixtral")
    model.set_attn_implementation(implementation)
    mxfp4_compile.optimize(model, verify=False)
    inputs = {"input_ids": torch.randint(3, 60, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    inputs["attention_mask"][0, :3] = 0
    options = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    plain(model)
    with torch.no_grad():
        expected = model(**inputs).logits, model.generate(**inputs, **options)
    seen: list[Any] = []
    run = DecodeStep._run

    def other() -> None:
        with torch.no_grad():
            seen.append((model(**inputs).logits, model.generate(**inputs, **options)))

    def run_beside(self: DecodeStep) -> None:
        if not seen:
            assert model.config._attn_implementation == "mxfp4_decode"
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        run(self)

    monkeypatch.setattr(DecodeStep, "_run", run_beside)
    recorder = recorded(model)
    assert torch.equal(model.generate(**inputs, **options), expected[1])
    assert recorder.replayed == 5
    ((logits, tokens),) = seen
    assert torch.equal(logits, expected[0])
    assert torch.equal(tokens, expected[1])
