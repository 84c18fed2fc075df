"""A site's rewritten graph with low-rank terms on its projections.

::

    mxfp4::moe             -> mxfp4::adapted_moe with the terms of both projections
    mxfp4::grouped_linear  -> the same, and a mxfp4::low_rank added for each term

The terms' tensors are the graph's last inputs, so that one graph serves every step of a training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ops import schema
from ..ops.low_rank import Term


@dataclass(frozen=True)
class Place:
    """Where a term belongs: the slot of its projection, and what is no tensor of it."""

    slot: str
    scaling: float
    start: int


def with_terms(graph: fx.GraphModule, places: tuple[Place, ...]) -> fx.GraphModule:
    """A copy of a rewritten graph that takes a and b of every place after its own inputs."""
    copy = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph.graph, mapped)
    last = [node for node in copy.nodes if node.op == "placeholder"][-1]
    inputs: dict[Place, list[tuple[fx.Node, fx.Node]]] = {}
    for i, place in enumerate(places):
        pair = []
        for name in (f"adapter_a_{i}", f"adapter_b_{i}"):
            with copy.inserting_after(last):
                last = copy.placeholder(name)
            pair.append(last)
        inputs.setdefault(place, []).append((pair[0], pair[1]))
    of_slot: dict[str, list[tuple[Place, tuple[fx.Node, fx.Node]]]] = {}
    for place, pairs in inputs.items():
        of_slot.setdefault(place.slot, []).extend((place, pair) for pair in pairs)
    for node in list(copy.nodes):
        if node.op != "call_function":
            continue
        if node.target == schema.moe:
            up, down = of_slot.get("up", []), of_slot.get("down", [])
            terms: list[Any] = [[a for _, (a, _) in up + down], [b for _, (_, b) in up + down]]
            terms += [[p.scaling for p, _ in up + down], [p.start for p, _ in up + down], len(up)]
            node.target, node.args = schema.adapted_moe, (*node.args[:7], *terms, *node.args[7:])
        elif node.target == schema.grouped_linear:
            slot = str(node.args[2][0].target).rpartition("_")[0]  # type: ignore[index, union-attr]
            _add_after(copy, node, of_slot.get(slot, []))
    copy.output(result)
    return fx.GraphModule(graph, copy)


def _add_after(graph: fx.Graph, node: fx.Node, terms: list[tuple[Place, tuple[fx.Node, fx.Node]]]) -> None:
    x, offsets, rows = node.args[0], node.args[1], node.args[3]
    y, users = node, list(node.users)
    for place, (a, b) in terms:
        with graph.inserting_after(y):
            y = graph.call_function(plus, (y, x, offsets, a, b, place.scaling, place.start, rows))
    for user in users:
        user.replace_input_with(node, y)


def plus(y: Tensor, x: Tensor, offsets: Tensor, a: Tensor, b: Tensor, scaling: float, start: int, rows: int) -> Tensor:
    """y [S, N] and what a term adds from its row ``start`` on, in the dtype of y."""
    low = schema.add_low_rank(x, offsets, a, b, scaling)
    return y + torch.nn.functional.pad(low.to(y.dtype), (start, rows - start - low.shape[1]))


__all__ = ["Place", "Term", "plus", "with_terms"]
