"""Rewrite: the traced graph with its matched region replaced by op calls on prepared weights.

::

    traced graph                              rewritten graph
    inputs, parameters, buffers, constants      inputs, retained parameters and buffers, prepared tensors
         |                                           |
    ... head, GEMMs, middle, tail ...           mxfp4::moe, and what the match's edits say beside it
         |                                           |        (split: a mxfp4::grouped_linear for each GEMM)
    the rest                                    the rest

Contract: the traced graph is not changed; the result is a GraphModule without state whose inputs are
the site's tensor arguments, then the retained parameters, then the prepared tensors. No expert GEMM may
be left over: RewriteError if one is.

1. copy the graph; 2. add inputs for prepared tensors; 3. put the op where the region's output was, and apply the
edits of the match (``match.edits``); 4. drop what nothing uses any more; 5. check that the anchors are gone.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ops import schema
from ..match import FusedMatch, SplitMatch
from ..match.edits import InputSize
from ..trace.collapse import rows_of_expert
from ..trace.traced import Traced
from ..weights import projections_of

aten = torch.ops.aten


class RewriteError(RuntimeError):
    """A matched graph that could not be rewritten as a whole, with the reason."""


def retained_names(traced: Traced, found: FusedMatch | SplitMatch) -> tuple[str, ...]:
    """Parameters and buffers that the rewritten graph still reads."""
    graph = _rewritten(traced, found, {p.slot: 1 for p in projections_of(found.spec)}, "reference", "canonical")
    names = {**traced.parameters, **traced.buffers}
    return tuple(names[n.target] for n in graph.nodes if n.op == "placeholder" and n.target in names)


def rewrite(
    traced: Traced, found: FusedMatch | SplitMatch, counts: Mapping[str, int], backend: str, layout: str
) -> fx.GraphModule:
    """The rewritten graph; ``counts``: slot -> number of prepared tensors."""
    graph = _rewritten(traced, found, counts, backend, layout)
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            root.register_buffer(node.target, traced.constants[node.target], persistent=False)
    return fx.GraphModule(root, graph, class_name="RewrittenExperts")


@dataclass(frozen=True)
class _Copy:
    """The new graph; ``mapped``: traced node -> new one; ``slots``: prepared tensors and bias by projection."""

    traced: Traced
    graph: fx.Graph
    mapped: dict[fx.Node, fx.Node]
    slots: Mapping[str, tuple[list[fx.Node], fx.Node | None]]
    backend: str
    layout: str

    def call(self, value: Any, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node that computes ``value``."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node


def _rewritten(
    traced: Traced, found: FusedMatch | SplitMatch, counts: Mapping[str, int], backend: str, layout: str
) -> fx.Graph:
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    state = {**traced.parameters, **traced.buffers}
    by_name = {n.name: n for n in traced.graph.nodes if n.op == "placeholder"}
    for name in (*traced.inputs, *state):
        mapped[by_name[name]] = graph.node_copy(by_name[name])
    copy = _Copy(traced, graph, mapped, _weight_inputs(graph, found, counts), backend, layout)
    for name in traced.constants:
        mapped[by_name[name]] = graph.get_attr(name)
    replaced = _Fused(copy, found) if isinstance(found, FusedMatch) else _Split(copy, found)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            # Exported programs return a tuple; a module called in a model returns its tensor.
            results = [mapped[r] for r in node.args[0]]  # type: ignore[index, union-attr]
            graph.output(results[0] if traced.out_spec is None else tuple(results))
            continue
        new = replaced.node(node)
        if new is None:
            new = graph.node_copy(node, lambda n: mapped[n])
            if node.target == aten.view.default:
                # The trace saw contiguous arguments; callers may pass others, as the original's reshape allowed.
                new.target = aten.reshape.default
        mapped[node] = new
    if isinstance(found, SplitMatch):
        _counts_at_once(graph)
    _drop_unused(graph, set(traced.inputs))
    _check_gone(traced, found, graph, mapped)
    graph.lint()
    return graph


def _check_gone(
    traced: Traced, found: FusedMatch | SplitMatch, graph: fx.Graph, mapped: Mapping[fx.Node, fx.Node]
) -> None:
    """RewriteError if a product or a weight that was to be replaced is still there."""
    left = {mapped[g.node] for g in found.gemms} & set(graph.nodes) if isinstance(found, FusedMatch) else set()
    if left:
        raise RewriteError(f"the products {sorted(map(str, left))} are also used outside the matched region")
    state = {**traced.parameters, **traced.buffers}
    weights = {n for p in projections_of(found.spec) for n in p.source.parameters}
    for node in graph.nodes:
        if node.op == "placeholder" and state.get(node.target) in weights:
            raise RewriteError(f"weight {state[node.target]!r} is still used by the rewritten graph")


class _Fused:
    """Puts ``mxfp4::moe`` in the place of the match's output, and what its edits say around it."""

    def __init__(self, copy: _Copy, found: FusedMatch) -> None:
        self.copy, self.found, self.edits = copy, found, found.edits
        self.moe: fx.Node | None = None

    def node(self, node: fx.Node) -> fx.Node | None:
        """What takes the place of a traced node; None for a copy of it."""
        if node is self.found.output:
            self.moe = self._moe()
            self.moe.meta = {**node.meta, "val": self.found.x.meta["val"]}
            return self._as_read(self.moe)
        if node is self.edits.handed_on and self.moe is not None:
            return self._plus_handed_on(self.moe, node.meta["val"])
        return None

    def _moe(self) -> fx.Node:
        copy, found = self.copy, self.found
        (up, up_bias), (down, down_bias) = copy.slots["up"], copy.slots["down"]
        ids, weights = copy.mapped[found.topk_ids], copy.mapped[found.topk_weights]
        if self.edits.gathers:
            like, pairs = found.topk_weights.meta["val"], found.topk_ids.meta["val"]
            known = copy.call(pairs, aten.clamp.default, ids, None, found.spec.params.num_experts - 1)
            weights = copy.call(like.new_empty(pairs.shape), aten.gather.default, weights, 1, known)
        if found.scale != 1.0:
            weights = copy.graph.call_function(aten.mul.Tensor, (weights, found.scale))
        scalars = schema.moe_scalars(found.spec.params)
        arguments = (up, down, up_bias, down_bias, *scalars, copy.backend, copy.layout)
        return copy.graph.call_function(schema.moe, (copy.mapped[found.x], ids, weights, *arguments))

    def _as_read(self, moe: fx.Node) -> fx.Node:
        """The op's output [T, H] in the shape and dtype in which the rest of the graph reads it."""
        copy, value, result = self.copy, self.found.output.meta["val"], moe
        if self.edits.lead is not None:
            shape = [self._size(size, own) for size, own in zip(self.edits.lead, value.shape, strict=False)]
            same = value.new_empty(value.shape, dtype=self.found.x.meta["val"].dtype)
            result = copy.call(same, aten.reshape.default, result, [*shape, value.shape[-1]])
        if self.edits.widens_to is not None:
            result = copy.call(value, aten._to_copy.default, result, dtype=self.edits.widens_to)
        return result

    def _size(self, size: int | InputSize, value: Any) -> int | fx.Node:
        if isinstance(size, int):
            return size
        source = self.copy.mapped[self.copy.traced.node(size.input)]
        return self.copy.call(value, aten.sym_size.int, source, size.dim)

    def _plus_handed_on(self, moe: fx.Node, value: Tensor) -> fx.Node:
        """op + x * (the weights of ids from E on), of the dtype of ``value``."""
        copy, found = self.copy, self.found
        x, ids, w = (n.meta["val"] for n in (found.x, found.topk_ids, found.topk_weights))
        none = ids.new_empty(ids.shape, dtype=torch.bool)
        chosen = copy.call(none, aten.ge.Scalar, copy.mapped[found.topk_ids], found.spec.params.num_experts)
        kept = copy.call(w, aten.mul.Tensor, copy.mapped[found.topk_weights], chosen)
        total = copy.call(w.new_empty((w.shape[0], 1)), aten.sum.dim_IntList, kept, [1], True)
        wide = torch.promote_types(w.dtype, x.dtype)
        part = copy.call(x.new_empty(x.shape, dtype=wide), aten.mul.Tensor, copy.mapped[found.x], total)
        if wide != value.dtype:
            part = copy.call(value, aten._to_copy.default, part, dtype=value.dtype)
        return copy.call(value, aten.add.Tensor, moe, part)


