"""Dependence: who may depend on whom, where a graph may branch, and how narrow its casts may be.

::

    x, ids, w  |  choice of experts   rows   middle   tail  |  output
               |  read ids            x, ids          y, w  |          and nothing else, of tokens or other inputs

Contract: the graph is read, never changed; Refused with the reason. This is what probes cannot prove, together with
``rules``, which look at the ops inside the regions.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..graph import (
    BRANCHES,
    COUNTING,
    SELECTS,
    ancestors,
    descendants,
    is_float,
    is_integer,
    op_name,
    read_by,
    reads_no_values,
)
from .chain import Chain, Refused
from .head import Head
from .rules import Regions, check_structure
from .tail import Tail

_NARROW_INTEGERS = (torch.int8, torch.uint8, torch.int16)


def check_dependence(chain: Chain, head: Head, tail: Tail) -> bool:
    """Who depends on whom, and that head and tail do not branch. Whether the graph provides for ids of no expert."""
    cuts = {head.x, head.ids, tail.weights}
    if ancestors(cuts) & chain.products:
        raise Refused("the tokens, ids or routing weights depend on the experts' products")
    regions = Regions(
        choice=read_by([g.selector for g in chain.gemms], stop=[head.ids]),
        rows=read_by([g.rows for g in chain.ups], stop=[head.ids, head.x, *([tail.weights] if head.on_input else [])]),
        middle=read_by([chain.down.rows], stop=[head.ids, *(g.node for g in chain.ups)]),
        tail=read_by([tail.output], stop=[head.ids, tail.weights, chain.down.node]),
    )
    if regions.tail & chain.products:
        raise Refused("the output depends on the up-projection beside the down-projection")
    for what, region in (
        ("the choice of experts", regions.choice),
        ("the up-projection's rows", regions.rows),
        ("the activation", regions.middle),
        ("the output", regions.tail),
    ):
        _check_reads(chain, head, what, region)
    reason = check_structure(chain, chain.products, (head.x, head.ids, tail.weights), regions, head.top_k)
    if reason is not None:
        raise Refused(reason)
    # Each is looked at: the first that branches on something else refuses.
    masked = [leaves_out_ids(chain, region, cuts) for region in (regions.choice, regions.rows, regions.tail)]
    return chain.traced.sentinels > 0 or any(masked)


def _check_reads(chain: Chain, head: Head, what: str, region: set[fx.Node]) -> None:
    """Refuse if a region reads the values, not just the sizes, of tokens or other float inputs."""
    for node in chain.in_order(region):
        is_input = node.op == "placeholder" and node.name in chain.traced.inputs and is_float(node)
        if (is_input or node is head.x) and any(user in region and not reads_no_values(user) for user in node.users):
            raise Refused(f"{what} also depends on {node.name}")


def leaves_out_ids(chain: Chain, region: set[fx.Node], cuts: set[fx.Node]) -> bool:
    """Whether a region leaves out ids; refuses if it branches on anything but ids."""
    masked = False
    counted = descendants((n for n in region if op_name(n) in COUNTING and not is_float(n)), region)
    for node in chain.in_order(region - cuts):
        # Ids that are none of these experts.
        masked |= op_name(node) == "one_hot" and node.meta["val"].shape[-1] > chain.experts
        if op_name(node) in BRANCHES:
            if node in counted or not _chooses_by_id(chain, node, cuts, counted):
                raise Refused(f"{node.name} ({node.target}) branches outside the activation")
            # Comparing ids alone (one_hot, counting) provides for no others than the experts'.
            masked |= op_name(node) in SELECTS
    return masked


def _chooses_by_id(chain: Chain, node: fx.Node, cuts: set[fx.Node], counted: set[fx.Node]) -> bool:
    """Whether a branch follows from expert ids alone: probes that hit every expert see what it does."""
    if op_name(node) in ("masked_fill", "where"):
        condition = node.args[1 if op_name(node) == "masked_fill" else 0]
        if not isinstance(condition, fx.Node):
            return False
        node = condition
    for part in read_by([node], stop=cuts):
        value = part.meta.get("val")
        if part in counted or (isinstance(value, Tensor) and value.is_floating_point()):
            return False
        numbers = [n for n in part.args if isinstance(n, (int, float)) and not isinstance(n, bool)]
        if op_name(part) in BRANCHES and any(not -1 <= n <= chain.experts for n in numbers):
            return False
    return True


def check_casts(chain: Chain, head: Head, tail: Tail) -> None:
    """No cast narrower than the model's own rounding; counts and ids no narrower than fp32 or int32."""
    round_dtype = chain.down.node.meta["val"].dtype
    rounding = torch.finfo(round_dtype)
    for node in chain.in_order(ancestors([tail.output], stop=[head.x, head.ids, tail.weights])):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node.op == "placeholder":
            continue
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        counts = bool(operands) and all(is_integer(n) for n in operands)
        if value.dtype in _NARROW_INTEGERS or (counts and value.dtype in (torch.bfloat16, torch.float16)):
            raise Refused(f"{node.name} holds ids or counts in {value.dtype}")
        if not value.is_floating_point():
            continue
        info = torch.finfo(value.dtype)
        if info.eps > rounding.eps or info.max < rounding.max:
            raise Refused(f"{node.name} rounds to {value.dtype}, narrower than {round_dtype}")


__all__ = ["check_casts", "check_dependence", "leaves_out_ids"]
