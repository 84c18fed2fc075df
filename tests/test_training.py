"""Training around frozen experts: gradients are those of the restored model, whose weights are the dequantized ones."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_checkpoints import gradient_checkpointing
from recording import recorded
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.passes.build.training import changed_by_training
from mxfp4_compile.tools.families import tiny_inputs, tiny_model


def gradients(model: nn.Module, inputs: dict[str, Tensor], call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Of everything that requires them, by name, for a loss that weighs all logits differently."""
    model.zero_grad()
    logits = (model if call is None else call)(**inputs | {"use_cache": False}).logits
    assert logits.requires_grad
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits.float() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor of ``ours``; every one of them must be there in ``theirs``."""
    return max(float((a.double() - theirs[n].double()).norm() / theirs[n].double().norm()) for n, a in ours.items())


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """An optimized model of which all but the final norm is trainable, and the restored copy. fp32."""
    model = tiny_model("qwen3_moe", dtype=torch.float32).requires_grad_(True)
    model.model.norm.weight.requires_grad_(False)
    mxfp4_compile.optimize(model, verify=False)
    return model, mxfp4_compile.restore(copy.deepcopy(model))


def test_what_is_no_expert_requires_gradients_as_before(pair: tuple[nn.Module, nn.Module]) -> None:
    model, ordinary = pair
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"model.norm.weight"}
    assert {n for n, p in ordinary.named_parameters() if not p.requires_grad} == {"model.norm.weight"}
    frozen = tiny_model("gpt_oss", layers=1).requires_grad_(False)
    mxfp4_compile.restore(mxfp4_compile.optimize(frozen, verify=False))
    assert not any(p.requires_grad for p in frozen.parameters())


def compiled(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


CHECKPOINTED = {"checkpointed": False, "checkpointed, reentrant": True}


@pytest.mark.parametrize("way", ["checkpointed", "checkpointed, reentrant", "eager", "compiled"])
def test_gradients_are_those_of_the_restored_model(pair: tuple[nn.Module, nn.Module], way: str) -> None:
    model, ordinary = pair
    inputs = tiny_inputs(model)
    theirs = gradients(ordinary, inputs)
    with gradient_checkpointing(model, CHECKPOINTED[way]) if way in CHECKPOINTED else nullcontext():
        ours = gradients(model, inputs, compiled(model) if way == "compiled" else model.train())
    model.eval()
    assert set(ours) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "model.layers.0.mlp.gate.weight" in ours and "model.embed_tokens.weight" in ours
    assert error(ours, theirs) <= 2e-5


def test_gradients_under_autocast(pair: tuple[nn.Module, nn.Module]) -> None:
    model, ordinary = pair
    inputs = tiny_inputs(model)
    exact = gradients(ordinary, inputs)

    def autocast(model: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, inputs)

    assert error(autocast(model), exact) <= 1.25 * error(autocast(ordinary), exact)


def test_a_model_prepared_by_peft() -> None:
    """``prepare_model_for_kbit_training`` makes everything fp32 but the experts."""
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    mxfp4_compile.optimize(model, verify=False)
    ordinary = mxfp4_compile.restore(copy.deepcopy(model)).float()
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    inputs = tiny_inputs(model)
    site = mxfp4_sites(model)["model.layers.0.mlp.experts"]
    seen: list[Tensor] = []
    handle = site.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    model.model.embed_tokens.weight.requires_grad_(True)
    ours = gradients(model, inputs)
    handle.remove()
    assert [t.dtype for t in seen] == [torch.float32, torch.float32]
    assert set(ours) == {"model.embed_tokens.weight"}
    assert error(ours, gradients(ordinary, inputs)) <= 5e-2
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(TypeError, match=r"rewritten for an argument of torch\.bfloat16, got torch\.float64"):
        site(
            seen[0].detach().double(), *(torch.zeros(seen[0].shape[0], 2, dtype=d) for d in (torch.int64, torch.float))
        )


def test_experts_themselves_are_not_trained(pair: tuple[nn.Module, nn.Module]) -> None:
    site = mxfp4_sites(pair[0])["model.layers.1.mlp.experts"]
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.experts: weights of MXFP4 experts .*restore"):
        site.requires_grad_(True)
    assert site.requires_grad_(False) is site


class Noisy(nn.Module):
    def __init__(self, noise: float, p: float) -> None:
        super().__init__()
        self.noise, self.p = noise, p
        self.inner = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.noise > 0:
            x = x + self.noise
        return self.helper(self.inner(x))

    def helper(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=self.training)


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def test_what_training_mode_changes_is_found() -> None:
    assert changed_by_training(Noisy(0.0, 0.0)) == ()
    assert changed_by_training(Noisy(0.5, 0.0)) == ("self.training in forward of Noisy",)
    assert changed_by_training(Noisy(0.0, 0.1)) == ("self.training in helper of Noisy", "inner (Dropout) with p=0.1")
    assert changed_by_training(nn.Sequential(Bare())) == ("self.training in forward of 0 (Bare)",)


def test_dropout_in_experts_is_refused_in_training_mode() -> None:
    model = tiny_model("qwen3_moe", dtype=torch.float32, layers=1)
    model.model.layers[0].mlp.experts.dropout = nn.Dropout(0.25)
    mxfp4_compile.optimize(model, verify=False)
    inputs = tiny_inputs(model)
    with pytest.raises(
        RuntimeError, match=r"layers\.0\.mlp\.experts: in training mode the original has dropout \(Drop"
    ):
        model.train()(**inputs)
    assert model.eval()(**inputs).logits.isfinite().all()


def test_recorded_steps_are_of_the_present_weights() -> None:
    model = tiny_model("qwen3_moe", dtype=torch.float32)
    mxfp4_compile.optimize(model, verify=False)
    recorder = recorded(model)
    options = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    ids = tiny_inputs(model)["input_ids"]
    model.generate(ids, **options)
    model.generate(ids, **options)
    assert recorder.recorded == 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gradients(model, {"input_ids": ids})
    optimizer.step()
    model.generate(ids, **options)
    assert recorder.recorded == 2
    assert "weights were written to" in str(model.mxfp4_report)


def test_recorded_steps_have_the_active_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", dtype=torch.float32)
    mxfp4_compile.optimize(model, verify=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    recorder = recorded(model)
    options = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    ids = tiny_inputs(model)["input_ids"]
    adapted.generate(input_ids=ids, **options)
    assert recorder.recorded == 1
    with adapted.disable_adapter():
        adapted.generate(input_ids=ids, **options)
    assert recorder.recorded == 2


@pytest.mark.slow
def test_the_example_of_fine_tuning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with an error unless the held-out loss falls and the adapter that it reads back gives the same one."""
    pytest.importorskip("peft")
    script = Path(__file__).parents[1] / "examples" / "finetune" / "finetune.py"
    monkeypatch.setattr("sys.argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert "read back" in capsys.readouterr().out
