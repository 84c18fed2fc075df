"""Chain: the expert GEMMs of a graph as one or two up-projections and the down-projection that they feed.

::

    [gemm, gemm, gemm]  -->  Chain(ups=(gate, up), down)        or Refused with the reason

Contract: the graph is read, never changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..graph import ancestors
from ..trace.traced import Traced
from .forms import ExpertGemm


class Refused(Exception):
    """A hypothesis about a graph that does not hold, with the reason in words."""


@dataclass(frozen=True)
class Chain:
    """The expert GEMMs of one mixture; ``order``: the place of each node in the graph."""

    traced: Traced
    ups: tuple[ExpertGemm, ...]
    down: ExpertGemm
    order: Mapping[fx.Node, int]

    @property
    def gemms(self) -> tuple[ExpertGemm, ...]:
        """All of them, in graph order."""
        return (*self.ups, self.down)

    @property
    def graph(self) -> fx.Graph:
        """The graph they are in."""
        return self.traced.graph

    def in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes in graph order, so that a reason names the same one in every run."""
        return sorted(nodes, key=lambda n: self.order[n])

    @property
    def products(self) -> set[fx.Node]:
        """The GEMMs' own nodes."""
        return {g.node for g in self.gemms}

    @property
    def weights(self) -> set[str]:
        """Names of the parameters they multiply."""
        return {g.weight for g in self.gemms}

    @property
    def experts(self) -> int:
        """E."""
        return self.down.shape[0]

    @property
    def hidden(self) -> int:
        """H, the width of a token."""
        return self.ups[0].shape[2]

    @property
    def up_rows(self) -> int:
        """Rows of the up-projections together: 2 I with a gate, else I."""
        return sum(g.shape[1] for g in self.ups)

    @property
    def intermediate(self) -> int:
        """I, the width of the down-projection's rows."""
        return self.down.shape[2]


def chain_of(traced: Traced, gemms: Sequence[ExpertGemm]) -> Chain:
    """The GEMMs by their roles, the last one being the down-projection; raises Refused."""
    down, ups = gemms[-1], tuple(gemms[:-1])
    if not 1 <= len(ups) <= 2:
        raise Refused(f"{len(ups) + 1} expert GEMMs in one module, two or three were expected")
    feeds = ancestors([down.rows])
    if not all(g.node in feeds for g in ups):
        raise Refused("the last expert GEMM does not take its rows from the others")
    first = ups[0]
    for up in ups:
        if up.node in ancestors([g.rows for g in ups]):
            raise Refused("an up GEMM feeds another")
        if up.transposed != first.transposed or up.shape[0] != first.shape[0] or up.shape[2] != first.shape[2]:
            raise Refused("the up GEMMs' weights are laid out differently")
    if down.shape[0] != first.shape[0]:
        raise Refused("the projections have different numbers of experts")
    chain = Chain(traced, ups, down, {node: i for i, node in enumerate(traced.graph.nodes)})
    if down.shape[1] != chain.hidden:
        raise Refused(f"the experts' output width {down.shape[1]} is not their input width {chain.hidden}")
    return chain


__all__ = ["Chain", "Refused", "chain_of"]
