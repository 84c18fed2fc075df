"""What a rewritten model can do: everything an ordinary one can, or an error that says why not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from loop_models import RemoteMoE
from torch import nn
from toy_backend import register

import mxfp4_compile
from mxfp4_compile.ops import schema
from mxfp4_compile.ops.selection import Choice
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.families import tiny_inputs, tiny_model


def optimized(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    return mxfp4_compile.optimize(tiny_model(family, dtype=dtype), **kwargs)


def logits(model: nn.Module, inputs=None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or tiny_inputs(model))).logits


def restored_copy(model: nn.Module) -> nn.Module:
    return mxfp4_compile.restore(copy.deepcopy(model))


def prompt(model: nn.Module, batch: int = 2, length: int = 7) -> torch.Tensor:
    return tiny_inputs(model, batch=batch, length=length)["input_ids"]


def test_same_object_same_class() -> None:
    model = tiny_model("qwen3_moe")
    assert mxfp4_compile.optimize(model) is model
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.get_submodule("model.layers.0.mlp.experts").num_experts == 8


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "muse_spark"])
def test_logits_are_those_of_the_dequantized_model(family: str) -> None:
    model = optimized(family)
    ordinary = restored_copy(model)
    ours, theirs = logits(model), logits(ordinary, tiny_inputs(model))
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=["greedy", "beam", "sample"]
)
def test_generate(options: dict) -> None:
    model = optimized("qwen3_moe")
    ordinary = restored_copy(model)
    ids = prompt(model)
    out = []
    for m in (ordinary, model):
        torch.manual_seed(0)
        arguments = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0} | options
        out.append(m.generate(ids, **arguments))
    assert torch.equal(out[0], out[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "muse_spark"])
def test_compile_fullgraph(family: str) -> None:
    model = optimized(family)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, tiny_inputs(model)), expected, rtol=1e-4, atol=1e-4)


def count_graphs(model: nn.Module, lengths) -> int:
    torch._dynamo.reset()
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for n in lengths:
            compiled(**tiny_inputs(model, batch=1, length=n))
    return len(graphs)


@pytest.mark.slow
def test_compiles_no_more_graphs_than_the_unmodified_model() -> None:
    lengths = range(9, 65)
    plain = count_graphs(tiny_model("qwen3_moe", dtype=torch.bfloat16), lengths)
    assert count_graphs(optimized(dtype=torch.bfloat16), lengths) <= plain


@pytest.mark.parametrize("family", ["qwen3_moe", "muse_spark"])
def test_export(family: str) -> None:
    model = optimized(family)
    inputs = tiny_inputs(model)
    program = torch.export.export(model, (), inputs, strict=False)
    targets = [n.target for n in program.graph.nodes]
    wanted = schema.moe if family == "qwen3_moe" else schema.grouped_linear
    assert targets.count(wanted) == (2 if family == "qwen3_moe" else 4)
    torch.testing.assert_close(program.module()(**inputs).logits, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "muse_spark"])
@pytest.mark.parametrize("backend", ["cpu", "toy"])
def test_copies(family: str, backend: str) -> None:
    register()
    model = optimized(family, backend=backend)
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(twin), expected)
        assert str(twin.mxfp4_report) == str(model.mxfp4_report)
        for a, b in zip(mxfp4_sites(twin).values(), mxfp4_sites(model).values(), strict=True):
            assert a.weights(a.projections[0].slot)[0].data_ptr() != b.weights(b.projections[0].slot)[0].data_ptr()


@pytest.mark.parametrize(
    "family", ["gpt_oss", *(pytest.param(f, marks=pytest.mark.slow) for f in ("muse_spark", "aria"))]
)
def test_state_dict_is_canonical_and_portable(family: str) -> None:
    register()
    model, toy = optimized(family), optimized(family, backend="toy")
    state, other = model.state_dict(), toy.state_dict()
    assert state.keys() == other.keys()
    for key in state:
        assert torch.equal(state[key], other[key]), key
    names = [k for k in state if ".experts." in k]
    assert any(k.endswith("_packed") for k in names)
    assert not any(k.endswith(("up_0", "down_0")) for k in names)
    fresh = mxfp4_compile.optimize(tiny_model(family, seed=5), backend="toy")
    assert not torch.equal(logits(fresh), logits(model))
    result = fresh.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(logits(fresh), logits(model))


def test_load_state_dict_names_what_is_wrong() -> None:
    model = optimized()
    state = model.state_dict()
    key = "model.layers.1.mlp.experts.down_proj_scales"
    broken = {**state, key: state[key][:, :3]}
    with pytest.raises(RuntimeError, match=r"down_proj_scales: expected torch\.uint8"):
        model.load_state_dict(broken)
    missing = {k: v for k, v in state.items() if k != key}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.mlp\.experts\.down_proj_scales"):
        model.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        model.load_state_dict({**state, "model.layers.1.mlp.experts.extra": torch.zeros(1)})


def test_casting_raises_before_anything_changes() -> None:
    model = optimized(dtype=torch.bfloat16)
    before = {n: p.dtype for n, p in model.named_parameters()}
    for cast in (model.float, model.half, lambda: model.to(torch.float32)):
        with pytest.raises(TypeError, match="restore"):
            cast()
    assert {n: p.dtype for n, p in model.named_parameters()} == before
    model.bfloat16()
    model.to("cpu")
    with pytest.raises(RuntimeError, match="meta"):
        model.get_submodule("model.layers.0.mlp.experts").to("meta")


def test_a_container_at_the_root() -> None:
    """What is called, counted and indexed by its children's order gets none of ours."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(64)
    model = nn.Sequential(nn.Sequential(norm, RemoteMoE())).eval()
    x = torch.randn(2, 9, 64)
    mxfp4_compile.optimize(model, example_inputs=(x,))
    assert len(model) == 1 and len(model[0]) == 2 and model[0][0] is norm
    got = model(x)
    with pytest.raises(TypeError, match="bfloat16"):
        model.to(torch.bfloat16)
    assert norm.weight.dtype == torch.float32, "nothing was cast"
    restored = mxfp4_compile.restore(model)
    torch.testing.assert_close(got, restored(x), rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in restored.named_modules() if "guard" in name]


