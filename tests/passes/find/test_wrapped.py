"""Models that accelerate dispatched and models with PEFT adapters: what works, what is refused, and by what name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from loop_models import Model, RemoteMoE

import mxfp4_compile
from mxfp4_compile import OptimizeError
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.passes.find.foreign_hooks import unhooked
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

CPU = torch.device("cpu")


def logits(model: nn.Module, inputs: dict[str, Any] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(tiny_inputs(tiny_model("qwen3_moe")) if inputs is None else inputs)).logits


def loop_model() -> nn.Module:
    return Model(RemoteMoE, torch.float32)


def loop_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))}


# accelerate


def hooked(model: nn.Module, **options: Any) -> nn.Module:
    """What dispatch_model does for several devices: a hook on every module with tensors of its own and on the model."""
    hooks = pytest.importorskip("accelerate.hooks")
    for module in model.modules():
        if module is model or any(True for _ in module.parameters(recurse=False)):
            hook = hooks.AlignDevicesHook(execution_device=CPU, io_same_device=module is model, **options)
            hooks.add_hook_to_module(module, hook)
    return model


@pytest.mark.parametrize("append", [False, True], ids=["one hook", "a chain of hooks"])
def test_hooks_of_a_dispatched_model_keep_working(append: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain = hooked(tiny_model("qwen3_moe")), mxfp4_compile.optimize(tiny_model("qwen3_moe"))
    original = model.model.layers[0].mlp.experts
    if append:
        hooks.add_hook_to_module(original, hooks.ModelHook(), append=True)
    theirs = original._hf_hook
    moved: list[int] = []

    class Seen(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            moved.append(len(args))
            return args, kwargs

    hooks.add_hook_to_module(original, Seen(), append=True)
    mxfp4_compile.optimize(model)
    site = model.model.layers[0].mlp.experts
    assert site in mxfp4_sites(model).values() and site._hf_hook is not theirs
    moved.clear()
    assert torch.equal(logits(model), logits(plain))
    assert moved == [3]
    assert torch.equal(logits(copy.deepcopy(model)), logits(plain))
    mxfp4_compile.restore(model)
    assert model.model.layers[0].mlp.experts is original and "_hf_hook" in vars(original)
    moved.clear()
    torch.testing.assert_close(logits(model), logits(plain), rtol=2e-4, atol=2e-4)
    assert moved == [3]
    hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(logits(model), logits(plain), rtol=2e-4, atol=2e-4)


def test_a_hook_on_rewritten_experts_can_be_removed() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = mxfp4_compile.optimize(hooked(tiny_model("qwen3_moe")))
    before = logits(model)
    hooks.remove_hook_from_module(model, recurse=True)
    assert not any("_hf_hook" in vars(m) for m in model.modules())
    assert torch.equal(logits(model), before)


def test_experts_on_a_device_of_their_own() -> None:
    """The hook moves what arrives from elsewhere: arguments on meta stand for another device's."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts

    class FromElsewhere(hooks.AlignDevicesHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            args = tuple(torch.ones_like(a, device="cpu") if a.device.type == "meta" else a for a in args)
            return super().pre_forward(module, *args, **kwargs)

    hooks.add_hook_to_module(experts, FromElsewhere(execution_device=CPU))
    mxfp4_compile.optimize(model)
    site = model.model.layers[0].mlp.experts
    assert {i.device for i in site.plan.pattern.tensors} == {CPU}
    args = (torch.empty(3, 64), torch.zeros(3, 2, dtype=torch.int64), torch.empty(3, 2))
    ones = [torch.ones_like(a) for a in args]
    with torch.no_grad():
        assert torch.equal(site(*[a.to("meta") for a in args]), site(*ones))


@pytest.mark.slow
def test_loops_in_a_dispatched_model() -> None:
    model, plain = hooked(loop_model()), mxfp4_compile.optimize(loop_model(), example_inputs=loop_inputs())
    mxfp4_compile.optimize(model, example_inputs=loop_inputs())
    assert len(mxfp4_sites(model)) == 2
    with torch.no_grad():
        assert torch.equal(model(**loop_inputs()), plain(**loop_inputs()))


def test_dispatch_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("qwen3_moe")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                  "lm_head": "cpu"}  # fmt: skip
    want = logits(mxfp4_compile.optimize(tiny_model("qwen3_moe")))
    accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    assert "_hf_hook" in vars(model)
    assert torch.equal(logits(mxfp4_compile.optimize(model)), want)


def test_offloaded_experts_are_refused_by_name_and_others_may_be_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_model("qwen3_moe"), CPU)
    state = logits(model)
    with pytest.raises(OptimizeError, match=r"layers\.0\.mlp\.experts\.\w+ is on the meta device.*mxfp4_compile\.load"):
        mxfp4_compile.optimize(model)
    assert torch.equal(logits(model), state)

    model = tiny_model("qwen3_moe")
    want = logits(mxfp4_compile.optimize(copy.deepcopy(model)))
    for layer in model.model.layers:
        accelerate.cpu_offload(layer.self_attn, CPU)
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    assert torch.equal(logits(mxfp4_compile.optimize(model)), want)


