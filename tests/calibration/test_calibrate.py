"""calibrate() and optimize(calibration=...): what is recorded, what comes out, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checkpoints import codes
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile import OptimizeError, mx
from mxfp4_compile.calibration import driver
from mxfp4_compile.calibration.driver import Options, plain_target
from mxfp4_compile.calibration.model import MARK
from mxfp4_compile.calibration.recording import Recorder
from mxfp4_compile.calibration.text import judge_loss, read_windows, write_windows
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.planning import plan_model
from mxfp4_compile.report import Report
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

WINDOW, COUNT = 40, 16
# Biases, transposed weights, gate and up interleaved; weights on the input; two products around a middle of their own.
FAMILIES = (
    "qwen3_moe",
    "gpt_oss",
    pytest.param("llama4", marks=pytest.mark.slow),
    pytest.param("muse_spark", marks=pytest.mark.slow),
)


def ids(count: int = COUNT * WINDOW, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (count,), generator=torch.Generator().manual_seed(seed))


def options(**changes: Any) -> Options:
    return Options(**{"text": ids(), "tokens": COUNT * WINDOW, "window": WINDOW, **changes})


def make(family: str = "qwen3_moe", **kwargs: Any) -> Any:
    return tiny_model(family, **kwargs)


def planned(model: nn.Module) -> list[Any]:
    sites = plan_model(model, Report("mse", "bf16", 0, False), None, (), True, None, [])
    return [site for site in sites if site.structure is not None]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def calibrated() -> Any:
    """A model after calibrate(), its report, and the model before."""
    model = make()
    before = copy.deepcopy(model)
    return model, mxfp4_compile.calibrate(model, ids(), tokens=COUNT * WINDOW, window=WINDOW), before


# what is recorded


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_changes_no_output_and_leaves_nothing(family: str) -> None:
    model = make(family)
    sites = planned(model)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        truth = model(**inputs).logits
        recorder = Recorder()
        target = plain_target(model, sites)
        with target.recording(recorder):
            logits = model(**inputs).logits
        torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(**inputs).logits, truth)
    assert sorted(recorder.order) == list(range(len(sites))) and not recorder.slots
    assert not any("forward" in vars(m) for m in model.modules())
    for key, site in target.sites.items():
        kept = recorder.take(key)
        assert kept.keys() == ({site.projections[0].slot} if site.params else {p.slot for p in site.projections})
    assert "recording" not in mxfp4_compile.ops.registry.known_backends()


def test_what_is_recorded_is_what_the_experts_get() -> None:
    model = make(dtype=torch.bfloat16)
    sites, seen = planned(model), []
    hook = sites[1].candidate.module.register_forward_pre_hook(lambda module, args: seen.append(args))
    recorder = Recorder()
    with torch.no_grad(), plain_target(model, sites).recording(recorder):
        model(**tiny_inputs(model))
    hook.remove()
    kept = recorder.take(1)["up"]
    x, experts, weights = seen[0]
    assert torch.equal(kept.x[0], x) and torch.equal(kept.ids[0], experts) and torch.equal(kept.weights[0], weights)


# what comes out


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_every_form_of_experts_gets_better(family: str) -> None:
    model = make(family, layers=2 if family == "llama4" else 1)
    text = ids(4 * COUNT * WINDOW)
    report = mxfp4_compile.calibrate(model, text, tokens=4 * COUNT * WINDOW, window=WINDOW)
    assert report.sites and report.tokens + report.held_back == 4 * COUNT * WINDOW
    for site in report.sites:
        assert site.error < 0.6 * site.nearest_error
        assert site.held_error < 0.8 * site.nearest_held_error
        assert site.nearest_drift < site.drift_mean <= site.drift_max < 0.1
    optimized = mxfp4_compile.optimize(model)
    assert {s.weight_error_mean for s in optimized.mxfp4_report.rewritten} == {s.drift_mean for s in report.sites}


def test_optimize_with_calibration_is_both_in_one(calibrated: Any) -> None:
    model, report, before = calibrated
    two = mxfp4_compile.optimize(copy.deepcopy(model))
    one = mxfp4_compile.optimize(copy.deepcopy(before), calibration=options())
    assert same(codes(one), codes(two))
    for optimized in (one, two):
        told = optimized.mxfp4_report
        assert all(s.calibrated for s in told.rewritten)
        assert [s.weight_error_max for s in told.rewritten] == [s.drift_max for s in report.sites]
        assert "calibrated on 560 tokens of token ids" in str(told) and "moved by calibration" in str(told)
        assert told.to_dict()["calibration"]["ids_hash"] == report.ids_hash
    assert not same(codes(one), codes(mxfp4_compile.optimize(copy.deepcopy(before))))


def test_calibrated_weights_are_on_the_grid_and_the_rest_is_as_it_was(calibrated: Any) -> None:
    model, _, before = calibrated
    for (name, new), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert new.requires_grad == old.requires_grad
        if ".experts." in name:
            packed, scales = mx.quantize(new.detach())
            assert torch.equal(mx.dequantize(packed, scales, new.shape[-1], new.dtype), new)
            assert not torch.equal(new, old)
        else:
            assert torch.equal(new, old)


@pytest.mark.slow
def test_the_same_bits_whatever_fits_at_a_time(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, before = calibrated
    # Room for one site's inputs, so that the text runs once for each; groups of one or two experts.
    monkeypatch.setattr(driver, "free_host_memory", lambda: 1.5 * COUNT * WINDOW * (64 * 4 + 2 * 12))
    monkeypatch.setitem(mxfp4_compile.calibration.sites._GROUP_BYTES, "cpu", 500_000)
    again = copy.deepcopy(before)
    mxfp4_compile.calibrate(again, ids(), tokens=COUNT * WINDOW, window=WINDOW)
    # (sums of fewer experts at a time take other tiles: the same sums in another order of fp32 for some experts)
    differ = [(a != b).float().mean() for a, b in zip(again.parameters(), model.parameters(), strict=True)]
    assert max(differ) < 0.02
    monkeypatch.undo()
    third = copy.deepcopy(before)
    mxfp4_compile.calibrate(third, ids(), tokens=COUNT * WINDOW, window=WINDOW)
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), model.parameters(), strict=True))


def test_layer_after_layer(calibrated: Any) -> None:
    model, _, before = calibrated
    other = copy.deepcopy(before)
    report = mxfp4_compile.calibrate(other, ids(), tokens=COUNT * WINDOW, window=WINDOW, sequential=True)
    first, second = report.sites
    plain = [s.candidate.module for s in planned(model)]
    later = [s.candidate.module for s in planned(other)]
    assert torch.equal(plain[0].down_proj, later[0].down_proj) is False  # down makes up for gate and up
    assert torch.equal(plain[0].gate_up_proj, later[0].gate_up_proj)  # inputs of the first layer are the same
    assert first.held_error < first.nearest_held_error and second.held_error < second.nearest_held_error


def test_marks_are_of_the_weights_they_were_made_for(calibrated: Any) -> None:
    model = copy.deepcopy(calibrated[0])
    assert MARK in vars(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("down_proj")).mul_(1.1)
    told = mxfp4_compile.optimize(model).mxfp4_report
    assert told.calibration is None and not any(s.calibrated for s in told.rewritten)


def test_an_expert_that_gets_worse_stays_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(layers=1)
    rounded = mxfp4_compile.optimize(copy.deepcopy(model))
    real = mxfp4_compile.calibration.sites.output_errors

    def second_is_worse(*args: Any) -> Any:
        noise, power = real(*args)
        noise[0][1] = noise[1][1] * 1.01
        return noise, power

    monkeypatch.setattr(mxfp4_compile.calibration.sites, "output_errors", second_is_worse)
    optimized = mxfp4_compile.optimize(model, calibration=options())
    report = optimized.mxfp4_report.calibration
    assert 1 in report.sites[0].kept_nearest and "experts stay rounded to nearest" in str(report)
    ours, theirs = codes(optimized), codes(rounded)
    for name in ours:
        assert torch.equal(ours[name][1], theirs[name][1])
        assert name.endswith(".scales") or not torch.equal(ours[name][0], theirs[name][0])


def test_three_tokens_in_all() -> None:
    model = make(layers=1)
    report = mxfp4_compile.calibrate(model, ids(3), tokens=3, window=3)
    assert report.held_back == 0 and any("single window" in note for note in report.notes)
    assert report.sites[0].tokens_min == 0 and report.sites[0].on_prior == 8
    mxfp4_compile.optimize(model)


def test_a_bar_counts_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    mxfp4_compile.calibrate(make(layers=1), ids(80), tokens=80, window=40, progress=True)
    assert "calibration: " in capsys.readouterr().err
    mxfp4_compile.calibrate(make(layers=1), ids(80), tokens=80, window=40, progress=False)
    assert "calibration: " not in capsys.readouterr().err


def test_a_model_writes_its_own_text() -> None:
    model = make(layers=1)
    state = torch.get_rng_state()
    a, b, c = (write_windows(model, tokens=90, window=30, seed=seed).ids for seed in (0, 0, 1))
    assert a.shape == (3, 30) and torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    report = mxfp4_compile.calibrate(model, tokens=90, window=30)
    assert report.text == "text that the model wrote itself" and report.own_nll == report.nll


# what is refused


def untouched(model: nn.Module, before: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("text", "numbers", "error", "words"),
    [
        (ids(30), {}, ValueError, "30 tokens long, less than one window of 40"),
        ("a text", {}, ValueError, "no tokenizer to read a text with: pass token ids"),
        (torch.randn(99), {}, TypeError, "holds token ids, integers; this one is torch.float32"),
        (torch.tensor([1, 500] * 40), {}, ValueError, r"must be in 0 .. 127; token ids has 1 .. 500"),
        (ids(), {"tokens": 20}, ValueError, "tokens=20 is less than one window of 40"),
        (ids(), {"window": 1}, ValueError, "window must be at least 2"),
        (ids(), {"seed": 0.5}, TypeError, "seed must be an integer"),
        (["/no/such/file"], {}, ValueError, "/no/such/file is no file"),
        ([], {}, ValueError, "empty list of files"),
        (3, {}, TypeError, "calibration text is a str"),
    ],
)
def test_bad_text(text: Any, numbers: dict[str, Any], error: type[Exception], words: str) -> None:
    model = make(layers=1)
    before = copy.deepcopy(model)
    with pytest.raises(error, match=words):
        mxfp4_compile.calibrate(model, text, **{"tokens": 640, "window": WINDOW, **numbers})
    with pytest.raises(error, match=words):
        mxfp4_compile.optimize(model, calibration=options(text=text, **numbers))
    assert untouched(model, before) and not mxfp4_sites(model)


def test_text_that_comes_to_no_tokens(tmp_path: Any) -> None:
    model = make(layers=1, vocab_size=256)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for text in ("", empty, [empty, str(empty)]):
        with pytest.raises(ValueError, match="comes to no tokens at all"):
            mxfp4_compile.calibrate(model, text, window=WINDOW)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary is no UTF-8 text"):
        mxfp4_compile.calibrate(model, binary, window=WINDOW)


def test_bytes_are_tokens_of_a_byte_level_model() -> None:
    model = make(layers=1, vocab_size=256)
    windows = read_windows(model, "two windows" * 20, tokens=80, window=40, seed=0)
    assert bytes(windows.ids[1, :11].tolist()).decode() in "two windows" * 3


def test_longer_text_is_sampled_and_said() -> None:
    model = make(layers=1)
    text = torch.arange(2000) % 100 + 3
    a, b, c = (read_windows(model, text, tokens=200, window=40, seed=seed) for seed in (0, 0, 1))
    assert a.ids.shape == (5, 40) and torch.equal(a.ids, b.ids) and not torch.equal(a.ids, c.ids)
    assert a.notes == ["token ids has 2000 tokens; 5 windows of 40 were sampled with seed 0"]
    starts = sorted(int(w[0]) for w in a.ids)
    assert all((w.diff() % 100 == 1).all() for w in a.ids) and len(starts) == 5


def test_windows_are_no_longer_than_the_models_positions() -> None:
    model = make(layers=1, max_position_embeddings=64)
    windows = read_windows(model, ids(200), tokens=200, window=100, seed=0)
    assert windows.ids.shape == (3, 64) and "has 64 positions" in windows.notes[0]


def test_models_that_cannot_be_calibrated() -> None:
    optimized = mxfp4_compile.optimize(make(layers=1))
    for call in (mxfp4_compile.calibrate, lambda m, t, **_: mxfp4_compile.optimize(m, calibration=t)):
        with pytest.raises(OptimizeError, match="optimized already: its original weights"):
            call(optimized, ids(), window=WINDOW)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        mxfp4_compile.calibrate("model")  # type: ignore[arg-type]
    with pytest.raises(OptimizeError, match="training mode"):
        mxfp4_compile.calibrate(make(layers=1).train(), ids(), window=WINDOW)
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(OptimizeError, match="no mixture of experts was found"):
        mxfp4_compile.calibrate(dense.eval(), ids(), window=WINDOW)


def test_activations_that_are_nan_name_layer_and_token() -> None:
    model = make()
    before = copy.deepcopy(model)
    text = ids()
    text[text == 77] = 78
    text[5 * WINDOW + 17] = 77
    with torch.no_grad():
        for m in (model, before):
            m.get_input_embeddings().weight[77] = torch.nan
    with pytest.raises(OptimizeError, match=r"layers\.0\.mlp.*NaN or Inf at token \d+ of window 5 \(id \d+\)"):
        mxfp4_compile.calibrate(model, text, tokens=COUNT * WINDOW, window=WINDOW)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(
        model.parameters(), before.parameters(), strict=True))  # fmt: skip


def test_memory_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "free_host_memory", lambda: 1e5)
    with pytest.raises(OptimizeError, match=r"on 640 tokens keeps 0.0 GB of its inputs; the host has 0.0 GB free"):
        mxfp4_compile.calibrate(make(layers=1), ids(), tokens=COUNT * WINDOW, window=WINDOW)


def test_text_that_the_model_does_not_know() -> None:
    noise = 8.0  # log(vocabulary)
    vocabulary = 2981
    assert judge_loss(1.3, 1.2, vocabulary, ids=True) == []
    with pytest.raises(ValueError, match="these token ids are no text of this model"):
        judge_loss(noise + 0.1, 1.2, vocabulary, ids=True)
    assert "noise has 8.00" in judge_loss(noise + 0.1, 1.2, vocabulary, ids=False)[0]
    assert "of a kind that it does not know well" in judge_loss(3.0, 1.2, vocabulary, ids=True)[0]
    assert judge_loss(noise + 0.1, noise - 0.1, vocabulary, ids=True)  # an untrained model: warned only
    assert judge_loss(None, None, vocabulary, ids=True) == []
