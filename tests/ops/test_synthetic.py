"""Random layers for tuning and benchmarks, and the sizes of a model's layers from its configuration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mxfp4_compile.ops.backends import cpu, reference
from mxfp4_compile.ops.synthetic import LayerShape, Prepared, call, prepare, random_inputs, random_layer
from mxfp4_compile.passes.find.discover import find_candidates
from mxfp4_compile.passes.match import FusedMatch
from mxfp4_compile.planning import Site, match_all
from mxfp4_compile.tools import demo
from mxfp4_compile.tools.families import tiny_inputs, tiny_model
from mxfp4_compile.tools.model_shapes import ShapeError, model_shapes, shapes_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_layer_is_the_same_for_every_backend(gated: bool, biased: bool) -> None:
    shape = LayerShape(5, 2, 70, 33, gated, biased)
    layer = random_layer(shape, CPU)
    inputs = random_inputs(shape, 6, CPU)
    a, b = (call(m.BACKEND, shape, prepare(layer, m.BACKEND, CPU), inputs).float() for m in (cpu, reference))
    assert float((a - b).norm() / b.norm()) < 2e-2
    assert 0.05 < float(b.square().mean().sqrt()) < 5, "neither vanishing nor exploding"
    exact = Prepared(layer.up, layer.down, layer.up_bias, layer.down_bias, "canonical")
    assert torch.equal(call(reference.BACKEND, shape, exact, inputs).float(), b)


def test_routing_is_uniform_or_among_the_first() -> None:
    shape = LayerShape(16, 4, 32, 32)
    inputs = random_inputs(shape, 200, CPU)
    assert inputs.experts_hit == 16
    assert all(len(set(row)) == 4 for row in inputs.ids.tolist())
    assert torch.allclose(inputs.weights.float().sum(1), torch.ones(200), atol=2e-2)
    assert random_inputs(shape, 200, CPU, 5).ids.max() == 4
    assert torch.equal(random_inputs(shape, 200, CPU).x, inputs.x)


def test_shapes_that_cannot_be() -> None:
    for sizes in ((4, 5, 32, 32), (4, 0, 32, 32), (4, 2, 0, 32)):
        with pytest.raises(ValueError, match="E,K,H,I"):
            LayerShape(*sizes)


# sizes of a model


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "olmoe", "nemotron_h", "gemma4"]
)
def test_sizes_are_those_of_the_experts(family: str) -> None:
    """Against what the matcher finds by running the model."""
    model = tiny_model(family, dtype=torch.bfloat16)
    sites = [Site(c) for c in find_candidates(model)]
    match_all(model, sites, tiny_inputs(model), None)
    specs = [s.structure.found.spec for s in sites if s.structure and isinstance(s.structure.found, FusedMatch)]
    wanted = {
        (p.num_experts, spec.top_k, p.hidden, p.intermediate, p.activation.gated, bool(spec.up.bias))
        for spec in specs
        for p in [spec.params]
    }
    found = {(*s.sizes, s.gated, s.biased) for s in shapes_of(model, model.config, torch.bfloat16)}
    assert wanted and found == wanted


def test_sizes_from_a_directory() -> None:
    (shape,) = model_shapes(str(demo.MODEL_DIRECTORY), torch.bfloat16)
    assert shape.sizes == (16, 2, 128, 128)


class Experts(nn.Module):
    """Packed experts of the given matrices."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        super().__init__()
        for i, size in enumerate(sizes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.empty(4, *size, device="meta")))


def test_sizes_that_cannot_be_told() -> None:
    config = SimpleNamespace(hidden_size=32, num_experts_per_tok=2)
    with pytest.raises(ShapeError, match="no experts that can be told"):
        shapes_of(nn.Linear(4, 4), config, torch.bfloat16)
    with pytest.raises(ShapeError, match="hidden and intermediate"):
        shapes_of(Experts((48, 24), (24, 48)), config, torch.bfloat16)
    with pytest.raises(ShapeError, match="how many experts"):
        shapes_of(Experts((48, 32), (32, 24)), SimpleNamespace(hidden_size=32), torch.bfloat16)
    (separate,) = shapes_of(Experts((24, 32), (24, 32), (32, 24)), config, torch.bfloat16)
    assert (separate.sizes, separate.gated) == ((4, 2, 32, 24), True)
    (plain,) = shapes_of(Experts((32, 24), (24, 32)), config, torch.bfloat16)
    assert (plain.sizes, plain.gated) == ((4, 2, 32, 24), False)
