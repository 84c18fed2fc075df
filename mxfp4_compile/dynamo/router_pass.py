"""Lower: what only the compiled graph shows. An Inductor pass over graphs that hold ``mxfp4::moe``.

Contract: a graph without our ops is not touched. A router (softmax or sigmoid, top-k, renormalization) becomes one
``mxfp4::route`` where that is PROVEN: the matched nodes are run on probe values, in the dtypes they have, against
the op's reference; equal scores aside, where torch.topk leaves the order open and the op takes the lowest expert.

::

    logits -> softmax -> topk -> values / sum -> weights      becomes      logits -> mxfp4::route -> weights, ids
                             +-> ids

1. find each top-k over the last dimension of [T, E] scores;
2. behind it, the farthest [T, K] that depends on the chosen scores alone; before it, the farthest [T, E] on which
   the scores alone depend; only ops a router needs, and none that holds a size;
3. of the known forms, the one that the region computes on every probe; none, and the router stays as it is;
4. put the op there.
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..ops import route as route_op
from ..ops import schema
from ..passes import graph as graphs
from ..passes.graph import ROUTING, ancestors, is_float, op_name
from ..passes.observe import observe

HOOK = "post_grad_custom_pre_pass"
_CANDIDATES = 8
_PROBE_TOKENS = (1, 7, 33)
_PROBE_STEPS = (1.0, 0.125, 2.0**-10)


@dataclass(frozen=True)
class Router:
    """One top-k in a graph, as ``mxfp4::route`` would do it."""

    topk: fx.Node
    logits: fx.Node
    weights: fx.Node
    k: int
    before: str
    after: str
    eps: float


@dataclass(frozen=True)
class Decision:
    """What the pass did about one router: ``fused``, or the reason why not."""

    node: str
    fused: bool
    reason: str


# Of the process's latest graphs, for reports and tests.
decisions: list[Decision] = []
_KEPT_DECISIONS = 1000


ENVIRONMENT_VARIABLE = "MXFP4_COMPILE_FUSE_ROUTER"


def fused_devices() -> tuple[str, ...]:
    """Where routers are fused: on GPUs, unless MXFP4_COMPILE_FUSE_ROUTER=0 forbids it."""
    return () if os.environ.get(ENVIRONMENT_VARIABLE) == "0" else ("cuda",)


class LowerPass(CustomGraphPass):
    """The pass; ``devices``: types of device on which routers are fused, by default as ``fused_devices`` says."""

    def __init__(self, devices: tuple[str, ...] | None = None) -> None:
        self.devices = fused_devices() if devices is None else devices

    def __call__(self, graph: fx.Graph) -> None:
        if not any(n.target is schema.moe for n in graph.nodes):
            return
        observe("before_lowering", graph)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target == torch.ops.aten.topk.default:
                decisions.append(self._decide(graph, node))
        del decisions[:-_KEPT_DECISIONS]
        graph.eliminate_dead_code()
        graph.lint()
        observe("after_lowering", graph)

    def _decide(self, graph: fx.Graph, node: fx.Node) -> Decision:
        device = node.args[0].meta["val"].device.type  # type: ignore[union-attr]
        if device not in self.devices:
            hint = f": {ENVIRONMENT_VARIABLE}=0" if device == "cuda" else ""
            return Decision(node.name, False, f"routers are not fused on {device}{hint}")
        found = match_router(node)
        if isinstance(found, str):
            return Decision(node.name, False, found)
        replace_router(graph, found)
        return Decision(node.name, True, f"{found.before}, top-{found.k}, {found.after}")

    def uuid(self) -> Any:
        """Changes with the source of the pass and its op, and with the settings."""
        return f"mxfp4_compile.lower:{_source_hash()}:{','.join(self.devices)}"


@lru_cache(maxsize=1)
def _source_hash() -> str:
    digest = hashlib.sha256()
    here = Path(__file__)
    for path in (here, Path(graphs.__file__), Path(route_op.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


# 1 to 3. find and prove


def match_router(topk: fx.Node) -> Router | str:
    """The router around a top-k, or the reason why it stays."""
    scores, k = topk.args[0], topk.args[1]
    dim, largest = (*topk.args[2:4], *(-1, True)[len(topk.args) - 2 :])[:2]
    value = scores.meta.get("val") if isinstance(scores, fx.Node) else None
    if not isinstance(scores, fx.Node) or not isinstance(value, Tensor) or value.dim() != 2 or not is_float(scores):
        return "its scores are not [T, E]"
    experts = value.shape[1]
    if not isinstance(k, int) or not isinstance(experts, int) or dim not in (-1, 1) or not largest:
        return "it does not take the k largest of each row"
    if experts > route_op.MAX_EXPERTS:
        return f"{experts} experts, at most {route_op.MAX_EXPERTS} fit the kernel"
    outputs = {n.args[1]: n for n in topk.users if n.target is operator.getitem}
    if 0 not in outputs or len(outputs) != len(topk.users):
        return "its values are not used"
    values = outputs[0]
    ends, starts = list(_ends(values, k)), list(_starts(scores, experts))
    for weights in ends:
        for logits in starts:
            form = _form(logits, scores, values, weights, k, experts)
            if form is not None:
                return Router(topk, logits, weights, k, *form)
    return "it computes none of the known forms"


def _row_shaped(node: fx.Node, columns: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == columns and value.is_floating_point()


def _clean(region: set[fx.Node]) -> bool:
    """Only a router's ops, none of which holds a size of the graph."""
    return all(
        n.op == "call_function"
        and op_name(n) in ROUTING
        and not getattr(getattr(n.target, "_schema", None), "is_mutable", False)
        and all(isinstance(a.meta.get("val"), Tensor) for a in n.all_input_nodes)
        for n in region
    )


