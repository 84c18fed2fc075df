"""The prep program of a projection: an FX graph from original parameters to prepared weights.

Its inputs are slices [e, ...] of the source parameters, its output is (packed, scales, prepared tensors).
It runs a few experts at a time, so that temporary memory stays small whatever the site's size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .. import mx
from ..ops import schema
from ..ops.registry import get_backend
from ..spec import MoEParams
from .experts import Projection
from .sources import stack

# Experts are prepared in groups of at most this many bytes of source weights, or a sixteenth of the projection
# where that is more: large groups keep a GPU busy, small ones keep the peak of small models near nothing.
_GROUP_BYTES = 8 << 20

aten = torch.ops.aten


def prep_program(
    projection: Projection, params: MoEParams | None, scale_rule: str, backend: str, layout: str
) -> fx.GraphModule:
    """Build the prep program of one projection."""
    graph = fx.Graph()
    labels = str.maketrans({".": "_", "*": "each", "#": "_by_"})
    parts = [graph.placeholder(name.translate(labels)) for name in projection.source.parameters]
    if projection.source.transposed:
        parts = [graph.call_function(aten.transpose.int, (part, 1, 2)) for part in parts]
    weight = parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts, 1))
    quantized = graph.call_function(schema.quantize, (weight, scale_rule))
    packed = graph.call_function(operator.getitem, (quantized, 0))
    scales = graph.call_function(operator.getitem, (quantized, 1))
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
    """Prepared tensors (first dimension E) and each expert's relative squared error [E] (fp64, CPU)."""

    tensors: list[Tensor]
    errors: Tensor


def run_prep(
    program: fx.GraphModule,
    projection: Projection,
    original: nn.Module,
    progress: Callable[[int], None] | None = None,
) -> PreparedProjection:
    """Run ``program`` over all experts of ``original``; peak extra memory is one group of experts."""
    sources = [stack(original, name) for name in projection.source.parameters]
    experts = projection.shape[0]
    per_expert = max(1, sum(s.numel() // experts * s.element_size() for s in sources))
    group = max(1, min(experts, max(_GROUP_BYTES // per_expert, experts // 16)))
    outputs: list[Tensor] = []
    errors = []
    for start in range(0, experts, group):
        stop = min(start + group, experts)
        slices = [s[start:stop] for s in sources]
        with torch.no_grad():
            packed, scales, prepared = program(*slices)
            weight = [s.transpose(1, 2) if projection.source.transposed else s for s in slices]
            errors.append(_errors(weight, packed, scales))
        if not outputs:
            outputs = [t.new_empty((experts, *t.shape[1:])) for t in prepared]
        for target, source in zip(outputs, prepared, strict=True):
            target[start:stop].copy_(source)
        if progress is not None:
            progress(sum(s.numel() * s.element_size() for s in slices))
    # Brought over once: a copy per group would wait for the device each time.
    return PreparedProjection(outputs, torch.cat(errors).cpu())


def _errors(parts: list[Tensor], packed: Tensor, scales: Tensor) -> Tensor:
    """Relative squared error per expert over all its parts."""
    start = 0
    noise = torch.zeros(packed.shape[0], dtype=torch.float64, device=packed.device)
    power = torch.zeros_like(noise)
    for part in parts:
        rows = slice(start, start + part.shape[1])
        own = mx.squares(part, packed[:, rows], scales[:, rows])
        noise, power = noise + own[0], power + own[1]
        start = rows.stop
    return torch.where(power > 0, noise / power, 0.0)


def prepare_bias(
    projection: Projection, original: nn.Module, params: MoEParams | None, backend: str, layout: str
) -> Tensor | None:
    """The prepared bias of a projection, or None."""
    if not projection.source.bias:
        return None
    bias = torch.cat([stack(original, name)[:] for name in projection.source.bias], dim=1)
    # prepare_bias may hand its input back: the buffer must not share memory with the original parameter.
    return get_backend(backend).prepare_bias(bias.clone(), role=projection.role, params=params, layout=layout)
