"""A site's weights: prepared tensors as buffers, and the canonical form that is recovered from them, bit for bit.

::

    prepared tensors of one backend  --canonical-->  packed [E, N, K/2], scales [E, N, K/32]  --dequantized-->  bf16
          ^                                                    |
          +---- _load_from_state_dict, prepare_for ------------+---- _save_to_state_dict

Contract: weights exist in one form, the prepared one; every other form is made when it is asked for and not kept.
``state_dict`` is canonical MXFP4 whatever the backend, under the names of the original parameters with ``_packed`` and
``_scales``; loading raises nothing and writes nothing unless every tensor of the site is there in its shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import mx
from ...ops.arguments import Slot
from ...ops.registry import get_backend
from ...ops.selection import Choice
from ...ops.target import PLAIN, Request
from ...spec import MoEParams, MoESpec, Shard, SplitSpec
from ..trace.traced import CallPattern
from ..weights import Projection, members, projections_of, restacked, sizes, unstack

BLUEPRINT = "_original"


@dataclass(frozen=True)
class SitePlan:
    """Everything decided about one site before its weights are touched."""

    spec: MoESpec | SplitSpec
    backend: str
    layout: str
    scale_rule: str
    weight_dtype: torch.dtype
    pattern: CallPattern
    retained: tuple[str, ...]
    request: Request = PLAIN
    out_spec: Any = None  # how several outputs are arranged; None for one tensor
    shard: Shard | None = None  # which part of the experts this rank holds; None for all

    @property
    def params(self) -> MoEParams | None:
        """The parameters a fused kernel is asked for; None for a split site."""
        return self.spec.params if isinstance(self.spec, MoESpec) else None


class PreparedWeights(nn.Module):
    """The weights of a site in the layout of its backend, as buffers ``SLOT_0``, ``SLOT_1``, ... and ``SLOT_bias``."""

    plan: SitePlan
    backend: str
    layout: str
    weight_errors: dict[str, dict[str, float]]
    """Source parameter -> relative squared error of its experts' quantization, "mean" and "max"; empty if unknown."""
    weight_powers: Tensor | None = None
    """Until a part of the experts is installed: each one's squared norm, all projections one after the other."""

    def set_tensors(self, weights: dict[str, list[Tensor]], biases: dict[str, Tensor]) -> None:
        """Take the prepared tensors and biases, by the slot of their projection."""
        for slot, tensors in weights.items():
            for i, tensor in enumerate(tensors):
                self.register_buffer(f"{slot}_{i}", tensor, persistent=False)
        for slot, tensor in biases.items():
            self.register_buffer(f"{slot}_bias", tensor, persistent=False)
        self._counts = {slot: len(tensors) for slot, tensors in weights.items()}
        self._tensor_names = self._names()

    def _names(self) -> tuple[str, ...]:
        """The buffers in the order in which the rewritten graph takes them."""
        tensors = [f"{slot}_{i}" for slot, count in self._counts.items() for i in range(count)]
        return (*tensors, *(f"{slot}_bias" for slot in self._counts if f"{slot}_bias" in self._buffers))

    @property
    def device(self) -> torch.device:
        """Where the prepared weights lie."""
        return self.weights(self.projections[0].slot)[0].device

    def expert_bytes(self) -> int:
        """Bytes of the packed weights and scales (biases not counted, as they are not quantized)."""
        return sum(t.numel() * t.element_size() for p in self.projections for t in self.weights(p.slot))

    # canonical

    @property
    def original(self) -> nn.Module:
        """The module this one replaced; its weights are gone (on the meta device)."""
        module: nn.Module = self.__dict__[BLUEPRINT]
        return module

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The packed projections of this site."""
        return projections_of(self.plan.spec)

    def weights(self, slot: str) -> list[Tensor]:
        """Prepared tensors of one projection."""
        return [getattr(self, f"{slot}_{i}") for i in range(self._counts[slot])]

    def canonical(self, projection: Projection, experts: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(packed uint8 [e,N,ceil(K/2)], scales uint8 [e,N,ceil(K/32)]) of some experts."""
        _, n, k = projection.shape
        return get_backend(self.backend).recover(
            [t[experts] for t in self.weights(projection.slot)], self._slot(projection, self.layout), n=n, k=k
        )

    def _slot(self, projection: Projection, layout: str) -> Slot:
        return Slot(projection.role, self.plan.params, layout)

    def canonical_bias(self, projection: Projection) -> Tensor | None:
        """Bias [E, N] in the model's order and dtype, or None."""
        bias = getattr(self, f"{projection.slot}_bias", None)
        if bias is None:
            return None
        return get_backend(self.backend).recover_bias(bias, self._slot(projection, self.layout), n=projection.shape[1])

    def dequantized(
        self, projection: Projection, experts: slice = slice(None), dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The source parameters of a projection, dequantized, in their original layout and dtype."""
        packed, scales = self.canonical(projection, experts)
        weight = mx.dequantize(packed, scales, projection.shape[2], dtype or self.plan.weight_dtype)
        parts = weight.split(projection.rows(self.original), dim=1)
        out: dict[str, Tensor] = {}
        for name, part in zip(projection.source.parameters, parts, strict=True):
            part = (part.transpose(1, 2) if projection.source.transposed else part).contiguous()
            out.update(unstack(self.original, name, part))
        return out

    def dequantized_biases(self) -> dict[str, Tensor]:
        """The source bias parameters, exactly as they were."""
        out: dict[str, Tensor] = {}
        for projection in self.projections:
            bias = self.canonical_bias(projection)
            if bias is not None:
                rows = [sizes(self.original, name)[0] for name in projection.source.bias]
                for name, part in zip(projection.source.bias, bias.split(rows, dim=1), strict=True):
                    out.update(unstack(self.original, name, part))
        return out

    # state_dict: canonical, whatever the backend

    canonical_in_state_dict = True
    """False while a checkpoint is written: packed weights go there a few experts at a time, not all at once."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.canonical_in_state_dict:
            return
        for projection in self.projections:
            packed, scales = self.canonical(projection)
            rows = projection.rows(self.original)
            for name, p, s in zip(
                projection.source.parameters, packed.split(rows, dim=1), scales.split(rows, dim=1), strict=True
            ):
                for member, value in unstack(self.original, name, p).items():
                    destination[f"{prefix}{member}_packed"] = value
                for member, value in unstack(self.original, name, s).items():
                    destination[f"{prefix}{member}_scales"] = value
        for name, bias in self.dequantized_biases().items():
            destination[prefix + name] = bias

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for projection in self.projections:
            experts, _, k = projection.shape
            for name, n in zip(projection.source.parameters, projection.rows(self.original), strict=True):
                for suffix, width in (("packed", (k + 1) // 2), ("scales", -(-k // mx.BLOCK))):
                    whole = torch.empty(experts, n, width, dtype=torch.uint8, device="meta")
                    for member, part in unstack(self.original, name, whole).items():
                        wanted[f"{member}_{suffix}"] = (tuple(part.shape), torch.uint8)
        biases = self.dequantized_biases()
        for name, bias in biases.items():
            wanted[name] = (tuple(bias.shape), bias.dtype)
        given: dict[str, Tensor] = {}
        bad = False
        for name, (shape, dtype) in wanted.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
                bad = True
            elif tuple(value.shape) != shape or (dtype == torch.uint8) != (value.dtype == torch.uint8):
                error_msgs.append(
                    f"{prefix}{name}: expected {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}"
                )
                bad = True
            else:
                given[name] = value
        rest = {k: v for k, v in state_dict.items() if not (k.startswith(prefix) and k[len(prefix) :] in wanted)}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        own = [k for k in unexpected_keys if k.startswith(prefix) and k[len(prefix) :] in wanted]
        for key in own:
            unexpected_keys.remove(key)
        if bad:
            return
        self.weight_errors = {}  # of the weights that were there
        for projection in self.projections:
            names, experts = projection.source.parameters, projection.shape[0]
            packed = torch.cat([restacked(self.original, n, given, "_packed", experts) for n in names], dim=1)
            scales = torch.cat([restacked(self.original, n, given, "_scales", experts) for n in names], dim=1)
            self._write(projection, packed, scales)
            if projection.source.bias and f"{projection.slot}_bias" in self._buffers:
                parts = [restacked(self.original, n, given, "", experts) for n in projection.source.bias]
                bias = torch.cat(parts, dim=1)
                target = self._buffers[f"{projection.slot}_bias"]
                assert target is not None
                target.copy_(
                    get_backend(self.backend).prepare_bias(bias.to(target.device), self._slot(projection, self.layout))
                )

    def _write(self, projection: Projection, packed: Tensor, scales: Tensor) -> None:
        """Prepare canonical weights into the existing buffers, expert by expert."""
        targets = self.weights(projection.slot)
        for e in range(projection.shape[0]):
            prepared = get_backend(self.backend).prepare(
                packed[e : e + 1].to(targets[0].device),
                scales[e : e + 1].to(targets[0].device),
                self._slot(projection, self.layout),
                k=projection.shape[2],
            )
            for target, source in zip(targets, prepared, strict=True):
                target[e : e + 1].copy_(source)

    # another device or backend

    def prepare_for(self, device: torch.device, choice: Choice) -> None:
        """Move the weights to ``device`` in the layout of another backend, through the canonical form."""
        with torch.inference_mode(False):  # its tensors could not be written to later
            self._prepare_for(device, choice)

    def _prepare_for(self, device: torch.device, choice: Choice) -> None:
        old, new = get_backend(self.backend), get_backend(choice.backend)
        for projection in self.projections:
            experts, n, k = projection.shape
            before, after = self._slot(projection, self.layout), self._slot(projection, choice.layout)
            collected: list[list[Tensor]] = []
            for e in range(experts):
                packed, scales = self.canonical(projection, slice(e, e + 1))
                collected.append(new.prepare(packed.to(device), scales.to(device), after, k=k))
            for i in range(self._counts[projection.slot]):
                del self._buffers[f"{projection.slot}_{i}"]
            tensors = [torch.cat(parts) for parts in zip(*collected, strict=True)]
            for i, tensor in enumerate(tensors):
                self.register_buffer(f"{projection.slot}_{i}", tensor, persistent=False)
            self._counts[projection.slot] = len(tensors)
            bias = self._buffers.get(f"{projection.slot}_bias")
            if bias is not None:
                canonical = old.recover_bias(bias, before, n=n)
                self._buffers[f"{projection.slot}_bias"] = new.prepare_bias(canonical.to(device), after)
        self.backend, self.layout = choice.backend, choice.layout
        self._tensor_names = self._names()


class _Part(nn.Module):
    """What remains of an experts module inside a site. ``packed``: state_dict names, from here, that are the site's."""

    def __init__(self, packed: frozenset[str]) -> None:
        super().__init__()
        self.packed = packed

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before = len(unexpected_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[before:] = [k for k in unexpected_keys[before:] if k.removeprefix(prefix) not in self.packed]


def adopt(module: nn.Module, original: nn.Module, path: str, released: Iterable[str]) -> None:
    """Give ``module`` the parameter or buffer of ``original`` at ``path``, in plain modules on the way there."""
    *owners, leaf = path.split(".")
    source, target, inner = original, module, ""
    for owner in owners:
        inner += f"{owner}."
        if owner not in target._modules:
            names = [n.removeprefix(inner) for n in released if n.startswith(inner)]
            target.add_module(owner, _Part(frozenset(f"{n}{end}" for n in names for end in ("_packed", "_scales"))))
        source, target = source.get_submodule(owner), target.get_submodule(owner)
    if leaf in source._parameters:
        target.register_parameter(leaf, source._parameters[leaf])
    else:
        target.register_buffer(leaf, source._buffers[leaf], persistent=leaf not in source._non_persistent_buffers_set)


def release(original: nn.Module, names: Iterable[str]) -> None:
    """Drop parameters of ``original``, leaving shape, dtype and ``requires_grad`` on the meta device."""
    for name in (member for n in names for member in members(original, n)):
        owner, _, leaf = name.rpartition(".")
        module = original.get_submodule(owner)
        parameter = module._parameters[leaf]
        assert parameter is not None
        if parameter.device.type != "meta":
            module._parameters[leaf] = nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), parameter.requires_grad
            )
