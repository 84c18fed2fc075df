"""What is changed in the graph of a compiled decode layer: equal nodes, and products of one row with a bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from mxfp4_compile.runtime.graph_pass import LayerPass, reduce_biased, share

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


def test_caches_tell_passes_apart() -> None:
    assert LayerPass(("share",)).uuid() != LayerPass(("share", "reduce_biased")).uuid()
    assert LayerPass(("share",)).uuid() == LayerPass(("share",)).uuid()