def test_offloaded_loops_are_refused_by_name() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(loop_model(), CPU)
    with pytest.raises(OptimizeError, match=r"is on the meta device: accelerate's AlignDevicesHook"):
        mxfp4_compile.optimize(model, example_inputs=loop_inputs())


def test_weights_that_were_never_loaded_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(OptimizeError, match=r"layers\.1\.mlp\.experts\.\w+ is on the meta device: load"):
        mxfp4_compile.optimize(model)


def test_unhooked_puts_everything_back() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer = nn.Linear(2, 2)
    own = layer.forward = lambda x: x + 1  # an override from before the hook stays in force without it
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device=CPU))
    before = dict(vars(layer))
    with unhooked(layer):
        assert "_hf_hook" not in vars(layer)
        assert layer.forward is own
    assert dict(vars(layer)) == before


def test_hooks_that_always_fire_are_kept() -> None:
    model = tiny_model("qwen3_moe")
    seen: list[str] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda *_: seen.append("called"), always_call=True)
    mxfp4_compile.optimize(model)
    seen.clear()
    with pytest.raises(TypeError):
        model.model.layers[0].mlp.experts(torch.zeros(1, 64))
    assert seen == ["called"]


# PEFT


def adapted(model: nn.Module, targets: Any, parameters: list[str] | None = None) -> nn.Module:
    """A LoRA on the targets, with weights that do something."""
    peft = pytest.importorskip("peft")
    options = {} if parameters is None else {"target_parameters": parameters}
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("first", ["optimize", "adapter"])
def test_an_adapter_on_attention(first: str) -> None:
    model = tiny_model("qwen3_moe")
    if first == "optimize":
        model = adapted(mxfp4_compile.optimize(model), ["q_proj", "v_proj"])
    else:
        model = mxfp4_compile.optimize(adapted(model, ["q_proj", "v_proj"]))
    ours = logits(model)
    with model.disable_adapter():
        without = logits(model)
    plain = logits(mxfp4_compile.optimize(tiny_model("qwen3_moe")))
    torch.testing.assert_close(without, plain, rtol=1e-5, atol=1e-5)
    assert float((ours - without).norm() / without.norm()) > 0.01
    inputs = tiny_inputs(tiny_model("qwen3_moe"))
    tokens = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    owner = model.base_model.model if first == "optimize" else model
    mxfp4_compile.restore(owner)
    assert not mxfp4_sites(model)
    torch.testing.assert_close(logits(model), ours, rtol=2e-4, atol=2e-4)
    again = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again, tokens)


def test_an_adapter_on_attention_merged_after_optimize() -> None:
    model = adapted(mxfp4_compile.optimize(tiny_model("qwen3_moe")), ["q_proj", "v_proj"])
    ours = logits(model)
    merged = model.merge_and_unload()
    assert mxfp4_sites(merged)
    torch.testing.assert_close(logits(merged), ours, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_packed_experts_is_refused_until_it_is_merged() -> None:
    model = adapted(tiny_model("qwen3_moe"), ["q_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    before = logits(model)
    with pytest.raises(OptimizeError, match=r"0\.mlp\.experts\S* is a PEFT layer .*'default'.*merge_and_unload"):
        mxfp4_compile.optimize(model)
    assert torch.equal(logits(model), before)
    merged = mxfp4_compile.optimize(model.merge_and_unload())
    assert float((logits(merged) - before).norm() / before.norm()) < 0.3
    assert len(mxfp4_sites(merged)) == 2


def test_an_adapter_on_experts_in_a_list_is_refused_until_it_is_merged() -> None:
    model = adapted(loop_model(), r".*\.experts\.\d+\.(up|down)_proj")
    before = model(**loop_inputs())
    with pytest.raises(OptimizeError, match=r"is a PEFT layer \[Linear\] with the adapter 'default'"):
        mxfp4_compile.optimize(model, example_inputs=loop_inputs())
    assert torch.equal(model(**loop_inputs()), before)
    merged = mxfp4_compile.optimize(model.merge_and_unload(), example_inputs=loop_inputs())
    assert mxfp4_sites(merged)


def test_an_adapter_put_on_experts_afterwards_is_no_silent_nothing() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"))
    ids = torch.arange(3, 9)[None]
    before = model(ids).logits
    model = adapted(model, [], ["mlp.experts.gate_up_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


def test_an_adapter_put_inside_a_rewritten_block_afterwards_raises() -> None:
    """What a block kept (its router, shared experts) is in its graph as plain tensors."""
    model = mxfp4_compile.optimize(loop_model(), example_inputs=loop_inputs())
    model = adapted(model, r".*shared_experts\.up_proj")
    with pytest.raises(TypeError, match=r"shared_experts\.up_proj\.weight is no parameter of its Linear any more"):
        model(**loop_inputs())
