"""Generation over static caches: the same tokens as transformers' own loop on the same model.

A stand-in that calls the step where a graph would be replayed makes everything but the recording itself run
on a CPU: padding, choice of sizes, rings past the window, reset, and the loops. tests/gpu has the graphs.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.runtime import step as steps
from mxfp4_compile.runtime.cache import CACHE, Arena, HandoverCache, StaticKV, shapes_of
from mxfp4_compile.runtime.graphs import EagerRecorder
from mxfp4_compile.runtime.sizes import capture_sizes, length_for, prompt_length_for, prompt_lengths, size_for
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, TEXT_FILE, load
from mxfp4_compile.tools.families import tiny_model


class CountingRecorder(EagerRecorder):
    """The stand-in, with a count of recordings and replays."""

    def __init__(self, free: int | None = None, compiles: bool = False) -> None:
        self.recorded = self.replayed = 0
        self.free, self.compiles = free, compiles

    def record(self, run, warmups):
        self.recorded += 1
        recording = super().record(run, warmups)
        replay = recording.replay

        def counted() -> None:
            self.replayed += 1
            replay()

        recording.replay = counted
        return recording

    def free_bytes(self) -> int | None:
        return self.free


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The demo's trained model in fp32, optimized."""
    return mxfp4_compile.optimize(load(MODEL_DIRECTORY).float(), verify=False)


def recorded(model: nn.Module, **kwargs: Any) -> CountingRecorder:
    runtime = runtime_of(model)
    runtime.drop()
    runtime.report.notes.clear()
    runtime.record_prompts = True
    runtime.recorder = CountingRecorder(**kwargs)
    return runtime.recorder


def plain(model: nn.Module) -> None:
    runtime_of(model).recorder = None  # on a CPU: no graphs


