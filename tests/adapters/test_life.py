"""Adapters on experts in the circumstances of trainings: checkpoints, autocast, 16 bits, split experts; refusals."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_checkpoints import gradient_checkpointing
from test_lora import both, config, distance, loss_and_gradients
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile.ops import schema
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

peft = pytest.importorskip("peft")


def optimized(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> nn.Module:
    """One layer; "split" has an activation that no fused kernel knows."""
    model = tiny_model("qwen3_moe" if family == "split" else family, dtype=dtype, layers=1)
    if family == "split":
        model.model.layers[0].mlp.experts.act_fn = nn.Tanh()
    return mxfp4_compile.optimize(model, verify=False)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return both(optimized(), config(target_modules=["q_proj"]))


def apart(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert set(mine) == set(theirs) and any("lora_A" in n for n in mine)
    return max(distance(g, theirs[n]) for n, g in mine.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(pair: tuple[nn.Module, nn.Module], reentrant: bool) -> None:
    ours, theirs = pair
    base, inputs = ours.get_base_model(), tiny_inputs(pair[1].get_base_model())
    with gradient_checkpointing(base, reentrant):
        logits, mine = loss_and_gradients(ours, inputs)
    expected, usual = loss_and_gradients(theirs, inputs)
    assert distance(logits, expected) <= 2e-5 and apart(mine, usual) <= 2e-5


def test_split_experts() -> None:
    """Their projections are single ops, to each of which its terms are added."""
    model = optimized("split")
    assert model.mxfp4_report.sites[0].outcome == "split"
    ours, theirs = both(model, config())
    inputs = tiny_inputs(model)
    (logits, mine), (expected, usual) = (loss_and_gradients(m, inputs) for m in (ours, theirs))
    assert distance(logits, expected) <= 2e-5 and apart(mine, usual) <= 2e-5


def together(of: dict[str, Tensor]) -> Tensor:
    return torch.cat([of[n].float().flatten() for n in sorted(of) if "experts" in n])


@pytest.mark.parametrize("way", ["bf16", "autocast"])
def test_sixteen_bits(way: str, pair: tuple[nn.Module, nn.Module]) -> None:
    """About as far from fp32 as PEFT on ordinary experts is."""
    ours, theirs = both(optimized(dtype=torch.bfloat16), config()) if way == "bf16" else pair
    inputs = tiny_inputs(theirs.get_base_model())
    exact = together(loss_and_gradients(copy.deepcopy(theirs).float(), inputs)[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        mine, usual = (together(loss_and_gradients(model, inputs)[1]) for model in (ours, theirs))
    assert distance(mine, exact) <= 1.5 * distance(usual, exact)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "split"])
def test_compiled_in_one_graph(family: str) -> None:
    ours = peft.get_peft_model(optimized(family), config(init_lora_weights=False))
    inputs = tiny_inputs(ours.get_base_model())
    logits, eager = loss_and_gradients(ours, inputs)
    module: Any = torch.compile(ours, backend="aot_eager", fullgraph=True)
    options = inputs | {"use_cache": False}
    again = module(**options).logits
    ours.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (again * weights).sum().backward()
    assert torch.equal(again, logits)
    assert apart({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, eager) <= 1e-6


# what is refused


def test_second_derivatives(pair: tuple[nn.Module, nn.Module]) -> None:
    logits = pair[0](**tiny_inputs(pair[1].get_base_model()) | {"use_cache": False}).logits
    leaves = [p for n, p in pair[0].named_parameters() if "experts" in n and p.requires_grad]
    first = torch.autograd.grad(logits.square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"adapted_moe_backward has no gradient .*second derivatives"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def test_weights_of_inference_mode(pair: tuple[nn.Module, nn.Module]) -> None:
    site = next(iter(mxfp4_sites(pair[0]).values()))
    with torch.inference_mode():
        site = copy.deepcopy(site)
    given = (torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    with torch.no_grad():
        site(torch.randn(3, 64), *given)
    with pytest.raises(RuntimeError, match=r"mxfp4::moe: a gradient is asked for.*torch\.inference_mode\(\)"):
        site(torch.randn(3, 64, requires_grad=True), *given)


def test_activations_of_8_bits(pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    site = next(iter(mxfp4_sites(pair[0]).values()))
    monkeypatch.setattr(get_backend(site.backend), "slack", lambda layout: 0.08)
    inputs = tiny_inputs(pair[1].get_base_model())
    with pytest.raises(
        NotImplementedError, match=r"mxfp4::adapted_moe: gradients do not pass .* activations of 8 bits"
    ):
        pair[0](**inputs)
    with torch.no_grad():
        pair[0](**inputs)


class OnGPU:
    """What the check asks of tokens on a GPU."""

    is_cuda = True

    def is_inference(self) -> bool:
        return False


def test_a_backend_without_backward_kernels_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_SAID", set())
    check: Callable[..., None] = schema._check_gradients
    with pytest.warns(UserWarning, match="backend 'reference' has no backward kernels: gradients dequantize"):
        check("moe", "reference", "canonical", OnGPU(), [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("moe", "reference", "canonical", OnGPU(), [])
        check("moe", "triton", "sm80", OnGPU(), [])


def test_an_adapter_of_other_experts(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    pair[0].save_pretrained(tmp_path)
    other = mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=1, num_experts=4), verify=False)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*experts\.base_layer\.lora_A"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist = torch.distributed
    if dist.is_initialized():
        pytest.skip("a process group is there already")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = optimized()
    model.model.embed_tokens.weight.requires_grad_(True)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(NotImplementedError, match=r"layers\.0\.mlp\.experts: MXFP4 experts are not trained under FSDP"):
        model(**tiny_inputs(model))


@pytest.mark.slow
def test_export(pair: tuple[nn.Module, nn.Module]) -> None:
    """Refused with adapters on experts; without, the program's own module has gradients as the site has."""
    wrapper = pair[0].get_base_model().model.layers[0].mlp.experts
    given = (torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2))
    with pytest.raises(
        NotImplementedError, match=r"layers\.0\.mlp\.experts: torch\.export is not served with adapters"
    ):
        torch.export.export(wrapper, given)
    site = next(iter(mxfp4_sites(pair[0]).values()))
    x = given[0].requires_grad_()
    program = torch.export.export(site, given).module()
    first, second = (torch.autograd.grad(module(*given).square().sum(), x)[0] for module in (site, program))
    assert torch.equal(first, second)
