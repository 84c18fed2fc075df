"""The families of transformers: the same tokens with recorded steps as without."""

from __future__ import annotations

import copy

import pytest
import torch
from recording import (
    both,
)
from torch import nn
from transformers import AutoModelForCausalLM

import mxfp4_compile
from mxfp4_compile.tools.families import tiny_model


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


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v32"])
def test_caches_of_other_kinds_are_named_and_run_without(family: str) -> None:
    model = mxfp4_compile.optimize(tiny_model(family), verify=False)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    expected, got, recorder = both(model, {"input_ids": ids}, max_new_tokens=10, eos_token_id=None)
    assert torch.equal(got, expected)
    assert recorder.recorded == 0
    assert "no static form" in str(model.mxfp4_report)
