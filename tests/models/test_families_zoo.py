"""The zoo of tiny models: every family with packed experts builds, is finite, runs, and is reproducible."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from mxfp4_compile.tools.families import (
    GEN,
    MODEL_CLASS,
    SPECIAL,
    decorated_families,
    tiny_experts,
    tiny_inputs,
    tiny_model,
    undecorated_families,
)

ALL = decorated_families() + undecorated_families()


def is_experts(module: torch.nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def first_tensor(output: Any) -> torch.Tensor:
    """The logits of a model output, or its first tensor."""
    logits = getattr(output, "logits", None)
    while not isinstance(logits, torch.Tensor):
        logits = next(iter(output.values() if hasattr(output, "values") else output))
        output = logits
    return logits


def forward(model: torch.nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(model(**inputs))


def test_count() -> None:
    names = decorated_families()
    assert len(names) >= 60
    assert names == sorted(set(names))
    assert {"mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "aria", "nemotron_h"} <= set(names)
    assert not set(names) & set(undecorated_families())


def test_tables_name_known_families() -> None:
    assert set(SPECIAL) | set(MODEL_CLASS) <= set(ALL)


# test_families.py builds and runs the other decorated ones in the quick tier, too.
QUICK = {"gpt_oss", "mixtral", "deepseek_v4", "nemotron_h", "qwen3_omni_moe", *undecorated_families()}


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in ALL])
def test_builds_and_runs_fp32(family: str) -> None:
    state = torch.random.get_rng_state()
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state was disturbed"
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000, "not tiny"
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.dtype == torch.float32, name
    experts = [module for module in model.modules() if is_experts(module)]
    assert bool(experts) == (family in decorated_families())
    reached = []
    for module in experts:
        module.register_forward_hook(lambda module, args, output: reached.append(module))
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                assert 0.4 < parameter.std() < 0.6, name
            else:
                fan_in = parameter.shape[-2 if module.is_transposed else -1]
                assert 0.9 < parameter.std() * math.sqrt(fan_in) < 1.1, name
    if experts:
        model.set_experts_implementation("grouped_mm")
    output = forward(model, **inputs)
    assert output.isfinite().all()
    assert output.std() > 1e-3
    assert bool(reached) == bool(experts), "no experts module was reached by the forward"
    assert torch.equal(output, forward(model, **inputs)), "two runs differ"


@pytest.mark.slow
@pytest.mark.parametrize("family", decorated_families())
def test_runs_bf16(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    for module in model.modules():
        if is_experts(module):
            assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        assert forward(model, **tiny_inputs(model)).isfinite().all(), implementation


@pytest.mark.slow
@pytest.mark.parametrize("family", undecorated_families())
def test_undecorated_runs_bf16(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    assert forward(model, **tiny_inputs(model)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_generates(family: str) -> None:
    model = tiny_model(family)
    if not model.can_generate():
        pytest.skip("no generation for this class")
    inputs = tiny_inputs(model)
    for kwargs in (inputs, {name: value for name, value in inputs.items() if name != "use_cache"}):
        tokens = model.generate(**kwargs, max_new_tokens=4, do_sample=False)
        tokens = getattr(tokens, "sequences", tokens)
        assert tokens.shape[0] == 2
        assert tokens.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", decorated_families())
def test_experts_alone(family: str) -> None:
    for name, module in tiny_experts(family):
        assert type(module).__name__ == name
        assert is_experts(module)
        weights = {key: p for key, p in module.named_parameters() if p.dim() == 3}
        up = next(value for key, value in weights.items() if "up_proj" in key)
        width, count = up.shape[-2 if module.is_transposed else -1], up.shape[0]
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(7, width, generator=rng)
        ids = torch.rand(7, count, generator=rng).argsort(dim=1)[:, :2]
        outputs = []
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            module.config._experts_implementation = implementation
            with torch.no_grad():
                outputs.append(module(x, ids, torch.rand(7, 2, generator=rng.manual_seed(1))))
        assert outputs[0].shape == x.shape
        assert outputs[0].isfinite().all()
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["ernie4_5_vl_moe", "glm4v_moe", "mistral_large4", "qwen3_omni_moe"])
def test_experts_alone_of_the_difficult(family: str) -> None:
    test_experts_alone(family)


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again, other = (tiny_model("gpt_oss", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", ["mixtral", "inkling2", "deepseek_v4"])
def test_bf16_is_fp32_rounded(family: str) -> None:
    wide = dict(tiny_model(family).named_parameters())
    for name, parameter in tiny_model(family, dtype=torch.bfloat16).named_parameters():
        assert torch.equal(parameter, wide[name].to(parameter.dtype)), name


def test_kept_in_fp32_as_from_pretrained_does() -> None:
    model = tiny_model("inkling2", dtype=torch.bfloat16)
    kept = [name for name, p in model.named_parameters() if p.dtype == torch.float32]
    assert any(name.endswith("mlp.gate.weight") for name in kept)


def test_layers_and_overrides() -> None:
    model = tiny_model("mixtral", layers=3, num_local_experts=4, hidden_size=32, head_dim=8)
    experts = [module for module in model.modules() if is_experts(module)]
    assert len(experts) == 3
    assert experts[0].gate_up_proj.shape == (4, 2 * GEN["intermediate_size"], 32)
    assert len([m for m in tiny_model("qwen3_vl_moe", layers=3).modules() if is_experts(m)]) == 3


def test_another_class_of_the_family() -> None:
    """Experts that a text-only forward never reaches: dots3_note's vision tower, qwen3_omni's talker."""
    model = tiny_model("dots3_note", model_class="Dots3NoteForConditionalGeneration")
    assert any("vision_tower" in name for name, module in model.named_modules() if is_experts(module))
    model = tiny_model("qwen3_omni_moe", model_class="Qwen3OmniMoeForConditionalGeneration")
    assert {type(m).__name__ for m in model.modules() if is_experts(m)} == {
        "Qwen3OmniMoeThinkerTextExperts",
        "Qwen3OmniMoeTalkerTextExperts",
    }


def test_inputs() -> None:
    model = tiny_model("qwen3_moe")
    one, same, other = (tiny_inputs(model, 3, 5, seed)["input_ids"] for seed in (0, 0, 1))
    assert one.shape == (3, 5)
    assert one.dtype == torch.int64
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    ids = tiny_inputs(model, 16, 256)["input_ids"]
    assert ids.max() < model.config.vocab_size
    assert not set(ids.flatten().tolist()) & {0, 1, 2}, "padding, begin and end tokens"
    assert tiny_inputs(model)["use_cache"] is False
    assert tiny_inputs(tiny_model("switch_transformers"))["decoder_input_ids"].shape == (2, 9)
    assert tiny_inputs(tiny_model("vitpose_backbone"))["pixel_values"].dim() == 4


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"known families: .*mixtral"):
        tiny_model("no_such_family")
    with pytest.raises(ValueError, match="no_such_field"):
        tiny_model("mixtral", no_such_field=1)
    with pytest.raises(ValueError, match="has no class"):
        tiny_model("mixtral", model_class="NoSuchModel")
    with pytest.raises(RuntimeError, match="decorated"):
        tiny_experts("dbrx")
