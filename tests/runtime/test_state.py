"""What is recorded, when, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recording import (
    both,
    plain,
    prompts,
    recorded,
)
from torch import nn

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of, state
from mxfp4_compile.runtime.caches.step_cache import StepCache
from mxfp4_compile.tools.families import tiny_model


def test_captured_once_for_all_lengths_and_batches_of_a_size(trained: nn.Module) -> None:
    recorder = recorded(trained)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    for batch, length in ((3, 24), (3, 24), (4, 40), (3, 9), (4, 60)):
        trained.generate(**prompts(batch, length), **options)
    assert recorder.recorded == 1
    trained.generate(**prompts(5), **options)
    assert recorder.recorded == 2
    trained.generate(**prompts(3, 520), **options)
    assert recorder.recorded == 3  # a longer cache
    trained.generate(**prompts(3, 24), **options)
    assert recorder.recorded == 3
    sizes = [(c.batch, c.length) for c in trained.mxfp4_report.runtime.captures]
    assert sizes == [(4, 512), (8, 512), (4, 1024)]
    assert "decode step: batch 4, 512 tokens" in str(trained.mxfp4_report)


def test_batches_above_the_largest_size_run_without() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False, max_capture_size=2)
    inputs = {"input_ids": torch.randint(3, 60, (3, 5))}
    expected, got, recorder = both(model, inputs, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(got, expected)
    assert recorder.recorded == 0
    assert "max_capture_size=2" in str(model.mxfp4_report)


def test_a_cache_that_does_not_fit_is_reported_and_not_attempted() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    recorder = recorded(model, free=(1 << 30) + 1000)
    out = model.generate(torch.randint(3, 60, (2, 5)), max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 9)
    assert recorder.recorded == 0
    assert "not captured, its cache takes" in str(model.mxfp4_report)


def test_a_step_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    masks = StepCache.masks

    def wrong(self: StepCache, kinds: Any) -> dict[str, torch.Tensor]:
        out = masks(self, kinds)
        out["full_attention"] = out["full_attention"].clone()
        out["full_attention"][..., 2:9] = False
        return out

    monkeypatch.setattr(StepCache, "masks", wrong)
    expected, got, _ = both(model, {"input_ids": torch.randint(3, 60, (2, 5))}, eos_token_id=None)
    assert torch.equal(got, expected)
    assert not runtime_of(model).report.captures
    assert "not used, a prompt: output of layer" in str(model.mxfp4_report)


def test_weights_that_moved_are_noticed() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    recorder = recorded(model)
    ids = torch.randint(3, 60, (2, 5))
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    model.generate(ids, **options)
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight, requires_grad=False)
    got = model.generate(ids, **options)
    assert recorder.recorded == 2
    plain(model)
    assert torch.equal(got, model.generate(ids, **options))


def test_a_recorder_stays_on_its_device() -> None:
    """A model that moved away from a GPU must not be recorded with its CUDA graphs, which would be empty."""
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    recorder = recorded(model)
    recorder.device = torch.device("cpu")
    ids = torch.randint(3, 60, (2, 5))
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = model.generate(ids, **options)
    assert recorder.recorded == 1 and runtime_of(model).report.captures
    recorder.device = torch.device("cuda", 0)  # where the model was, had it come from there
    assert torch.equal(model.generate(ids, **options), expected)
    assert recorder.recorded == 1 and not runtime_of(model).report.captures
    assert any("moved" in note for note in runtime_of(model).report.notes)


def test_ways_of_making_products(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change where it is for, first; every step can be made without."""
    recorded(trained, compiles=True)
    runtime = runtime_of(trained)
    for rows, biased, siblings, few, expected in (
        (1, True, True, True, ("share", "reduce_biased")), (1, False, True, False, ("share",)),
        (1, True, False, False, ("reduce_biased",)), (8, True, True, True, ("share", "few_rows")),
        (8, True, False, False, ()), (72, True, True, True, ("share",)),
    ):  # fmt: skip
        monkeypatch.setattr(state, "have_biases", lambda layers, biased=biased: biased)
        monkeypatch.setattr(runtime, "siblings", [object()] if siblings else [])
        monkeypatch.setattr(runtime, "linear_rows", few)
        ways = runtime._ways(rows)
        assert ways[0].changes == expected
        assert not any(way.changes for way in ways[bool(expected) :])
        assert [w.layers for w in ways[bool(expected) :][:3]] == ["compiled", "compiled for this length:", "eager"]
    plain(trained)