class _Split:
    """Puts a ``mxfp4::grouped_linear`` in the place of each GEMM."""

    def __init__(self, copy: _Copy, found: SplitMatch) -> None:
        self.copy = copy
        self.gemms = {g.node: (f"linear{i}", g) for i, g in enumerate(found.gemms)}
        self.ends: dict[fx.Node, fx.Node] = {}
        self.parts: dict[fx.Node, fx.Node] = {}

    def node(self, node: fx.Node) -> fx.Node | None:
        """What takes the place of a traced node; None for a copy of it."""
        copy = self.copy
        if node.target is rows_of_expert:
            return _part(copy.graph, node, copy.mapped, self.parts)
        if node not in self.gemms:
            return None
        slot, gemm = self.gemms[node]
        offsets = copy.mapped[gemm.selector]
        if gemm.form == "loop":
            if gemm.selector not in self.ends:
                self.ends[gemm.selector] = _offsets(copy.graph, offsets, gemm.shape[0])
            offsets = self.ends[gemm.selector]
        arguments = (gemm.shape[1], node.meta["val"].dtype, copy.backend, copy.layout)
        weight = copy.slots[slot][0]
        new = copy.graph.call_function(schema.grouped_linear, (copy.mapped[gemm.rows], offsets, weight, *arguments))
        new.meta = dict(node.meta)
        return new


