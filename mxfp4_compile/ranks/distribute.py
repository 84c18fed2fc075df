"""Distribute: a site's rewritten graph on one rank's part of its experts, made the whole site's.

::

    ids (of all experts) --> ids - first --> others become E --> mxfp4::moe on this part --> mxfp4::reduce --> ...
    (experts by columns: the ids stay as they are)

Contract: the graph given is not changed. Ids are those of the whole site on every rank, routing weights are untouched
(``mxfp4::moe`` passes over ids from E on). The sum stands right behind the op, before whatever the graph does with its
output, so that it is exact for any graph. RewriteError for a graph that has not exactly one ``mxfp4::moe``, or which
uses the ids otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ops import schema
from ..passes.build.rewrite import RewriteError
from ..passes.match import FusedMatch, SplitMatch
from ..spec import Shard

aten = torch.ops.aten


def refusal(found: FusedMatch | SplitMatch, shard: Shard) -> str | None:
    """Why a site cannot be spread over ranks, in words that follow its name; None if it can."""
    if not isinstance(found, FusedMatch):
        return f"is split into grouped projections ({found.spec.reason}); only fused sites are served on several ranks"
    params = found.spec.params
    if shard.kind == "expert" and (found.edits.gathers or found.edits.handed_on is not None):
        return "uses the expert ids for more than its experts: its experts cannot lie on several ranks"
    count = params.num_experts if shard.kind == "expert" else params.intermediate
    if count != shard.count:
        return f"was matched with {count} of what should be {shard}"
    return None


def distribute(module: fx.GraphModule, shard: Shard) -> fx.GraphModule:
    """The rewritten graph of one rank's part -> that of the whole site, of which ``shard`` is the part."""
    ops = [n for n in module.graph.nodes if n.op == "call_function" and n.target == schema.moe]
    if len(ops) != 1:
        raise RewriteError(f"{len(ops)} mxfp4::moe in a rewritten graph: only one can be spread over ranks")
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        new = graph.node_copy(node, mapped.__getitem__)
        if node is ops[0]:
            if shard.kind == "expert":
                x, ids, *rest = new.args
                with graph.inserting_before(new):
                    local = _local_ids(graph, ids, shard)
                new.args = (x, local, *rest)
            new = _call(graph, new, schema.reduce, new, shard.group)
        mapped[node] = new
    graph.lint()
    return fx.GraphModule(module, graph, class_name="DistributedExperts")


def _local_ids(graph: fx.Graph, ids: Any, shard: Shard) -> fx.Node:
    """Ids of the whole site -> those of this rank's experts; E for the others, which are no expert of this rank."""
    count = shard.stop - shard.start
    local = _call(graph, ids, aten.sub.Tensor, ids, shard.start)
    below, above = _call(graph, ids, aten.lt.Scalar, local, 0), _call(graph, ids, aten.ge.Scalar, local, count)
    others = _call(graph, ids, aten.bitwise_or.Tensor, below, above)
    return _call(graph, ids, aten.masked_fill.Scalar, local, others, count)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    value = like.meta.get("val")
    if value is not None:
        comparison = target in (aten.lt.Scalar, aten.ge.Scalar, aten.bitwise_or.Tensor)
        node.meta["val"] = value.new_empty(value.shape, dtype=torch.bool) if comparison else value
    return node


__all__ = ["distribute", "refusal"]
