"""Routing by a matrix: dense products made sparse where zeros are proven, masks with capacity; nothing is silent."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import dense_models
import pytest
import torch
from dense_models import FAITHFUL, MUTATIONS, AnyNumberPerToken, CapacityMoE, CountsInMask, FilledMask, H, TwoPerToken
from loop_models import Model
from torch import nn

import mxfp4_compile
from mxfp4_compile import OptimizeError

QUICK = {
    dense_models.NoMask, dense_models.SmallInsteadOfZero, dense_models.NextExpert, dense_models.UpBias,
    dense_models.NotZeroAtZero,
}  # fmt: skip


def inputs(batch: int = 2, length: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcomes(model: nn.Module) -> list[str]:
    return [s.outcome for s in model.mxfp4_report.sites]


def check_against_restored(model: nn.Module, tolerance: float) -> None:
    """One block: a second one's router would turn rounding into other experts."""
    calls = [inputs(b, seed=b) for b in (1, 2, 40, 300)]
    calls.append(calls[-1] * 1e4)
    calls.append(calls[1][:, :1].expand(2, 9, H).contiguous())
    with torch.no_grad():
        ours = [model.layers[0](x)[0] for x in calls]
        mxfp4_compile.restore(model)
        for x, y in zip(calls, ours, strict=True):
            theirs = model.layers[0](x)[0]
            assert torch.equal(y.isnan(), theirs.isnan())  # a sum of weights that underflows, in both
            y, theirs = y.nan_to_num(), theirs.nan_to_num()
            assert (y - theirs).norm() <= tolerance * theirs.norm(), "silently wrong"


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=b.__name__, marks=[pytest.mark.slow] if i > 1 else []) for i, b in enumerate(FAITHFUL)],
)
def test_dense_products_become_sparse(block: type[nn.Module]) -> None:
    model = Model(block, torch.float32)
    keys = set(model.state_dict())
    mxfp4_compile.optimize(model, example_inputs=(inputs(),))
    assert outcomes(model) == ["fused", "fused"]
    on_input = not issubclass(block, dense_models.WeightOnOutput)
    assert all(("weight on input" in s.form) == on_input for s in model.mxfp4_report.sites)
    assert any(k.endswith("gate_up_packed") for k in model.state_dict())
    check_against_restored(model, 1e-5)
    assert set(model.state_dict()) == keys


def test_dense_bf16() -> None:
    model = Model(dense_models.DenseMoE)
    mxfp4_compile.optimize(model, example_inputs=(inputs(dtype=torch.bfloat16),))
    for report in model.mxfp4_report.sites:
        assert report.outcome == "fused" and report.error <= 1.5 * report.original_error + 2e-3


def test_the_zeros_are_the_reason() -> None:
    model = Model(dense_models.UpBias, torch.float32)
    mxfp4_compile.optimize(model, example_inputs=(inputs(),), strict=False)
    assert outcomes(model) == ["unmatched", "unmatched"]
    assert "proven to be zero" in model.mxfp4_report.sites[0].reason
    model = Model(dense_models.NoMask, torch.float32)
    mxfp4_compile.optimize(model, example_inputs=(inputs(),), strict=False)
    assert "no routing matrix" in model.mxfp4_report.sites[0].reason


@pytest.mark.parametrize("block", [CapacityMoE, TwoPerToken], ids=lambda b: b.__name__)
def test_masks(block: type[nn.Module]) -> None:
    model = Model(block, torch.float32)
    keys = set(model.state_dict())
    mxfp4_compile.optimize(model, example_inputs=(inputs(),), strict=False)
    if block is CapacityMoE:  # with the constant factor 0.5 in the weights; dropped tokens are ids that are no expert
        assert outcomes(model) == ["fused", "fused"]
        check_against_restored(model, 1e-5)
        assert set(model.state_dict()) == keys
    else:
        assert outcomes(model) == ["split", "split"]  # one weight for two experts
        check_against_restored(model, 1e-5)


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(m, id=m.__name__, marks=[] if m in QUICK else [pytest.mark.slow])
        for m in (*MUTATIONS, AnyNumberPerToken, CountsInMask, FilledMask)
    ],
)
def test_never_silently_wrong(mutation: type[nn.Module]) -> None:
    model = Model(mutation, torch.float32)
    untouched = copy.deepcopy(model)
    try:
        mxfp4_compile.optimize(model, example_inputs=(inputs(),))
    except OptimizeError:
        with torch.no_grad():
            assert torch.equal(model(inputs()), untouched(inputs()))
        return
    check_against_restored(model, 1e-4)


