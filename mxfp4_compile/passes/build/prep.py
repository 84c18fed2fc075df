"""The prep program of a projection: an FX graph from original parameters to prepared weights.

::

    slices [e, ...] of the source parameters  -->  [e, N, K]  --quantize-->  packed, scales  --prepare-->  tensors of
    (several are joined along N)                                                                        the backend

Contract: the original is read, never changed, and nothing of it is kept.
Its inputs are slices [e, ...] of the source parameters, its output is (packed, scales, prepared tensors).
It runs a few experts at a time, so that temporary memory stays small whatever the site's size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from ... import mx
from ...ops import schema
from ...ops.arguments import Slot
from ...ops.registry import get_backend
from ...spec import MoEParams
from ..weights import Projection, stack

# Experts are prepared in groups of at most this many bytes of source weights, or a sixteenth of the projection
# where that is more: large groups keep a GPU busy, small ones keep the peak of small models near nothing.
_GROUP_BYTES = 8 << 20

aten = torch.ops.aten


def prep_program(
    projection: Projection, params: MoEParams | None, scale_rule: str, backend: str, layout: str
) -> fx.GraphModule:
    """Build the prep program of one projection."""
    graph = fx.Graph()
    labels = str.maketrans({".": "_", "*": "each", "#": "_by_", "@": "_of_"})
    parts = [graph.placeholder(name.translate(labels)) for name in projection.source.parameters]
    if projection.source.transposed:
        parts = [graph.call_function(aten.transpose.int, (part, 1, 2)) for part in parts]
    weight = parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts, 1))
    quantized = graph.call_function(schema.quantize, (weight, scale_rule))
    packed = graph.call_function(operator.getitem, (quantized, 0))
    scales = graph.call_function(operator.getitem, (quantized, 1))
    return _finish(graph, packed, scales, projection, params, backend, layout)


def codes_program(projection: Projection, params: MoEParams | None, backend: str, layout: str) -> fx.GraphModule:
    """The prep program of a projection whose weights come in MXFP4: from canonical (packed, scales)."""
    graph = fx.Graph()
    packed, scales = graph.placeholder("packed"), graph.placeholder("scales")
    return _finish(graph, packed, scales, projection, params, backend, layout)


def _finish(
    graph: fx.Graph,
    packed: fx.Node,
    scales: fx.Node,
    projection: Projection,
    params: MoEParams | None,
    backend: str,
    layout: str,
) -> fx.GraphModule:
    k = projection.shape[2]
    prepared: fx.Node | list[fx.Node] = [packed, scales]
    if layout != "canonical":
        if projection.role is None or params is None:
            prepared = graph.call_function(schema.prepare_linear, (packed, scales, k, backend, layout))
        else:
            scalars = schema.moe_scalars(params)
            prepared = graph.call_function(
                schema.prepare_moe, (packed, scales, k, projection.role, *scalars, backend, layout)
            )
    graph.output((packed, scales, prepared))
    return fx.GraphModule(nn.Module(), graph, class_name="PrepProgram")


@dataclass(frozen=True)
class PreparedProjection:
    """Prepared tensors (first dimension E) and each expert's relative squared error [E] (fp64, CPU).

    Weights that came in MXFP4 have no errors, [0]: what they were made from is not known. ``powers``: what the errors
    are relative to, the squared norm of each expert's weights; with it, errors of parts make that of the whole.
    """

    tensors: list[Tensor]
    errors: Tensor
    powers: Tensor | None = None


class ExpertReader(Protocol):
    """Where a site's weights are read from, a few experts at a time; on the device where they are prepared."""

    def quantized(self, name: str) -> bool:
        """Whether parameter ``name`` is there as MXFP4 codes and scales rather than as values."""

    def values(self, name: str, experts: slice) -> Tensor:
        """Experts of a parameter in its own layout and dtype, [e, ...]."""

    def codes(self, name: str, experts: slice, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Canonical (packed uint8 [e, n, ceil(k/2)], scales uint8 [e, n, ceil(k/32)]) of some experts."""


@dataclass(frozen=True)
class ModuleReader:
    """Reads the parameters of a module whose weights are in memory."""

    module: nn.Module

    def quantized(self, name: str) -> bool:  # noqa: ARG002
        """Never: a module holds values."""
        return False

    def values(self, name: str, experts: slice) -> Tensor:
        """A view of some experts."""
        return stack(self.module, name)[experts]

    def codes(self, name: str, experts: slice, n: int, k: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Not there."""
        raise RuntimeError(f"{name} is not in MXFP4")


def groups_of(experts: int, per_expert: int) -> Iterator[slice]:
    """Ranges of experts worth preparing together; ``per_expert``: bytes of one expert's source weights."""
    group = max(1, min(experts, max(_GROUP_BYTES // max(per_expert, 1), experts // 16)))
    for start in range(0, experts, group):
        yield slice(start, min(start + group, experts))


def run_prep(
    program: fx.GraphModule,
    projection: Projection,
    original: nn.Module,
    progress: Callable[[int], None] | None = None,
    reader: ExpertReader | None = None,
    measure: bool = True,
) -> PreparedProjection:
    """Run ``program`` over all experts; peak extra memory is one group of experts.

    ``original`` gives shapes and dtypes (it may be on the meta device), ``reader`` the values, by default its own.
    ``measure``: compute the errors, too.
    A ``program`` of ``codes_program`` is for a reader that has every parameter as codes; its result has no errors.
    """
    reader = ModuleReader(original) if reader is None else reader
    names = projection.source.parameters
    parameters = [stack(original, name) for name in names]
    experts, _, k = projection.shape
    per_expert = sum(p.numel() // experts * p.element_size() for p in parameters)
    from_codes = reader.quantized(names[0])
    rows = projection.rows(original)
    outputs: list[Tensor] = []
    errors: list[tuple[Tensor, Tensor]] = []
    for some in groups_of(experts, per_expert):
        start, stop = some.start, some.stop
        with torch.no_grad():
            if from_codes:
                pairs = [reader.codes(name, some, n, k) for name, n in zip(names, rows, strict=True)]
                _, _, prepared = program(torch.cat([p for p, _ in pairs], 1), torch.cat([s for _, s in pairs], 1))
            else:
                slices = [reader.values(name, some) for name in names]
                packed, scales, prepared = program(*slices)
                weight = [s.transpose(1, 2) if projection.source.transposed else s for s in slices]
                if measure:
                    errors.append(_errors(weight, packed, scales))
        if not outputs:
            outputs = [t.new_empty((experts, *t.shape[1:])) for t in prepared]
        for target, source in zip(outputs, prepared, strict=True):
            target[start:stop].copy_(source)
        if progress is not None:
            progress(per_expert * (stop - start))
    # Brought over once: a copy per group would wait for the device each time.
    if not errors:
        return PreparedProjection(outputs, torch.zeros(0, dtype=torch.float64))
    relative, powers = (torch.cat(parts).cpu() for parts in zip(*errors, strict=True))
    return PreparedProjection(outputs, relative, powers)


def _errors(parts: list[Tensor], packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Relative squared error per expert over all its parts, and the squared norm that it is relative to."""
    start = 0
    noise = torch.zeros(packed.shape[0], dtype=torch.float64, device=packed.device)
    power = torch.zeros_like(noise)
    for part in parts:
        rows = slice(start, start + part.shape[1])
        own = mx.squares(part, packed[:, rows], scales[:, rows])
        noise, power = noise + own[0], power + own[1]
        start = rows.stop
    return torch.where(power > 0, noise / power, 0.0), power


def prepare_bias(
    projection: Projection,
    original: nn.Module,
    params: MoEParams | None,
    backend: str,
    layout: str,
    reader: ExpertReader | None = None,
) -> Tensor | None:
    """The prepared bias of a projection, or None."""
    if not projection.source.bias:
        return None
    reader = ModuleReader(original) if reader is None else reader
    everyone = slice(0, projection.shape[0])
    bias = torch.cat([reader.values(name, everyone) for name in projection.source.bias], dim=1)
    # prepare_bias may hand its input back: the buffer must not share memory with the original parameter.
    return get_backend(backend).prepare_bias(bias.clone(), Slot(projection.role, params, layout))
