r"""Match: a traced graph -> MoESpec, SplitSpec, or a reason.

::

    traced graph                                                FusedMatch
    x [T, H]    ids [T, K]    w [T, K]
       \       /      \          |                                 x   ids   w   prepared weights
        rows [S, H]    \         |      <- head                     \   |    |   /
            |           \        |                                    mxfp4::moe
         up GEMMs  <- experts    |      <- anchors (forms/)                |
            |                    |                                     output [T, H]
        activation               |      <- middle
            |                    |                                SplitMatch
        down GEMM                |                                 each GEMM becomes mxfp4::grouped_linear,
            |                    |                                 everything else stays
        sum over pairs  <--------+      <- tail
            |
        output [T, H]

Contract: the graph is read, never changed; what the rewritten graph needs beside the op is data (``edits``). Nothing
is concluded from names (of modules, classes, or ops) beyond the anchors, the expert GEMMs that ``forms`` finds. What
lies between them is cut into three regions, and each is compared, by running it in fp64 on random values, with what a
mixture of experts computes. Spelling therefore does not matter, and a region that merely looks right does not pass.

1. anchors (``forms``, ``chain``): one down GEMM, and one or two up GEMMs that feed it;
2. head: find nodes x [T,H], ids [T,K] (and w [T,K]) such that the up GEMM's rows are x[token] (or
   x[token] * w[pair]) for exactly the pairs that ids names, whatever their order;
3. middle: the down GEMM's rows must be activation(up output + bias of the row's expert);
4. tail: find the node that equals sum over a token's pairs of w * (down output + bias);
5. what probes cannot prove is required of the graph (``dependence``, ``rules``): the tokens, ids and weights do not
   depend on the GEMMs, nor the tail on any but the last; nothing in head and tail branches on values or counts; no
   cast is narrower than the model's own rounding (for counts and ids: than fp32 or int32). Ids of no expert and
   experts without a token count for nothing (``others``).
If 2 to 5 fail but the GEMMs are sound by themselves, the site is split: SplitSpec with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from ...spec import LinearSpec, MoESpec, SplitSpec, WeightSource
from ..evaluate import EvaluationError
from ..graph import is_integer
from ..trace.collapse import routed
from ..trace.traced import Traced
from .chain import Chain, Refused, chain_of
from .dependence import check_casts, check_dependence
from .edits import Edits, closing_cast, edits_of
from .forms import ExpertGemm, find_gemms
from .head import Head, find_head
from .middle import Middle, find_middle
from .others import check_no_expert, check_other_experts
from .probes import prober_of
from .tail import Tail, find_tail


@dataclass(frozen=True)
class FusedMatch:
    """A fused site: the spec, and the nodes where the op's inputs enter and its output leaves."""

    spec: MoESpec
    x: fx.Node
    topk_ids: fx.Node
    topk_weights: fx.Node
    output: fx.Node
    gemms: tuple[ExpertGemm, ...]
    sentinels: int = 0  # so many ids from E on name experts without weights
    scale: float = 1.0  # a constant factor of the whole output, which goes into the weights
    edits: Edits = field(default_factory=Edits)


@dataclass(frozen=True)
class SplitMatch:
    """A split site: each GEMM becomes a grouped_linear, everything else stays as it is."""

    spec: SplitSpec
    gemms: tuple[ExpertGemm, ...]


@dataclass(frozen=True)
class NoMatch:
    """Why a graph is no site. ``dense``: every token meets every expert, there is no routing in it."""

    reason: str
    dense: bool = False


def match(traced: Traced) -> FusedMatch | SplitMatch | NoMatch:
    """Match one traced experts module: fused if it is proven to be a mixture of experts, else split or no match."""
    gemms = find_gemms(traced)
    if not gemms:
        return _no_gemms(traced)
    problem = _weights_used_twice(gemms) or _weights_used_elsewhere(traced, gemms)
    if problem:
        return NoMatch(problem)
    try:
        return _fused(traced, gemms)
    except (Refused, EvaluationError) as refusal:
        reason = str(refusal)
    if any(g.form not in ("grouped_mm", "loop") for g in gemms):
        return NoMatch(f"not fused ({reason}), and only grouped_mm graphs and loops over experts can be split")
    return SplitMatch(_split_spec(gemms, reason), tuple(gemms))


