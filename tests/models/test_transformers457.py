"""Families of transformers 4.57, whose experts are module lists or packed in loops; run in an environment of its own
(.ci/run)."""

from __future__ import annotations

import inspect
import io
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
if not transformers.__version__.startswith("4.57."):
    pytest.skip("for transformers 4.57", allow_module_level=True)

from surveys import group, surveyed  # noqa: E402
from test_remote_code import check_rewritten_and_generating, publish  # noqa: E402

import mxfp4_compile  # noqa: E402
from mxfp4_compile import CheckpointError, OptimizeError  # noqa: E402
from mxfp4_compile.passes.find.discover import DiscoveryError, find_candidates, record_calls  # noqa: E402
from mxfp4_compile.tools.families import listed_families, tiny_inputs, tiny_model, undecorated_families  # noqa: E402

# Experts in a ModuleList or ModuleDict.
LISTED = [
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "glm4v_moe", "hunyuan_v1_moe",
    "jamba", "minimax", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
]  # fmt: skip
# Packed experts, in loops over all or over sorted rows, and dense products of every token with every expert.
PACKED = [
    "aria", "dbrx", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared", "jetmoe", "llama4",
    "longcat_flash", "qwen3_vl_moe",
]  # fmt: skip
FUSED = [*LISTED, *PACKED]
# Its tokens are chosen by a mask with a capacity, so that the products are grouped and all else stays.
SPLIT = ["switch_transformers"]
# What each lacks, in words of the report's reason.
REFUSED = {
    "nllb_moe": "the experts depend on their order|does not trace",
    "vitpose_backbone": "a child is one matrix, not an up- and a down-projection",
}
# Of these families only some modules are rewritten: what the others lack.
PARTLY = {"jetmoe": "something else \\(attention\\) lies between them"}
# Its own forward does not run in 4.57.6 once it has experts.
BROKEN = ["doge"]
CAUSAL = [f for f in FUSED if f not in ("aria", "glm4v_moe", "llama4", "qwen3_omni_moe", "qwen3_vl_moe", "jetmoe")]

pytestmark = pytest.mark.slow


