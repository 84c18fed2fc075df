"""What changes a module's values from outside its class: kept where it can be, else refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_models import Model, RemoteMoE
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mxfp4_compile
from mxfp4_compile import OptimizeError
from mxfp4_compile.passes.alterations import hooks_of, own_forwards, without_hooks
from mxfp4_compile.tools.families import tiny_model


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def thrice(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out * 3


def halved(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] / 2, *args[1:])


def packed() -> tuple[nn.Module, nn.Module]:
    """A model of one layer and its experts, whose weights are packed."""
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    return model, model.model.layers[0].mlp.experts


@pytest.fixture(scope="module", autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 9, 64)}


def refusal(model: nn.Module, **options: Any) -> str:
    with pytest.raises(OptimizeError) as error:
        mxfp4_compile.optimize(model, **options)
    assert "Nothing was changed" in str(error.value)
    return str(error.value)


def test_hooks_of_experts_stay() -> None:
    """Hooks on the experts module itself change the rewritten module's values once, as they did the original's."""
    model, experts = packed()
    experts.register_forward_hook(thrice)
    experts.register_forward_pre_hook(halved)
    mxfp4_compile.optimize(model)
    built = model.model.layers[0].mlp.experts
    assert built is not experts and model.mxfp4_report.rewritten
    x, ids, weights = torch.randn(5, 64), torch.randint(8, (5, 2)), torch.rand(5, 2)
    with torch.no_grad():
        torch.testing.assert_close(built(x, ids, weights), built.forward(x / 2, ids, weights) * 3)


def test_a_hook_inside_that_changes_a_value_is_named() -> None:
    """It would be lost with the module that it is on."""
    model = Model(RemoteMoE, torch.float32)
    block = next(m for m in model.modules() if isinstance(m, RemoteMoE))
    block.experts[2].down_proj.register_forward_hook(thrice)
    words = refusal(model, example_inputs=inputs())
    assert "hooks change its values" in words and "experts.2.down_proj: thrice" in words


@pytest.mark.slow
def test_a_hook_inside_that_observes_is_noted() -> None:
    model = Model(RemoteMoE, torch.float32)
    block = next(m for m in model.modules() if isinstance(m, RemoteMoE))
    block.experts[2].register_forward_hook(lambda module, args, out: None)
    mxfp4_compile.optimize(model, example_inputs=inputs())
    assert any("experts.2" in note and "no longer run" in note for note in model.mxfp4_report.notes)


@pytest.mark.parametrize("kind", ["packed", pytest.param("list", marks=pytest.mark.slow)])
def test_parametrized_weights_are_named(kind: str) -> None:
    if kind == "packed":
        model, owner = packed()
        weight, options = "gate_up_proj", {}
    else:
        model, options = Model(RemoteMoE, torch.float32), {"example_inputs": inputs()}
        owner, weight = next(m for m in model.modules() if isinstance(m, RemoteMoE)).experts[1].up_proj, "weight"
    parametrize.register_parametrization(owner, weight, Twice())
    words = refusal(model, **options)
    assert f"{weight} is parametrized (Twice)" in words and "remove_parametrizations" in words


def test_a_forward_bound_to_the_original_is_named() -> None:
    model, experts = packed()
    before = experts.forward

    def scaled(*args: Tensor) -> Tensor:
        return before(*args) * 2

    experts.forward = scaled  # type: ignore[method-assign]
    assert "scaled" in refusal(model)


def test_hooks_come_back() -> None:
    block = RemoteMoE()
    block.register_forward_pre_hook(halved, with_kwargs=False)
    block.experts[0].register_forward_hook(thrice)
    assert hooks_of(block) == ["itself: halved", "experts.0: thrice"] and own_forwards(block) == []
    with without_hooks(block):
        assert hooks_of(block) == []
    assert hooks_of(block) == ["itself: halved", "experts.0: thrice"]
