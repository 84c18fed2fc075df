"""Middle: the activation between the projections.

::

    up GEMMs' outputs [S, N]   biases [E, N]   -->   down GEMM's rows [S, I]  =  activation(output + bias[expert])

Contract: the graph is read, never changed. The region is run on outputs that probes choose; what it gives must be a
known activation (``activation.py``) without a bias, and that activation after the bias at every probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...spec import MoEParams
from ..graph import SHAPING, ancestors, is_integer, op_name
from ..trace.traced import Traced
from .activation import Recognized, recognize
from .bias import bias_nodes
from .chain import Chain, Refused
from .head import Head, routed_case
from .probes import SCALES, Case, Prober, close

_MIN_PROBES = 4096


@dataclass(frozen=True)
class Middle:
    """The activation, and the parameters [E, N] that are added before it, one for each up GEMM, or none."""

    recognized: Recognized
    bias: tuple[fx.Node, ...]

    def params(self, chain: Chain, on_input: bool, rounds: torch.dtype, accumulates: torch.dtype) -> MoEParams:
        """The parameters of the fused op."""
        found = self.recognized
        return MoEParams(
            chain.experts, chain.hidden, chain.intermediate, found.activation, found.gate_layout, found.activated_half,
            on_input, rounds, accumulates,
        )  # fmt: skip


def find_middle(prober: Prober, head: Head) -> tuple[Middle, Head]:
    """The middle, and the head with one more case, which is wide enough for it; raises Refused."""
    chain = prober.chain
    bias = bias_nodes(chain, head, chain.down.rows, [g.node for g in chain.ups], chain.ups)
    stop = [*(g.node for g in chain.ups), *(g.selector for g in chain.gemms), head.ids, head.x]
    constants = list(_constants(ancestors([chain.down.rows], stop=stop), chain.traced))
    # Enough tokens that all pairs of probe values find a place at once where the layer is narrow.
    tokens = max(6, math.ceil(_MIN_PROBES / (chain.intermediate * head.top_k)))
    wide = routed_case(prober, head, tokens + tokens % 2)
    head = replace(head, cases=(*head.cases, wide))
    found = recognize(
        lambda y: _run(chain, head, bias, wide, y, None),
        wide.ids.numel(), chain.up_rows, chain.intermediate, constants,
    )  # fmt: skip
    if isinstance(found, str):
        raise Refused(found)
    middle = Middle(found, bias)
    _check(prober, head, middle)
    return middle, head


def _run(chain: Chain, head: Head, bias: tuple[fx.Node, ...], case: Case, y: Tensor, values: Tensor | None) -> Tensor:
    """The down GEMM's rows for up outputs ``y`` [S, N] and the biases' ``values`` [E, N] (zero without)."""
    given: dict[fx.Node, Any] = {head.ids: case.ids, head.x: case.x}
    start = 0
    for g in chain.ups:
        given[g.node] = g.as_output(y[:, start : start + g.shape[1]])
        start += g.shape[1]
    start = 0
    for node in bias:
        n = node.meta["val"].shape[1]
        none = torch.zeros(chain.experts, n, dtype=torch.float64)
        given[node] = none if values is None else values[:, start : start + n]
        start += n
    rows, selector = case.probe.run([chain.down.rows, chain.down.selector], given)
    if not torch.equal(chain.down.experts_of(selector, case.ids.numel()), case.expert_of_row):
        raise Refused("the down-projection's rows belong to other experts than the up-projection's")
    return chain.down.row_matrix(rows)


def _check(prober: Prober, head: Head, middle: Middle) -> None:
    """activation(y + bias of the expert) on fresh values, at every token count."""
    chain, draw = prober.chain, prober.draw
    params = middle.params(chain, False, torch.float64, torch.float64)
    for case, scale in [(c, 4.0) for c in head.cases] + [(head.cases[0], scale) for scale, _ in SCALES]:
        y = draw.normal((case.ids.numel(), chain.up_rows)) * scale
        bias = draw.normal((chain.experts, chain.up_rows)) * scale if middle.bias else None
        out = _run(chain, head, middle.bias, case, y, bias)
        if bias is not None:
            y = y + bias[case.expert_of_row]
        if not close(params.activate(y), out, scale):
            raise Refused("the region between the projections is more than a bias and an activation")


def _constants(region: set[fx.Node], traced: Traced) -> Iterator[float]:
    """Every number written in a region's nodes, and the values of one-element constants it reads."""
    for node in region:
        if node.op == "placeholder":
            constant = traced.constants.get(node.name)
            if constant is not None and constant.numel() == 1:
                yield float(constant)
            continue
        if op_name(node) in SHAPING or is_integer(node) or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            continue  # sizes, positions and experts are no numbers of a formula, and every number costs probes
        for value in torch.utils._pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if abs(value) < (1e30 if isinstance(value, float) else 1e9):  # slice ends are no numbers of a formula
                    yield float(value)
                    if value:
                        yield 1 / float(value)


__all__ = ["Middle", "find_middle"]
