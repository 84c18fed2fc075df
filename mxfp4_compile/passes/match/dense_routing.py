"""Routing matrices: a graph that routes by a matrix [T, E] put in terms of expert ids [T, K] and weights [T, K].

::

    matrix [T, E], zero but at K places of a row      ids [T, K], weights [T, K]  -->  the matrix again
        |                                                 |
    X [E, T, K]  --bmm W-->  Y [E, T, N]         -->  rows X[id, t] [T * K, K]  --expert_products-->  among zeros

Contract: the traced graph is not changed; each variant is a copy that computes the same, so that ``match`` can say
what it is. A routing matrix is one that holds zero everywhere but at K known places of a row, which follows from the
graph alone (``_Places``): ``one_hot``, or a ``scatter`` into a constant, and pointwise ops that keep the zeros.

1. Of whole numbers, 0 and 1 (a mask, with tokens over an expert's capacity taken out): ids are the places, E where the
   mask holds 0 (no expert); the mask is made again from the ids.
2. Of floats (weights): ids are the places, the weights are read there; the matrix is made again from both.
3. Dense products ``bmm(X [E, T, K], W)`` of every token with every expert become ``expert_products`` on the rows
   X[id, t] alone, put back among zeros. That is the same if X is zero elsewhere, which ``match`` proves by running it
   (``Traced.dense``): a zero row gives a zero row, since the products have no bias. It is also the same if the
   output does not depend on what stands there (``Traced.dont_care``), since a zero of the matrix is its factor.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import CASTS, COPIES, FILLED, RESHAPES, op_name
from ..trace.collapse import expert_products, expert_products_transposed
from ..trace.traced import Traced
from .forms.anchor import trace_weight

aten = torch.ops.aten
# The last dimension is whole, and the numbers are those of a place or the background, after these.
_VIEWS = RESHAPES | COPIES
_CASTS = CASTS | {"type_as"}


@dataclass(frozen=True)
class _Places:
    """``node`` [..., E] holds ``background`` but at ``index`` [..., K] (or [...], for one) of its last dimension.

    ``zero_one``: it holds nothing but 0 and 1.
    """

    index: fx.Node
    columns: int
    background: float
    zero_one: bool


def variants(traced: Traced) -> Iterator[Traced]:
    """The graph in terms of each routing matrix it has, the last in graph order first."""
    found = _places(traced.graph)
    for node in reversed(list(found)):
        if found[node].background != 0 or any(user in found and found[user].background == 0 for user in node.users):
            continue
        if found[node].columns > 1 and not _distinct(found[node].index):
            continue
        variant = _Variant(traced, node, found[node]).run()
        if variant is not None:
            yield variant


def has_dense_products(traced: Traced) -> bool:
    """Whether every expert's weights are multiplied with rows of every token."""
    return any(_dense(node, traced) is not None for node in traced.graph.nodes)


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _places(graph: fx.Graph) -> dict[fx.Node, _Places]:
    found: dict[fx.Node, _Places] = {}
    for node in graph.nodes:
        value = _value(node)
        if node.op == "call_function" and value is not None and value.dim() >= 2 and isinstance(value.shape[-1], int):
            places = _of(node, value, found)
            if places is not None:
                found[node] = places
    return found


def _of(node: fx.Node, value: Tensor, found: dict[fx.Node, _Places]) -> _Places | None:
    name = op_name(node)
    if name == "one_hot":
        ids = node.args[0]
        assert isinstance(ids, fx.Node)
        return _Places(ids, 1, 0.0, True)
    if name == "scatter":
        return _scattered(node, value)
    sources = [n for n in node.all_input_nodes if n in found]
    if len(sources) != 1:
        return None
    (source,) = sources
    old = found[source]
    if name in _VIEWS | _CASTS:
        whole = value.shape[-1] == source.meta["val"].shape[-1]
        exact = name in _VIEWS or old.background in (0.0, float("inf"), float("-inf"))
        return old if whole and exact and node.args[0] is source else None
    if name in ("softmax", "_softmax"):
        last = node.args[1] in (-1, value.dim() - 1)
        return _Places(old.index, old.columns, 0.0, False) if last and old.background == float("-inf") else None
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    if str(value.shape) != str(source.meta["val"].shape):
        return None
    others = [n for n in node.all_input_nodes if n is not source]
    if others:
        # Zero times or over anything finite; a mask keeps zeros and ones.
        if old.background != 0 or not (name == "mul" or (name == "div" and node.args[0] is source)):
            return None
        masked = all((v := _value(n)) is not None and v.dtype == torch.bool for n in others)
        return _Places(old.index, old.columns, 0.0, old.zero_one and name == "mul" and masked)
    given = torch.tensor(old.background, dtype=torch.float64)
    try:
        args = fx.node.map_arg(node.args, lambda _: given)
        result = target(*args, **node.kwargs)
    except Exception:
        return None
    if not isinstance(result, Tensor) or result.numel() != 1:
        return None
    return _Places(old.index, old.columns, float(result), False)