def _starts(scores: fx.Node, experts: int) -> Iterator[fx.Node]:
    """Nodes [T, E] on which the scores alone depend, the farthest first."""
    found = [scores]
    above = sorted(_near(scores), key=lambda n: -_position(n))
    for node in above[: 4 * _CANDIDATES]:
        if _row_shaped(node, experts) and _clean(ancestors([scores], stop=[node])):
            found.append(node)
    return reversed(found)


def _near(node: fx.Node) -> set[fx.Node]:
    """What leads to ``node`` through a router's ops, and the first nodes that are something else."""
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes) if op_name(node) in ROUTING else []
    while stack:
        part = stack.pop()
        if part not in seen:
            seen.add(part)
            if part.op == "call_function" and op_name(part) in ROUTING:
                stack.extend(part.all_input_nodes)
    return seen


def _position(node: fx.Node) -> int:
    return next(i for i, n in enumerate(node.graph.nodes) if n is node)


def _ends(values: fx.Node, k: int) -> Iterator[fx.Node]:
    """Nodes [T, K] that depend on the chosen scores alone and through which all of them leave; farthest first."""
    below: dict[fx.Node, None] = {}
    stack = [values]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user not in below and user.op == "call_function" and op_name(user) in ROUTING:
                below[user] = None
                stack.append(user)
    for node in sorted(below, key=lambda n: -_position(n)):
        if not _row_shaped(node, k):
            continue
        region = ancestors([node], stop=[values])
        if not _clean(region):
            continue
        if all(user in region for part in {values, *region} - {node} for user in part.users):
            yield node
    yield values


def _form(
    logits: fx.Node, scores: fx.Node, values: fx.Node, weights: fx.Node, k: int, experts: int
) -> tuple[str, str, float] | None:
    """(before, after, eps) that the nodes from ``logits`` to ``weights`` compute, or None."""
    region = ancestors([scores], stop=[logits]) | ancestors([weights], stop=[values])
    numbers = {float(a) for n in region for a in (*n.args, *n.kwargs.values()) if isinstance(a, float) and 0 < a < 1e-3}
    dtype = weights.meta["val"].dtype
    probes = list(_probes(experts, logits.meta["val"].dtype))
    try:
        seen = [_run(x, logits, scores, values, weights, k) for x, _ in probes]
    except Exception:
        return None
    # A softmax before the top-k and a division after it are a softmax after it, but for rounding: the op keeps the
    # graph's order.
    first = _computes(ancestors([scores], stop=[logits]))
    last = _computes(ancestors([weights], stop=[values]))
    for before in [b for b in route_op.BEFORE if (b != "none") == first]:
        for after in [a for a in route_op.AFTER if (a != "none") == last]:
            for eps in (0.0, *sorted(numbers)) if after == "sum" else (0.0,):
                if all(
                    _agrees(x, distinct, out, k, before, after, eps, dtype)
                    for (x, distinct), out in zip(probes, seen, strict=True)
                ):
                    return before, after, eps
    return None


def _computes(region: set[fx.Node]) -> bool:
    """Whether a region does more than cast."""
    return not all(op_name(n) in ("convert_element_type", "_to_copy", "clone", "alias", "detach") for n in region)