def _offsets(graph: fx.Graph, experts: fx.Node, count: int) -> fx.Node:
    """``grouped_linear``'s offsets [E] from the expert of each row, [S] in ascending order."""
    counts = graph.call_function(aten.bincount.default, (experts,), {"minlength": count})
    ends = graph.call_function(aten.cumsum.default, (counts, 0))
    offsets = graph.call_function(aten.to.dtype, (ends, torch.int32))
    for node in (counts, ends, offsets):
        node.meta["val"] = torch.empty((count,), dtype=torch.int64, device="meta")
    offsets.meta["val"] = offsets.meta["val"].int()
    return offsets


def _part(graph: fx.Graph, node: fx.Node, mapped: dict[fx.Node, fx.Node], parts: dict[fx.Node, fx.Node]) -> fx.Node:
    """One expert's rows as a view: ``loops`` joined them in the experts' order from counts that are at hand."""
    values, experts, expert = node.args
    assert isinstance(values, fx.Node) and isinstance(experts, fx.Node)
    if values not in parts:
        counts = [mapped[full.args[0][0]] for full in experts.args[0]]  # type: ignore[index, union-attr]
        parts[values] = graph.call_function(aten.split_with_sizes.default, (mapped[values], counts))
        parts[values].meta["val"] = [node.meta["val"]]
    part = graph.call_function(operator.getitem, (parts[values], expert))
    part.meta = dict(node.meta)
    return part


def _counts_at_once(graph: fx.Graph) -> None:
    """Read the counts of all experts together: each ``item`` of a tensor on a GPU would wait for it."""
    lists: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target != aten.item.default:
            continue
        select = node.args[0]
        if select.target != aten.select.int or select.args[0].meta["val"].dim() != 1:
            continue
        source, _, place = select.args
        if source not in lists:
            with graph.inserting_after(source):
                lists[source] = graph.call_method("tolist", (source,))
        with graph.inserting_before(node):
            one = graph.call_function(operator.getitem, (lists[source], place))
        one.meta = dict(node.meta)
        node.replace_all_uses_with(one)


def _weight_inputs(
    graph: fx.Graph, found: FusedMatch | SplitMatch, counts: Mapping[str, int]
) -> dict[str, tuple[list[fx.Node], fx.Node | None]]:
    projections = projections_of(found.spec)
    tensors = {p.slot: [graph.placeholder(f"{p.slot}_{i}") for i in range(counts[p.slot])] for p in projections}
    biases = {p.slot: graph.placeholder(f"{p.slot}_bias") if p.source.bias else None for p in projections}
    return {p.slot: (tensors[p.slot], biases[p.slot]) for p in projections}


def _drop_unused(graph: fx.Graph, keep: set[str]) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or node.users:
            continue
        prepared = "val" not in node.meta and node.op == "placeholder"
        if node.op == "placeholder" and (node.target in keep or prepared):
            continue
        graph.erase_node(node)


def reroute(
    module: fx.GraphModule, counts: Mapping[str, int], backend: str, layout: str, device: torch.device
) -> fx.GraphModule:
    """A copy of a rewritten graph for another backend and device: other prepared tensors, other ids."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    fresh: dict[str, list[fx.Node]] = {}
    nodes = list(module.graph.nodes)
    old_slots = {f"{slot}_" for slot in counts}

    def slot_of(node: fx.Node) -> str | None:
        stem, _, tail = str(node.target).rpartition("_")
        return stem if node.op == "placeholder" and f"{stem}_" in old_slots and tail.isdigit() else None

    for node in nodes:
        slot = slot_of(node)
        if slot is not None:
            if slot not in fresh:
                fresh[slot] = [graph.placeholder(f"{slot}_{i}") for i in range(counts[slot])]
            continue
        new = graph.node_copy(node, lambda n: mapped.get(n, n)) if not _is_op(node) else None
        if new is None:
            args: list[Any] = []
            for arg in node.args:
                if isinstance(arg, (list, tuple)) and arg and slot_of(arg[0]) is not None:
                    args.append(fresh[slot_of(arg[0]) or ""])
                else:
                    args.append(fx.node.map_arg(arg, lambda n: mapped[n]))
            args[-2:] = [backend, layout]
            new = graph.call_function(node.target, tuple(args))
        if "device" in new.kwargs:
            new.kwargs = {**new.kwargs, "device": device}
        mapped[node] = new
    graph.lint()
    return fx.GraphModule(module, graph, class_name="RewrittenExperts")


def _is_op(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (schema.moe, schema.grouped_linear)


def count_ops(module: torch.nn.Module) -> dict[str, int]:
    """How many ``mxfp4::moe`` and ``mxfp4::grouped_linear`` calls a rewritten graph holds."""
    counts = {"moe": 0, "grouped_linear": 0}
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if node.target == schema.moe:
                counts["moe"] += 1
            elif node.target == schema.grouped_linear:
                counts["grouped_linear"] += 1
    return counts


__all__ = ["RewriteError", "count_ops", "reroute", "retained_names", "rewrite"]