def _scattered(node: fx.Node, value: Tensor) -> _Places | None:
    base, dim, index, source = node.args[:4]
    shape = _value(index)
    if not isinstance(base, fx.Node) or not isinstance(index, fx.Node) or shape is None or node.kwargs:
        return None
    if dim not in (-1, value.dim() - 1) or not isinstance(shape.shape[-1], int):
        return None
    if [str(d) for d in shape.shape[:-1]] != [str(d) for d in value.shape[:-1]]:
        return None
    fill = _fill(base)
    if fill is None:
        return None
    return _Places(index, shape.shape[-1], fill, fill == 0 and isinstance(source, int) and source == 1)


def _fill(node: fx.Node) -> float | None:
    """The number a new tensor is filled with."""
    name = op_name(node)
    if name in FILLED:
        return FILLED[name]
    if name in ("full", "full_like", "new_full"):
        number = node.args[2 if name == "new_full" else 1]
        return float(number) if isinstance(number, (int, float)) else None
    return None


def _distinct(index: fx.Node) -> bool:
    """Whether the ids of a row are different ones: the places of a top-k along the last dimension."""
    while op_name(index) in _VIEWS and index.args[0].meta["val"].shape[-1] == index.meta["val"].shape[-1]:  # type: ignore[union-attr]
        index = index.args[0]  # type: ignore[assignment]
    if index.target != operator.getitem or index.args[1] != 1:
        return False
    source = index.args[0]
    if not isinstance(source, fx.Node) or source.target != aten.topk.default:
        return False
    dims = source.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return len(source.args) < 3 or source.args[2] in (-1, dims - 1)


def _dense(node: fx.Node, traced: Traced) -> tuple[fx.Node, fx.Node, bool] | None:
    """(rows [E, T, K], weights' placeholder, stored [E, K, N]) of a product of all tokens with all experts."""
    if node.op != "call_function" or node.target != aten.bmm.default:
        return None
    rows, weight = node.args
    place = trace_weight(weight, traced)
    if place is None or place[2] not in ((0, 1, 2), (0, 2, 1)) or not isinstance(rows, fx.Node):
        return None
    _, placeholder, order = place
    return rows, placeholder, order == (0, 1, 2)


class _NoSize(Exception):
    """A free size that is none of an input's."""


