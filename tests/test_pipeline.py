"""optimize(): what it looks for, what it refuses, what it says, and that a failure loses nothing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mxfp4_compile
from mxfp4_compile import OptimizeError, installing, planning
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.passes.build.verify import VerificationError
from mxfp4_compile.passes.find.discover import experts_implementation, find_candidates, record_calls
from mxfp4_compile.passes.match import FusedMatch, match
from mxfp4_compile.passes.trace.export import trace
from mxfp4_compile.passes.trace.traced import call_pattern
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

# models written for the purpose


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden))
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = (x @ self.weight.T).softmax(-1).topk(self.top_k)
        return ids, weights


class Experts(nn.Module):
    """Packed experts with separate gate and up projections, spelled in plain torch over gathered weights."""

    def __init__(self, experts: int = 6, hidden: int = 64, intermediate: int = 32, dtype=torch.bfloat16) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def weight(n: int, k: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(experts, n, k, generator=g) / k**0.5).to(dtype))

        self.gate, self.up = weight(intermediate, hidden), weight(intermediate, hidden)
        self.down = weight(hidden, intermediate)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        h = F.silu(torch.bmm(self.gate[flat], rows)) * torch.bmm(self.up[flat], rows)
        y = torch.bmm(self.down[flat], h).squeeze(-1) * weights.reshape(-1, 1)
        return y.view(*ids.shape, -1).sum(1)


class Model(nn.Module):
    def __init__(self, layers: int = 2, make=Experts, dtype=torch.bfloat16, **kwargs) -> None:
        super().__init__()
        self.experts = nn.ModuleList([make(dtype=dtype, **kwargs) for _ in range(layers)])
        first = next(iter(self.experts[0].parameters()))
        self.router = Router(64, first.shape[0], 2).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for experts in self.experts:
            x = x + experts(x, *self.router(x))
        return x


def tokens(n: int = 12, dtype=torch.bfloat16) -> dict:
    return {"x": torch.randn(n, 64, generator=torch.Generator().manual_seed(0)).to(dtype)}


def make(dtype=torch.bfloat16, **kwargs) -> Model:
    torch.manual_seed(0)
    return Model(dtype=dtype, **kwargs).eval()


def test_plain_torch_experts_with_three_projections() -> None:
    model = make(torch.float32)
    with torch.no_grad():
        before = model(**tokens(dtype=torch.float32))
    mxfp4_compile.optimize(model, example_inputs=tokens(dtype=torch.float32))
    site = model.experts[0]
    assert site.plan.spec.up.parameters in (("gate", "up"), ("up", "gate"))
    with torch.no_grad():
        after = model(**tokens(dtype=torch.float32))
    ordinary = mxfp4_compile.restore(model)
    with torch.no_grad():
        torch.testing.assert_close(after, ordinary(**tokens(dtype=torch.float32)), rtol=1e-4, atol=1e-4)
    assert 0.01 < float((after - before).norm() / before.norm()) < 0.3


def test_tuple_inputs() -> None:
    model = mxfp4_compile.optimize(make(), example_inputs=(tokens()["x"],))
    assert len(mxfp4_sites(model)) == 2


# what it refuses


def unchanged(model: nn.Module, state: dict) -> None:
    assert not mxfp4_sites(model)
    now = model.state_dict()
    assert now.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(now[key], value) or not torch.isfinite(value).all()
    assert not hasattr(model, "mxfp4_report")


def refused(model: nn.Module, match: str, error=OptimizeError, **kwargs) -> Exception:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=match) as info:
        mxfp4_compile.optimize(model, **({"example_inputs": tokens()} | kwargs))
    unchanged(model, state)
    return info.value


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got dict"):
        mxfp4_compile.optimize({})


def test_training_mode() -> None:
    refused(make().train(), r"call model.eval\(\)")


def test_dense_model() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    dense = Dense().bfloat16().eval()
    refused(dense, "no mixture of experts was found. Looked for")
    report = mxfp4_compile.optimize(dense, example_inputs=tokens(), strict=False).mxfp4_report
    assert report.sites == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_name_parameter_and_expert(value: float) -> None:
    model = make()
    model.experts[1].down.data[4, 3, 7] = value
    refused(model, r"experts.1.down holds NaN or Inf in expert 4")


def test_huge_finite_weights_are_fine() -> None:
    model = make()
    model.experts[0].down.data.mul_(1e4)
    mxfp4_compile.optimize(model, example_inputs=tokens())


def test_meta_weights() -> None:
    with torch.device("meta"):
        model = Model().eval()
    with pytest.raises(OptimizeError, match="meta device"):
        mxfp4_compile.optimize(model, example_inputs=tokens())


def test_fp8_weights() -> None:
    model = make()
    for experts in model.experts:
        experts.down = nn.Parameter(experts.down.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(OptimizeError, match=r"down is torch.float8_e4m3fn: quantized already"):
        mxfp4_compile.optimize(model, example_inputs=tokens())


def test_quantized_checkpoints() -> None:
    model = tiny_model("qwen3_moe")
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(OptimizeError, match=r"quantized already \(mxfp4\)"):
        mxfp4_compile.optimize(model)


def test_sharded_experts() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = make()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(model.experts[0].down.data, mesh, [Replicate()])
        model.experts[0].down = nn.Parameter(sharded, requires_grad=False)
        with pytest.raises(OptimizeError, match=r"experts.0: .* split in a way that is not known \(down R"):
            mxfp4_compile.optimize(model, example_inputs=tokens())
    finally:
        dist.destroy_process_group()


def test_expert_parallel_experts() -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(OptimizeError, match="expert-parallel"):
        mxfp4_compile.optimize(model)


def test_compiled_models() -> None:
    with pytest.raises(OptimizeError, match="compiled already"):
        mxfp4_compile.optimize(torch.compile(make()), example_inputs=tokens())
    model = make()
    model.compile()
    with pytest.raises(OptimizeError, match="compiled already"):
        mxfp4_compile.optimize(model, example_inputs=tokens())


def test_unknown_names_list_the_known() -> None:
    refused(make(), "unknown backend 'marlinn'; known: .*reference.*cpu", ValueError, backend="marlinn")
    refused(make(), "floor.*even.*round_up.*mse", ValueError, scale_rule="ceil")
    refused(make(), "activation_dtype", ValueError, activation_dtype="int4")
    refused(make(), "max_capture_size", ValueError, max_capture_size=-1)


def test_environment_variable_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4_COMPILE_BACKEND", "reference")
    model = mxfp4_compile.optimize(make(), example_inputs=tokens())
    assert {s.backend for s in model.mxfp4_report.sites} == {"reference"}
    model = mxfp4_compile.optimize(make(), example_inputs=tokens(), backend="cpu")
    assert {s.backend for s in model.mxfp4_report.sites} == {"cpu"}
    monkeypatch.setenv("MXFP4_COMPILE_BACKEND", "nonsense")
    refused(make(), "unknown backend 'nonsense'", ValueError)


def test_a_forward_that_fails_asks_for_inputs() -> None:
    refused(make(), "pass example_inputs", RuntimeError, example_inputs={"y": torch.zeros(1)})
    refused(make(), "pass example_inputs", RuntimeError, example_inputs=None)


# what has no match


class Sometimes(nn.Module):
    """Experts in a list, of which each forward uses a part."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)) for _ in range(4)])
        self.router = Router(64, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (ids == i).any(1).nonzero().squeeze(1)
            if rows.numel():
                out[rows] = expert(x[rows]) * weights[rows]
        return out


def test_list_experts_are_reported() -> None:
    model = Sometimes().bfloat16().eval()
    refused(model, r"1 modules look like mixtures of experts but have no match: experts \[ModuleList\]")
    report = mxfp4_compile.optimize(model, example_inputs=tokens(), strict=False).mxfp4_report
    (site,) = report.sites
    assert site.outcome == "unmatched"
    assert "experts [ModuleList]: unmatched" in str(report)


class Odd(Experts):
    """Packed weights that no form knows: a product over all experts, masked by routing."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        h = F.silu(torch.einsum("th,eih->tei", x, self.gate)) * torch.einsum("th,eih->tei", x, self.up)
        y = torch.einsum("tei,ehi->teh", h, self.down)
        mask = torch.zeros(x.shape[0], y.shape[1], dtype=x.dtype).scatter(1, ids, weights)
        return (y * mask.unsqueeze(-1)).sum(1)


def test_packed_experts_without_a_match() -> None:
    model = make(make=Odd)
    error = refused(model, "2 modules look like mixtures of experts but have no match")
    assert [s.outcome for s in error.report.sites] == ["unmatched", "unmatched"]


def test_skip() -> None:
    model = make()
    mxfp4_compile.optimize(model, example_inputs=tokens(), skip=["experts.1", "nothing.*"], strict=False)
    report = model.mxfp4_report
    assert [s.outcome for s in report.sites] == ["fused", "skipped"]
    assert "skip='experts.1'" in str(report)
    assert "'nothing.*' names nothing in this model" in str(report)
    assert isinstance(model.experts[1], Experts)
    skipped = mxfp4_compile.optimize(make(make=Odd), example_inputs=tokens(), skip=["experts.*"]).mxfp4_report
    assert [s.outcome for s in skipped.sites] == ["skipped", "skipped"]


# sharing


def test_shared_modules_stay_shared() -> None:
    model = make()
    model.experts[1] = model.experts[0]
    mxfp4_compile.optimize(model, example_inputs=tokens())
    assert model.experts[0] is model.experts[1]
    (site,) = model.mxfp4_report.sites
    assert site.names == ("experts.0", "experts.1")
    mxfp4_compile.restore(model)
    assert model.experts[0] is model.experts[1]
    assert isinstance(model.experts[0], Experts)


def test_tied_weights_stay_tied() -> None:
    model = make()
    for name in ("gate", "up", "down"):
        setattr(model.experts[1], name, getattr(model.experts[0], name))
    mxfp4_compile.optimize(model, example_inputs=tokens())
    first, second = model.experts
    assert first.weights("up")[0].data_ptr() == second.weights("up")[0].data_ptr()


# verification has the last word


def test_a_wrong_kernel_never_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfp4_compile.ops.backends.cpu import CpuBackend

    right = CpuBackend.moe
    monkeypatch.setattr(CpuBackend, "moe", lambda self, *a: right(self, *a) * 1.05)
    refused(make(), r"experts.0 was matched but failed verification: .*Nothing was changed")


def test_a_wrong_layout_never_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    right = installing.prep_program

    def wrong(*args):
        program = right(*args)
        for node in program.graph.nodes:  # quantize the weight upside down
            if "quantize" in str(node.target):
                with program.graph.inserting_before(node):
                    flipped = program.graph.call_function(torch.ops.aten.flip.default, (node.args[0], [1]))
                node.update_arg(0, flipped)
        program.recompile()
        return program

    monkeypatch.setattr(installing, "prep_program", wrong)
    refused(make(), "relative squared error of .* no right layout")


@pytest.fixture
def middle_disagrees(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model of three layers whose second fails verification."""
    model = make(layers=3)
    right, middle = installing.verify_site, model.experts[1]

    def verify(built, site):
        if site.candidate.module is middle:
            raise VerificationError("made to fail")
        return right(built, site)

    monkeypatch.setattr(installing, "verify_site", verify)
    return model


def test_every_site_is_tried_before_the_first_is_installed(middle_disagrees: nn.Module) -> None:
    modules = list(middle_disagrees.modules())
    state = {k: v.clone() for k, v in middle_disagrees.state_dict().items()}
    with pytest.raises(OptimizeError, match=r"^experts.1 was .* made to fail. Nothing was changed.") as raised:
        mxfp4_compile.optimize(middle_disagrees, example_inputs=tokens())
    assert [(s.names, s.outcome) for s in raised.value.report.sites] == [(("experts.1",), "failed")]
    assert list(middle_disagrees.modules()) == modules and not hasattr(middle_disagrees, "mxfp4_report")
    after = middle_disagrees.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[k], v) for k, v in state.items())


