"""Decoder layers are compiled once for all that are alike."""

from __future__ import annotations

import pytest
import torch
from recording import (
    counting_backend,
    recorded,
    windowed,
)

from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.runtime.layers import decoder_layers


@pytest.mark.slow
def test_equal_layers_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation per structure of layer, none later."""
    graphs = counting_backend(monkeypatch)
    model = windowed()
    ids = torch.randint(3, 100, (2, 7))
    options = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = model.generate(ids, **options)
    recorded(model, compiles=True)
    assert len(decoder_layers(model)) == 6
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(graphs) == 2 + 1  # of the step, whose caches differ; of prompts, whose masks are arguments
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(graphs) == 3
    runtime = runtime_of(model)
    for length in (600, 1100, 4000):
        runtime.step(2, length)
    assert len(runtime.report.captures) == 4, str(runtime.report)
    assert len(graphs) == 3, "a longer cache was compiled for again"
    assert "compiled layers" in runtime_of(model).report.captures[0].made


@pytest.mark.parametrize("asked", ["output_hidden_states", pytest.param("output_attentions", marks=pytest.mark.slow)])
def test_outputs_that_were_asked_for_once_do_not_keep_layers_from_being_compiled(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' hooks stay on the modules, and go on recording."""
    counting_backend(monkeypatch)
    model = windowed(2)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 100, (2, 7))
    with torch.no_grad():
        before = model(ids, **{asked: True})
    assert any(m._forward_hooks for m in model.modules())
    recorded(model, compiles=True)
    runtime_of(model).record_prompts = False
    model.generate(ids, max_new_tokens=3, pad_token_id=0, eos_token_id=None, do_sample=False)
    report = runtime_of(model).report
    assert [c.made for c in report.captures] == ["compiled layers, own attention"], str(report)
    assert [p.prompts for p in report.prefills] == ["prompts, several rows"], str(report)
    with torch.no_grad():
        after = model(ids, **{asked: True})
    name = asked.removeprefix("output_")
    for a, b in zip(before[name], after[name], strict=True):
        assert torch.equal(a, b)