class _Variant:
    """A copy of a graph in terms of the ids and weights of one routing matrix."""

    def __init__(self, traced: Traced, matrix: fx.Node, places: _Places) -> None:
        self.traced, self.matrix, self.places = traced, matrix, places
        self.graph = fx.Graph()
        self.mapped: dict[fx.Node, fx.Node] = {}
        self.ids: fx.Node | None = None
        self.experts = int(matrix.meta["val"].shape[-1])
        self.dense: list[fx.Node] = []
        self.dont_care: list[fx.Node] = []

    def run(self) -> Traced | None:
        value = self.matrix.meta["val"]
        if not value.is_floating_point() and not self.places.zero_one:
            return None
        try:
            return self._copied(value)
        except _NoSize:
            return None

    def _copied(self, value: Any) -> Traced:
        old = self.traced
        with value.fake_mode:
            for node in old.graph.nodes:
                dense = _dense(node, old) if self.ids is not None else None
                if dense is not None and node.meta["val"].shape[0] == self.experts:
                    self.mapped[node] = self._sparse(node, *dense)
                else:
                    self.mapped[node] = self.graph.node_copy(node, lambda n: self.mapped[n])
                if node is self.matrix:
                    self.mapped[node] = self._again(self.mapped[node])
        self.graph.eliminate_dead_code()
        self.graph.lint()
        names = {n.name for n in self.graph.nodes if n.op == "placeholder"}
        new = Traced(
            self.graph,
            list(old.inputs),
            {k: v for k, v in old.parameters.items() if k in names},
            {k: v for k, v in old.buffers.items() if k in names},
            {k: v for k, v in old.constants.items() if k in names},
            old.pattern,
            old.out_spec,
        )
        new.dense, new.sentinels = tuple(self.dense), int(not value.is_floating_point())
        new.dont_care = tuple(self.dont_care)
        return new

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values, **named)
        return node

    def _sizes(self, shape: Any) -> list[Any]:
        """A shape as arguments, its free sizes from inputs where they occur there: they depend on no values."""
        free = [i for i, d in enumerate(shape) if not isinstance(d, int)]
        if len(free) <= 1:
            return [-1 if i in free else d for i, d in enumerate(shape)]
        return [self._size(d) if i in free else d for i, d in enumerate(shape)]

    def _size(self, size: Any) -> fx.Node:
        for node in self.graph.nodes:
            value = _value(node)
            if value is not None and node.name in self.traced.inputs:
                for i, d in enumerate(value.shape):
                    if str(d) == str(size):
                        return self._call(aten.sym_size.int, node, i)
        raise _NoSize

    def _again(self, matrix: fx.Node) -> fx.Node:
        """Ids [T, K] out of the matrix, and the matrix made of them again."""
        columns, value = self.places.columns, matrix.meta["val"]
        index = self._call(aten.reshape.default, self.mapped[self.places.index], [-1, columns])
        flat = self._call(aten.reshape.default, matrix, [-1, self.experts])
        held = self._call(aten.gather.default, flat, 1, index)
        if value.is_floating_point():
            self.ids = index
            tokens = self._call(aten.sym_size.int, index, 0)
            zeros = self._call(aten.new_zeros.default, held, [tokens, self.experts])
            again = self._call(aten.scatter.src, zeros, 1, index, held)
        else:
            none = self._call(aten.full_like.default, index, self.experts)
            there = self._call(aten.ne.Scalar, held, 0)
            self.ids = self._call(aten.where.self, there, index, none)
            again = self._mask(self.ids, value)
        return self._call(aten.reshape.default, again, self._sizes(value.shape))

    def _mask(self, ids: fx.Node, like: Tensor) -> fx.Node:
        numbers = self._call(aten.arange.default, self.experts, device=like.device)
        mask: fx.Node | None = None
        for column in range(self.places.columns):
            one = self._call(aten.unsqueeze.default, self._call(aten.select.int, ids, 1, column), 1)
            here = self._call(aten.eq.Tensor, one, numbers)
            mask = here if mask is None else self._call(aten.logical_or.default, mask, here)
        assert mask is not None
        return self._call(aten._to_copy.default, mask, dtype=like.dtype)

    def _sparse(self, node: fx.Node, rows: fx.Node, weight: fx.Node, transposed: bool) -> fx.Node:
        """The product of the rows that ids name, among zeros."""
        assert self.ids is not None
        all_rows, ids = self.mapped[rows], self.ids
        width, out = int(rows.meta["val"].shape[2]), int(node.meta["val"].shape[2])

        def places(size: int) -> fx.Node:
            return self._call(aten.expand.default, self._call(aten.unsqueeze.default, ids, 2), [-1, -1, size])

        by_token = self._call(aten.transpose.int, all_rows, 0, 1)
        chosen = self._call(aten.gather.default, by_token, 1, places(width))
        flat = self._call(aten.reshape.default, chosen, [-1, width])
        experts = self._call(aten.reshape.default, ids, [-1])
        target = expert_products_transposed if transposed else expert_products
        product = self.graph.call_function(target, (flat, self.mapped[weight], experts))
        value = node.meta["val"]
        product.meta["val"] = value.new_empty((flat.meta["val"].shape[0], out))
        back = self._call(aten.reshape.default, product, [-1, self.places.columns, out])
        tokens = self._call(aten.sym_size.int, ids, 0)
        zeros = self._call(aten.new_zeros.default, product, [tokens, self.experts, out])
        self.dont_care.append(zeros)
        put = self._call(aten.scatter.src, zeros, 1, places(out), back)
        by_expert = self._call(aten.transpose.int, put, 0, 1)
        result = self._call(aten.clone.default, by_expert, memory_format=torch.contiguous_format)
        self.dense.append(all_rows)
        return result


__all__ = ["has_dense_products", "variants"]
