"""Circumstances: autocast, fp16, inference mode, experts implementations, ``skip``, state between calls."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile.circumstances import constants_of, kept_state
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def some(quick: str, *slow: str) -> Any:
    """A parametrization over families: one in the quick tier, all in the slow one."""
    return pytest.mark.parametrize("family", [quick, *(pytest.param(f, marks=pytest.mark.slow) for f in slow)])


def tiny(family: str = "qwen3_moe", dtype: torch.dtype = BF16, **options: Any) -> Any:
    return tiny_model(family, dtype=dtype, layers=1, **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits.detach()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def restored(model: nn.Module) -> Any:
    return mxfp4_compile.restore(copy.deepcopy(model))


# autocast


def check_sites_under_autocast(model: Any, limit: float) -> None:
    """Each rewritten site gives what the original gives on the same arguments under the same autocast."""
    ordinary = restored(model)
    calls: dict[str, Any] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] = (args, kwargs, output)

        return hook

    for name in mxfp4_sites(model):
        ordinary.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        ordinary(**tiny_inputs(model))
        assert model(**tiny_inputs(model)).logits.isfinite().all()
        assert calls.keys() == mxfp4_sites(model).keys()
        for name, (args, kwargs, output) in calls.items():
            ours = model.get_submodule(name)(*args, **kwargs)
            flat, wanted = (torch.utils._pytree.tree_leaves(v) for v in (ours, output))
            for a, b in zip(flat, wanted, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape, name
                assert relative(a, b) <= limit if b.is_floating_point() else torch.equal(a, b), name


@some("deepseek_v3", "glm4_moe", "dots1", "hunyuan_v1_moe", "solar_open", "longcat_flash", "nemotron_h", "exaone_moe")
def test_rewritten_experts_under_autocast(family: str) -> None:
    check_sites_under_autocast(mxfp4_compile.optimize(tiny(family)), 1e-2)


@some("qwen3_moe", "gpt_oss", "mixtral", "olmoe", "deepseek_v3", "phimoe")
def test_fp32_models_under_autocast(family: str) -> None:
    check_sites_under_autocast(mxfp4_compile.optimize(tiny(family, F32)), 2e-2)


@some("deepseek_v3", "glm4_moe", "dots1", "solar_open", "nemotron_h", "gpt_oss")
def test_optimize_inside_autocast_is_as_without(family: str) -> None:
    inside, outside = tiny(family), tiny(family)
    mxfp4_compile.optimize(outside)
    with torch.autocast("cpu", dtype=BF16):
        mxfp4_compile.optimize(inside)
        assert torch.is_autocast_enabled("cpu")
    a, b = (m.mxfp4_report.to_dict()["sites"] for m in (inside, outside))
    assert a == b
    assert torch.equal(logits(inside), logits(outside))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["autocast", "inference"])
def test_loading_inside_autocast_and_inference_mode(mode: str) -> None:
    source = saved("deepseek_v3")
    with torch.autocast("cpu", dtype=BF16) if mode == "autocast" else torch.inference_mode():
        inside = mxfp4_compile.load(source)
    outside = mxfp4_compile.load(source)
    assert torch.equal(logits(inside), logits(outside))
    inside.load_state_dict(outside.state_dict())


@some("deepseek_v3", "glm4_moe", "dots1", "qwen3_moe", "mixtral", "gpt_oss")
def test_the_compile_backend_inside_autocast(family: str) -> None:
    model = tiny(family)
    before = len(mxfp4_compile.compile_reports())
    compiled = torch.compile(model, backend="mxfp4_compile", options={"inner": "eager"})
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = compiled(**tiny_inputs(model)).logits
        plain = model(**tiny_inputs(model)).logits
    sites = [s for r in mxfp4_compile.compile_reports()[before:] for s in r.sites]
    assert [s.outcome for s in sites] == ["fused"], [s.reason for s in sites]
    assert out.dtype == plain.dtype and relative(out, plain) < 0.5


def test_compiled_under_autocast_in_one_graph() -> None:
    model = mxfp4_compile.optimize(tiny("deepseek_v3"))
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        expected = model(**tiny_inputs(model)).logits
        got = torch.compile(model, backend="eager", fullgraph=True)(**tiny_inputs(model)).logits
    assert torch.equal(got, expected)


# fp16


def move_scale(model: Any, power: int) -> None:
    """What the norm before the experts gives becomes smaller, what multiplies it larger: nothing changes."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.mul_(2.0**-power)
            for name, parameter in layer.mlp.named_parameters():
                if name.endswith(("gate.weight", "gate_up_proj", "gate_proj.weight", "up_proj.weight")):
                    parameter.mul_(2.0**power)


