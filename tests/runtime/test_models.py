"""Every family of transformers that generates: the same tokens with recorded steps as without, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recording import both, counting_backend, plain, recorded
from torch import nn

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.tools.families import decorated_families, listed_families, tiny_model, undecorated_families

# Whose generate is not what recorded steps stand in for, and why.
WITHOUT = {
    "diffusion_gemma": "a generate of its own",
    "doge": "its experts are not rewritten",
    "nllb_moe": "an encoder-decoder",
    "openai_privacy_filter": "does not generate",
    "switch_transformers": "an encoder-decoder",
    "vitpose_backbone": "does not generate",
}
# Refused, in these words.
REFUSED = {
    "deepseek_v4": "no static form here (heavily_compressed_attention)",
    "glm5_next": "makes attention masks of its own, which are not by position",
    "minimax": "the model makes a cache of its own",
    "qwen4_exp": "its indexer keeps positions",
    "unlimited_ocr": "no static form here (reference_sliding_attention)",
}
# An indexer with few heads scores many positions with exactly 0, and which of those are chosen is up to the library.
# With many heads, and these seeds of weights, none has two that are alike.
MANY_HEADS = {"deepseek_v32": 2, "axk2": 2, "dots3_note": 0, "glm_moe_dsa": 2, "hy_v4": 0, "mistral_large4": 2}
# One for each kind of cache, with attention of every shape: full, window, latent, positions of several kinds, chunks,
# states, convolutions, no cache, an indexer, both in one layer.
KINDS = {
    "mixtral", "gpt_oss", "deepseek_v3", "qwen3_vl_moe", "llama4", "qwen3_next", "lfm2_moe", "nemotron_h",
    "mistral_large4", "zaya",
}  # fmt: skip
ALL = sorted({*decorated_families(), *undecorated_families(), *listed_families()} - WITHOUT.keys())


def optimized(family: str) -> nn.Module:
    more = {"index_n_heads": 16, "seed": MANY_HEADS[family]} if family in MANY_HEADS else {}
    strict = family != "jetmoe"  # its attention has experts too, which are left alone
    return mxfp4_compile.optimize(tiny_model(family, **more), verify=False, strict=strict)


def padded(rows: int = 3) -> dict[str, torch.Tensor]:
    """Random tokens, the second row left-padded."""
    ids = torch.randint(3, 100, (rows, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:2, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in KINDS else pytest.mark.slow) for f in ALL])
def test_families(family: str) -> None:
    """Left-padded, a row less than recorded for, past windows and chunks of 8."""
    model = optimized(family)
    expected, got, recorder = both(model, padded(), max_new_tokens=20, eos_token_id=None)
    assert torch.equal(got, expected)
    if family in REFUSED:
        assert recorder.replayed <= 2
        assert REFUSED[family] in str(model.mxfp4_report)
    else:
        assert recorder.recorded <= 2, str(model.mxfp4_report)  # by our attention; if that cannot be, by the model's
        assert recorder.replayed == 20, str(model.mxfp4_report)
        assert runtime_of(model).report.captures[0].error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(KINDS))
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True}], ids=["beam", "sample"])
def test_kinds_reordered_and_drawn_from(family: str, options: dict[str, Any]) -> None:
    expected, got, recorder = both(optimized(family), padded(), max_new_tokens=16, eos_token_id=None, **options)
    assert torch.equal(got, expected)
    assert recorder.replayed > 10


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(KINDS - {"gpt_oss", "mixtral", "qwen3_vl_moe"}))
def test_kinds_compiled(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of steps and prompts as Dynamo has them, every layer of them."""
    counting_backend(monkeypatch)
    model = optimized(family)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    plain(model)
    expected = model.generate(**padded(), **options)
    recorded(model, compiles=True)
    assert torch.equal(model.generate(**padded(), **options), expected)
    report = runtime_of(model).report
    assert [c.made for c in report.captures] == ["compiled layers, own attention"], str(report)
    assert [p.prompts for p in report.prefills] == ["prompts, several rows, padded"], str(report)
    assert report.prefills[0].error < 1e-5
    assert not report.notes


def test_layers_that_cannot_be_told_apart_are_said_to_be_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """longcat_flash's decoder layers have two caches each."""
    counting_backend(monkeypatch)
    model = optimized("longcat_flash")
    recorded(model, compiles=True)
    model.generate(**padded(), max_new_tokens=3, pad_token_id=0, eos_token_id=None, do_sample=False)
    report = runtime_of(model).report
    assert [c.made for c in report.captures] == ["eager layers, own attention"]
    assert any("cannot be told apart" in note for note in report.notes)