def test_without_strict_a_site_that_disagrees_stays_and_the_rest_changes(middle_disagrees: nn.Module) -> None:
    middle = middle_disagrees.experts[1]
    mxfp4_compile.optimize(middle_disagrees, example_inputs=tokens(), strict=False)
    assert middle_disagrees.experts[1] is middle and all(p.device.type != "meta" for p in middle.parameters())
    sites = middle_disagrees.mxfp4_report.sites
    assert [(s.outcome, s.reason) for s in sites] == [("fused", ""), ("failed", "made to fail"), ("fused", "")]
    with torch.no_grad():
        assert torch.isfinite(middle_disagrees(**tokens())).all()


@pytest.mark.parametrize("times", [1, 2])
def test_running_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The first time a site is prepared nothing was changed yet; the second time, others were."""
    model = make(layers=3)
    right, last, seen = installing.run_prep, model.experts[2], []

    def run_prep(program, projection, original, *rest):
        seen.append(projection.slot if original is last else "")
        if seen.count("up") == times:
            raise MemoryError("made to fail")
        return right(program, projection, original, *rest)

    monkeypatch.setattr(installing, "run_prep", run_prep)
    with pytest.raises(OptimizeError, match="MemoryError: made to fail") as raised:
        mxfp4_compile.optimize(model, example_inputs=tokens())
    with torch.no_grad():
        assert torch.isfinite(model(**tokens())).all()
    if times == 1:
        assert "Nothing was changed" in str(raised.value) and not hasattr(model, "mxfp4_report")
        return
    assert "cannot be undone: experts.0, experts.1. In their original precision: experts.2." in str(raised.value)
    assert [s.names[0] for s in model.mxfp4_report.rewritten] == ["experts.0", "experts.1"]
    with pytest.raises(TypeError, match="restore"):
        model.float()


def test_what_was_verified_is_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights prepared once more must come out as those that were verified."""
    model = make(layers=2)
    right, calls = installing.run_prep, []

    def run_prep(*args):
        made = right(*args)
        calls.append(args[1].slot)
        if len(calls) == 7:  # two sites were tried, the second is being installed
            made.tensors[0].view(-1)[0] += 1
        return made

    monkeypatch.setattr(installing, "run_prep", run_prep)
    with pytest.raises(OptimizeError, match=r"experts.1 .*prepared once more, came out other"):
        mxfp4_compile.optimize(model, example_inputs=tokens())
    assert [s.outcome for s in model.mxfp4_report.sites] == ["fused", "failed"]


