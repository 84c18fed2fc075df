"""Run parts of a traced graph in fp64, with chosen nodes replaced by chosen values.

This is how the matcher learns what a region computes: not from the names of its ops but from what it
does. Casts between float dtypes become casts to fp64, so that rounding does not hide the function; and
everything runs on the CPU, wherever the graph was traced.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .graph import FLOATS, ancestors

_CPU = torch.device("cpu")


class EvaluationError(RuntimeError):
    """A region that cannot be run on probes, with the reason."""


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
    """A graph traced on a GPU counts integers, which the CPU's histc does not take."""
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
