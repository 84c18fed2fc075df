"""Greedy decoding and sampling over static caches: the same tokens as transformers' own loop on the same model."""

from __future__ import annotations

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


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.smoke), 8])
def test_greedy_200_tokens(trained: nn.Module, batch: int) -> None:
    expected, got, recorder = both(trained, prompts(batch), max_new_tokens=200)
    assert torch.equal(got, expected)
    assert got.shape[1] == 224
    assert recorder.recorded == 1
    assert recorder.replayed == 1 + 199  # the check against eager, and every token but the one of the prefill


OPTIONS: dict[str, dict[str, Any]] = {
    "sample": {"do_sample": True, "top_k": 20},
    "sample, end": {"do_sample": True, "temperature": 1.5, "eos_token_id": [10, 46, 32]},
    "greedy, end": {"eos_token_id": 32},
    "greedy, processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 10},
    "beam": {"num_beams": 3},
    "beam, sample, several": {"num_beams": 4, "do_sample": True, "num_return_sequences": 2, "eos_token_id": 10},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "one token": {"max_new_tokens": 1},
    "time": {"max_time": 3600.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(trained: nn.Module, options: dict[str, Any]) -> None:
    expected, got, recorder = both(trained, prompts(3), **options)
    assert torch.equal(got, expected)
    assert recorder.replayed > 1 or "max_new_tokens" in options


def test_everything_finished_early_and_the_random_state_is_as_if_nothing_more_was_drawn(trained: nn.Module) -> None:
    expected, got, _ = both(trained, prompts(2), do_sample=True, eos_token_id=list(range(0, 256, 2)))
    assert torch.equal(got, expected)
    assert got.shape[1] < 24 + 16


@pytest.mark.parametrize("options", [{}, {"eos_token_id": 32}, {"do_sample": True, "eos_token_id": 32}])
def test_streamer(trained: nn.Module, options: dict[str, Any]) -> None:
    seen = []
    for use in (False, True):
        streamer = Streamer()
        recorded(trained) if use else plain(trained)
        torch.manual_seed(0)
        trained.generate(
            **prompts(1), max_new_tokens=30, pad_token_id=0, streamer=streamer, **({"do_sample": False} | options)
        )
        assert streamer.ended == 1
        seen.append(streamer.got)
    assert seen[0] == seen[1]


def test_a_shorter_generation_after_a_longer_one_sees_nothing_of_it(trained: nn.Module) -> None:
    recorded(trained)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    short = prompts(2, 12)
    first = trained.generate(**short, **options)
    trained.generate(**prompts(2, 100, seed=4), **(options | {"max_new_tokens": 60}))
    assert torch.equal(trained.generate(**short, **options), first)


def test_padded_rows_choose_the_experts_of_row_0(trained: nn.Module) -> None:
    recorded(trained)
    seen: list[torch.Tensor] = []
    site = trained.model.layers[2].mlp.experts
    original = site.rewritten.forward
    site.rewritten.forward = lambda *args: seen.append(args[1]) or original(*args)
    try:
        trained.generate(**prompts(3), max_new_tokens=20, do_sample=True, pad_token_id=0)
    finally:
        del site.rewritten.forward
    decode = [ids for ids in seen if ids.shape[0] == 4][-10:]
    assert len(decode) == 10
    for ids in decode:
        assert torch.equal(ids[3], ids[0])
