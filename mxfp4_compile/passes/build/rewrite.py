"""Rewrite: the captured graph with its matched region replaced by op calls on prepared weights.

Contract: the captured graph is not changed; the result is a GraphModule without state whose inputs are
the site's tensor arguments, then the retained parameters, then the prepared tensors. No expert GEMM may
be left over: RewriteError if one is.

1. copy the graph; 2. add inputs for prepared tensors; 3. put the op where the region's output was;
4. drop what nothing uses any more; 5. check that the anchors are gone.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...ops import schema
from ...spec import MoESpec
from ..match.match import FusedMatch, SplitMatch
from ..trace.capture import Captured
from ..trace.collapse import rows_of_expert
from ..weights import projections_of

aten = torch.ops.aten


class RewriteError(RuntimeError):
    """A matched graph that could not be rewritten as a whole, with the reason."""


def retained_names(captured: Captured, found: FusedMatch | SplitMatch) -> tuple[str, ...]:
    """Parameters and buffers that the rewritten graph still reads."""
    graph, _ = _rewritten(captured, found, {p.slot: 1 for p in projections_of(found.spec)}, "reference", "canonical")
    names = {**captured.parameters, **captured.buffers}
    return tuple(names[n.target] for n in graph.nodes if n.op == "placeholder" and n.target in names)


def rewrite(
    captured: Captured, found: FusedMatch | SplitMatch, counts: Mapping[str, int], backend: str, layout: str
) -> fx.GraphModule:
    """The rewritten graph; ``counts``: slot -> number of prepared tensors."""
    graph, _ = _rewritten(captured, found, counts, backend, layout)
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            root.register_buffer(node.target, captured.constants[node.target], persistent=False)
    return fx.GraphModule(root, graph, class_name="RewrittenExperts")


def _rewritten(
    captured: Captured, found: FusedMatch | SplitMatch, counts: Mapping[str, int], backend: str, layout: str
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    state = {**captured.parameters, **captured.buffers}
    by_name = {n.name: n for n in captured.graph.nodes if n.op == "placeholder"}
    for name in captured.inputs:
        mapped[by_name[name]] = graph.node_copy(by_name[name])
    for name in state:
        mapped[by_name[name]] = graph.node_copy(by_name[name])
    slots = _weight_inputs(graph, found, counts)
    for name in captured.constants:
        mapped[by_name[name]] = graph.get_attr(name)
    replaced = {found.output: None} if isinstance(found, FusedMatch) else {g.node: g for g in found.gemms}
    index = 0
    ends: dict[fx.Node, fx.Node] = {}
    parts: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.target is rows_of_expert and isinstance(found, SplitMatch):
            mapped[node] = _part(graph, node, mapped, parts)
            continue
        if node in replaced:
            if isinstance(found, FusedMatch):
                mapped[node] = _moe_call(graph, found, mapped, slots, backend, layout)
            else:
                gemm = found.gemms[index]
                offsets = mapped[gemm.selector]
                if gemm.form == "loop":
                    if gemm.selector not in ends:
                        ends[gemm.selector] = _offsets(graph, offsets, gemm.shape[0])
                    offsets = ends[gemm.selector]
                mapped[node] = graph.call_function(
                    schema.grouped_linear,
                    (
                        mapped[gemm.rows],
                        offsets,
                        slots[f"linear{index}"][0],
                        gemm.shape[1],
                        gemm.node.meta["val"].dtype,
                        backend,
                        layout,
                    ),
                )
                index += 1
            mapped[node].meta = dict(node.meta)
            continue
        if node.op == "output":
            # Exported programs return a tuple; a module called in a model returns its tensor.
            results = [mapped[r] for r in node.args[0]]  # type: ignore[index, union-attr]
            graph.output(results[0] if captured.out_spec is None else tuple(results))
            continue
        mapped[node] = graph.node_copy(node, lambda n: mapped[n])
        if node.target == torch.ops.aten.view.default:
            # The capture saw contiguous arguments; callers may pass others, as the original's reshape allowed.
            mapped[node].target = torch.ops.aten.reshape.default
    if isinstance(found, SplitMatch):
        _counts_at_once(graph)
    _drop_unused(graph, set(captured.inputs))
    left = {mapped[g.node] for g in found.gemms} & set(graph.nodes) if isinstance(found, FusedMatch) else set()
    if left:
        raise RewriteError(f"the products {sorted(map(str, left))} are also used outside the matched region")
    weights = {n for p in projections_of(found.spec) for n in p.source.parameters}
    for node in graph.nodes:
        if node.op == "placeholder" and state.get(node.target) in weights:
            raise RewriteError(f"weight {state[node.target]!r} is still used by the rewritten graph")
    graph.lint()
    return graph, mapped


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


def _moe_call(
    graph: fx.Graph,
    found: FusedMatch,
    mapped: Mapping[fx.Node, fx.Node],
    slots: Mapping[str, tuple[list[fx.Node], fx.Node | None]],
    backend: str,
    layout: str,
) -> fx.Node:
    (up, up_bias), (down, down_bias) = slots["up"], slots["down"]
    weights = mapped[found.topk_weights]
    if found.scale != 1.0:
        weights = graph.call_function(torch.ops.aten.mul.Tensor, (weights, found.scale))
    return graph.call_function(
        schema.moe,
        (
            mapped[found.x],
            mapped[found.topk_ids],
            weights,
            up,
            down,
            up_bias,
            down_bias,
            *schema.moe_scalars(found.spec.params),
            backend,
            layout,
        ),
    )


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


__all__ = ["MoESpec", "RewriteError", "count_ops", "reroute", "retained_names", "rewrite"]