@pytest.mark.parametrize("family", ["gpt_oss", "muse_spark"])
def test_preparing_again_for_another_backend_keeps_every_bit(family: str) -> None:
    register()
    model = optimized(family)
    expected, state = logits(model), model.state_dict()
    for site in mxfp4_sites(model).values():
        site.prepare_for(torch.device("cpu"), Choice("toy", "sideways"))
    assert torch.equal(logits(model), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    for site in mxfp4_sites(model).values():
        site.prepare_for(torch.device("cpu"), Choice("cpu", "canonical"))
    assert torch.equal(logits(model), expected)


def test_restore_gives_the_ordinary_model_back() -> None:
    model = tiny_model("gpt_oss")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before = {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
    children = [n for n, _ in model.named_children()]
    attributes = set(vars(model))
    mxfp4_compile.optimize(model)
    expected = logits(model)
    mxfp4_compile.restore(model)
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == before
    assert [n for n, _ in model.named_children()] == children
    assert set(vars(model)) == attributes
    assert not mxfp4_sites(model)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=2e-4, atol=2e-4)
    mxfp4_compile.optimize(model, scale_rule="floor")  # and again; dequantized weights survive the floor rule exactly
    torch.testing.assert_close(logits(model), expected, rtol=2e-4, atol=2e-4)
    with pytest.raises(mxfp4_compile.OptimizeError, match="not optimized"):
        mxfp4_compile.restore(mxfp4_compile.restore(model))


def test_second_call_is_a_no_op_that_says_so(capsys: pytest.CaptureFixture) -> None:
    model = optimized()
    state = model.state_dict()
    mxfp4_compile.optimize(model)
    assert "optimized already" in capsys.readouterr().err
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_hooks_on_experts_keep_firing() -> None:
    model = tiny_model("qwen3_moe")
    seen = []
    model.model.layers[0].mlp.experts.register_forward_hook(lambda m, a, o: seen.append(o.shape))
    mxfp4_compile.optimize(model)
    seen.clear()
    logits(model)
    assert len(seen) == 1


def test_settings_are_put_back() -> None:
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("batched_mm")
    state = torch.random.get_rng_state()
    mxfp4_compile.optimize(model)
    assert model.config._experts_implementation == "batched_mm"
    assert torch.equal(torch.random.get_rng_state(), state)
    model.set_experts_implementation("grouped_mm")  # what generate() does on a GPU must not disturb the rewrite
    expected = logits(model)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), expected)


def test_gradients_pass_through_the_experts() -> None:
    model = optimized()
    embeddings = torch.randn(1, 5, 64, requires_grad=True)
    router = model.model.layers[0].mlp.gate.weight.requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        out = model(inputs_embeds=embeddings, use_cache=False).logits
        return torch.autograd.grad(out.square().sum(), (embeddings, router))

    ours = gradients()
    mxfp4_compile.restore(model)
    for a, b in zip(ours, gradients(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_other_calls_than_the_captured_one_are_refused() -> None:
    site = optimized().model.layers[0].mlp.experts
    x, ids, weights = torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2)
    site(x, ids, weights)
    with pytest.raises(TypeError, match="positional arguments"):
        site(x, ids)
    with pytest.raises(TypeError, match=r"float32, got torch\.bfloat16"):
        site(x.bfloat16(), ids, weights)
