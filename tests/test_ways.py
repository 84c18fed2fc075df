"""The ways to a model with MXFP4 experts leave the same behind: report, guard, generate, hooks, the router pass."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from checkpoints import saved
from torch import fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import Qwen3MoeForCausalLM

import mxfp4_compile
from mxfp4_compile import installing
from mxfp4_compile.dynamo import router_pass
from mxfp4_compile.dynamo.router_pass import HOOK
from mxfp4_compile.lifecycle import GUARD, DtypeGuard
from mxfp4_compile.ops import schema
from mxfp4_compile.passes.build.verify import VerificationError
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.tools.families import tiny_inputs

pytestmark = pytest.mark.matching
SIZE = 4


@pytest.fixture(autouse=True)
def routers_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Routers are fused on the CPU, and no other test's models count."""
    monkeypatch.setattr(router_pass, "fused_devices", lambda: ("cpu",))
    monkeypatch.setattr(router_pass, "_guards", weakref.WeakSet())
    monkeypatch.setattr(router_pass, "_installed", None)
    with inductor.patch({HOOK: None}):
        yield


def plain(source: Path) -> Any:
    return Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()


def optimized(source: Path) -> Any:
    return mxfp4_compile.optimize(plain(source), max_capture_size=SIZE)


def loaded(source: Path) -> Any:
    return mxfp4_compile.load(source, max_capture_size=SIZE)


def from_pretrained(source: Path) -> Any:
    config = mxfp4_compile.Mxfp4CompileConfig(max_capture_size=SIZE)
    return Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)


def state_loaded(source: Path) -> Any:
    model = optimized(source)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    return model


def copied(source: Path) -> Any:
    return copy.deepcopy(optimized(source))


def pickled(source: Path) -> Any:
    return pickle.loads(pickle.dumps(optimized(source)))


def hooks(model: nn.Module) -> set[tuple[str, str, str]]:
    """(module, kind of hook, whose) of every hook in the model."""
    found = set()
    for name, module in model.named_modules():
        for kind, value in vars(module).items():
            if kind.endswith("hooks") and isinstance(value, dict):
                found |= {(name, kind, getattr(hook, "__qualname__", repr(hook))) for hook in value.values()}
        if "generate" in vars(module):
            found.add((name, "generate", type(vars(module)["generate"]).__name__))
    return found


def routes(model: nn.Module) -> int:
    """How many ``mxfp4::route`` the pass that Inductor is configured with leaves in the first decoder layer's graph."""
    layer, found = model.model.layers[0], []

    def count(gm: fx.GraphModule, inputs: Any) -> Any:
        graph = make_fx(gm, decomposition_table=select_decomp_table())(*inputs).graph
        configured = getattr(inductor, HOOK)
        if configured is not None:
            configured(graph)
        found.append([n.target for n in graph.nodes].count(schema.route))
        return gm.forward

    torch._dynamo.reset()
    hidden = model.model.embed_tokens(tiny_inputs(model)["input_ids"])
    positions = torch.arange(hidden.shape[1])[None]
    with torch.no_grad():
        embeddings = model.model.rotary_emb(hidden, positions)
        torch.compile(layer, backend=count, fullgraph=True)(hidden, position_embeddings=embeddings)
    return sum(found)


def left_behind(model: nn.Module) -> dict[str, Any]:
    report = model.mxfp4_report
    guard = model._modules[GUARD]
    runtime = runtime_of(model)
    assert isinstance(guard, DtypeGuard) and runtime is not None
    return {
        "report": {k: v for k, v in report.to_dict().items() if k not in ("seconds", "sites", "runtime", "notes")},
        "sites": [{k: v is None for k, v in asdict(site).items()} | {"outcome": site.outcome} for site in report.sites],
        "first child": next(iter(model._modules)),
        "guard": guard.dtype,
        "hooks": hooks(model),
        "trainable": {name for name, p in model.named_parameters() if p.requires_grad},
        "generate": (runtime.max_capture_size, runtime.report is report.runtime, runtime.model is model),
        "routes": routes(model),
    }


@pytest.fixture(scope="module")
def source() -> Path:
    return saved("qwen3_moe")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Filled by the first test that needs it, under the fixture that has routers fused."""
    return {}


@pytest.mark.parametrize("way", [loaded, from_pretrained, state_loaded, copied, pickled], ids=lambda way: way.__name__)
def test_every_way_leaves_the_same(way: Callable[[Path], Any], source: Path, expected: dict[str, Any]) -> None:
    if not expected:
        expected |= left_behind(optimized(source))
        assert expected["routes"] == 1 and expected["generate"] == (SIZE, True, True)
    setattr(inductor, HOOK, None)
    router_pass._installed = None
    model = way(source)
    found = left_behind(model)
    for key, value in expected.items():
        if (way, key) == (state_loaded, "sites"):
            for site in found[key]:
                assert site.pop("weight_error_mean") and site.pop("weight_error_max")
            value = [{k: v for k, v in s.items() if not k.startswith("weight_error")} for s in value]
        assert found[key] == value, key
    if way in (loaded, from_pretrained):
        assert model.hf_quantizer.is_trainable
    mxfp4_compile.restore(model)
    assert not hooks(model) and GUARD not in model._modules and runtime_of(model) is None


def test_the_report_says_that_load_state_dict_replaced_weights(source: Path) -> None:
    model, other = optimized(source), optimized(source)
    assert other.mxfp4_report.sites[0].weight_error_mean is not None
    state = model.state_dict()
    for _ in range(2):
        nn.ModuleList([other])[0].load_state_dict(state)
    assert all(s.weight_error_mean is s.weight_error_max is None for s in other.mxfp4_report.sites)
    assert sum("load_state_dict replaced weights" in n for n in other.mxfp4_report.notes) == 1
    assert all(s.weight_error_mean is not None for s in model.mxfp4_report.sites)


def test_a_copy_keeps_the_router_pass_when_its_original_is_restored(source: Path) -> None:
    model = optimized(source)
    twin = copy.deepcopy(model)
    mxfp4_compile.restore(model)
    assert isinstance(getattr(inductor, HOOK), router_pass.LowerPass) and routes(twin) == 1
    mxfp4_compile.restore(twin)
    assert getattr(inductor, HOOK) is None


def test_a_site_that_fails_verification_fails_the_whole_load(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = installing.verify_site, []

    def second_layer_fails(built: Any, site: Any) -> Any:
        seen.append(site.name)
        if site.name == "model.layers.1.mlp.experts":
            raise VerificationError("nothing agrees")
        return real(built, site)

    monkeypatch.setattr(installing, "verify_site", second_layer_fails)
    with pytest.raises(mxfp4_compile.OptimizeError, match=r"layers\.1\.mlp\.experts.*nothing agrees"):
        mxfp4_compile.load(source, strict=False)
    assert "model.layers.0.mlp.experts" in seen


@pytest.mark.parametrize("size", [-1, 1.5, "8"])
def test_a_bad_capture_size_is_refused_before_loading(size: Any, source: Path) -> None:
    with pytest.raises(ValueError, match="max_capture_size must be an int >= 0"):
        mxfp4_compile.load(source, max_capture_size=size)
