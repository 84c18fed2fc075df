"""LoRA on MXFP4 experts is PEFT's on the same weights, dequantized: outputs, gradients, files. fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import recorded
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

peft = pytest.importorskip("peft")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3")


def config(targets: list[str] = TARGETS, **more: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "target_modules": [], "target_parameters": targets} | more)


@pytest.fixture(scope="module", params=FAMILIES)
def optimized(request: pytest.FixtureRequest) -> nn.Module:
    return mxfp4_compile.optimize(tiny_model(request.param, dtype=torch.float32, layers=2), verify=False)


@pytest.fixture(scope="module")
def qwen3() -> nn.Module:
    return mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=torch.float32, layers=1), verify=False)


def both(optimized: nn.Module, given: Any) -> tuple[nn.Module, nn.Module]:
    """An adapter on a copy of the optimized model, and the same one on the restored model."""
    ordinary = mxfp4_compile.restore(copy.deepcopy(optimized))
    ours = peft.get_peft_model(copy.deepcopy(optimized), copy.deepcopy(given))
    theirs = peft.get_peft_model(ordinary, copy.deepcopy(given))
    fill(ours)
    incompatible = peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    assert not incompatible.unexpected_keys
    return ours, theirs


def fill(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(**inputs | {"use_cache": False}).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(ours: nn.Module, theirs: nn.Module) -> None:
    inputs = tiny_inputs(theirs.get_base_model())
    a, da = loss_and_gradients(ours, inputs)
    b, db = loss_and_gradients(theirs, inputs)
    assert distance(a, b) <= 2e-5
    assert set(da) == set(db) and any("lora_A" in n for n in da)
    assert max(distance(g, db[n]) for n, g in da.items()) <= 2e-5


def test_outputs_and_gradients_are_peft_s(optimized: nn.Module) -> None:
    ours, theirs = both(optimized, config())
    check(ours, theirs)
    with torch.no_grad(), ours.disable_adapter():
        inputs = tiny_inputs(optimized)
        assert torch.equal(ours(**inputs).logits, optimized(**inputs).logits)


@pytest.mark.parametrize(
    "given",
    [
        {"targets": ["experts.down_proj"]},
        {"targets": ["experts.gate_up_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r".*\.experts\.down_proj": 5}},
    ],
)
def test_one_projection_patterns_attention_beside(qwen3: nn.Module, given: dict[str, Any]) -> None:
    check(*both(qwen3, config(**given)))


def test_gradient_checkpointing(qwen3: nn.Module) -> None:
    ours, theirs = both(qwen3, config())
    ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    ours.train()
    check(ours, theirs)


def test_files_are_peft_s(qwen3: nn.Module, tmp_path: Path) -> None:
    ours, theirs = both(qwen3, config())
    inputs = tiny_inputs(qwen3)
    ours.save_pretrained(tmp_path / "ours")
    fill(theirs, seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    ordinary = mxfp4_compile.restore(copy.deepcopy(qwen3))
    with torch.no_grad():
        read = peft.PeftModel.from_pretrained(ordinary, tmp_path / "ours")
        assert distance(ours(**inputs).logits, read(**inputs).logits) <= 2e-5
        read = peft.PeftModel.from_pretrained(copy.deepcopy(qwen3), tmp_path / "theirs")
        assert distance(read(**inputs).logits, theirs(**inputs).logits) <= 2e-5
        first = read(**inputs).logits
        read.load_adapter(tmp_path / "ours", "second")
        read.set_adapter("second")
        assert distance(read(**inputs).logits, ours(**inputs).logits) <= 2e-5
        read.set_adapter("default")
        assert torch.equal(read(**inputs).logits, first)


def test_merge_is_refused_until_restored(qwen3: nn.Module) -> None:
    ours, theirs = both(qwen3, config(target_modules=["q_proj"]))
    before = copy.deepcopy(ours.state_dict())
    for call in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match=r"experts: adapters cannot be merged.*restore\(peft_model"):
            call()
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    mxfp4_compile.restore(ours.get_base_model())
    inputs = tiny_inputs(qwen3)
    with torch.no_grad():
        assert distance(ours.merge_and_unload()(**inputs).logits, theirs(**inputs).logits) <= 2e-5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target_modules": ["experts"], "targets": None}, r"target_parameters=\['gate_up_proj', 'down_proj'\]"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_is_refused(qwen3: nn.Module, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(copy.deepcopy(qwen3), config(**given))


def test_a_file_of_another_rank(qwen3: nn.Module, tmp_path: Path) -> None:
    ours, _ = both(qwen3, config())
    ours.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"r": 3', '"r": 4'))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(qwen3), tmp_path)


def test_generate_gives_the_tokens_of_the_plain_loop(qwen3: nn.Module) -> None:
    ours, theirs = both(qwen3, config())
    ids = tiny_inputs(qwen3)["input_ids"]
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    for model in (ours, theirs):
        model.eval()
    expected = theirs.generate(input_ids=ids, **options)
    recorder = recorded(ours.get_base_model())
    assert torch.equal(ours.generate(input_ids=ids, **options), expected)
    assert torch.equal(ours.generate(input_ids=ids, **options), expected)
    assert recorder.recorded == 0
    notes = runtime_of(ours.get_base_model()).report.notes
    assert sum("adapters on experts" in note for note in notes) == 1, notes
