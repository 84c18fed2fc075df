"""Static caches: what goes in comes out, before and past a window."""

from __future__ import annotations

import copy

import pytest
import torch
from recording import (
    both,
)

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.runtime.caches.base import CACHE, Arena
from mxfp4_compile.runtime.caches.handover import HandoverCache
from mxfp4_compile.runtime.caches.kinds import forms_of
from mxfp4_compile.runtime.caches.step_cache import StepCache
from mxfp4_compile.tools.families import tiny_model


@pytest.mark.parametrize("window", [2, 5, pytest.param(700, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prompt", [1, pytest.param(5, marks=pytest.mark.slow), 13])
def test_windows(window: int, prompt: int) -> None:
    """gpt-oss before, at and past its window; 700 is longer than the cache."""
    model = tiny_model("gpt_oss")
    model.config.sliding_window = window
    for layer in model.model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = window
    mxfp4_compile.optimize(model, verify=False)
    ids = torch.randint(3, 100, (2, prompt), generator=torch.Generator().manual_seed(prompt))
    expected, got, recorder = both(model, {"input_ids": ids}, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(got, expected)
    assert recorder.replayed == 20
    assert runtime_of(model).report.captures[0].error < 1e-5


def test_cache_goes_in_and_comes_out() -> None:
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        cache = getattr(model(torch.randint(3, 100, (3, 21)), use_cache=True), CACHE)
    before = copy.deepcopy(cache)
    static = StepCache(forms_of(cache, model.config), 4, 512, torch.device("cpu"), Arena())
    handover = HandoverCache(cache)
    handover.lend(static, None, 3)
    assert handover.get_seq_length() == 21
    for view in static.views:
        assert torch.equal(view.keys[3], view.keys[0])
    static.reorder(torch.tensor([2, 0, 0]))
    back = handover.plain()
    assert back.get_seq_length() == 21
    for layer, old in zip(back.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys[[2, 0, 0]])
        assert torch.equal(layer.values, old.values[[2, 0, 0]])
