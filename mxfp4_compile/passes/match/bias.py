"""Bias: the parameters [E, N] that a region reads, one for each GEMM before it.

Contract: the graph is read, never changed. Anything else that is read there and is no input is a reason for refusal.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..graph import ancestors
from .chain import Chain, Refused
from .forms import ExpertGemm
from .head import Head


def bias_nodes(
    chain: Chain, head: Head, target: fx.Node, stop: Sequence[fx.Node], gemms: Sequence[ExpertGemm]
) -> tuple[fx.Node, ...]:
    """The [E, N] parameters read between ``stop`` and ``target``, in the order of ``gemms``; raises Refused."""
    traced = chain.traced
    where = "after the down-projection" if gemms[0] is chain.down else "between the projections"
    read = [
        n
        for n in chain.in_order(ancestors([target], stop=[*stop, head.ids, head.x]))
        if n.op == "placeholder" and n.name not in traced.inputs and n.name not in traced.constants
    ]
    read = [n for n in read if traced.parameters.get(n.name) not in chain.weights]
    for node in read:
        if node.name not in traced.parameters:
            raise Refused(f"{traced.buffers.get(node.name, node.name)!r} is read {where}")
    if not read:
        return ()
    wanted = [(g.shape[0], g.shape[1]) for g in gemms]
    if sorted(tuple(n.meta["val"].shape) for n in read) != sorted(wanted):
        every = sorted(traced.parameters[n.name] for n in read)
        names = ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
        raise Refused(f"{names} is read {where} and is not one bias per expert and row")
    return tuple(read) if len(read) == 1 else tuple(_of_gemm(g, read) for g in gemms)


def _of_gemm(gemm: ExpertGemm, read: Sequence[fx.Node]) -> fx.Node:
    """Of the biases of separate gate and up projections, the one that is added to this GEMM's output first."""
    mine = [n for n in read if any(gemm.node in ancestors([u]) for u in _adders(n))]
    if len(mine) != 1:
        raise Refused("it is not clear which bias belongs to which projection")
    return mine[0]


def _adders(node: fx.Node) -> list[fx.Node]:
    """The two-operand nodes that a bias reaches first."""
    found, stack = [], list(node.users)
    while stack:
        user = stack.pop()
        if len(user.all_input_nodes) >= 2 and str(user.target).startswith("aten.add"):
            found.append(user)
        else:
            stack.extend(user.users)
    return found


__all__ = ["bias_nodes"]
