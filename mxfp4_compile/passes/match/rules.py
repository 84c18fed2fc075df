"""What probes cannot prove: rules for the integers and the ops around the activation.

Contract: the graph is read, never changed; ``check_structure`` returns a reason or None.

Probes run a region for a few token counts, ids and magnitudes. What they show holds for all others only if
nothing in the region can tell those apart. So, in the parts that choose experts, gather rows, activate and sum:

1. positions (token counts, row numbers, counts of rows) only index or shape. They are not compared, not turned
   into numbers to compute with, and meet no constants but 0, 1, -1 and K;
2. ids become numbers or masks row by row, never across a token's row of ids;
3. rows are not cut at a constant place;
4. rows are gathered and summed by linear ops only: others may act on some magnitudes alone;
5. integers do not come from floats narrower than fp32, unless those are 0 or 1;
6. nothing else is read: no weight's values, no other input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import ARITHMETIC, BY_ROW, COMPARES, COUNTS, CUTS, FRESH, LINEAR, PICKS, SIZES, op_name, reads_no_values
from .chain import Chain

_POSITION, _ID = "position", "id"
_WHOLE = 1 << 31


@dataclass(frozen=True)
class Regions:
    """The nodes that choose experts, make the up GEMMs' rows, activate, and sum."""

    choice: set[fx.Node]
    rows: set[fx.Node]
    middle: set[fx.Node]
    tail: set[fx.Node]


def check_structure(
    chain: Chain, products: set[fx.Node], cuts: tuple[fx.Node, ...], regions: Regions, top_k: int
) -> str | None:
    """Apply the rules. ``cuts``: tokens, ids, weights, and what else is given; ``products`` are given, too."""
    return _Check(chain, products, cuts, regions, top_k).run()