# fused


def _fused(traced: Traced, gemms: Sequence[ExpertGemm]) -> FusedMatch:
    """The steps of the contract in their order; raises Refused or EvaluationError."""
    chain = chain_of(traced, gemms)
    prober = prober_of(chain)
    head = find_head(prober)
    middle, head = find_middle(prober, head)
    tail = find_tail(prober, head)
    if check_dependence(chain, head, tail):
        check_no_expert(prober, head, tail)
    check_other_experts(prober, head, middle, tail)
    check_casts(chain, head, tail)
    tail = replace(tail, output=closing_cast(head, tail.output))
    return FusedMatch(
        _moe_spec(chain, head, middle, tail),
        head.x,
        head.ids,
        tail.weights,
        tail.output,
        chain.gemms,
        traced.sentinels,
        tail.scale,
        edits_of(prober, head, tail),
    )


def _moe_spec(chain: Chain, head: Head, middle: Middle, tail: Tail) -> MoESpec:
    rounds = chain.down.node.meta["val"].dtype
    accumulates = torch.promote_types(tail.weights.meta["val"].dtype, rounds)
    names = chain.traced.parameters
    return MoESpec(
        middle.params(chain, head.on_input, rounds, accumulates),
        WeightSource(
            tuple(g.weight for g in chain.ups),
            chain.ups[0].transposed,
            tuple(names[b.name] for b in middle.bias),
        ),
        WeightSource((chain.down.weight,), chain.down.transposed, tuple(names[b.name] for b in tail.bias)),
        head.top_k,
    )


# split, or no match


def _split_spec(gemms: Sequence[ExpertGemm], reason: str) -> SplitSpec:
    linears = [LinearSpec(*g.shape, WeightSource((g.weight,), g.transposed), g.node.meta["val"].dtype) for g in gemms]
    return SplitSpec(tuple(linears), reason)


def _no_gemms(traced: Traced) -> NoMatch:
    """Tell a dense product over all experts from something unknown."""
    if routed(traced.graph):
        return NoMatch(
            "its products are of every token, or of as many rows for each expert (a capacity that depends on "
            "the number of tokens), whatever the routing says: no product of rows with the weights of their experts"
        )
    chooses = {"sort", "topk", "index", "index_select", "gather", "nonzero", "embedding", "scatter", "where"}
    used = {
        str(n.target).split(".")[1]
        for n in traced.graph.nodes
        if n.op == "call_function" and str(n.target).startswith("aten.")
    }
    if not used & chooses and not any(is_integer(traced.node(name)) for name in traced.inputs):
        return NoMatch("dense: every expert serves every token, nothing is routed", dense=True)
    return NoMatch("no product of rows with the weights of their experts (grouped_mm, batched_mm, a loop)")


def _weights_used_twice(gemms: Sequence[ExpertGemm]) -> str | None:
    names = [g.weight for g in gemms]
    twice = sorted({n for n in names if names.count(n) > 1})
    return f"weight {twice[0]!r} serves two products" if twice else None


def _weights_used_elsewhere(traced: Traced, gemms: Sequence[ExpertGemm]) -> str | None:
    """A reason if a GEMM's weight also serves something that is no anchor."""
    weights = {g.weight for g in gemms}
    placeholders = {traced.node(p) for p, name in traced.parameters.items() if name in weights}
    known = set()
    for gemm in gemms:
        known.add(gemm.node)
    for placeholder in placeholders:
        stack = list(placeholder.users)
        while stack:
            node = stack.pop()
            if node in known:
                continue
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() == 3 and node.users and node.op == "call_function":
                stack.extend(node.users)
            elif not _only_sizes(node):
                return f"weight {traced.parameters[placeholder.name]!r} is also used by {node.target}"
    return None


def _only_sizes(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), Tensor)


__all__ = ["FusedMatch", "NoMatch", "SplitMatch", "match"]