# What only a forward shows


class Masked(nn.ModuleList):
    """One matrix per expert, run on every token, as ViTPose does."""

    def __init__(self) -> None:
        super().__init__([nn.Linear(H, H) for _ in range(4)])

    def forward(self, x):
        which = (x.sum(-1, keepdim=True) * 3).long() % 4
        return sum(expert(x) * (which == i) for i, expert in enumerate(self))


class Retrieval(nn.Module):
    """Experts that are rows of two tables, as in Doge."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(H, 32, bias=False)
        self.down = nn.Embedding(32, H)
        self.up = nn.Embedding(32, H)

    def forward(self, x):
        scores, ids = self.keys(x).topk(4, dim=-1)
        hidden = torch.einsum("bth,btkh->btk", x, self.down(ids))
        return torch.einsum("btk,btkh->bth", hidden.relu() * scores.softmax(-1), self.up(ids))


class ApartWithoutForward(nn.Module):
    """Two grouped projections that the model calls one at a time, as JetMoe's attention does."""

    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, H, H))

        def forward(self, x, sizes):
            return torch.cat([rows @ w for rows, w in zip(x.split(sizes), self.weight, strict=True)])

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = ApartWithoutForward.Projection(), ApartWithoutForward.Projection()

    def __init__(self) -> None:
        super().__init__()
        self.pair = self.Pair()

    def forward(self, x):
        rows = x.reshape(-1, H)
        sizes = [3, 4, 5, rows.shape[0] - 12]
        return self.pair.second(self.pair.first(rows, sizes).tanh(), sizes).view(x.shape)


@pytest.mark.parametrize(
    ("block", "words"),
    [(Masked, "a mask chooses"), (Retrieval, "no weight matrix"), (ApartWithoutForward, "called one at a time")],
)
def test_reported_by_name(block: type[nn.Module], words: str) -> None:
    model = Model(block, torch.float32)
    mxfp4_compile.optimize(model, example_inputs=(inputs(),), strict=False)
    sites = model.mxfp4_report.sites
    assert [s.outcome for s in sites] == ["unmatched", "unmatched"]
    assert sites[0].names[0].startswith("layers.0") and words in sites[0].reason
    with pytest.raises(OptimizeError, match=r"layers\.0"):
        mxfp4_compile.optimize(Model(block, torch.float32), example_inputs=(inputs(),))
    skipped = Model(block, torch.float32)
    mxfp4_compile.optimize(skipped, example_inputs=(inputs(),), strict=False, skip=["layers.*"])
    assert outcomes(skipped) == ["skipped", "skipped"]
    assert not any("names no" in note for note in skipped.mxfp4_report.notes)


