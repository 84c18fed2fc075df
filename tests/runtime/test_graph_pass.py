"""What is changed in the graph of a compiled decode layer: equal nodes, and products of one row with a bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from mxfp4_compile.runtime import linear  # noqa: F401 - defines the op
from mxfp4_compile.runtime.graph_pass import LayerPass, few_rows, reduce_biased, share

ADDMM = torch.ops.aten.addmm.default


def test_only_what_is_equal_is_shared() -> None:
    """Random numbers, other arguments and numbers of other types stay."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x + 1, x + 1, x + 1.0, torch.rand_like(x), torch.rand_like(x), x.sum(0), x.sum(1)

    graph = make_fx(function)(torch.ones(2, 2, dtype=torch.int64).float())
    before = sum(n.op == "call_function" for n in graph.graph.nodes)
    share(graph.graph)
    graph.graph.lint()
    assert sum(n.op == "call_function" for n in graph.graph.nodes) == before - 1


def graph_of(rows: int, dtype: torch.dtype) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 300), (40, 300), (40,)))
    inputs = [x, weight * 0.1, bias * 8]
    return make_fx(F.linear, tracing_mode="fake")(*inputs), inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_biased_product_of_one_row_is_rounded_once(dtype: torch.dtype) -> None:
    graph, inputs = graph_of(1, dtype)
    assert len(graph.graph.find_nodes(op="call_function", target=ADDMM)) == 1
    LayerPass(("share", "reduce_biased"))(graph.graph)
    graph.recompile()
    assert not graph.graph.find_nodes(op="call_function", target=ADDMM)
    assert all("val" in n.meta for n in graph.graph.nodes if n.op == "call_function")
    got, exact = graph(*inputs), F.linear(*(t.double() for t in inputs))
    assert got.dtype == dtype
    # At most half a unit of the last place from the exact result: nothing was rounded before the bias was added.
    unit = torch.finfo(dtype).eps * exact.abs().log2().floor().exp2()
    assert bool(((got.double() - exact).abs() <= 0.501 * unit).all())


@pytest.mark.parametrize(("rows", "dtype"), [(2, torch.bfloat16), (1, torch.float32), (1, torch.float64)])
def test_other_products_stay(rows: int, dtype: torch.dtype) -> None:
    """With more rows, and where the sum would be narrower than the product was, or no cheaper."""
    graph, _ = graph_of(rows, dtype)
    reduce_biased(graph.graph)
    assert len(graph.graph.find_nodes(op="call_function", target=ADDMM)) == 1


@pytest.mark.parametrize("biased", [True, False])
def test_few_rows_are_computed_by_the_kernel(biased: bool) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias if biased else None) + x @ odd

    x, weight, bias, odd = (torch.randn(*s).bfloat16() for s in ((8, 32), (40, 32), (40,), (32, 40)))
    graph = make_fx(function, tracing_mode="fake")(x, weight, bias, odd)
    expected = graph(x, weight, bias, odd)
    few_rows(graph.graph)
    kernel, product = torch.ops.mxfp4_runtime.linear_rows.default, torch.ops.aten.mm.default
    count = lambda: [len(graph.graph.find_nodes(op="call_function", target=t)) for t in (kernel, ADDMM, product)]
    assert count() == [0, biased, 2 - biased]  # on a CPU nothing changes
    few_rows(graph.graph, "cpu")
    graph.graph.lint()
    graph.recompile()
    assert count() == [1, 0, 1]  # the other weight is no transpose
    assert torch.equal(graph(x, weight, bias, odd), expected)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (65, torch.bfloat16), (8, torch.float32)])
def test_other_numbers_of_rows_stay(rows: int, dtype: torch.dtype) -> None:
    graph, _ = graph_of(rows, dtype)
    few_rows(graph.graph, "cpu")
    assert len(graph.graph.find_nodes(op="call_function", target=ADDMM)) == 1


def test_caches_tell_passes_apart() -> None:
    assert LayerPass(("share",)).uuid() != LayerPass(("share", "reduce_biased")).uuid()
    assert LayerPass(("share",)).uuid() == LayerPass(("share",)).uuid()
