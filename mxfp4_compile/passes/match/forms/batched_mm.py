"""Each pair brings a gathered copy of its expert's weight: ``bmm(W[ids], x[..., None])`` or its mirror."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...trace.traced import Traced
from .anchor import ExpertGemm, permutation_of, trace_weight

NAME = "batched_mm"
aten = torch.ops.aten


def find(traced: Traced) -> Iterator[ExpertGemm]:
    """Anchors of this form in graph order."""
    for node in traced.graph.nodes:
        if node.op != "call_function" or node.target != aten.bmm.default:
            continue
        left, right = node.args
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            continue
        if right.meta["val"].shape[2] == 1:
            gathered, rows, column = left, right, True
        elif left.meta["val"].shape[1] == 1:
            gathered, rows, column = right, left, False
        else:
            continue
        found = _gather(gathered, traced)
        if found is None:
            continue
        name, ids, order = found
        if order[0] != 0:
            continue
        dims = [int(d) for d in gathered.meta["val"].shape[1:]]
        n, k = dims if column else reversed(dims)
        # The gathered matrix is [N, K] for a column operand and [K, N] for a row operand.
        experts = _experts(name, traced)
        swapped = order == (0, 2, 1)
        yield ExpertGemm(
            node=node,
            form=NAME,
            weight=name,
            transposed=swapped if column else not swapped,
            shape=(experts, n, k),
            rows=rows,
            selector=ids,
            experts_of=lambda value, _rows: value.reshape(-1),
            row_matrix=lambda value: value.reshape(value.shape[0], -1),
            as_output=(lambda y: y.unsqueeze(2)) if column else (lambda y: y.unsqueeze(1)),
        )


def _experts(name: str, traced: Traced) -> int:
    placeholder = next(p for p, target in traced.parameters.items() if target == name)
    return int(traced.node(placeholder).meta["val"].shape[0])


def _gather(node: Any, traced: Traced) -> tuple[str, fx.Node, tuple[int, ...]] | None:
    """Follow permutations to the gather, and from there to the parameter."""
    order: tuple[int, ...] = (0, 1, 2)
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target == aten.index.Tensor:
            source, indices = node.args[0], cast("list[Any]", node.args[1])
            if len(indices) != 1:
                return None
            ids: Any = indices[0]
        elif node.target == aten.index_select.default and node.args[1] == 0:
            source, _, ids = node.args
        else:
            step = permutation_of(node)
            if step is None:
                return None
            order = tuple(step[i] for i in order)
            node = node.args[0]
            continue
        if not isinstance(ids, fx.Node) or ids.meta["val"].dim() != 1:
            return None
        place = trace_weight(source, traced)
        if place is None:
            return None
        name, _, inner = place
        return name, ids, tuple(inner[i] for i in order)
    return None


__all__ = ["NAME", "Tensor", "find"]