class Heads(nn.Module):
    """Equal heads side by side on the same input, whose outputs are joined: no mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(H, 16) for _ in range(4)])

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(H, H, 3, padding=1), nn.Conv1d(H, H, 3, padding=1, bias=False)
        self.third = nn.Conv1d(H, H, 3, padding=1, bias=False)

    def forward(self, x):
        return self.third(self.second(self.first(x.transpose(1, 2)).relu())).transpose(1, 2)


@pytest.mark.parametrize("block", [Heads, Convolutions])
def test_lookalikes_are_not_reported(block: type[nn.Module]) -> None:
    model = Model(block, torch.float32)
    mxfp4_compile.optimize(model, example_inputs=(inputs(),), strict=False)
    assert not model.mxfp4_report.sites


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 99}
DENSE: dict[str, dict[str, int]] = {
    "LlamaForCausalLM": {**SMALL, "num_key_value_heads": 2},
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "n_positions": 64},
    "BertModel": SMALL,
    "T5ForConditionalGeneration": {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2},
    "ViTModel": {**SMALL, "image_size": 16, "patch_size": 8},
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 99},
    "WhisperModel": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 99,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
        "max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_nothing_is_reported_of_dense_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**DENSE[name])).eval()
    example = None
    if name == "ViTModel":
        example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    elif name == "WhisperModel":
        example = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.tensor([[1, 5, 6]] * 2)}
    mxfp4_compile.optimize(model, example_inputs=example, strict=False)
    assert not model.mxfp4_report.sites


# The families


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "change"),
    [
        ("switch_transformers", torch.float32, {"expert_capacity": 3}),
        ("nllb_moe", torch.float32, {}),
        ("llama4", torch.float32, {"top_k": 2}),
        ("jetmoe", torch.float32, {}),
        pytest.param("switch_transformers", torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param("nllb_moe", torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param("llama4", torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param("llama4", torch.bfloat16, {"top_k": 2}, marks=pytest.mark.slow),
        pytest.param("jetmoe", torch.bfloat16, {}, marks=pytest.mark.slow),
    ],
)
def test_families(family: str, dtype: torch.dtype, change: dict[str, int]) -> None:
    pytest.importorskip("transformers")
    from mxfp4_compile.tools import families

    if family not in families.undecorated_families():
        pytest.skip(f"this transformers decorates {family} or has none")
    model = families.tiny_model(family, dtype=dtype)
    for module in model.modules():
        for name, value in change.items():
            if hasattr(module, name):
                setattr(module, name, value)
    keys = set(model.state_dict())
    example = families.tiny_inputs(model)
    mxfp4_compile.optimize(model, example_inputs=example, strict=False)
    sites = model.mxfp4_report.sites
    routed = [s for s in sites if "attention" not in s.names[0]]
    assert routed and all(s.outcome == "fused" and s.error is not None for s in routed)
    assert all("called one at a time" in s.reason for s in sites if s not in routed)
    with torch.no_grad():
        ours = model(**example).logits.double()
        mxfp4_compile.restore(model)
        theirs = model(**example).logits.double()
    assert set(model.state_dict()) == keys
    assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
def test_loaded_and_generating(family: str, tmp_path: Path) -> None:
    """Packed weights within a block are quantized while they are read, too; other lengths run."""
    pytest.importorskip("transformers", minversion="5.0")
    from mxfp4_compile.tools import families

    model = families.tiny_model(family, dtype=torch.bfloat16)
    example = families.tiny_inputs(model)
    model.save_pretrained(tmp_path / "plain")
    mxfp4_compile.optimize(model, strict=False)
    loaded = mxfp4_compile.load(tmp_path / "plain", dtype=torch.bfloat16, strict=False)
    model.save_pretrained(tmp_path / "saved")
    again = mxfp4_compile.load(tmp_path / "saved", dtype=torch.bfloat16, strict=False)
    with torch.no_grad():
        ours = model(**example).logits
        assert torch.equal(loaded(**example).logits, ours)
        assert torch.equal(again(**example).logits, ours)
    assert model.generate(example["input_ids"][:, :5], max_new_tokens=3, do_sample=False).shape[1] == 8


def test_every_mutation_is_judged() -> None:
    """What dense_models.py writes down as a block runs in a test here, in the quick or in the slow tier."""
    judged = {*MUTATIONS, *FAITHFUL, AnyNumberPerToken, CountsInMask, FilledMask, CapacityMoE, TwoPerToken}
    bases = {base for block in judged for base in block.__mro__}
    for value in vars(dense_models).values():
        if inspect.isclass(value) and issubclass(value, (dense_models.DenseMoE, CapacityMoE)):
            assert value in judged or value in bases, f"{value.__name__} is judged by no test"