def tiny(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    # These two have experts from their second layer on, or two kinds of layers.
    return tiny_model(family, dtype=dtype, layers=2 if family in ("qwen3_next", "granitemoehybrid") else 1)


def of_each(families: Iterable[str]) -> list[Any]:
    """Parameters: what becomes of a family is found once, for test_models_doc.py too."""
    return [pytest.param(f, marks=group(f)) for f in families]


def test_every_family_is_in_one_of_the_lists() -> None:
    assert sorted([*FUSED, *SPLIT, *REFUSED, *BROKEN]) == sorted({*listed_families(), *undecorated_families()})


@pytest.mark.matching
@pytest.mark.parametrize("family", of_each(REFUSED))
def test_refused_with_the_property_it_lacks(family: str) -> None:
    model, _ = surveyed(family)  # of nllb_moe the longest of all: first
    assert model.mxfp4_report.sites
    assert {s.outcome for s in model.mxfp4_report.sites} <= {"unmatched", "dense"}
    assert all(re.search(REFUSED[family], s.reason) for s in model.mxfp4_report.sites)


@pytest.mark.matching
@pytest.mark.parametrize("family", of_each([*FUSED, *SPLIT]))
def test_rewritten_verified_and_put_back(family: str) -> None:
    model, _ = surveyed(family)
    inputs, keys = tiny_inputs(model), set(tiny_model(family, dtype=torch.bfloat16).state_dict())
    outcome = "split" if family in SPLIT else "fused"
    rewritten = [s for s in model.mxfp4_report.sites if s.outcome == outcome]
    assert rewritten
    assert all(s.error <= 1.5 * s.original_error + 2e-3 for s in rewritten)
    left = [s for s in model.mxfp4_report.sites if s.outcome != outcome]
    assert bool(left) == (family in PARTLY)
    assert all(re.search(PARTLY[family], s.reason) for s in left)
    longer = tiny_inputs(model, batch=3, length=14, seed=1)
    with torch.no_grad():
        ours = [model(**x).logits for x in (inputs, longer)]
        mxfp4_compile.restore(model)
        theirs = [model(**x).logits for x in (inputs, longer)]
    assert set(model.state_dict()) == keys
    for y, z in zip(ours, theirs, strict=True):
        assert (y - z).norm() <= 0.05 * z.norm()


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_needs_no_example_inputs(family: str) -> None:
    model = tiny(family)
    candidates = find_candidates(model)
    record_calls(model, candidates)
    assert any(c.calls for c in candidates)


@pytest.mark.parametrize("family", BROKEN)
def test_does_not_run_by_itself(family: str) -> None:
    model = tiny(family)
    with pytest.raises(TypeError, match="must be Tensor, not tuple"):
        model(**tiny_inputs(model))
    with pytest.raises((OptimizeError, DiscoveryError)):
        mxfp4_compile.optimize(model)


def test_gpt_oss_as_it_computes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts multiply every token with every expert unless they are on a CPU."""
    from transformers.models.gpt_oss import modeling_gpt_oss as module

    source = textwrap.dedent(inspect.getsource(module.GptOssExperts.forward))
    fork = 'hidden_states.device.type == "cpu" or self.training'
    assert fork in source
    space = dict(vars(module))
    exec(source.replace(fork, "self.training"), space)
    monkeypatch.setattr(module.GptOssExperts, "forward", space["forward"])
    model = tiny("gpt_oss")
    mxfp4_compile.optimize(model)
    (site,) = model.mxfp4_report.sites
    assert (site.outcome, site.module_class) == ("fused", "GptOssMLP")
    inputs = tiny_inputs(model, batch=3, length=5)
    with torch.no_grad():
        ours = model(**inputs).logits
        theirs = mxfp4_compile.restore(model)(**inputs).logits
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_a_model_that_brings_its_own_code(tmp_path: Path) -> None:
    check_rewritten_and_generating(publish(tmp_path / "model"))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_generate_gives_the_same_tokens(family: str) -> None:
    model = tiny(family, torch.float32)
    ids = tiny_inputs(model, batch=2, length=5)["input_ids"]
    mxfp4_compile.optimize(model)
    ours = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert ours.shape[1] > 5
    mxfp4_compile.restore(model)
    assert torch.equal(ours, model.generate(ids, max_new_tokens=12, do_sample=False))


def test_an_optimized_block_compiles_as_one_graph() -> None:
    model = tiny("qwen3_moe", torch.float32)
    mxfp4_compile.optimize(model)
    block = model.model.layers[0].mlp
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch, length in ((2, 9), (1, 1), (3, 4)):
        x = torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            for a, b in zip(compiled(x), block(x), strict=True):
                torch.testing.assert_close(a, b)


def test_state_dict_goes_through_a_file_and_checkpoints_say_what_they_need(tmp_path: Path) -> None:
    model, other = tiny("mixtral"), tiny("mixtral")
    with torch.no_grad():
        other.model.layers[0].block_sparse_moe.experts[1].w1.weight.zero_()
    for m in (model, other):
        mxfp4_compile.optimize(m)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert not torch.equal(other(**inputs).logits, model(**inputs).logits)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    with pytest.raises(CheckpointError, match="saving a checkpoint needs transformers 5"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    mxfp4_compile.restore(model).save_pretrained(tmp_path / "b")  # transformers' own: the dequantized experts
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(CheckpointError, match="needs transformers 5"):
        mxfp4_compile.load(tmp_path / "b")
    with pytest.raises(CheckpointError, match="needs transformers 5"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "b", quantization_config=mxfp4_compile.Mxfp4CompileConfig()
        )


def test_nothing_is_changed_where_strict_refuses() -> None:
    model = tiny("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts[3].act_fn = nn.GELU()
    with pytest.raises(OptimizeError, match="expert 3"):
        mxfp4_compile.optimize(model)
    assert model.model.layers[0].mlp.experts is experts
