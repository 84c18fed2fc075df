"""A cache that the caller hands in, for the next turn of a chat or a shared prefix: filled as transformers fills it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from recording import plain, recorded
from torch import nn
from transformers import DynamicCache

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.runtime.caches.base import CACHE
from mxfp4_compile.tools.families import tiny_model

OPTIONS = {"pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {}


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "qwen3_next", "mistral_large4"])
def model(request: pytest.FixtureRequest, models: dict[str, nn.Module]) -> nn.Module:
    """Full attention, a window, states, an indexer."""
    family = request.param
    if family not in models:
        more = {"index_n_heads": 16, "seed": 2} if family == "mistral_large4" else {}
        models[family] = mxfp4_compile.optimize(tiny_model(family, **more), verify=False)
    return models[family]


def tokens(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def contents(cache: DynamicCache) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        found += [t for n in ("keys", "values", "indexer_keys") if (t := getattr(layer, n, None)) is not None]
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            found += [t for t in states.values() if t is not None]
    return found


def chat(model: nn.Module, turns: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, DynamicCache]:
    """Turn after turn with one cache."""
    cache = DynamicCache(config=model.config)
    said = turns[0][:, :0]
    for turn in turns:
        said = torch.cat([said, turn], dim=1)
        said = model.generate(said, **{CACHE: cache}, **(OPTIONS | options))
    return said, cache


def test_a_chat(model: nn.Module) -> None:
    """Stopped by a length, then by an end token that comes before it."""
    turns = [tokens(2, 9), tokens(2, 4, seed=5)]
    plain(model)
    free, _ = chat(model, turns, max_new_tokens=8, eos_token_id=None)
    for end in (None, int(free[0, 9 + 3])):
        row = [t[:1] for t in turns] if end is not None else turns
        plain(model)
        expected, theirs = chat(model, row, max_new_tokens=8, eos_token_id=end)
        recorder = recorded(model)
        got, ours = chat(model, row, max_new_tokens=8, eos_token_id=end)
        assert torch.equal(got, expected)
        assert recorder.replayed > expected.shape[1] - 9 - 4 - 2
        assert ours.get_seq_length() == theirs.get_seq_length() == got.shape[1] - 1
        for a, b in zip(contents(ours), contents(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert not runtime_of(model).report.notes


def test_a_cache_is_returned_as_handed_in(model: nn.Module) -> None:
    recorded(model)
    cache = DynamicCache(config=model.config)
    out = model.generate(
        tokens(2, 9), **{CACHE: cache}, **OPTIONS, eos_token_id=None, max_new_tokens=4, return_dict_in_generate=True
    )
    assert getattr(out, CACHE) is cache
    assert type(cache) is DynamicCache
    assert cache.get_seq_length() == 12


def test_a_streamer_that_fails_leaves_the_cache_whole(model: nn.Module) -> None:
    class Fails:
        count = 0

        def put(self, value: torch.Tensor) -> None:
            self.count += 1
            if self.count == 4:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    recorded(model)
    cache = DynamicCache(config=model.config)
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens(1, 9), **{CACHE: cache}, **OPTIONS, eos_token_id=None, max_new_tokens=8, streamer=Fails())
    assert cache.get_seq_length() > 9
    assert all(torch.isfinite(t).all() and t.numel() for t in contents(cache))


def test_a_shared_prefix(model: nn.Module) -> None:
    """One filled cache, copied for each continuation, with rows of different prompts."""
    prefix, ends = tokens(2, 7), [tokens(2, 3, seed=8), tokens(2, 5, seed=9)]
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prefix, **{CACHE: filled}, use_cache=True)
    out = []
    for use in (False, True):
        recorder = recorded(model) if use else plain(model)
        for end in ends:
            ids = torch.cat([prefix, end], dim=1)
            cache = copy.deepcopy(filled)
            out.append(model.generate(ids, **{CACHE: cache}, **OPTIONS, eos_token_id=None, max_new_tokens=6))
    assert torch.equal(out[0], out[2]) and torch.equal(out[1], out[3])
    assert recorder.replayed == 1 + 5 + 5


@pytest.fixture(scope="module")
def qwen3(models: dict[str, nn.Module]) -> nn.Module:
    if "qwen3_moe" not in models:
        models["qwen3_moe"] = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    return models["qwen3_moe"]


def filled_by(model: nn.Module, ids: torch.Tensor, cache: DynamicCache) -> DynamicCache:
    with torch.no_grad():
        model(ids, **{CACHE: cache}, use_cache=True)
    return cache


def test_a_cropped_and_a_reordered_cache(qwen3: nn.Module) -> None:
    out = []
    for use in (False, True):
        recorder = recorded(qwen3) if use else plain(qwen3)
        cache = filled_by(qwen3, tokens(2, 9), DynamicCache(config=qwen3.config))
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0]))
        ids = torch.cat([tokens(2, 9)[[1, 0], :6], tokens(2, 2, seed=7)], dim=1)
        out.append(qwen3.generate(ids, **{CACHE: cache}, **OPTIONS, eos_token_id=None, max_new_tokens=5))
    assert torch.equal(*out)
    assert recorder.replayed == 5


@pytest.mark.parametrize("fault", ["batch", "dtype", "model", "layers"])
def test_a_cache_that_does_not_fit_is_as_without_recorded_steps_and_said(qwen3: nn.Module, fault: str) -> None:
    """The same tokens or the same error."""

    def cache() -> DynamicCache:
        ids, maker = tokens(2, 6), qwen3
        if fault == "batch":
            ids = ids[:1]
        if fault == "model":
            maker = tiny_model("qwen3_moe", num_key_value_heads=4)
        if fault == "layers":
            maker = tiny_model("qwen3_moe", layers=1)
        made = filled_by(maker, ids, DynamicCache(config=maker.config))
        for layer in made.layers if fault == "dtype" else ():
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
        return made

    out: list[Any] = []
    for use in (False, True):
        recorder = recorded(qwen3) if use else plain(qwen3)
        try:
            ids = tokens(2, 9)
            out.append(qwen3.generate(ids, **{CACHE: cache()}, **OPTIONS, eos_token_id=None, max_new_tokens=4))
        except Exception as error:
            out.append(f"{type(error).__name__}: {error}")
    assert torch.equal(*out) if isinstance(out[0], torch.Tensor) else out[0] == out[1]
    assert recorder.replayed <= 1
    assert sum("the cache handed in does not fit" in note for note in runtime_of(qwen3).report.notes) == 1


def test_a_cache_made_without_the_configuration_of_a_windowed_model() -> None:
    """transformers makes full layers for it, which keep more than the step's rings."""
    model = mxfp4_compile.optimize(tiny_model("gpt_oss"), verify=False)
    out = []
    for use in (False, True):
        recorder = recorded(model) if use else plain(model)
        out.append(
            model.generate(tokens(1, 9), **{CACHE: DynamicCache()}, **OPTIONS, eos_token_id=None, max_new_tokens=4)
        )
    assert torch.equal(*out)
    assert recorder.replayed == 1
    assert "made without the model's configuration" in str(model.mxfp4_report)