@some("qwen3_moe", "mixtral", "deepseek_v3", "dots1", "glm4_moe", "olmoe", "solar_open")
def test_fp16_models_whose_scale_was_moved_to_the_experts(family: str) -> None:
    model = tiny(family, F16)
    before = logits(model)
    move_scale(model, 8)
    assert relative(logits(model), before) < 1e-2
    mxfp4_compile.optimize(model)
    site = model.mxfp4_report.sites[0]
    assert site.error is not None and site.original_error is not None and 0 < site.original_error < 1e-2
    assert logits(model).isfinite().all()
    assert relative(logits(model), logits(restored(model))) < 2e-2


def test_a_model_that_overflows_on_tokens_of_any_size_is_refused() -> None:
    model = tiny("qwen3_moe", F16)
    experts = model.model.layers[0].mlp.experts
    real = type(experts).forward

    class Overflowing(type(experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Tensor:
            out = real(self, *args)
            return out + out.new_full((), 65504.0) * 2 if out.dtype == F16 else out

    experts.__class__ = Overflowing
    with pytest.raises(mxfp4_compile.OptimizeError):
        mxfp4_compile.optimize(model)


# inference mode


@some("qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "nemotron_h", "jamba")
def test_optimize_inside_inference_mode(family: str) -> None:
    model, other = tiny(family), mxfp4_compile.optimize(tiny(family, seed=1))
    with torch.inference_mode():
        mxfp4_compile.optimize(model)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))


# experts implementation


@some("qwen3_moe", "mixtral", "deepseek_v3", "dots1", "glm4_moe", "olmoe")
def test_rows_that_grouped_mm_does_not_take(family: str) -> None:
    field = "intermediate_size" if family in ("mixtral", "olmoe") else "moe_intermediate_size"
    model = tiny(family, **{field: 20})
    model.set_experts_implementation("eager")
    expected = logits(model)
    mxfp4_compile.optimize(model)
    assert model.config._experts_implementation == "eager"
    assert [s.outcome for s in model.mxfp4_report.sites] == ["fused"]
    ordinary = restored(model)
    assert ordinary.config._experts_implementation == "eager"
    assert relative(logits(model), logits(ordinary)) < 2e-2 and relative(logits(model), expected) < 0.5


@some("qwen3_moe", "mixtral", "deepseek_v3", "dots1", "glm4_moe", "gpt_oss")
def test_set_experts_implementation_says_that_it_changes_nothing(family: str) -> None:
    model = mxfp4_compile.optimize(tiny(family))
    before, expected = model.config._experts_implementation, logits(model)
    for one in (model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match="changes nothing about the rewritten experts"):
            one.set_experts_implementation("batched_mm")
        assert one.config._experts_implementation == before and torch.equal(logits(one), expected)
    mxfp4_compile.restore(model).set_experts_implementation("batched_mm")
    assert model.config._experts_implementation == "batched_mm"


def test_set_experts_implementation_reaches_the_experts_that_were_left_alone() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=BF16), skip="model.layers.0")
    with pytest.warns(UserWarning, match="changes nothing about the rewritten experts"):
        model.set_experts_implementation("batched_mm")
    assert model.config._experts_implementation == "batched_mm"


# skip


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_model("qwen3_moe", dtype=BF16)


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    "skip",
    [EXPERTS, (EXPERTS,), "model.layers.0", "*.0.mlp", "model.layers.0*", f"{EXPERTS}.down_proj"],
    ids=["one string", "a tuple", "a layer", "a parent by pattern", "everything below", "a parameter inside"],
)
def test_skip_leaves_alone_what_it_names_and_what_is_below(skip: Any, plain: Any) -> None:
    model = copy.deepcopy(plain)
    mxfp4_compile.optimize(model, skip=skip)
    assert list(mxfp4_sites(model)) == ["model.layers.1.mlp.experts"]
    site = next(s for s in model.mxfp4_report.sites if s.outcome == "skipped")
    assert site.names == (EXPERTS,) and "skip=" in site.reason


@pytest.mark.slow
@some("jamba", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "longcat_flash")
def test_skip_of_each_site_by_its_name_and_its_parents(family: str) -> None:
    model = tiny(family)
    (name, *_) = mxfp4_sites(mxfp4_compile.optimize(copy.deepcopy(model), verify=False))
    for skip in (name, name.rpartition(".")[0]):
        twin = mxfp4_compile.optimize(copy.deepcopy(model), skip=skip, verify=False)
        assert name not in mxfp4_sites(twin), skip


