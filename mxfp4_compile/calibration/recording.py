"""The recording backend: every site computes as it did, and what its ops get is kept.

::

    site of a plain model     its rewritten graph on its own weights,      backend "recording", layout "plain"
                              or on calibrated ones
    site in MXFP4             its rewritten graph as it is                 backend "recording", "BACKEND/LAYOUT"

Contract: parameters and buffers stay as they are; forwards and graphs are put back at the end of the block. Hooking at
the op makes every family one case: biases, orders of gate and up, weights on the input and split middles are in the
graph around it or among its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..ops.arguments import LinearInputs, MoEInputs
from ..ops.backend import Backend, Requirement
from ..ops.gradients import grouped
from ..ops.registry import get_backend, unlisted
from ..ops.target import Request, Target
from ..passes.build.module import MXFP4Experts, state_of
from ..passes.build.rewrite import reroute, rewrite
from ..passes.calls import TensorInfo
from ..passes.weights import Projection, projections_of, stack
from ..planning import Site

NAME = "recording"
PLAIN = "plain"


@dataclass
class Recorded:
    """What one op got, call by call: ``x`` [T, K], ``ids`` [T, k] int64, ``weights`` [T, k], on the host or, where the
    recorder stays there, on the op's device. ``finite``: whether all of x are, as scalars on the op's device.
    """

    x: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)

    def joined(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, ids and weights of all calls, and which tokens [T] bool are held back, on ``device``."""
        mask = torch.cat([torch.full((len(x),), held) for x, held in zip(self.x, self.held, strict=True)])
        x, ids, weights = (
            torch.cat([part.to(device, non_blocking=True) for part in parts])
            for parts in (self.x, self.ids, self.weights)
        )
        return x, ids, weights, mask.to(device)

    @property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(t.numel() * t.element_size() for kept in (self.x, self.ids, self.weights) for t in kept)


class Enough(BaseException):
    """Ends a forward after the last site that was wanted; no error, so that nothing on the way reports it as one."""


class Recorder(Backend):
    """A backend for the time of a calibration. ``wanted``: sites whose ops are kept, None for all.

    ``held``: whether the text that runs is held back. ``last``: a site after which a forward ends. ``calibrated``:
    sites that have calibrated weights run on them. ``stays``: what is kept stays on the device that it is on.
    """

    name = NAME

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], Recorded] = {}
        self.order: list[int] = []
        self.wanted: set[int] | None = None
        self.last: int | None = None
        self.held = False
        self.calibrated = False
        self.stays = False
        self.codes: dict[int, Mapping[str, tuple[Tensor, Tensor]]] = {}
        self.slots: dict[int, tuple[int, str]] = {}  # where the weights of an op lie -> its site and slot

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        return [Requirement("use", False, "records what ops get while a model is calibrated")]

    def take(self, site: int) -> dict[str, Recorded]:
        """What was kept of a site, by slot; it is forgotten here."""
        keys = [key for key in self.kept if key[0] == site]
        return {slot: self.kept.pop((site, slot)) for _, slot in keys}

    def _note(self, weight: Tensor, x: Tensor, ids: Callable[[], Tensor], weights: Callable[[], Tensor]) -> None:
        site, slot = self.slots[weight.data_ptr()]
        if site not in self.order:
            self.order.append(site)
        if self.wanted is not None and site not in self.wanted:
            return
        record = self.kept.setdefault((site, slot), Recorded())
        keep = _clone if self.stays else _copy
        record.x.append(keep(x))
        record.ids.append(keep(ids().long()))
        record.weights.append(keep(weights()))
        record.finite.append(x.detach().isfinite().all())
        record.held.append(self.held)

    def moe(self, inputs: MoEInputs) -> Tensor:
        self._note(inputs.up[0], inputs.x, lambda: inputs.topk_ids, lambda: inputs.topk_weights)
        if inputs.layout != PLAIN:
            backend, _, own = inputs.layout.partition("/")
            return get_backend(backend).moe(replace(inputs, layout=own))
        return _moe(inputs)

    def grouped_linear(self, inputs: LinearInputs) -> Tensor:
        x, offsets = inputs.x, inputs.offsets

        def ids() -> Tensor:
            place = torch.arange(x.shape[0], device=x.device)
            return torch.searchsorted(offsets.to(place.dtype), place, right=True)[:, None]

        self._note(inputs.weight[0], x, ids, lambda: torch.ones(x.shape[0], 1))
        if inputs.layout != PLAIN:
            backend, _, own = inputs.layout.partition("/")
            return get_backend(backend).grouped_linear(replace(inputs, layout=own))
        out = x.new_zeros((x.shape[0], inputs.n), dtype=inputs.round_dtype)
        for expert, rows in inputs.of_experts():
            out[rows] = linear(x[rows], inputs.weight[0][expert].to(x.dtype))
        return out


