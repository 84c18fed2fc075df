"""Models that are no causal language models: images and audio as inputs, several towers, other heads, no head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import mxfp4_compile  # noqa: E402
from mxfp4_compile import OptimizeError  # noqa: E402
from mxfp4_compile.passes.build.module import mxfp4_sites  # noqa: E402
from mxfp4_compile.tools.families import decorated_families, tiny_inputs, tiny_model  # noqa: E402


def needs(family: str) -> None:
    if family not in decorated_families():
        pytest.skip(f"transformers {transformers.__version__} has no {family} with packed experts")


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(model(**inputs).to_tuple())
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def equal_to_the_restored_one(model: nn.Module, inputs: dict[str, Any], sites: int) -> None:
    """Every site verified; outputs in fp32 are those of the ordinary model with the same dequantized weights."""
    report = model.mxfp4_report
    assert len(mxfp4_sites(model)) == sites == len(report.rewritten)
    assert all(s.error is not None for s in report.rewritten)
    ours = outputs(model, inputs)
    assert ours and all(t.isfinite().all() for t in ours)
    theirs = outputs(mxfp4_compile.restore(model), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# images


def image_inputs(model: nn.Module, images: int = 2) -> dict[str, Any]:
    """Token ids with one image's placeholders each, and the image as rows of patches (4 x 4 of them)."""
    vision, token = model.config.vision_config, model.config.image_token_id
    merge = vision.spatial_merge_size
    grid = torch.tensor([[1, 4, 4]] * images)
    generator = torch.Generator().manual_seed(0)
    width = vision.in_channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    ids = tiny_inputs(model, images, 12)["input_ids"]
    ids[:, 3 : 3 + 16 // merge**2] = token
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16 * images, width, generator=generator),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == token).int(),
        "use_cache": False,
    }


def vision_language(family: str) -> tuple[nn.Module, dict[str, Any]]:
    needs(family)
    model = tiny_model(family, image_token_id=100)
    return model, image_inputs(model)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", pytest.param("glm4v_moe", marks=pytest.mark.slow)])
def test_a_vision_language_model_with_pixels(family: str) -> None:
    model, inputs = vision_language(family)
    seen: list[torch.Size] = []
    handle = model.model.visual.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    mxfp4_compile.optimize(model, example_inputs=inputs)
    assert seen, "the vision tower was not run"
    handle.remove()
    text = tiny_inputs(model)
    with torch.no_grad():
        assert model(**text).logits.isfinite().all()
    equal_to_the_restored_one(model, inputs, sites=2)


# experts that these inputs do not reach


def test_towers_that_no_forward_reaches_are_named() -> None:
    needs("qwen3_omni_moe")
    model = tiny_model("qwen3_omni_moe", model_class="Qwen3OmniMoeForConditionalGeneration")
    with pytest.raises((OptimizeError, RuntimeError)):
        mxfp4_compile.optimize(model)  # its own forward is generate()'s
    thinker = model.thinker
    mxfp4_compile.optimize(thinker, example_inputs=tiny_inputs(thinker))
    equal_to_the_restored_one(thinker, tiny_inputs(thinker), sites=2)


def vision_experts(narrow: bool) -> nn.Module:
    needs("dots3_note")
    model = tiny_model("dots3_note", model_class="Dots3NoteForConditionalGeneration")
    if narrow:
        experts = model.model.vision_tower.blocks[0].mlp.experts
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:, :32].clone())
        experts.down_proj = nn.Parameter(experts.down_proj[:, :, :16].clone())
    return model


def test_vision_experts_equal_to_the_texts_are_matched_by_their_calls() -> None:
    model = vision_experts(narrow=False)
    mxfp4_compile.optimize(model, example_inputs=tiny_inputs(model))
    assert [s.names[0].split(".")[1] for s in model.mxfp4_report.sites] == ["language_model"] * 2 + ["vision_tower"]
    equal_to_the_restored_one(model, tiny_inputs(model), sites=3)


def test_vision_experts_that_text_does_not_reach_are_named() -> None:
    model = vision_experts(narrow=True)
    with pytest.raises(OptimizeError, match=r"vision_tower\S+ \[\w+\]: no forward with these inputs reached it"):
        mxfp4_compile.optimize(model, example_inputs=tiny_inputs(model))
    assert not mxfp4_sites(model)
    mxfp4_compile.optimize(model, example_inputs=tiny_inputs(model), strict=False)
    (left,) = [s for s in model.mxfp4_report.sites if not s.rewritten]
    assert "vision_tower" in left.names[0] and "example_inputs" in left.reason
    equal_to_the_restored_one(model, tiny_inputs(model), sites=2)


def test_the_talker_of_an_omni_model() -> None:
    needs("qwen3_omni_moe")
    whole = tiny_model("qwen3_omni_moe", model_class="Qwen3OmniMoeForConditionalGeneration")
    talker = whole.talker.model
    generator = torch.Generator().manual_seed(0)
    inputs = {"inputs_embeds": torch.randn(2, 9, talker.config.hidden_size, generator=generator), "use_cache": False}
    mxfp4_compile.optimize(talker, example_inputs=inputs)
    assert {s.module_class for s in talker.mxfp4_report.sites} == {"Qwen3OmniMoeTalkerTextExperts"}
    equal_to_the_restored_one(talker, inputs, sites=2)


# other heads, no head


@pytest.mark.parametrize(
    ("family", "cls"),
    [
        ("mixtral", "MixtralForSequenceClassification"),
        ("qwen3_moe", "Qwen3MoeForTokenClassification"),
        ("qwen3_moe", "Qwen3MoeModel"),
        ("openai_privacy_filter", None),
    ],
)
def test_other_heads(family: str, cls: str | None) -> None:
    needs(family)
    model = tiny_model(family, **({} if cls is None else {"model_class": cls}))
    mxfp4_compile.optimize(model)
    equal_to_the_restored_one(model, tiny_inputs(model), sites=2)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


class BertLikeEncoder(nn.Module):
    """A remote-code text encoder (Nomic-BERT like): bidirectional attention, experts in every second layer, pooled.

    Its forward takes ids and an attention mask and returns one normalized vector per text.
    """

    class Block(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
            self.mlp = _EncoderMoE(experts) if experts else _mlp()

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.norm1(x + self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0])
            return self.norm2(x + self.mlp(x))

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(128, 64)
        self.layers = nn.ModuleList([self.Block(6 if i % 2 else 0) for i in range(4)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask == 0)
        pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return nn.functional.normalize(pooled, dim=-1)


class _EncoderMoE(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(64, experts, bias=False)
        self.experts = nn.ModuleList([_mlp() for _ in range(experts)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.router(rows).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(rows)
        mask = nn.functional.one_hot(ids, len(self.experts)).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            column, token = torch.where(mask[e])
            out.index_add_(0, token, expert(rows[token]) * weights[token, column, None])
        return out.view_as(x)


def test_a_text_encoder_of_remote_code() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertLikeEncoder().eval()
    ids = torch.randint(128, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    mxfp4_compile.optimize(model, example_inputs={"input_ids": ids, "attention_mask": mask})
    assert [s.names[0] for s in model.mxfp4_report.rewritten] == ["layers.1.mlp", "layers.3.mlp"]
    with torch.no_grad():
        ours = model(ids, mask)
        theirs = mxfp4_compile.restore(model)(ids, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
