"""A loop over experts, collapsed by ``trace.collapse``: one node per projection, rows one expert after the other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ...trace.collapse import expert_products, expert_products_transposed
from ...trace.traced import Traced
from .anchor import ExpertGemm

NAME = "loop"


def find(traced: Traced) -> Iterator[ExpertGemm]:
    """Anchors of this form in graph order."""
    for node in traced.graph.nodes:
        if node.op != "call_function" or node.target not in (expert_products, expert_products_transposed):
            continue
        rows, stack, selector = node.args
        assert isinstance(rows, fx.Node) and isinstance(stack, fx.Node) and isinstance(selector, fx.Node)
        transposed = node.target is expert_products_transposed
        experts, first, second = (int(d) for d in stack.meta["val"].shape)
        yield ExpertGemm(
            node=node,
            form=NAME,
            weight=traced.parameters[stack.name],
            transposed=transposed,
            shape=(experts, second, first) if transposed else (experts, first, second),
            rows=rows,
            selector=selector,
            experts_of=lambda value, _rows: value,
            row_matrix=lambda value: value,
            as_output=lambda value: value,
        )


__all__ = ["NAME", "find"]
