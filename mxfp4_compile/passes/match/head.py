r"""Head: which nodes are the tokens, the expert ids and, where they scale the tokens, the routing weights.

::

    x [T, H]   ids [T, K]  (w [T, K])
        \         |         /
         up GEMM's rows [S, H] and the expert of each        = x[token of the pair] (* w[pair]), ids[pair]

Contract: the graph is read, never changed. A hypothesis (three nodes) holds if, at every probe, the up GEMMs' rows are
those of exactly the pairs that the ids name, whatever their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..evaluate import EvaluationError
from ..graph import ancestors, is_float, is_integer
from .chain import Refused
from .probes import EVERY_EXPERT, SAME_EXPERTS, Case, Probe, Prober, pair_of_row

# So many pairs of nodes are tried.
_MAX_HYPOTHESES = 256


@dataclass(frozen=True)
class Head:
    """ids [T, K], x [T, H], and the routing weights if the tokens are multiplied by them.

    ``cases``: the routing of the probes.
    """

    ids: fx.Node
    x: fx.Node
    input_weights: fx.Node | None
    cases: tuple[Case, ...]

    @property
    def on_input(self) -> bool:
        """Whether the routing weights scale the token instead of the expert's output."""
        return self.input_weights is not None

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.ids.meta["val"].shape[1])


def find_head(prober: Prober) -> Head:
    """The head; raises Refused."""
    chain, probes = prober.chain, prober.probes()
    first = chain.ups[0]
    region = sorted(ancestors([first.rows, first.selector]), key=lambda n: -chain.order[n])
    two = [n for n in region if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim() == 2]
    all_ids = [n for n in two if is_integer(n) and isinstance(n.meta["val"].shape[1], int) and prober.sizes.decide(n)]
    floats = [n for n in two if is_float(n) and prober.sizes.decide(n)]
    tokens = [n for n in floats if n.meta["val"].shape[1] == chain.hidden and n is not first.rows]
    if len(all_ids) * len(tokens) > _MAX_HYPOTHESES:
        raise Refused("too many nodes could be the tokens or the expert ids")
    for ids in all_ids:
        for x in tokens:
            like_ids = [w for w in floats if w.meta["val"].shape == ids.meta["val"].shape and w is not x]
            for w in (None, *like_ids):
                cases = _cases(prober, probes, ids, x, w)
                if cases is not None:
                    return Head(ids, x, w, cases)
    raise Refused("the up-projection's rows are not the tokens of the pairs that the expert ids name")


def _cases(
    prober: Prober, probes: tuple[Probe, ...], ids: fx.Node, x: fx.Node, w: fx.Node | None
) -> tuple[Case, ...] | None:
    """The routing of each probe if the hypothesis holds at all of them."""
    draw, cases = prober.draw, []
    for place, probe in enumerate(probes):
        if probe.shape(x)[0] != probe.shape(ids)[0]:
            return None
        id_values = draw.ids(probe.shape(ids))
        if place == EVERY_EXPERT:
            id_values = draw.all_ids(id_values.shape)
        elif place == SAME_EXPERTS:
            id_values = id_values[:1].expand_as(id_values).contiguous()
        x_values = draw.spread(probe.shape(x))
        weights = None if w is None else draw.spread(probe.shape(w))
        pairs = _pairs(prober, probe, {ids: id_values, x: x_values} | ({} if w is None else {w: weights}), ids, x, w)
        if pairs is None:
            return None
        cases.append(Case(probe, id_values, x_values, pairs))
    return tuple(cases)


def _pairs(
    prober: Prober, probe: Probe, given: dict[fx.Node, Any], ids: fx.Node, x: fx.Node, w: fx.Node | None
) -> Tensor | None:
    """The pair of each row of the up GEMMs, the same for all of them."""
    ups = prober.chain.ups
    try:
        values = probe.run([node for g in ups for node in (g.rows, g.selector)], given)
    except EvaluationError:
        return None
    expected = rows_of_pairs(given[x], given[ids].shape[1], None if w is None else given[w])
    pairs = None
    for g, rows, selector in zip(ups, values[0::2], values[1::2], strict=True):
        experts = g.experts_of(selector, len(expected))
        found = pair_of_row(g.row_matrix(rows), experts, expected, given[ids].reshape(-1))
        if found is None or (pairs is not None and not torch.equal(found, pairs)):
            return None
        pairs = found
    return pairs


def rows_of_pairs(x: Tensor, top_k: int, weights: Tensor | None) -> Tensor:
    """[T * K, H]: each pair's token (times its routing weight, where that scales the input)."""
    rows = x.repeat_interleave(top_k, 0)
    return rows if weights is None else rows * weights.reshape(-1, 1)


def routed_case(prober: Prober, head: Head, tokens: int) -> Case:
    """One more case, of ``tokens`` tokens; raises Refused."""
    probe, draw, first = prober.probe(tokens), prober.draw, prober.chain.ups[0]
    ids, x = draw.ids(probe.shape(head.ids)), draw.normal(probe.shape(head.x))
    given: dict[fx.Node, Any] = {head.ids: ids, head.x: x}
    weights = None
    if head.input_weights is not None:
        given[head.input_weights] = weights = draw.normal(ids.shape)
    expected = rows_of_pairs(x, head.top_k, weights)
    rows, selector = probe.run([first.rows, first.selector], given)
    pairs = pair_of_row(first.row_matrix(rows), first.experts_of(selector, len(expected)), expected, ids.reshape(-1))
    if pairs is None:
        raise Refused("the order of rows depends on the number of tokens")
    return Case(probe, ids, x, pairs)


__all__ = ["Head", "find_head", "routed_case", "rows_of_pairs"]
