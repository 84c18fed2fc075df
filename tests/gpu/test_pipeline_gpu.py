"""optimize() on a GPU: the default backend, eager, compiled and under CUDA graphs, and moving between devices."""

from __future__ import annotations

import copy

import pytest
import torch

import mxfp4_compile
from mxfp4_compile.ops.selection import BackendUnavailable
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "nemotron_h", "gemma4", "split"]


def tiny(family: str, dtype: torch.dtype):
    """A tiny model; "split" is one whose middle no fused kernel knows."""
    model = tiny_model("qwen3_moe" if family == "split" else family, dtype=dtype)
    if family == "split":
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = torch.nn.Tanh()
    return model


def on_gpu(family: str, dtype: torch.dtype = torch.bfloat16):
    model = tiny(family, dtype).cuda()
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in tiny_inputs(model).items()}
    return model, inputs


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_optimize(family: str, dtype: torch.dtype) -> None:
    model, inputs = on_gpu(family, dtype)
    mxfp4_compile.optimize(model)
    for site in model.mxfp4_report.sites:
        assert site.rewritten
        assert site.backend == "triton"
        assert site.outcome == ("split" if family == "split" else "fused")
        assert site.error is not None
    assert torch.isfinite(logits(model, inputs)).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_fp8_activations(family: str) -> None:
    """Verified where they are used, and only there; a model whose experts are split is refused by name."""
    model, inputs = on_gpu(family)
    mxfp4_compile.optimize(model, activation_dtype="fp8")
    for site in model.mxfp4_report.sites:
        assert site.layout == "sm89_fp8"
        assert site.quantized_from > 60
        assert 1e-3 < site.quantized_error < 0.08 and site.error < 0.02
    many = torch.randint(0, 50, (4, site.quantized_from), device="cuda")
    with torch.no_grad():
        assert torch.isfinite(model(many).logits).all()
    assert torch.isfinite(logits(model, inputs)).all()


def test_fp8_activations_of_split_experts() -> None:
    model, _ = on_gpu("split")
    with pytest.raises(BackendUnavailable, match=r"activation_dtype \(fp8; offers bf16\)"):
        mxfp4_compile.optimize(model, activation_dtype="fp8", backend="triton")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_compiled_and_captured(family: str) -> None:
    model, inputs = on_gpu(family, torch.float32)
    mxfp4_compile.optimize(model)
    expected = logits(model, inputs)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        out = logits(compiled, inputs).clone()
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "split"])
def test_moving_between_devices_keeps_every_bit(family: str) -> None:
    model = mxfp4_compile.optimize(tiny(family, torch.float32))
    inputs = tiny_inputs(model)
    expected, state = logits(model, inputs), copy.deepcopy(model.state_dict())
    model.cuda()
    assert {site.backend for site in mxfp4_sites(model).values()} == {"triton"}
    moved = logits(model, {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    torch.testing.assert_close(moved.cpu(), expected, rtol=2e-3, atol=2e-3)
    for key, value in model.state_dict().items():
        assert torch.equal(value.cpu(), state[key]), key
    model.cpu()
    assert {site.backend for site in mxfp4_sites(model).values()} == {"cpu"}
    assert torch.equal(logits(model, inputs), expected)


def test_generate() -> None:
    model, inputs = on_gpu("qwen3_moe", torch.float32)
    mxfp4_compile.optimize(model)
    ordinary = mxfp4_compile.restore(copy.deepcopy(model))
    ids = inputs["input_ids"]
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), ordinary.generate(ids, **arguments))