def _probes(experts: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, bool]]:
    """Logits [T, E], and whether those of a row are distinct."""
    generator = torch.Generator().manual_seed(3)
    for tokens in _PROBE_TOKENS:
        order = torch.rand(tokens, experts, generator=generator).argsort(1)
        for step in _PROBE_STEPS:
            x = ((order - experts // 2) * step).to(dtype)
            yield x, bool((x.sort(1).values.diff(dim=1) != 0).all())
        yield (torch.randn(tokens, experts, generator=generator) * 2).to(dtype), False
        # Small sums of chosen scores: there an eps, or its absence, shows.
        yield (torch.randn(tokens, experts, generator=generator) - 30).to(dtype), False


def _run(
    x: Tensor, logits: fx.Node, scores: fx.Node, values: fx.Node, weights: fx.Node, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known: dict[fx.Node, Any] = {logits: x}
    _evaluate(ancestors([scores], stop=[logits]), known, scores)
    chosen, ids = torch.topk(known[scores], k, dim=-1)
    known[values] = chosen
    _evaluate(ancestors([weights], stop=[values]), known, weights)
    return known[scores], chosen, ids, known[weights]


def _evaluate(region: set[fx.Node], known: dict[fx.Node, Any], wanted: fx.Node) -> None:
    """Run nodes on the CPU in the dtypes they have."""
    for node in wanted.graph.nodes:
        if node in region and node not in known:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
            kwargs = {name: "cpu" if isinstance(a, torch.device) else a for name, a in kwargs.items()}
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def _agrees(
    x: Tensor,
    distinct: bool,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    k: int,
    before: str,
    after: str,
    eps: float,
    dtype: torch.dtype,
) -> bool:
    scores, chosen, ids, weights = out
    ours, our_ids = route_op.reference(x, k, before, after, eps, dtype)
    if not torch.equal(scores.gather(1, our_ids), chosen):
        return False
    # Scores that a softmax rounds to the same number are equal again, however distinct the logits.
    if distinct and bool((chosen.diff(dim=1) != 0).all()):
        kth = chosen[:, -1:]
        if bool(((scores == kth).sum(1) == 1).all()) and not torch.equal(ids, our_ids):
            return False
    if ours.dtype != weights.dtype or ours.shape != weights.shape:
        return False
    tolerance = 4 * torch.finfo(dtype).eps if dtype.itemsize == 4 else torch.finfo(dtype).eps
    tiny = torch.finfo(torch.float32).tiny
    difference = (ours.double() - weights.double()).abs()
    return bool((difference <= tolerance * weights.double().abs() + tiny).all()) and not math.isnan(
        float(difference.sum())
    )


# 4. replace


def replace_router(graph: fx.Graph, router: Router) -> fx.Node:
    """Put ``mxfp4::route`` in the place of a proven router."""
    outputs = {n.args[1]: n for n in router.topk.users}
    ids = outputs.get(1)
    with graph.inserting_before(router.topk):
        node = graph.call_function(
            schema.route,
            (
                router.logits,
                router.k,
                router.before,
                router.after,
                router.eps,
                router.weights.meta["val"].dtype,
            ),
        )
        weights_out = graph.call_function(operator.getitem, (node, 0))
        ids_out = graph.call_function(operator.getitem, (node, 1))
    ids_value = ids.meta["val"] if ids is not None else router.topk.meta["val"][1]
    weights_out.meta = dict(router.weights.meta)
    ids_out.meta = {**(ids.meta if ids is not None else {}), "val": ids_value}
    node.meta = {"val": (router.weights.meta["val"], ids_value)}
    router.weights.replace_all_uses_with(weights_out)
    if ids is not None:
        ids.replace_all_uses_with(ids_out)
    return node


# installing


class Chain(CustomGraphPass):
    """Several passes as one, in order: what was configured before ours stays."""

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        """None, which keeps graphs out of the caches, if one of the passes cannot be told from another."""
        found = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if any(u is None for u in found) else str(found)


def chained(existing: Any, one: Callable[[fx.Graph], None]) -> Any:
    """``existing`` (None, a pass, or several) followed by ``one``."""
    before = list(existing) if isinstance(existing, (list, tuple)) else [existing] if existing is not None else []
    return one if not before and isinstance(one, CustomGraphPass) else Chain([*before, one])


_guards: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_installed: tuple[Any, Any] | None = None  # what was configured before, and what we put there


def with_lowering(existing: Any) -> Any:
    """``existing`` with our pass behind it, if it is not among them already."""
    among = existing.passes if isinstance(existing, Chain) else (existing,)
    return existing if any(isinstance(one, LowerPass) for one in among) else chained(existing, LowerPass())


def install(guard: nn.Module) -> None:
    """Have later compilations run the pass, behind whatever passes are configured; ``guard``: of an optimized model."""
    global _installed
    import torch._inductor.config as config

    _guards.add(guard)
    before = getattr(config, HOOK)
    ours = with_lowering(before)
    if ours is not before:
        setattr(config, HOOK, ours)
        _installed = (before, ours)


def uninstall(guard: nn.Module) -> None:
    """Undo ``install``; the pass goes with the last optimized model, unless others were configured over it."""
    global _installed
    import torch._inductor.config as config

    _guards.discard(guard)
    if _guards or _installed is None:
        return
    before, ours = _installed
    if getattr(config, HOOK) is ours:
        setattr(config, HOOK, before)
    _installed = None


__all__ = [
    "HOOK",
    "Chain",
    "Decision",
    "LowerPass",
    "Router",
    "chained",
    "decisions",
    "install",
    "match_router",
    "replace_router",
    "uninstall",
    "with_lowering",
]