class _Check:
    def __init__(
        self, chain: Chain, products: set[fx.Node], cuts: tuple[fx.Node, ...], regions: Regions, top_k: int
    ) -> None:
        self.traced, self.weights, self.experts = chain.traced, chain.weights, chain.experts
        self.cuts, self.ids, self.top_k = set(cuts), cuts[1], top_k
        given = self.cuts | products
        self.choice, self.rows = regions.choice - given, regions.rows - given
        self.middle, self.tail = regions.middle - given, regions.tail - given
        self.region = self.choice | self.rows | self.middle | self.tail
        self.taint: dict[fx.Node, set[str]] = {self.ids: {_ID}}
        self.live = set(given)

    def run(self) -> str | None:
        for node in self.traced.graph.nodes:
            if node not in self.region:
                continue
            if node.op == "placeholder":
                reason = self._placeholder(node)
            else:
                self.taint[node] = self._taint(node)
                # A new tensor of one number holds the same wherever it is read.
                constant = op_name(node) in FRESH and op_name(node) != "arange"
                if constant or (any(n in self.live for n in node.all_input_nodes) and op_name(node) not in SIZES):
                    self.live.add(node)
                reason = self._node(node)
            if reason is not None:
                return reason
        return None

    def _placeholder(self, node: fx.Node) -> str | None:
        own = node.name in self.traced.inputs or self.traced.parameters.get(node.name) in self.weights
        if own and any(user in self.region and not reads_no_values(user) for user in node.users):
            return f"the values of {node.name} are also read beside the projections"
        return None

    # what a node depends on

    def _taint(self, node: fx.Node) -> set[str]:
        name = op_name(node)
        if name in SIZES or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return {_POSITION}
        if name == "getitem":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if op_name(source) in ("sort", "topk") and node.args[1] == 1:
                return {_POSITION}
            return self.taint.get(source, set())
        if name == "arange":
            return {_POSITION} if any(isinstance(a, fx.Node) for a in node.args) else set()
        found: set[str] = set()
        for operand in self._data(node):
            found |= self.taint.get(operand, set())
        if name in COUNTS and found and not _is_float(node):
            found = {_POSITION}
        if name in ("histc", "bincount") and found:
            found = {_POSITION}
        return found

    def _data(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose values a node hands on or computes with (not those that only index or shape)."""
        name, args = op_name(node), node.args
        if name in FRESH:
            return []
        if name in ("view", "reshape", "_unsafe_view", "expand", "repeat", "slice", "narrow", "repeat_interleave"):
            return _nodes(args[:1])
        if name in ("full", "new_full", "full_like"):
            return _nodes(args[-1:])
        if name in PICKS:
            source = args[0]
            assert isinstance(source, fx.Node)
            indices = [n for n in node.all_input_nodes if n is not source]
            return [source] if source in self.live else [source, *indices]
        if name in ("index_put", "_unsafe_index_put"):
            return _nodes((args[0], args[2]))
        if name in ("index_add", "scatter_add", "scatter", "index_copy", "scatter_reduce"):
            return _nodes((args[0], args[3] if isinstance(args[3], fx.Node) else args[2]))
        return list(node.all_input_nodes)

    # the rules

    def _node(self, node: fx.Node) -> str | None:
        name, value = op_name(node), node.meta.get("val")
        data = self._data(node)
        positions = [n for n in data if _POSITION in self.taint.get(n, ())]
        if positions and name in COMPARES | {"where", "masked_fill"}:
            return f"{node.name} compares positions or counts of rows"
        if name in ARITHMETIC and (positions or _POSITION in self.taint[node]):
            allowed = {-1, 0, 1, self.top_k}
            numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float))]
            if name.endswith(("shift", "shift__")):
                numbers = [2**n for n in numbers if isinstance(n, int)]
            if any(n not in allowed for n in numbers) and not self._is_size(value):
                return f"{node.name} computes positions with {numbers[0]}"
        if name in CUTS:
            reason = self._cut(node, name)
            if reason is not None:
                return reason
        if _is_float(node):
            if positions and node not in self.choice:
                return f"{node.name} computes with positions or counts of rows"
            if node in self.rows | self.tail and node not in self.choice and name not in LINEAR:
                return f"{node.name} ({node.target}) is no linear op"
        elif isinstance(value, Tensor):
            for n in node.all_input_nodes:
                narrow = _is_float(n) and n.meta["val"].dtype.itemsize < 4
                if narrow and n in self.region and n not in self.middle and not _zeros_and_ones(n):
                    return f"{node.name} takes ids or positions from {n.meta['val'].dtype}"
        if node not in self.choice or name in ("where", "masked_fill"):
            return self._ids_row_by_row(node, data)
        return None

    def _is_size(self, value: Any) -> bool:
        """Whether a size is one of the tokens' or of the ids': a batch times a fixed length."""
        if not isinstance(value, torch.SymInt):
            return False
        sizes = {str(d) for n in self.cuts for d in (*n.meta["val"].shape, n.meta["val"].numel())}
        # Every token for every expert.
        sizes |= {str(n.meta["val"].shape[0] * n.meta["val"].shape[1]) for n in self.traced.dense}
        return str(value) in sizes

    def _ids_row_by_row(self, node: fx.Node, data: list[fx.Node]) -> str | None:
        if not _is_float(node):
            return None
        stack = [n for n in data if not _is_float(n) and _ID in self.taint.get(n, ())]
        seen: set[fx.Node] = set()
        while stack:
            part = stack.pop()
            if part in seen or part is self.ids or part not in self.region or _is_float(part):
                continue
            seen.add(part)
            if part.op == "call_function" and op_name(part) not in BY_ROW and _ID in self.taint.get(part, ()):
                return f"{part.name} ({part.target}) makes a number of several ids"
            stack.extend(part.all_input_nodes)
        return None

    def _cut(self, node: fx.Node, name: str) -> str | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = source.meta["val"]
        if not isinstance(value, Tensor):
            return None
        at = {"slice": 1, "narrow": 1, "select": 1, "unbind": 1}.get(name, 2)
        dim: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)
        if isinstance(value.shape[dim], int):
            # Within a row of ids only all columns together are looked at.
            several = source is self.ids or (_ID in self.taint.get(source, ()) and not _is_float(source))
            if name == "select" and _all_selected(source, dim, self.experts, self.traced.sentinels):
                return None
            return f"{node.name} takes some of a token's ids" if several and value.shape[dim] > 1 else None
        if name == "slice":
            start, end, step = (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])[:3]
            if start in (None, 0) and (end is None or (isinstance(end, int) and end >= _WHOLE)) and step == 1:
                return None
        return f"{node.name} takes some of the rows"


def _all_selected(source: fx.Node, dim: int, experts: int, sentinels: int) -> bool:
    """Whether every place along ``dim``, wider than a token's ids, is selected: one for each expert of a loop.

    The places after the last expert's, of ids that are none, may be left out.
    """
    value = source.meta["val"]
    at = {
        int(n.args[2]) % value.shape[dim]  # type: ignore[arg-type]
        for n in source.users
        if op_name(n) == "select" and int(n.args[1]) % value.dim() == dim % value.dim()  # type: ignore[arg-type]
    }
    places = value.shape[dim]
    return at == set(range(places)) or (at == set(range(experts)) and places <= experts + max(sentinels, 1))


def _zeros_and_ones(node: fx.Node) -> bool:
    """Whether a node holds nothing but 0 and 1, which every float dtype represents: a scatter of them into zeros."""
    base = node.args[0] if node.args else None
    marked = op_name(node) == "scatter" and node.args[3] in (0, 1) and not node.kwargs
    return marked and isinstance(base, fx.Node) and op_name(base) in ("zeros", "zeros_like", "new_zeros")


def _nodes(args: Iterable[Any]) -> list[fx.Node]:
    return [a for a in torch.utils._pytree.tree_leaves(list(args)) if isinstance(a, fx.Node)]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:  # the parts of a split
        value = value[0]
    return isinstance(value, Tensor) and value.is_floating_point()