def test_a_pattern_that_names_nothing_is_refused_with_near_names(plain: Any) -> None:
    model = copy.deepcopy(plain)
    with pytest.raises(mxfp4_compile.OptimizeError, match=r"names nothing.*near it: .*model\.layers\.0\.mlp\.experts"):
        mxfp4_compile.optimize(model, skip=["model.layers.1.mlp.experts", "model.layer.0.mlp.experts"])
    assert not mxfp4_sites(model) and not hasattr(model, "mxfp4_report")
    report = mxfp4_compile.optimize(model, skip="model.layer.0.mlp.experts", strict=False).mxfp4_report
    assert len(report.rewritten) == 2 and any("names nothing" in note for note in report.notes)


def test_a_pattern_that_names_no_experts_is_noted(plain: Any) -> None:
    report = mxfp4_compile.optimize(copy.deepcopy(plain), skip=["lm_head", EXPERTS]).mxfp4_report
    assert [n for n in report.notes if "skip" in n] == ["skip pattern 'lm_head' names no MoE-looking module"]


def test_loading_and_converting_take_one_string_too(tmp_path: Path) -> None:
    model = mxfp4_compile.load(saved("qwen3_moe"), skip=EXPERTS)
    assert list(mxfp4_sites(model)) == ["model.layers.1.mlp.experts"]
    with pytest.raises(mxfp4_compile.OptimizeError, match="near it"):
        mxfp4_compile.load(saved("qwen3_moe"), skip="model.layers.7.mlp.experts")
    with pytest.raises(TypeError, match="skip takes module-name patterns"):
        mxfp4_compile.load(saved("qwen3_moe"), skip=[5])


# state between calls


def remembering(module: nn.Module) -> None:
    """Give a module a forward that sets attributes and a buffer, and one that it reads."""
    real = type(module).forward

    class Remembering(type(module)):  # type: ignore[misc]
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.last_seen = hidden
            self.calls += 1
            self.kept.append(hidden)
            self.table["last"] = hidden
            return real(self, hidden * self.factor, *args, **kwargs)

    module.calls, module.kept, module.table, module.factor = 0, [], {}, 0.5
    module.__class__ = Remembering


@some("qwen3_moe", "mixtral", "deepseek_v3", "dots1", "glm4_moe", "gpt_oss")
def test_what_forwards_set_is_put_back_and_what_they_read_is_told(family: str) -> None:
    model = tiny(family)
    name = next(n for n, m in model.named_modules() if n.endswith("mlp.experts"))
    remembering(model.get_submodule(name))
    norm = model.model.norm
    remembering(norm)
    mxfp4_compile.optimize(model)
    assert norm.calls == 0 and norm.kept == [] and norm.table == {} and not hasattr(norm, "last_seen")
    site, report = model.get_submodule(name), model.mxfp4_report
    assert site.calls == 0 and site.kept == [] and site.table == {} and not hasattr(site, "last_seen")
    (lost,) = [n for n in report.notes if "do not" in n]
    (others,) = [n for n in report.notes if "put back" in n]
    for attribute in ("last_seen", "calls"):
        assert f"{name}.{attribute}" in lost and f"model.norm.{attribute}" in others
    assert "factor=0.5" in report.sites[0].constants
    with pytest.raises(AttributeError, match=r"factor=0\.5 is part of the rewritten graph"):
        site.factor = 2.0
    site.factor = 0.5
    site.another = 2.0
    assert logits(model).isfinite().all()


def test_kept_state() -> None:
    module = nn.Module()
    module.register_buffer("counts", torch.zeros(3))
    module.register_buffer("table", torch.ones(2))
    module.scale, module.seen, module.fixed = 1.0, [1], (1, 2)
    counts = module.counts
    with kept_state(module) as changes:
        module.counts += 1
        module.table = torch.zeros(5)
        module.scale, module.fresh = 2.0, object()
        module.seen.append(2)
        module.fixed = (1, 2)
    assert sorted(map(str, changes)) == ["counts", "fresh", "scale", "seen", "table"]
    assert module.counts is counts and torch.equal(counts, torch.zeros(3)) and torch.equal(module.table, torch.ones(2))
    assert module.scale == 1.0 and module.seen == [1] and not hasattr(module, "fresh")


def test_constants_are_what_the_code_reads() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.beta, self.unused, self.limit = 1.0, 2, 3.0, 7.0

        @property
        def doubled(self) -> float:
            return self.beta * 2

        def helper(self, x: Tensor) -> Tensor:
            return x.clamp(max=self.limit)

        def forward(self, x: Tensor) -> Tensor:
            return self.helper(x) * self.alpha + sum(self.doubled for _ in range(2))

    assert constants_of(Module()) == {"alpha": 1.0, "beta": 2, "limit": 7.0}