def test_a_backend_that_fails_at_a_later_site_gives_way_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfp4_compile.ops.backend import BackendError

    model = make(layers=2)
    right, tried = installing.build_site, []

    def build(site, *args):
        tried.append((site.name, site.structure.choice.backend))
        if tried[-1] == ("experts.1", tried[0][1]):
            raise BackendError("made to fail")
        return right(site, *args)

    monkeypatch.setattr(installing, "build_site", build)
    mxfp4_compile.optimize(model, example_inputs=tokens())
    first, second = tried[0][1], tried[-1][1]
    assert first != second and tried[:4] == [
        ("experts.0", first), ("experts.1", first), ("experts.1", second), ("experts.0", second)
    ]  # fmt: skip
    assert {s.backend for s in model.mxfp4_report.sites} == {second}


def test_unusual_weights_are_reported() -> None:
    model = make()
    # Two values per block that no common scale serves: the error is larger than any ordinary weight's.
    w = model.experts[0].down.data
    w.copy_(torch.where(torch.arange(w.shape[2]) % 32 == 0, 4.5, 0.7) * torch.sign(w.float()))
    mxfp4_compile.optimize(model, example_inputs=tokens())
    first, second = model.mxfp4_report.sites
    assert "lose more than usual" in first.warnings[0]
    assert second.warnings == ()
    assert "warning: experts.0: down:" in str(model.mxfp4_report)


