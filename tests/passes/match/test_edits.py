"""Matching reads: what a rewritten graph needs beside the op is data, and rewrite applies it to a copy."""

from __future__ import annotations

import functools

import pytest
import torch
from loop_models import AllWeightsMoE, Model
from mutations import CHANGING
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile.ops import schema
from mxfp4_compile.passes.build.rewrite import rewrite
from mxfp4_compile.passes.calls import describe
from mxfp4_compile.passes.match import FusedMatch, SplitMatch, match
from mxfp4_compile.passes.match.edits import Edits, InputSize
from mxfp4_compile.passes.trace.export import trace
from mxfp4_compile.passes.trace.traced import Traced, call_pattern
from mxfp4_compile.passes.trace.unroll import trace_loop

E, H, MI, K = 4, 64, 32, 2
aten = torch.ops.aten


class Block(nn.Module):
    """Routes itself and sums [batch, length, K, H]; ``wide``: in fp32, to which it adds the tokens before it rounds."""

    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self.wide = wide
        self.gate = nn.Parameter(torch.randn(E, H))
        self.up = nn.Parameter(torch.randn(E, 2 * MI, H))
        self.down = nn.Parameter(torch.randn(E, H, MI))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, H)
        weights, ids = (tokens @ self.gate.T).softmax(-1).topk(K, dim=-1)
        pair = ids.reshape(-1)
        y = torch.bmm(self.up[pair], tokens.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
        gate, up = y.chunk(2, dim=-1)
        y = torch.bmm(self.down[pair], (nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        if not self.wide:
            return (y.view(*x.shape[:2], K, H) * weights.view(*x.shape[:2], K, 1)).sum(2)
        total = (y.view(-1, K, H) * weights.unsqueeze(-1)).float().sum(1)
        return (total + tokens.float()).to(x.dtype).view(x.shape)


def block(dtype: torch.dtype, make: object) -> Model:
    return Model(make, dtype, layers=1)


def traced(model: Model, dtype: torch.dtype, take: object = trace) -> Traced:
    sizes = [torch.zeros(b, n, H, dtype=dtype) for b, n in ((2, 9), (3, 11))]
    return take(model.layers[0], call_pattern(*(describe((x,), {}) for x in sizes)))  # type: ignore[operator]


def matched(graph: Traced) -> FusedMatch:
    """The match; the graph must be the same to the letter after it."""
    before = str(graph.graph)
    found = match(graph)
    assert str(graph.graph) == before, "matching changed the graph"
    assert isinstance(found, FusedMatch), found
    assert {found.x, found.topk_ids, found.topk_weights, found.output} <= set(graph.graph.nodes)
    rewritten = rewrite(graph, found, {"up": 1, "down": 1}, "reference", "canonical").graph
    assert str(graph.graph) == before, "rewriting changed the traced graph"
    assert [n.target for n in rewritten.nodes].count(schema.moe) == 1
    return found


def close_to_restored(model: Model, dtype: torch.dtype, tolerance: float) -> None:
    """On a batch that was not traced: the rewritten block against the restored one, on the same weights."""
    generator = torch.Generator().manual_seed(1)
    example, x = (torch.randn(b, n, H, generator=generator).to(dtype) for b, n in ((2, 9), (4, 5)))
    with torch.no_grad():
        mxfp4_compile.optimize(model, example_inputs=(example,))
        assert [s.outcome for s in model.mxfp4_report.sites] == ["fused"]
        ours = model(x).double()
        theirs = mxfp4_compile.restore(model)(x).double()
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_an_output_by_batch_and_length_is_put_in_that_shape_again() -> None:
    model = block(torch.float32, Block)
    found = matched(traced(model, torch.float32))
    (name,) = traced(model, torch.float32).inputs
    assert found.edits == Edits(lead=(InputSize(name, 0), InputSize(name, 1)))
    assert found.output.meta["val"].dim() == 3
    close_to_restored(model, torch.float32, 1e-5)


def test_a_sum_in_fp32_that_is_added_to_is_read_in_fp32() -> None:
    model = block(torch.bfloat16, functools.partial(Block, wide=True))
    found = matched(traced(model, torch.bfloat16))
    assert found.edits == Edits(widens_to=torch.float32)
    assert found.output.meta["val"].dtype == torch.float32
    close_to_restored(model, torch.bfloat16, 2e-2)


def test_routing_weights_of_all_experts_are_gathered_by_id() -> None:
    model = block(torch.float32, AllWeightsMoE)
    graph = traced(model, torch.float32, trace_loop)
    found = matched(graph)
    assert found.edits == Edits(gathers=True)
    assert found.topk_weights.meta["val"].shape[1] == found.spec.params.num_experts
    rewritten = rewrite(graph, found, {"up": 1, "down": 1}, "reference", "canonical").graph
    op = next(n for n in rewritten.nodes if n.target == schema.moe)
    assert op.args[2].target == aten.gather.default


def test_a_reason_names_the_first_node_of_the_graph_that_it_is_about() -> None:
    """Two nodes round the sum to bf16: in every process the same one is named."""
    mutation = next(m for m in CHANGING if m.name == "sum_in_bf16")
    graph = mutation.mutate()
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
    rounded = [n.name for n in calls if n.meta["val"].dtype == torch.bfloat16]
    found = match(graph)
    assert isinstance(found, SplitMatch) and len(rounded) > 1
    assert found.spec.reason.startswith(f"{rounded[0]} rounds to torch.bfloat16")


@pytest.mark.slow
def test_experts_that_hand_the_token_on_become_a_product_with_it() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from mxfp4_compile import planning
    from mxfp4_compile.passes.find.discover import experts_implementation, find_candidates
    from mxfp4_compile.tools.families import tiny_inputs, tiny_model

    model = tiny_model("longcat_flash", dtype=torch.bfloat16, layers=1)
    sites = [planning.Site(candidate) for candidate in find_candidates(model)]
    with experts_implementation(model, "grouped_mm"):
        planning.match_all(model, sites, tiny_inputs(model), None)
    found = [s.structure for s in sites if s.structure is not None]
    assert found and all(matched(s.traced).edits.handed_on is not None for s in found)
    for structure in found:
        graph = rewrite(structure.traced, structure.found, {"up": 1, "down": 1}, "reference", "canonical").graph
        assert not any(n.target == aten.nonzero.default for n in graph.nodes), "a loop over rows is left"
