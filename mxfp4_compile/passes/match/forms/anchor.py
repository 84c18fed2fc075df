"""The anchor all forms share: one product of rows with the weights of their experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...trace.traced import Traced

aten = torch.ops.aten

# Ops that hand on the same numbers in the same order of dimensions.
_SAME = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default}


@dataclass(frozen=True)
class ExpertGemm:
    """``rows [S, K] @ W[expert(row)].T -> [S, N]`` at ``node``.

    ``weight``: name of the packed 3-D parameter; ``transposed``: it is stored [E, K, N].
    ``rows``: the node that holds the rows; ``selector``: the node that tells each row's expert.
    ``experts_of``: value of ``selector`` -> [S] expert of each row. ``row_matrix``: value of ``rows`` ->
    [S, K]; ``as_output``: [S, N] -> a value of the shape ``node`` has.
    """

    node: fx.Node
    form: str
    weight: str
    transposed: bool
    shape: tuple[int, int, int]  # E, N, K
    rows: fx.Node
    selector: fx.Node
    experts_of: Callable[[Tensor, int], Tensor]
    row_matrix: Callable[[Tensor], Tensor]
    as_output: Callable[[Tensor], Tensor]


def trace_weight(node: Any, traced: Traced) -> tuple[str, fx.Node, tuple[int, ...]] | None:
    """Follow permutations back from ``node`` to a parameter.

    Returns (parameter name, its placeholder, permutation such that value = param.permute(permutation)),
    or None if anything but a permutation or a copy lies between.
    """
    order: tuple[int, ...] | None = None
    while isinstance(node, fx.Node):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 3:
            return None
        order = order if order is not None else (0, 1, 2)
        if node.op == "placeholder":
            name = traced.parameters.get(node.name)
            return None if name is None else (name, node, order)
        if node.op != "call_function":
            return None
        step = permutation_of(node)
        if step is None:
            return None
        order = tuple(step[i] for i in order)
        node = node.args[0]
    return None


def permutation_of(node: fx.Node) -> tuple[int, ...] | None:
    """The permutation a node applies to its 3-D input, identity for copies; None for any other op."""
    if node.target in _SAME:
        return (0, 1, 2)
    if node.target in (aten._to_copy.default, aten.to.dtype):
        source = node.args[0]
        same = isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype
        return (0, 1, 2) if same else None
    if node.target in (aten.transpose.int, aten.swapaxes.default):
        a, b = (int(d) % 3 for d in cast("tuple[int, int]", node.args[1:3]))
        order = [0, 1, 2]
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    if node.target == aten.permute.default:
        return tuple(int(d) % 3 for d in cast("list[int]", node.args[1]))
    return None
