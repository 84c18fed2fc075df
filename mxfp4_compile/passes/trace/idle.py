"""Proof on an unrolled loop that an expert without tokens contributes nothing.

Contract: the graph is read, never changed; TraceError names the expert and the op where the proof fails.

The trace runs every expert's body, the model skips those without rows. Both are the same if a body's only effect
is by its rows. So, for each size u that only the routing knows (the number of an expert's rows):

1. a value is *idle* at u = 0 if it has no elements then: it carries nothing, whatever computed it;
2. what depends on an expert's rows or parameters must be idle, until it is written into another tensor at places
   of which there are none (index_add, index_put, scatter), or is joined with other rows (cat);
3. counts choose sizes, and where an expert's rows begin: a sum of counts added to places that are an expert's own,
   or the begin of a slice of them. Elsewhere (a fill value, a begin of arange, an element's place) they are values;
4. between two experts' writes the sum may be reshaped, cast and added to the other experts' sums: an op beside
   that would be done once for each expert that has tokens.

What the last expert's body does to the sum after its write looks like a step after the loop: the matcher's probes
and the verification of the whole block judge it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from ..graph import FILL_SIZES, HANDS_ON, PLACES, SIZED, WRITES, op_name
from .traced import TraceError


def check_idle(graph: fx.Graph, experts: Mapping[Any, int], share: Callable[[fx.Node], int | None]) -> None:
    """Prove it for every size of ``graph`` that only the routing knows.

    ``experts``: symbol of a number of rows -> expert; ``share``: the expert whose parameter a node is, or None.
    """
    _Idle(graph, experts, share).run()


class _Idle:
    """``depends``: node -> the symbols whose expert it depends on; ``written``: those whose rows it has taken in."""

    def __init__(self, graph: fx.Graph, experts: Mapping[Any, int], share: Callable[[fx.Node], int | None]) -> None:
        self.graph, self.experts, self.share = graph, experts, share
        self.symbols = {e: s for s, e in experts.items()}
        self.depends: dict[fx.Node, frozenset[Any]] = {}
        self.written: dict[fx.Node, frozenset[Any]] = {}
        self.left: dict[tuple[fx.Node, Any], fx.Node] = {}
        self._of_formula: dict[Any, frozenset[Any]] = {}
        self._known: dict[fx.Node, frozenset[Any]] = {}
        self._at_zero: dict[fx.Node, frozenset[Any]] = {}

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op == "output":
                self._output(node)
            else:
                self.depends[node] = self._dependence(node)
                self.written[node] = self._writing(node)
        everyone = frozenset().union(*(self.written[n] for n in self.graph.output_node().all_input_nodes))
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._between(node, everyone)

    def _unknown(self, node: fx.Node) -> frozenset[Any]:
        """The sizes in a node's value that only the routing knows."""
        if node not in self._known:
            self._known[node] = frozenset().union(*(self._of_value(v) for v in _values(node)))
        return self._known[node]

    def _of_value(self, value: Any) -> frozenset[Any]:
        dims = value.shape if isinstance(value, Tensor) else (value,)
        return frozenset().union(*(self._of_size(d) for d in dims if isinstance(d, torch.SymInt)))

    def _of_size(self, size: torch.SymInt) -> frozenset[Any]:
        formula = size.node.expr
        if formula not in self._of_formula:
            self._of_formula[formula] = frozenset(free_unbacked_symbols(size))
        return self._of_formula[formula]

    def _vanishing(self, value: Any) -> frozenset[Any]:
        """The symbols that make a tensor empty where they are zero."""
        if not isinstance(value, Tensor):
            return frozenset()
        found: set[Any] = set()
        for dim in value.shape:
            if isinstance(dim, torch.SymInt) and (symbols := self._of_size(dim)):
                terms = dim.node.expr.as_ordered_factors() if dim.node.expr.is_Mul else [dim.node.expr]
                found |= symbols & set(terms)
        return frozenset(found)

    def _idle(self, node: fx.Node, symbol: Any) -> bool:
        """Whether a node has no elements where ``symbol`` is zero."""
        if node not in self._at_zero:
            self._at_zero[node] = frozenset.intersection(*(self._vanishing(v) for v in _values(node)))
        return symbol in self._at_zero[node]

    # 2. and 3. what depends on whom

    def _dependence(self, node: fx.Node) -> frozenset[Any]:
        owner = self.share(node)
        if owner is not None:
            return frozenset({self.symbols[owner]}) if owner in self.symbols else frozenset()
        if node.op != "call_function":
            return frozenset()
        name = op_name(node)
        is_tensor = any(isinstance(v, Tensor) for v in _values(node))
        found: set[Any] = set()
        for operand in node.all_input_nodes:
            wanted = self.depends[operand]
            if name == "getitem" and op_name(operand) == "split_with_sizes":
                wanted = self._of_piece(node, operand)
            if not wanted:
                continue
            if is_tensor and not any(isinstance(v, Tensor) for v in _values(operand)):
                wanted = self._of_count(node, name, operand, wanted)
            for symbol in wanted:
                if self._taken(node, name, operand, symbol):
                    continue
                found.add(symbol)
                origin = self.left.get((operand, symbol))
                if origin is None and not self._idle(node, symbol) and (is_tensor or self._idle(operand, symbol)):
                    origin = node
                if origin is not None and is_tensor:
                    self.left.setdefault((node, symbol), origin)
        # Sizes that come into being here, as nonzero's do.
        return frozenset(found | (self._unknown(node) - self._of_operands(node)))

    def _of_operands(self, node: fx.Node) -> frozenset[Any]:
        return frozenset().union(*(self._unknown(n) for n in node.all_input_nodes))

    def _of_count(self, node: fx.Node, name: str, count: fx.Node, wanted: frozenset[Any]) -> frozenset[Any]:
        """A count as an operand of a tensor op: as a size or a begin it says nothing beyond the result's size."""
        exempt = name in SIZED
        if name in FILL_SIZES:
            rest = [a for i, a in enumerate(node.args) if i != FILL_SIZES[name]]
            exempt = count not in pytree.tree_leaves((rest, node.kwargs))
        elif name in ("slice", "narrow"):
            exempt = count not in node.args[4:] and self._own_rows(node) and self._begin(count)
        elif name == "arange" or (name == "add" and not node.kwargs and not _floating(node)):
            exempt = len(node.args) == 2 and _only_places(node) and self._own_rows(node) and self._begin(count)
        return wanted & self._unknown(node) if exempt else wanted

    def _of_piece(self, node: fx.Node, split: fx.Node) -> frozenset[Any]:
        """One piece of a split: where it begins says nothing if it is some expert's rows behind those of others."""
        sizes, piece = split.args[1], node.args[1]
        if isinstance(sizes, (list, tuple)) and isinstance(piece, int) and self._own_rows(node):
            if all(isinstance(n, fx.Node) and self._begin(n) for n in sizes[:piece]):
                return self.depends[split.args[0]] | self._unknown(node)  # type: ignore[index]
        return self.depends[split]

    def _own_rows(self, node: fx.Node) -> bool:
        """Whether the rows of a tensor are as many as some expert's: it has none where that has none."""
        return any(self._idle(node, symbol) for symbol in self._unknown(node))

    def _begin(self, count: fx.Node) -> bool:
        """Whether a number is a sum of counts, in which an expert without rows is nothing whether added or not."""
        value = count.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return False
        formula = value.node.expr
        return set(formula.args if formula.is_Add else (formula,)) <= self._of_size(value)

    def _taken(self, node: fx.Node, name: str, operand: fx.Node, symbol: Any) -> bool:
        """Whether ``node`` takes in the rows of an operand such that nothing is left of none."""
        if name == "cat":
            return self._idle(operand, symbol)
        if name not in WRITES or operand is node.args[0]:
            return False
        return any(self._idle(n, symbol) for n in self._of_write(node, name))

    def _of_write(self, node: fx.Node, name: str) -> list[fx.Node]:
        places = [node.args[i] for i in WRITES[name] if i < len(node.args)]
        return [n for n in pytree.tree_leaves(places) if isinstance(n, fx.Node)]

    def _output(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            for symbol in sorted(self.depends[operand], key=str):
                origin = self.left.get((operand, symbol), operand)
                raise TraceError(
                    f"{self._who(symbol)} reaches the output beside its rows, through {origin.name} "
                    f"({origin.target}): without tokens it would contribute something, or the model something else"
                )

    def _who(self, symbol: Any) -> str:
        number = self.experts.get(symbol)
        return f"a part of the tokens ({symbol} rows)" if number is None else f"expert {number}"

    # 4. what happens between the experts' writes

    def _writing(self, node: fx.Node) -> frozenset[Any]:
        name = op_name(node)
        found: set[Any] = set()
        for operand in node.all_input_nodes:
            found |= self.written[operand]
            if node.op == "call_function":
                found |= {s for s in self.depends[operand] if self._taken(node, name, operand, s)}
        return frozenset(found)

    def _between(self, node: fx.Node, everyone: frozenset[Any]) -> None:
        written = self.written[node]
        if not written or written >= everyone or any(self._idle(node, s) for s in self.depends[node]):
            return
        name = op_name(node)
        if name in HANDS_ON | WRITES.keys() or name == "cat" or not any(isinstance(v, Tensor) for v in _values(node)):
            return
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if name == "add" and len(node.all_input_nodes) == 2 and not node.kwargs:
            if all(self.written[n] or _zeros(n) for n in tensors) and len(tensors) == 2:
                return
        missing = sorted(everyone - written, key=lambda s: (self.experts.get(s, -1), str(s)))
        raise TraceError(
            f"{node.name} ({node.target}) changes the sum before {self._who(missing[0])} has added its rows: it would "
            "be done for experts with tokens only"
        )


def _values(node: fx.Node) -> Iterator[Any]:
    value = node.meta.get("val")
    yield from value if isinstance(value, (tuple, list)) and value else (value,)


def _floating(node: fx.Node) -> bool:
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in _values(node))


def _only_places(node: fx.Node) -> bool:
    """Whether a tensor is used as places to read or write at, and not otherwise."""

    def place(user: fx.Node) -> bool:
        at = PLACES.get(op_name(user), len(user.args))
        rest = [a for i, a in enumerate(user.args) if i != at]
        return node not in pytree.tree_leaves((rest, user.kwargs))

    return all(map(place, node.users))


def _zeros(node: fx.Node) -> bool:
    return op_name(node) in ("zeros", "zeros_like", "new_zeros")


__all__ = ["check_idle"]