def prompts(batch: int, length: int = 24, mixed: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """Held-out text, left-padded to ``length``."""
    text = (MODEL_DIRECTORY / TEXT_FILE).read_bytes()
    ids, mask = torch.zeros(2, batch, length, dtype=torch.int64)
    for i in range(batch):
        n = length - (5 * i % (length - 3) if mixed else 0)
        start = 997 * (i + 1) + 101 * seed
        ids[i, length - n :] = torch.tensor(list(text[start : start + n]))
        mask[i, length - n :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def both(model: nn.Module, inputs: dict[str, Any], seed: int = 3, **options: Any) -> tuple[Any, Any, CountingRecorder]:
    """What transformers' loop gives, and what recorded steps give."""
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0} | options
    out = []
    for use in (False, True):
        if use:
            recorder = recorded(model)
        else:
            plain(model)
        torch.manual_seed(seed)
        out.append((model.generate(**inputs, **options), torch.get_rng_state()))
    assert torch.equal(out[0][1], out[1][1]), "the random state afterwards differs"
    return out[0][0], out[1][0], recorder


def test_a_cache_by_an_unknown_name_is_told(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 renamed it: recorded steps may go unused, but not without a word."""
    monkeypatch.setattr("mxfp4_compile.runtime.generation._cache_name", lambda: "elsewhere")
    want, got, _ = both(trained, prompts(2))
    assert torch.equal(got, want)
    assert not trained.mxfp4_report.runtime.captures
    assert any(f"'{CACHE}', which is not known here" in note for note in trained.mxfp4_report.runtime.notes)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.smoke), 8])
def test_greedy_200_tokens(trained: nn.Module, batch: int) -> None:
    expected, got, recorder = both(trained, prompts(batch), max_new_tokens=200)
    assert torch.equal(got, expected)
    assert got.shape[1] == 224
    assert recorder.recorded == 1
    assert recorder.replayed == 1 + 199  # the check against eager, and every token but the one of the prefill


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


OPTIONS: dict[str, dict[str, Any]] = {
    "sample": {"do_sample": True, "top_k": 20},
    "sample, end": {"do_sample": True, "temperature": 1.5, "eos_token_id": [10, 46, 32]},
    "greedy, end": {"eos_token_id": 32},
    "greedy, processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 20},
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
    assert got.shape[1] < 64


class Streamer:
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


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


def test_assisted_decoding_and_autocast_are_left_alone(trained: nn.Module) -> None:
    expected, got, recorder = both(trained, prompts(1), prompt_lookup_num_tokens=3)
    assert torch.equal(got, expected)
    assert recorder.recorded == 0
    recorder = recorded(trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = trained.generate(**prompts(2), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == prompts(2)["input_ids"].shape[1] + 5
    assert recorder.recorded == 0


def test_what_the_user_decides_is_left_to_transformers(trained: nn.Module) -> None:
    inputs = prompts(2, mixed=False)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}, {"disable_compile": True}):
        expected, got, recorder = both(trained, inputs, **options)
        assert torch.equal(got, expected)
        assert recorder.replayed == 0
    recorder = recorded(trained)
    cache = DynamicCache(config=trained.config)
    trained.generate(**inputs, **{CACHE: cache}, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert recorder.replayed == 0
    assert cache.get_seq_length() == 24 + 4


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


def test_a_shorter_generation_after_a_longer_one_sees_nothing_of_it(trained: nn.Module) -> None:
    recorded(trained)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    short = prompts(2, 12)
    first = trained.generate(**short, **options)
    trained.generate(**prompts(2, 100, seed=4), **(options | {"max_new_tokens": 200}))
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


# sizes


def test_prompt_sizes() -> None:
    assert prompt_lengths(1, 512) == (16, 32, 64, 128, 256, 512)
    assert prompt_lengths(8, 512) == (16, 32, 64)
    assert prompt_lengths(33, 512) == ()
    assert [prompt_length_for(t, 1, 512) for t in (2, 16, 17, 512, 513)] == [16, 16, 32, 512, None]
    assert prompt_length_for(65, 8, 512) is None
    assert prompt_length_for(2, 1, 0) is None


def test_sizes() -> None:
    assert capture_sizes(0) == ()
    assert capture_sizes(1) == (1,)
    assert capture_sizes(3) == (1, 2, 3)
    assert capture_sizes(4) == (1, 2, 4)
    assert capture_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert capture_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert len(capture_sizes(512)) == 3 + 64
    for largest in (1, 5, 8, 30, 512):
        for batch in range(1, largest + 1):
            size = size_for(batch, largest)
            assert size in capture_sizes(largest)
            assert batch <= size
            assert not [s for s in capture_sizes(largest) if batch <= s < size]
        assert size_for(largest + 1, largest) is None
    assert [length_for(n) for n in (1, 512, 513, 1024, 1025)] == [512, 512, 1024, 1024, 2048]


def test_batches_above_the_largest_size_run_without() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False, max_capture_size=2)
    inputs = {"input_ids": torch.randint(3, 60, (3, 5))}
    expected, got, recorder = both(model, inputs, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(got, expected)
    assert recorder.recorded == 0
    assert "max_capture_size=2" in str(model.mxfp4_report)


def test_switched_off() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False, max_capture_size=0)
    recorder = recorded(model)
    model.generate(torch.randint(3, 60, (2, 5)), max_new_tokens=4, pad_token_id=0)
    assert recorder.recorded == 0
    assert "max_capture_size=0" in str(model.mxfp4_report)


def test_a_cache_that_does_not_fit_is_reported_and_not_attempted() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    recorder = recorded(model, free=(1 << 30) + 1000)
    out = model.generate(torch.randint(3, 60, (2, 5)), max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 9)
    assert recorder.recorded == 0
    assert "not captured, its cache takes" in str(model.mxfp4_report)


def test_without_graphs_it_says_so() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    model.generate(torch.randint(3, 60, (2, 5)), max_new_tokens=4, pad_token_id=0)
    assert "there are no CUDA graphs on cpu" in str(model.mxfp4_report)
    mxfp4_compile.capture(model)
    assert not model.mxfp4_report.runtime.captures


def test_capture_ahead() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False, max_capture_size=8)
    recorder = recorded(model)
    report = mxfp4_compile.capture(model, max_length=600)
    assert [(c.batch, c.length) for c in report.captures] == [(8, 1024), (4, 1024), (2, 1024), (1, 1024)]
    model.generate(torch.randint(3, 60, (3, 5)), max_new_tokens=4, pad_token_id=0)
    assert recorder.recorded == 4
    addresses = {s.kv.views[0].keys.data_ptr() for s in runtime_of(model).steps.values()}
    assert len(addresses) == 1, "sizes captured from the largest down share one cache"
    with pytest.raises(TypeError, match="optimized model"):
        mxfp4_compile.capture(tiny_model("qwen3_moe"))


# families, windows


def wide(family: str) -> nn.Module:
    """A tiny model; deepseek_v3 with as many key heads as its attention has."""
    if family != "deepseek_v3":
        return tiny_model(family)
    config = copy.deepcopy(tiny_model(family).config)
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


QUICK = ["gpt_oss", "mixtral", "deepseek_v3", "qwen3_vl_moe"]
OTHERS = [
    "afmoe", "aria", "cohere2_moe", "ernie4_5_vl_moe", "gemma4", "glm4_moe", "granitemoe_swa", "laguna", "minimax_m2",
    "muse_spark", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "ernie4_5_vl_moe", "glm4v_moe", "qwen3_omni_moe",
]  # fmt: skip


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_families(family: str) -> None:
    model = mxfp4_compile.optimize(wide(family), verify=False)
    ids = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        expected, got, recorder = both(model, {"input_ids": ids, "attention_mask": mask}, eos_token_id=None, **options)
        assert torch.equal(got, expected)
        assert recorder.recorded == 1, str(model.mxfp4_report)
        assert recorder.replayed > 30, str(model.mxfp4_report)


@pytest.mark.parametrize("window", [2, 5, 700])
@pytest.mark.parametrize("prompt", [1, 5, 13])
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


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v32"])
def test_caches_of_other_kinds_are_named_and_run_without(family: str) -> None:
    model = mxfp4_compile.optimize(tiny_model(family), verify=False)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    expected, got, recorder = both(model, {"input_ids": ids}, max_new_tokens=10, eos_token_id=None)
    assert torch.equal(got, expected)
    assert recorder.recorded == 0
    assert "no static form" in str(model.mxfp4_report)


def test_cache_goes_in_and_comes_out() -> None:
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        cache = getattr(model(torch.randint(3, 100, (3, 21)), use_cache=True), CACHE)
    before = copy.deepcopy(cache)
    static = StaticKV(shapes_of(cache), 4, 512, torch.device("cpu"), Arena())
    handover = HandoverCache(cache)
    handover.lend(static, None)
    assert handover.get_seq_length() == 21
    for view in static.views:
        assert torch.equal(view.keys[3], view.keys[0])
    static.reorder(torch.tensor([2, 0, 0]))
    back = handover.plain()
    assert back.get_seq_length() == 21
    for layer, old in zip(back.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys[[2, 0, 0]])
        assert torch.equal(layer.values, old.values[[2, 0, 0]])


# guards


def test_a_step_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    masks = StaticKV.masks

    def wrong(self: StaticKV) -> dict[str, torch.Tensor]:
        out = masks(self)
        out["full_attention"] = out["full_attention"].clone()
        out["full_attention"][..., 2:9] = False
        return out

    monkeypatch.setattr(StaticKV, "masks", wrong)
    expected, got, _ = both(model, {"input_ids": torch.randint(3, 60, (2, 5))}, eos_token_id=None)
    assert torch.equal(got, expected)
    assert not runtime_of(model).report.captures
    assert "logits differ from the eager ones" in str(model.mxfp4_report)


def test_hooks_of_the_user_are_called() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    recorder = recorded(model)
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    model.generate(torch.randint(3, 60, (2, 5)), **options)
    assert len(calls) == 6
    assert recorder.recorded == 0
    assert "forward hooks" in str(model.mxfp4_report)
    handle.remove()
    model.generate(torch.randint(3, 60, (2, 5)), **options)
    assert recorder.recorded == 1


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


def test_the_model_stays_what_it_was() -> None:
    model = tiny_model("qwen3_moe")
    signature, names = inspect.signature(model.generate), set(vars(model))
    mxfp4_compile.optimize(model, verify=False)
    recorded(model)
    ids = torch.randint(3, 60, (2, 5))
    model.generate(ids, max_new_tokens=4, pad_token_id=0)
    assert inspect.signature(model.generate) == signature
    assert "generate" in vars(model)
    assert model.config._attn_implementation != "mxfp4_decode"
    assert not any("forward" in vars(module) for module in model.modules())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        runtime = runtime_of(twin)
        assert runtime.model is twin
        assert not runtime.steps
        assert not twin.mxfp4_report.runtime.captures
        assert torch.equal(
            twin.generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False),
            model.generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False),
        )
    mxfp4_compile.restore(model)
    assert set(vars(model)) == names
    assert inspect.signature(model.generate) == signature


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Another backend in Inductor's place."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **kwargs: real(f, backend=backend, **kwargs))


def counting_backend(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs that Dynamo hands over, which then run as they are: its own backend in Inductor's place."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_with(monkeypatch, backend)
    return graphs


def windowed(layers: int = 6) -> nn.Module:
    """gpt_oss with both kinds of layers, optimized."""
    config = AutoConfig.for_model(**tiny_model("gpt_oss").config.to_dict())
    config.num_hidden_layers, config.layer_types = layers, ["sliding_attention", "full_attention"] * (layers // 2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return mxfp4_compile.optimize(model, verify=False)


@pytest.mark.slow
def test_equal_layers_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation per structure of layer, none later."""
    graphs = counting_backend(monkeypatch)
    model = windowed()
    ids = torch.randint(3, 100, (2, 7))
    options = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = model.generate(ids, **options)
    recorded(model, compiles=True)
    assert len(steps.decoder_layers(model)) == 6
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


@pytest.mark.slow
def test_prompts_are_recorded_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    counting_backend(monkeypatch)
    ids = torch.randint(3, 60, (1, 9))
    for wanted in (False, True):
        monkeypatch.setenv("MXFP4_COMPILE_RECORD_PROMPTS", str(int(wanted)))
        model = mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=2), verify=False)
        runtime = runtime_of(model)
        runtime.recorder = CountingRecorder(compiles=True)
        model.generate(ids, max_new_tokens=3, pad_token_id=0, eos_token_id=None, do_sample=False)
        assert [bool(p.replay) for p in runtime.report.prefills] == [False, True][: 1 + wanted], str(runtime.report)


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