# the report, and how often things are done


def test_report() -> None:
    model = mxfp4_compile.optimize(tiny_model("gpt_oss", dtype=torch.bfloat16))
    report = model.mxfp4_report
    data = json.loads(report.to_json())
    assert data["bytes_before"] == sum(s["bytes_before"] for s in data["sites"])
    assert data["bytes_before"] / data["bytes_after"] == pytest.approx(16 / 4.25, rel=1e-3)
    text = str(report)
    assert "2 of 2 MoE modules rewritten" in text
    assert "alpha=1.702" in text
    assert "verified" in text
    unverified = str(mxfp4_compile.optimize(tiny_model("gpt_oss"), verify=False).mxfp4_report)
    assert "verify=False" in unverified
    assert report.versions["torch"] == torch.__version__


def test_graphs_traced_on_a_gpu_match_without_one() -> None:
    """Such a graph names its device and counts int32 ids; both are put into a graph traced here."""
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    candidates = find_candidates(model)
    record_calls(model, candidates)
    pattern = call_pattern(candidates[0].calls[0], candidates[0].calls[-1])
    with experts_implementation(model, "grouped_mm"):
        traced = trace(candidates[0].module, pattern)
    expected = match(traced)
    devices = 0
    for node in traced.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            devices += 1
        if node.target == torch.ops.aten.histc.default:
            cast = node.args[0]
            cast.kwargs = {"dtype": torch.int32}
            cast.meta["val"] = cast.meta["val"].to(torch.int32)
            node.meta["val"] = node.meta["val"].to(torch.int32)
    assert devices
    found = match(traced)
    assert isinstance(found, FusedMatch), found
    assert found.spec == expected.spec


