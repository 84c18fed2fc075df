"""Others: ids that are no expert, and experts that a token is not routed to, count for nothing.

Contract: the graph is read, never changed; Refused if they are not proven to count for nothing. Both are run, as the
head and the tail are: the op takes ids from E on for no expert, and never multiplies a token with another expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .bias import bias_nodes
from .chain import Refused
from .head import Head, rows_of_pairs
from .middle import Middle
from .probes import Case, Prober, close, pair_of_row
from .tail import Tail, weights_of_pairs


def check_no_expert(prober: Prober, head: Head, tail: Tail) -> None:
    """Ids that are no expert (>= E) must contribute nothing, as in the op, where a graph provides for them."""
    chain, draw, case = prober.chain, prober.draw, head.cases[0]
    first, down, probe = chain.ups[0], chain.down, case.probe
    ids = case.ids.clone()
    others = ids.view(-1)[::3]
    others[:] = chain.experts + torch.arange(len(others)) % max(chain.traced.sentinels, 1)
    weights = draw.normal(probe.shape(tail.weights))
    given: dict[fx.Node, Any] = {head.ids: ids, head.x: case.x, tail.weights: weights}
    rows, selector = probe.run([first.rows, first.selector], given)
    experts, pairs = first.experts_of(selector, ids.numel()), ids.reshape(-1)
    real_rows, real_pairs = experts < chain.experts, pairs < chain.experts
    found = pair_of_row(
        first.row_matrix(rows)[real_rows],
        experts[real_rows],
        rows_of_pairs(case.x, head.top_k, weights if head.on_input else None)[real_pairs],
        pairs[real_pairs],
    )
    if found is None:
        raise Refused("the rows of ids that are no expert are not left out")
    y = draw.normal((len(experts), chain.hidden))
    by_pair = torch.zeros((ids.numel(), chain.hidden), dtype=y.dtype)
    by_pair[real_pairs.nonzero().squeeze(1)[found]] = y[real_rows]
    if not head.on_input:
        by_pair = by_pair * weights_of_pairs(chain, head, tail, weights, ids)
    given[down.node] = down.as_output(y)
    for node in bias_nodes(chain, head, tail.output, [down.node, tail.weights], (down,)):
        given[node] = torch.zeros(node.meta["val"].shape, dtype=torch.float64)
    (out,) = probe.run([tail.output], given)
    if not close(by_pair.view(*ids.shape, chain.hidden).sum(1), out.reshape(-1, chain.hidden)):
        raise Refused("ids that are no expert contribute to the output")


def check_other_experts(prober: Prober, head: Head, middle: Middle, tail: Tail) -> None:
    """Where the original multiplies every token with every expert: other experts than the ids' must not count.

    Either their rows are zero, and so is what becomes of them, as products have no biases (a bias added later
    shows in the output); or the output is the same whatever they give.
    """
    if prober.chain.traced.dense:
        for case in head.cases:
            _check_other_experts(prober, head, middle, tail, case)


def _check_other_experts(prober: Prober, head: Head, middle: Middle, tail: Tail, case: Case) -> None:
    chain, draw, probe = prober.chain, prober.draw, case.probe
    tokens, pairs = case.x.shape[0], case.ids.numel()
    given: dict[fx.Node, Any] = {head.ids: case.ids, head.x: case.x}
    given[tail.weights] = draw.normal(probe.shape(tail.weights))
    for g in chain.gemms:
        given[g.node] = g.as_output(draw.normal((pairs, g.shape[1])) * 4)
    for node in (*middle.bias, *tail.bias):
        given[node] = draw.normal(node.meta["val"].shape)
    chosen = torch.zeros(tokens, chain.experts, dtype=torch.bool).scatter_(1, case.ids, True).T
    if all(bool((rows[~chosen] == 0).all()) for rows in probe.run(chain.traced.dense, given)):
        return
    wanted = [tail.output, chain.down.rows]
    for scale in (1.0, 1e6):
        free = {n: draw.normal((tokens, *n.meta["val"].shape[1:])) * scale for n in chain.traced.dont_care}
        if not all(map(torch.equal, probe.run(wanted, given), probe.run(wanted, {**given, **free}))):
            raise Refused(
                "every expert is multiplied with every token, and the rows of tokens that are not routed to "
                "an expert are not proven to be zero, nor to count for nothing"
            )


__all__ = ["check_no_expert", "check_other_experts"]
