"""Edits: what the rewritten graph holds beside the op, where the op's inputs and output are not just the graph's own.

::

    matched graph                                     rewritten graph (``build.rewrite`` applies the edits)
    w of all experts [T, E]                           w.gather(1, ids)  -->  op
    output in fp32, to which more is added            op  -->  to fp32
    output [batch, length, H]                         op  -->  reshape
    a loop over experts that hand the token on        op + x * (the weights of ids from E on)

Contract: the graph is read, never changed: an edit is data. Where an edit cannot be proven to be the same it is not
made, or, if there is no match without it, Refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..evaluate import EvaluationError
from ..graph import ADDS, CASTS, descendants, is_float, op_name, read_by
from .chain import Chain, Refused
from .dependence import leaves_out_ids
from .head import Head
from .probes import Prober, close
from .rules import Regions, check_structure
from .tail import Tail, covers, of_all_experts


@dataclass(frozen=True)
class InputSize:
    """The size ``dim`` of an input of the graph."""

    input: str
    dim: int


@dataclass(frozen=True)
class Edits:
    """``gathers``: the routing weights are of all experts [T, E], and each pair's are gathered, of ids up to E - 1.

    ``widens_to``: the dtype in which others read the op's output; None where that is the tokens'. ``lead``: they read
    it as [*lead, H] (-1 for one size that follows from the others); None where it is [T, H]. ``handed_on``: the node
    whose place output + x * (the weights of ids from E on) takes: a sum over experts without weights of their own.
    """

    gathers: bool = False
    widens_to: torch.dtype | None = None
    lead: tuple[int | InputSize, ...] | None = None
    handed_on: fx.Node | None = None


def edits_of(prober: Prober, head: Head, tail: Tail) -> Edits:
    """The edits of a match; raises Refused."""
    chain, value, x = prober.chain, tail.output.meta["val"], head.x.meta["val"]
    widens = value.dtype == torch.float32 != x.dtype and _only_added_to(head, tail.output)
    if value.dtype != x.dtype and not widens:
        raise Refused(f"the output is {value.dtype}, the tokens are {x.dtype}")
    return Edits(
        gathers=of_all_experts(chain, head, tail.weights),
        widens_to=value.dtype if widens else None,
        lead=_lead(chain, tail) if value.dim() == 3 else None,
        handed_on=_handed_on(prober, head, tail),
    )


def closing_cast(head: Head, output: fx.Node) -> fx.Node:
    """The output, with a closing cast to the tokens' dtype taken in."""
    wanted = head.x.meta["val"].dtype
    casts = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype, torch.ops.prims.convert_element_type.default)
    while output.meta["val"].dtype != wanted and len(output.users) == 1:
        (user,) = output.users
        value = user.meta.get("val")
        if user.target not in casts or not isinstance(value, Tensor) or value.dtype != wanted:
            break  # a detour through another dtype may round once more
        output = user
    return output


def _only_added_to(head: Head, output: fx.Node) -> bool:
    """Whether the block only adds to the sum until it rounds it to the tokens' dtype.

    The op gives its sum in that dtype: one rounding more, which verification judges. Anything else (a conversion to
    whole numbers, a threshold) may make more of one rounding.
    """
    wanted, waiting, seen = head.x.meta["val"].dtype, list(output.users), set()
    while waiting:
        node = waiting.pop()
        value = node.meta.get("val")
        if node in seen or not isinstance(value, Tensor) or node.op == "output":
            continue
        seen.add(node)
        if op_name(node) in CASTS and value.dtype == wanted:
            continue
        if op_name(node) not in ADDS or value.dtype != torch.float32:
            return False
        waiting.extend(node.users)
    return True


def _lead(chain: Chain, tail: Tail) -> tuple[int | InputSize, ...]:
    """Batch and length of an output [batch, length, H], as sizes of inputs: these depend on no values."""
    traced = chain.traced
    lead: list[int | InputSize] = []
    for size in tail.output.meta["val"].shape[:2]:
        if isinstance(size, int):
            lead.append(size)
            continue
        found = [
            InputSize(name, d)
            for name in traced.inputs
            for d, own in enumerate(traced.node(name).meta["val"].shape)
            if str(own) == str(size)
        ]
        lead.append(found[0] if found else -1)
    if lead.count(-1) > 1:
        raise Refused("the output's batch and length are no sizes of the inputs")
    return tuple(lead)


def _handed_on(prober: Prober, head: Head, tail: Tail) -> fx.Node | None:
    """The sum over experts that hand the token on, if it is proven to be output + x * (the weights of ids from E on).

    Such experts have no weights (longcat_flash). Their loop finds its rows by nonzero, whose size only the device
    knows: neither a CUDA graph nor a compiled one takes it. Where it cannot be proven to be this, it stays.
    """
    chain, output = prober.chain, tail.output
    if chain.traced.sentinels < 1 or tail.weights.meta["val"].shape != head.ids.meta["val"].shape:
        return None
    later = descendants([output]) - {output}
    sums = [n for n in later if is_float(n) and _by_token(chain, head, n)]
    for final in sorted(sums, key=lambda n: -chain.order[n]):
        if covers(final, output, later) and _hands_on(prober, head, tail, final):
            return final
    return None


def _by_token(chain: Chain, head: Head, node: fx.Node) -> bool:
    """Whether a node is [T, H]."""
    value, x = node.meta["val"], head.x.meta["val"]
    return value.dim() == 2 and str(value.shape[0]) == str(x.shape[0]) and value.shape[1] == chain.hidden


def _hands_on(prober: Prober, head: Head, tail: Tail, final: fx.Node) -> bool:
    """Whether ``final`` is ``output`` + x * (the weights of ids from E on), for all ids and token counts."""
    chain, draw = prober.chain, prober.draw
    cuts = (head.x, head.ids, tail.weights, tail.output)
    region = read_by([final], stop=cuts)
    try:
        leaves_out_ids(chain, region, set(cuts))
    except Refused:
        return False
    nothing: set[fx.Node] = set()
    regions = Regions(nothing, nothing, nothing, region)
    if check_structure(chain, nothing, cuts, regions, head.top_k) is not None:
        return False
    everyone = chain.experts + chain.traced.sentinels
    for case in head.cases[:-1]:
        for lowest, scale in ((0, 1.0), (0, 1e3), (chain.experts, 1.0), (0, 1e-3)):
            ids = torch.randint(lowest, everyone, case.probe.shape(head.ids), generator=draw.generator)
            x, output = draw.normal(case.x.shape) * scale, draw.normal(case.probe.shape(tail.output)) * scale
            weights = draw.normal(case.probe.shape(tail.weights))
            given: dict[fx.Node, Any] = {head.ids: ids, head.x: x, tail.weights: weights, tail.output: output}
            try:
                (out,) = case.probe.run([final], given)
            except EvaluationError:
                return False
            weight = (weights * (ids >= chain.experts)).sum(1, keepdim=True)
            if not close(output.reshape(-1, chain.hidden) + x * weight, out, scale):
                return False
    return True


__all__ = ["Edits", "InputSize", "closing_cast", "edits_of"]