def test_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    right = planning.trace
    monkeypatch.setattr(planning, "trace", lambda *a: count.append(1) or right(*a))
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", layers=4))
    assert len(mxfp4_sites(model)) == 4
    assert len(count) == 1


def test_layers_that_differ_in_a_number_are_told_apart() -> None:
    model = tiny_model("gpt_oss")
    model.model.layers[1].mlp.experts.limit = 3.5
    mxfp4_compile.optimize(model)
    limits = [s.plan.spec.params.activation.up_limit for s in mxfp4_sites(model).values()]
    assert limits == [7.0, 3.5]


@pytest.mark.slow
def test_48_layers_are_traced_and_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long does not grow with the layers: half a minute was enough for all of them."""
    calls = []
    for name in ("trace", "match"):
        right = getattr(planning, name)
        monkeypatch.setattr(planning, name, lambda *a, name=name, right=right: calls.append(name) or right(*a))
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=torch.bfloat16, layers=48))
    assert len(mxfp4_sites(model)) == 48
    assert calls == ["trace", "match"]


def test_modules_no_forward_reaches_follow_an_equal_one() -> None:
    model = make(layers=2)
    model.spare = Experts()
    mxfp4_compile.optimize(model, example_inputs=tokens())
    assert [s.names[0] for s in model.mxfp4_report.rewritten] == ["experts.0", "experts.1", "spare"]
    model = make(layers=1)
    model.spare = Experts(experts=3)
    refused(model, "spare .*: no forward with these inputs reached it")


def test_inputs_are_made_for_language_models() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"))
    with torch.no_grad():
        assert torch.isfinite(model(**tiny_inputs(model)).logits).all()
