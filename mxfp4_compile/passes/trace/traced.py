"""What a trace is: how a module is called, and its graph with the meaning of the graph's inputs.

What a call passed that is no tensor becomes part of the trace and is checked at every later call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..calls import Call, TensorInfo


class TraceError(RuntimeError):
    """A module that could not be traced, with the reason."""


@dataclass(frozen=True)
class CallPattern:
    """How a site is called: how many positional arguments, which keywords, and what each argument is.

    ``leaves``: positional arguments, then keywords in order; a TensorInfo where a tensor is expected, else
    the value every call must pass. ``dynamic``: per leaf, the dimensions that vary from call to call.
    """

    positional: int
    keywords: tuple[str, ...]
    leaves: tuple[Any, ...]
    dynamic: tuple[frozenset[int], ...]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensor leaves in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorInfo))

    def arrange(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Leaves -> (args, kwargs)."""
        return tuple(leaves[: self.positional]), dict(zip(self.keywords, leaves[self.positional :], strict=True))

    def __str__(self) -> str:
        def show(i: int) -> str:
            leaf = self.leaves[i]
            if not isinstance(leaf, TensorInfo):
                return repr(leaf)
            dims = ["*" if d in self.dynamic[i] else str(n) for d, n in enumerate(leaf.shape)]
            return f"{str(leaf.dtype).removeprefix('torch.')}[{', '.join(dims)}]"

        shown = [show(i) for i in range(self.positional)]
        shown += [f"{name}={show(self.positional + i)}" for i, name in enumerate(self.keywords)]
        return f"({', '.join(shown)})"


_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def call_pattern(first: Call, second: Call | None = None) -> CallPattern:
    """The pattern of two calls of one module; TraceError if they differ in more than sizes."""
    second = second or first
    if len(first.args) != len(second.args) or first.kwargs.keys() != second.kwargs.keys():
        raise TraceError("two calls passed different arguments")
    keywords = tuple(first.kwargs)
    leaves = (*first.args, *first.kwargs.values())
    others = (*second.args, *(second.kwargs[name] for name in keywords))
    dynamic = []
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, TensorInfo) and isinstance(b, TensorInfo):
            if a.dtype != b.dtype or len(a.shape) != len(b.shape):
                raise TraceError("an argument changes its dtype or rank from call to call")
            varied = {d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n}
            if 0 in varied and a.dtype.is_floating_point:
                varied.update(range(1, len(a.shape) - 1))  # [batch, length, width]: the length may vary, too
            dynamic.append(frozenset(varied))
            continue
        for value in (a, b):
            if not isinstance(value, _PLAIN):
                raise TraceError(f"an argument of type {type(value).__name__} is neither tensor nor plain value")
        if a != b:
            raise TraceError(f"a plain argument changes from call to call ({a!r}, then {b!r})")
        dynamic.append(frozenset())
    return CallPattern(len(first.args), keywords, leaves, tuple(dynamic))


@dataclass
class Traced:
    """A functional ATen graph and the meaning of its placeholders.

    ``parameters`` and ``buffers`` map placeholder names to names in the module; ``constants`` to tensors;
    ``inputs`` lists the placeholders that stand for the tensor leaves of a call, in order.
    """

    graph: fx.Graph
    inputs: list[str]
    parameters: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Tensor]
    pattern: CallPattern
    out_spec: Any = None  # how several outputs are arranged; None for one tensor
    dense: tuple[fx.Node, ...] = ()  # [E, T, .] rows of all experts and tokens that must be zero but where ids say
    dont_care: tuple[fx.Node, ...] = ()  # [T, E, .] what stands for dense products where ids do not say: zeros
    sentinels: int = 0  # so many ids from E on, which are no experts, occur
    branched_sizes: frozenset[Any] = frozenset()  # sizes on which the code has branched, as if they were not zero
    sides: tuple[tuple[int, ...], ...] = ()  # batch and length at which verification must run (``guards``)
    branches: str = ""  # what the code branches on there, in words

    def node(self, name: str) -> fx.Node:
        """The node named ``name``."""
        for node in self.graph.nodes:
            if node.name == name:
                return cast(fx.Node, node)
        raise KeyError(name)


def named_dims(pattern: CallPattern) -> list[Any]:
    """Per leaf, its dynamic dimensions for export: one name for sizes that were equal in the recorded call."""
    dims: dict[int, Any] = {}

    def dim(leaf: TensorInfo, d: int, dynamic: frozenset[int]) -> Any:
        if d not in dynamic:
            return torch.export.Dim.STATIC
        return dims.setdefault(leaf.shape[d], torch.export.Dim(f"size{len(dims)}"))

    return [
        {d: dim(leaf, d, dyn) for d in range(len(leaf.shape))} if isinstance(leaf, TensorInfo) else None
        for leaf, dyn in zip(pattern.leaves, pattern.dynamic, strict=True)
    ]


def free_dims(pattern: CallPattern) -> list[Any]:
    """Per leaf, its dynamic dimensions for export, which finds out by itself what is equal."""
    return [
        {d: torch.export.Dim.AUTO if d in dyn else torch.export.Dim.STATIC for d in range(len(leaf.shape))}
        if isinstance(leaf, TensorInfo)
        else None
        for leaf, dyn in zip(pattern.leaves, pattern.dynamic, strict=True)
    ]
