"""Run parts of a captured graph in fp64, with chosen nodes replaced by chosen values.

This is how the matcher learns what a region computes: not from the names of its ops but from what it
does. Casts between float dtypes become casts to fp64, so that rounding does not hide the function; and
everything runs on the CPU, wherever the graph was captured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})


class EvaluationError(RuntimeError):
    """A region that cannot be run on probes, with the reason."""


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """All nodes that ``nodes`` depend on, themselves included, not going past ``stop`` (not included)."""
    blocked = set(stop)
    seen: set[fx.Node] = set()
    stack = [n for n in nodes if n not in blocked]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(n for n in node.all_input_nodes if n not in blocked)
    return seen


def concrete(value: Any, sizes: Mapping[Any, int]) -> int:
    """A dimension of a traced shape with its symbols replaced by ``sizes`` (sympy symbol -> int)."""
    if isinstance(value, int):
        return value
    expr = value.node.expr
    return int(expr.subs({symbol: sizes[symbol] for symbol in expr.free_symbols}))


def shape_of(node: fx.Node, sizes: Mapping[Any, int]) -> tuple[int, ...]:
    """The shape of a traced tensor node at ``sizes``."""
    return tuple(concrete(d, sizes) for d in node.meta["val"].shape)


def graph_symbols(graph: fx.Graph) -> list[Any]:
    """The free symbols in the shapes of the graph's placeholders, in order of appearance."""
    symbols: dict[Any, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor):
            for dim in value.shape:
                symbols.update(dict.fromkeys(sorted(free_symbols(dim), key=str)))
        elif isinstance(value, torch.SymInt):
            symbols.update(dict.fromkeys(sorted(free_symbols(value), key=str)))
    return list(symbols)


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_integer(node: fx.Node) -> bool:
    """Whether the node's value is an integer tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)


_CPU = torch.device("cpu")


def random_ids(shape: Sequence[int], experts: int, generator: torch.Generator) -> torch.Tensor:
    """Random expert ids of this shape, int64, distinct along the last dimension as far as there are experts.

    Routers choose with topk: a loop that counts a token once per expert is right, and differs on repeated ids only.
    """
    columns = int(shape[-1]) if len(shape) else 1
    rows = math.prod(shape) // max(columns, 1)
    if columns > experts:
        return torch.randint(experts, tuple(shape), generator=generator)
    keys = torch.rand(rows, experts, generator=generator)
    return keys.argsort(dim=1)[:, :columns].contiguous().reshape(tuple(shape))


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value in FLOATS:
        return torch.float64
    return _CPU if isinstance(value, torch.device) else value


def _histc(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A graph captured on a GPU counts integers, which the CPU's histc does not take."""
    return torch.histc(values.double(), *args, **kwargs).to(values.dtype)


class Evaluator:
    """Demand-driven fp64 evaluation of one graph.

    ``values``: node -> value for placeholders (and anything else that should not be computed).
    """

    def __init__(self, values: Mapping[fx.Node, Any]) -> None:
        self.values = dict(values)

    def run(self, wanted: Iterable[fx.Node], overrides: Mapping[fx.Node, Any]) -> list[Any]:
        """The values of ``wanted`` with ``overrides`` in force; EvaluationError if something cannot run."""
        wanted = list(wanted)
        known: dict[fx.Node, Any] = {**self.values, **overrides}
        needed = ancestors(wanted, stop=known)
        uses = Counter(operand for node in needed for operand in node.all_input_nodes)
        uses.update(wanted)
        for node in wanted[0].graph.nodes:
            if node not in needed:
                continue
            known[node] = self._run_node(node, known)
            for operand in node.all_input_nodes:
                uses[operand] -= 1
                if not uses[operand] and operand in needed:
                    del known[operand]  # a loop over experts makes its sum anew for each of them
        return [known[node] for node in wanted]

    def _run_node(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        if node.op != "call_function":
            raise EvaluationError(f"{node.op} {node.name} has no probe value")
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            raise EvaluationError(f"{target} draws random numbers")
        args = fx.node.map_arg(node.args, lambda n: known[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: known[n])
        args, kwargs = pytree.tree_map(_widen, (args, kwargs))
        if target == torch.ops.aten.histc.default:
            target = _histc
        try:
            return target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise EvaluationError(f"{node.name} ({target}) cannot be run on probes: {error}") from error
