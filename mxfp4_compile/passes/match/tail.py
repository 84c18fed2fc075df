r"""Tail: where the experts' outputs, with their bias and the routing weights, have become one row for each token.

::

    down GEMM's output [S, H]   bias [E, H]   w [T, K] or [T, E]
              \                    |          /
               output [T, H] = scale * sum over a token's pairs of w * (output of the pair + bias[expert])

Contract: the graph is read, never changed. A hypothesis (output, weights, scale) holds if it is so at every case and
at every scale of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from ..evaluate import EvaluationError
from ..graph import ancestors, descendants, is_float, shape_of
from .bias import bias_nodes
from .chain import Chain, Refused
from .head import Head
from .probes import SCALES, Case, Prober, close


@dataclass(frozen=True)
class Tail:
    """``weights``: of the pairs [T, K] or of all experts [T, E]; ``scale``: a constant factor of the whole output."""

    output: fx.Node
    weights: fx.Node
    bias: tuple[fx.Node, ...]
    scale: float = 1.0


def find_tail(prober: Prober, head: Head) -> Tail:
    """The tail; raises Refused."""
    chain = prober.chain
    downstream = descendants([chain.down.node]) - {chain.down.node}
    refusal: Refused | None = None
    for output in _outputs(prober, head, downstream):
        if not covers(output, chain.down.node, downstream):
            continue
        weights = list(_weights(prober, head, output))
        try:
            bias = bias_nodes(chain, head, output, [chain.down.node, *weights], (chain.down,))
        except Refused as error:
            refusal = error
            continue
        for weight in weights:
            tail = Tail(output, weight, bias)
            if _holds(prober, head, tail):
                return tail
            scaled = replace(tail, scale=1.0 if head.on_input else _factor(prober, head, tail))
            if scaled.scale != 1.0 and _holds(prober, head, scaled):
                return scaled
    raise refusal or Refused(
        "the output is not the sum of the experts' outputs (plus bias) times the routing weights: "
        "something else happens after the down-projection"
    )


def _outputs(prober: Prober, head: Head, downstream: set[fx.Node]) -> Iterator[fx.Node]:
    """Nodes that have a row of width H for each token, those without a batch of them first."""
    chain = prober.chain
    for node in sorted(filter(is_float, downstream), key=lambda n: (n.meta["val"].dim(), chain.order[n])):
        value = node.meta["val"]
        if value.dim() and prober.sizes.decide(node) and value.shape[-1] == chain.hidden:
            if same_rows(node, head.x) if value.dim() == 2 else _by_batch(prober, head, node):
                yield node


def _by_batch(prober: Prober, head: Head, node: fx.Node) -> bool:
    """Whether a node may be [batch, length, H] with as many rows as there are tokens."""
    sizes = prober.sizes.of(6)
    shape = shape_of(node, sizes)
    return len(shape) == 3 and node.meta["val"].shape[1] != 1 and shape[0] * shape[1] == shape_of(head.x, sizes)[0]


def _weights(prober: Prober, head: Head, output: fx.Node) -> Iterator[fx.Node]:
    """What may be the routing weights: those of the input, or what the output depends on, the nearest first."""
    if head.input_weights is not None:
        yield head.input_weights
        return
    chain = prober.chain
    region = ancestors([output], stop=[chain.down.node])
    by_expert = lambda n: of_all_experts(chain, head, n)
    for node in sorted(filter(is_float, region), key=lambda n: (by_expert(n), -chain.order[n])):
        # Only sizes that follow from the tokens' can be compared: those that the routing knows are not known here.
        if prober.sizes.decide(node) and (node.meta["val"].shape == head.ids.meta["val"].shape or by_expert(node)):
            yield node


def of_all_experts(chain: Chain, head: Head, node: fx.Node) -> bool:
    """Whether a node may be routing weights of all experts [T, E], of which the ids choose some."""
    value = node.meta["val"]
    return bool(value.dim() == 2 and value.shape[1] == chain.experts > head.top_k and same_rows(node, head.ids))


def weights_of_pairs(chain: Chain, head: Head, tail: Tail, values: Tensor, ids: Tensor) -> Tensor:
    """[T * K, 1]: what each pair's row is multiplied by, of ``values`` of ``tail.weights``."""
    if of_all_experts(chain, head, tail.weights):
        values = values.gather(1, ids.clamp(max=chain.experts - 1))
    return (values * tail.scale).reshape(-1, 1)


def _factor(prober: Prober, head: Head, tail: Tail) -> float:
    """The constant that the output may be of the weighted sum, 1.0 if there is none."""
    try:
        expected, out = _run(prober, head, tail, head.cases[0], 1.0, 1.0)
    except EvaluationError:
        return 1.0
    norm = float(expected.square().sum())
    ratio = float((expected * out).sum()) / norm if expected.shape == out.shape and norm > 0 else 0.0
    return ratio if math.isfinite(ratio) and ratio != 0 else 1.0


def _holds(prober: Prober, head: Head, tail: Tail) -> bool:
    trials = [(case, 1.0, 1.0) for case in head.cases] + [(head.cases[0], *scales) for scales in SCALES]
    for case, y_scale, w_scale in trials:
        try:
            expected, out = _run(prober, head, tail, case, y_scale, w_scale)
        except EvaluationError:
            return False
        if not close(expected, out, y_scale * (1.0 if head.on_input else w_scale)):
            return False
    return True


def _run(prober: Prober, head: Head, tail: Tail, case: Case, y_scale: float, w_scale: float) -> tuple[Tensor, Tensor]:
    """What the output should be in this case, and what it is, [T, H]."""
    chain, draw = prober.chain, prober.draw
    y = draw.normal((case.ids.numel(), chain.hidden)) * y_scale
    weights = draw.normal(case.probe.shape(tail.weights)) * w_scale
    given: dict[fx.Node, Any] = {
        head.ids: case.ids,
        head.x: case.x,
        chain.down.node: chain.down.as_output(y),
        tail.weights: weights,
    }
    expected = y
    for node in tail.bias:
        given[node] = draw.normal(node.meta["val"].shape) * y_scale
        expected = expected + given[node][case.expert_of_row]
    by_pair = case.by_pair(expected)
    if not head.on_input:
        by_pair = by_pair * weights_of_pairs(chain, head, tail, weights, case.ids)
    (out,) = case.probe.run([tail.output], given)
    return by_pair.view(*case.ids.shape, chain.hidden).sum(1), out.reshape(-1, chain.hidden)


def covers(output: fx.Node, source: fx.Node, downstream: set[fx.Node]) -> bool:
    """Whether everything that leaves the region after ``source`` leaves through ``output``."""
    inside = ancestors([output]) & downstream
    if any(user not in inside and isinstance(user.meta.get("val"), Tensor) for user in source.users):
        return False  # a sum over some of the experts
    return all(user in inside for node in inside - {output} for user in node.users)


def same_rows(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have the same first size."""
    return bool(str(a.meta["val"].shape[0]) == str(b.meta["val"].shape[0]))


__all__ = ["Tail", "covers", "find_tail", "of_all_experts", "weights_of_pairs"]