def _copy(tensor: Tensor) -> Tensor:
    """On the host. From a CUDA device into pinned memory, which is there once the device has come so far."""
    if not tensor.is_cuda:
        return tensor.detach().to("cpu", copy=True)
    try:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # no more memory may be pinned
        return tensor.detach().to("cpu", copy=True)
    return out.copy_(tensor.detach(), non_blocking=True)


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _moe(inputs: MoEInputs) -> Tensor:
    """``mxfp4::moe`` on plain weights [E, N, K], rounded where the model rounds."""
    return _moe_grouped(inputs) if inputs.x.is_cuda else _moe_by_expert(inputs)


def _moe_grouped(inputs: MoEInputs) -> Tensor:
    """All experts in one product, on a device where launches and waiting for counts would take most of the time."""
    x, ids, params = inputs.x, inputs.topk_ids, inputs.params
    top_k, rounded = ids.shape[1], params.round_dtype
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    found = torch.bincount(flat.clamp(max=params.num_experts), minlength=params.num_experts + 1)
    counts: list[int] = found[: params.num_experts].tolist()
    order = order[: sum(counts)]  # ids of E and more are nobody's
    experts = flat[order].long()
    scale = inputs.topk_weights.reshape(-1, 1)[order]
    tokens = x[order // top_k]
    if params.weight_on_input:
        tokens = tokens * scale
    y = grouped(tokens.to(rounded), inputs.up[0].to(rounded).mT, counts)
    if inputs.up_bias is not None:
        y = y + inputs.up_bias.to(rounded)[experts]
    y = grouped(params.activate(y).to(rounded), inputs.down[0].to(rounded).mT, counts)
    if inputs.down_bias is not None:
        y = y + inputs.down_bias.to(rounded)[experts]
    y = y.to(params.accum_dtype)
    pairs = x.new_zeros((ids.numel(), params.hidden), dtype=params.accum_dtype)
    pairs[order] = y if params.weight_on_input else y * scale.to(params.accum_dtype)
    return pairs.view(ids.shape[0], top_k, params.hidden).sum(1).to(x.dtype)


def _moe_by_expert(inputs: MoEInputs) -> Tensor:
    """An expert at a time."""
    x, ids, params = inputs.x, inputs.topk_ids, inputs.params
    up, down, up_bias, down_bias = inputs.up[0], inputs.down[0], inputs.up_bias, inputs.down_bias
    top_k, rounded = ids.shape[1], params.round_dtype
    order = torch.argsort(ids.flatten(), stable=True)
    counts = torch.bincount(ids.flatten().clamp(max=params.num_experts), minlength=params.num_experts + 1)
    pairs = x.new_zeros((ids.numel(), params.hidden), dtype=params.accum_dtype)
    flat = inputs.topk_weights.reshape(-1, 1)
    start = 0
    for expert, count in enumerate(counts[: params.num_experts].tolist()):
        if not count:
            continue
        rows = order[start : start + count]
        start += count
        tokens = x[rows // top_k]
        if params.weight_on_input:
            tokens = tokens * flat[rows]
        y = linear(tokens.to(rounded), up[expert].to(rounded))
        y = params.activate(y if up_bias is None else y + up_bias[expert].to(rounded)).to(rounded)
        y = linear(y, down[expert].to(rounded))
        y = (y if down_bias is None else y + down_bias[expert].to(rounded)).to(params.accum_dtype)
        pairs[rows] = y if params.weight_on_input else y * flat[rows].to(params.accum_dtype)
    return pairs.view(ids.shape[0], top_k, params.hidden).sum(1).to(x.dtype)


def plain_weight(module: nn.Module, projection: Projection, experts: slice = slice(None)) -> Tensor:
    """The weights of some experts of a module, [e, N, K] in their own dtype; a view where they lie so."""
    parts = [stack(module, name)[experts] for name in projection.source.parameters]
    return canonical(parts, projection)


def canonical(parts: list[Tensor], projection: Projection) -> Tensor:
    """A projection's source parameters [e, ., .] as one weight [e, N, K]."""
    parts = [p.transpose(1, 2) if projection.source.transposed else p for p in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def decoded(codes: tuple[Tensor, Tensor], projection: Projection, like: Tensor) -> Tensor:
    """Values [e, N, K] of canonical codes and scales, of the dtype and on the device of ``like``."""
    from .. import mx

    packed, scales = (part.to(like.device) for part in codes)
    return mx.dequantize(packed, scales, projection.shape[2], like.dtype)


class _Forward:
    """What a site's module does in the meantime: its rewritten graph with the recording backend."""

    def __init__(self, site: Site, key: int, recorder: Recorder) -> None:
        structure = site.structure
        assert structure is not None
        self.module, self.key, self.recorder = site.candidate.module, key, recorder
        self.pattern, self.retained = structure.pattern, structure.retained
        self.out_spec = structure.traced.out_spec
        self.projections = projections_of(structure.found.spec)
        counts = {p.slot: 1 for p in self.projections}
        self.graph = rewrite(structure.traced, structure.found, counts, NAME, PLAIN)

    def weights(self, projection: Projection) -> Tensor:
        codes = self.recorder.codes.get(self.key) if self.recorder.calibrated else None
        if codes is None:
            return plain_weight(self.module, projection)
        return decoded(codes[projection.slot], projection, stack(self.module, projection.source.parameters[0]).parts[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [*args, *[kwargs[name] for name in self.pattern.keywords]]
        inputs = [v for v, e in zip(leaves, self.pattern.leaves, strict=True) if isinstance(e, TensorInfo)]
        inputs += [state_of(self.module, name, self.module) for name in self.retained]
        weights = {p.slot: self.weights(p) for p in self.projections}
        biases = [
            torch.cat([stack(self.module, name)[:] for name in p.source.bias], 1)
            for p in self.projections
            if p.source.bias
        ]
        slots = self.recorder.slots
        slots.update({w.data_ptr(): (self.key, slot) for slot, w in weights.items()})
        try:
            result = self.graph(*inputs, *weights.values(), *biases)
        finally:
            for weight in weights.values():
                slots.pop(weight.data_ptr(), None)
        if self.recorder.last == self.key:
            raise Enough
        return result if self.out_spec is None else torch.utils._pytree.tree_unflatten(list(result), self.out_spec)


@contextmanager
def recorded(sites: Mapping[int, Sequence[Site]], recorder: Recorder) -> Iterator[None]:
    """Within the block sites of a plain model record; the sites of one key share their weights."""
    with ExitStack() as stack_, unlisted(recorder):
        for key, same in sites.items():
            for site in same:
                module = site.candidate.module
                before = module.__dict__.get("forward")
                module.forward = _Forward(site, key, recorder)
                stack_.callback(_put_back, module, before)
        yield


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


@contextmanager
def recorded_mxfp4(sites: Mapping[int, Sequence[MXFP4Experts]], recorder: Recorder) -> Iterator[None]:
    """Within the block sites that run on MXFP4 record."""
    with ExitStack() as stack_, unlisted(recorder):
        for key, same in sites.items():
            for site in same:
                stack_.callback(setattr, site, "rewritten", site.rewritten)
                layout = f"{site.backend}/{site.layout}"
                site.rewritten = reroute(site.rewritten, site._counts, NAME, layout, site.device)
                for projection in site.projections:
                    recorder.slots[site.weights(projection.slot)[0].data_ptr()] = (key, projection.slot)
        yield


__all__ = [
    "Enough",
    "Recorded",
    "Recorder",
    "canonical",
    "decoded",
    "plain_weight",
    "recorded",
    "recorded_mxfp4",
]
