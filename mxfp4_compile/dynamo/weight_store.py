"""Prepared weights of models that are compiled as they are: made once per weight, shared by all recompilations.

Contract: a model's tensors are read, never changed. An entry lives as long as the tensors it was made from; its memory
stays the same while they change in place, as compiled code and CUDA graphs hold the addresses.

::

    (recipe, source tensors) -> [made before, and no source changed since?] -- yes --> prepared tensors
                                              | no: prepare, into the same memory if there is some --^
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.build.prep import prep_program, prepare_bias, run_prep
from ..passes.build.verify import check_weights
from ..passes.match import FusedMatch
from ..passes.weights import projections_of
from ..planning import Structure


@dataclass(frozen=True)
class Recipe:
    """How one structure's weights are prepared: ``names`` of the sources, in the order in which they are given."""

    key: Any
    structure: Structure
    names: tuple[str, ...]
    scale_rule: str

    def prepare(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Prepared tensors of every projection in order, then the biases; ValueError for NaN and Inf."""
        holder = nn.Module()
        for name, tensor in zip(self.names, sources, strict=True):
            holder.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
            if not bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all()):
                raise ValueError(f"mxfp4_compile: {name} {list(tensor.shape)} holds NaN or Inf and cannot be quantized")
        found, choice = self.structure.found, self.structure.choice
        params = found.spec.params if isinstance(found, FusedMatch) else None
        tensors, biases = [], []
        with torch.inference_mode(False), torch.no_grad():
            for projection in projections_of(found.spec):
                program = prep_program(projection, params, self.scale_rule, choice.backend, choice.layout)
                prepared = run_prep(program, projection, holder)
                for message in check_weights(prepared.errors, self.scale_rule, projection.source.parameters):
                    warnings.warn(f"mxfp4_compile: {message}", stacklevel=2)
                tensors += prepared.tensors
                bias = prepare_bias(projection, holder, params, choice.backend, choice.layout)
                if bias is not None:
                    biases.append(bias)
        return [*tensors, *biases]


@dataclass
class _Prepared:
    tensors: list[Tensor]
    stamp: tuple[tuple[int, int], ...]
    finalizers: list[Any]


def _stamp(sources: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((t._version, t.data_ptr()) for t in sources)


class WeightStore:
    """Prepared weights by the identity of the tensors they were made from; they go when those do."""

    def __init__(self) -> None:
        self._entries: dict[Any, _Prepared] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, recipe: Recipe, sources: Sequence[Tensor]) -> list[Tensor]:
        """The prepared weights and biases of ``sources``, made again if a source changed since."""
        key = (recipe.key, tuple(map(id, sources)))
        entry = self._entries.get(key)
        stamp = _stamp(sources)
        if entry is None or entry.stamp != stamp:
            tensors = recipe.prepare(sources)
            if entry is None:
                drop = [weakref.finalize(t, self._entries.pop, key, None) for t in sources]
                for finalizer in drop:
                    finalizer.atexit = False
                self._entries[key] = entry = _Prepared(tensors, stamp, drop)
            else:
                # Into the same memory: CUDA graphs and other compiled code hold these addresses.
                for old, new in zip(entry.tensors, tensors, strict=True):
                    old.copy_(new)
                entry.stamp = stamp
        return entry.tensors


store = WeightStore()
"""The process's prepared weights."""

__all__ = ["Recipe", "WeightStore", "store"]
