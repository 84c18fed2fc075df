"""Attention over latents: the same tokens as with latents expanded, and nothing expanded."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from recording import both, recorded
from torch import nn

import mxfp4_compile
from mxfp4_compile.runtime import latent, runtime_of
from mxfp4_compile.tools.families import tiny_model

OTHERS = ["deepseek_v2", "glm4_moe_lite", "mistral4", "axk1", "kimi_linear", "mistral_large4"]


@pytest.mark.parametrize("family", ["deepseek_v3", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_tokens_and_what_is_expanded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"index_n_heads": 16, "seed": 2} if family == "mistral_large4" else {}
    model = mxfp4_compile.optimize(tiny_model(family, **more), verify=False)
    modules = latent.latent_modules(model)
    assert modules
    runtime_of(model).absorb_latents = True
    ids = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    lengths: list[int] = []
    for cls in {type(m) for m in modules}:
        expand = cls.expand_kv
        monkeypatch.setattr(
            cls, "expand_kv", lambda self, kv, rope, e=expand: lengths.append(kv.shape[2]) or e(self, kv, rope)
        )
    expected, got, recorder = both(
        model, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=12, eos_token_id=None
    )
    assert torch.equal(got, expected)
    assert recorder.replayed == 12
    assert [c.made for c in runtime_of(model).report.captures] == ["eager layers, own attention over latents"]
    assert not any("expand_kv" in vars(m) for m in model.modules())
    lengths.clear()
    step = next(iter(runtime_of(model).steps.values()))
    with torch.no_grad():
        step.run_unrecorded()
    assert lengths == []


def test_another_thread_expands_meanwhile() -> None:
    model = tiny_model("deepseek_v3")
    module: Any = latent.latent_modules(model)[0]
    kv = torch.randn(2, 1, 5, module.kv_lora_rank)
    rope = torch.randn(2, 1, 5, module.qk_rope_head_dim)
    expected = module.expand_kv(kv, rope)
    seen: list[Any] = []
    with latent.absorbed(model):
        thread = threading.Thread(target=lambda: seen.append(module.expand_kv(kv, rope)))
        thread.start()
        thread.join()
        ours = module.expand_kv(kv, rope)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected, strict=True))
    assert ours[0].shape == (2, 1, 5, module.kv_lora_rank + module.qk_rope_head_dim)
    assert torch.equal(module.expand_kv(kv, rope)[0], expected[0])


def test_groups_of_heads_share_memory() -> None:
    latents = torch.randn(2, 1, 7, 24)
    assert latent.in_groups(latents, 128).shape == (2, 8, 7, 24)
    assert latent.in_groups(latents, 128).data_ptr() == latents.data_ptr()
    assert latent.in_groups(latents, 20).shape == (2, 1, 7, 24)


def test_as_asked_for_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in (False, True):
        monkeypatch.setenv("MXFP4_COMPILE_ABSORB_LATENTS", str(int(wanted)))
        model: nn.Module = mxfp4_compile.optimize(tiny_model("deepseek_v3", layers=1), verify=False)
        recorded(model)
        runtime_of(model).step(1, 20)
        assert [("over latents" in c.made) for c in runtime_of(model).report.captures] == [wanted]
