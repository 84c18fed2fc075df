"""The module that takes an experts module's place: prepared weights, the rewritten graph, and the way back.

Weights exist in one form, the prepared one, as buffers. The canonical form is recovered from it, bit for
bit, where it is needed: ``state_dict``, another device, ``restore``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ... import mx
from ...ops.backend import BackendError
from ...ops.registry import get_backend
from ...ops.selection import Choice, choose
from ...ops.target import PLAIN, Request
from ...spec import MoEParams, MoESpec, Role, SplitSpec, WeightSource
from ..calls import TensorInfo
from ..trace.capture import CallPattern
from ..weights import members, sizes, unstack

BLUEPRINT = "_original"


@dataclass(frozen=True)
class Projection:
    """One packed weight of a site: where it comes from and the shape [E, N, K] it has in canonical form."""

    slot: str
    source: WeightSource
    shape: tuple[int, int, int]
    role: Role | None

    def rows(self, original: nn.Module) -> list[int]:
        """N of each source parameter, in order."""
        dim = 1 if self.source.transposed else 0
        return [sizes(original, name)[dim] for name in self.source.parameters]


def projections_of(spec: MoESpec | SplitSpec) -> tuple[Projection, ...]:
    """The projections of a spec, in the order in which the rewritten graph takes them."""
    if isinstance(spec, MoESpec):
        return (
            Projection("up", spec.up, spec.params.shape("up"), "up"),
            Projection("down", spec.down, spec.params.shape("down"), "down"),
        )
    return tuple(Projection(f"linear{i}", s.source, s.shape, None) for i, s in enumerate(spec.linears))


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

    @property
    def params(self) -> MoEParams | None:
        """The parameters a fused kernel is asked for; None for a split site."""
        return self.spec.params if isinstance(self.spec, MoESpec) else None


class MXFP4Experts(nn.Module):
    """Experts in MXFP4, called exactly as the module they replace.

    Raises TypeError when called in another way than the one captured, or with other dtypes: both are
    part of the rewritten graph.
    """

    rewritten: fx.GraphModule
    weight_errors: dict[str, dict[str, float]]
    """Source parameter -> relative squared error of its experts' quantization, "mean" and "max"; empty if unknown."""

    def __init__(
        self,
        plan: SitePlan,
        graph: fx.GraphModule,
        original: nn.Module,
        weights: dict[str, list[Tensor]],
        biases: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.plan = plan
        self.backend = plan.backend
        self.layout = plan.layout
        self.weight_errors = {}
        self.__dict__[BLUEPRINT] = original  # not a child: its parameters are released
        self.training = False
        _copy_plain_attributes(original, self)
        released = {m for n in source_names(self.projections) for m in members(original, n)}
        for name in plan.retained:
            top = name.split(".")[0]
            if top == "*" or any(n.startswith(f"{top}.") for n in released):
                # A part of the experts themselves (a norm between their projections) without what is released.
                for member in members(original, name):
                    _adopt(self, original, member, released)
            elif top in original._modules:
                self.add_module(top, original._modules[top])
            elif top in original._parameters:
                self.register_parameter(top, original._parameters[top])
            else:
                self.register_buffer(top, original._buffers[top])
        self._set_tensors(weights, biases)
        self.rewritten = graph

    def _set_tensors(self, weights: dict[str, list[Tensor]], biases: dict[str, Tensor]) -> None:
        names = []
        for slot, tensors in weights.items():
            for i, tensor in enumerate(tensors):
                names.append(f"{slot}_{i}")
                self.register_buffer(names[-1], tensor, persistent=False)
        for slot, tensor in biases.items():
            names.append(f"{slot}_bias")
            self.register_buffer(names[-1], tensor, persistent=False)
        self._tensor_names = tuple(names)
        self._counts = {slot: len(tensors) for slot, tensors in weights.items()}

    # forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's forward on MXFP4 weights; arguments as captured."""
        pattern = self.plan.pattern
        if len(args) != pattern.positional or len(kwargs) != len(pattern.keywords):
            raise TypeError(
                f"these experts were rewritten for calls as {pattern}, got {len(args)} positional arguments "
                f"and keywords {sorted(kwargs)}"
            )
        leaves = [*args, *[kwargs[name] for name in pattern.keywords]]
        inputs = []
        for leaf, expected in zip(leaves, pattern.leaves, strict=True):
            if isinstance(expected, TensorInfo):
                if leaf.dtype != expected.dtype:
                    raise TypeError(
                        f"these experts were rewritten for an argument of {expected.dtype}, got {leaf.dtype}; "
                        "optimize the model in the dtype it runs in"
                    )
                inputs.append(leaf)
            elif leaf != expected:
                raise TypeError(f"these experts were rewritten for an argument equal to {expected!r}, got {leaf!r}")
        inputs += self.stored()
        if torch.compiler.is_compiling():
            return self._arranged(self.rewritten(*inputs))
        try:
            return self._arranged(self.rewritten(*inputs))
        except BackendError as error:
            name = self.__dict__.get("site_name")  # set when the site is installed
            if name is None:
                raise
            raise BackendError(f"{name}: {error}") from error

    def stored(self) -> list[Tensor]:
        """What the rewritten graph takes after the call's tensors: retained state, prepared weights, biases."""
        kept = [_get(self, name, self.original) for name in self.plan.retained]
        return kept + [getattr(self, name) for name in self._tensor_names]

    def _arranged(self, result: Any) -> Any:
        """One tensor, or several as the original returned them."""
        spec = self.plan.out_spec
        return result if spec is None else torch.utils._pytree.tree_unflatten(list(result), spec)

    # the way back to canonical weights

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
            [t[experts] for t in self.weights(projection.slot)],
            n=n,
            k=k,
            role=projection.role,
            params=self.plan.params,
            layout=self.layout,
        )

    def canonical_bias(self, projection: Projection) -> Tensor | None:
        """Bias [E, N] in the model's order and dtype, or None."""
        bias = getattr(self, f"{projection.slot}_bias", None)
        if bias is None:
            return None
        return get_backend(self.backend).recover_bias(
            bias, n=projection.shape[1], role=projection.role, params=self.plan.params, layout=self.layout
        )

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
            names = projection.source.parameters
            packed = torch.cat([self._restacked(given, n, "_packed", projection.shape[0]) for n in names], dim=1)
            scales = torch.cat([self._restacked(given, n, "_scales", projection.shape[0]) for n in names], dim=1)
            self._write(projection, packed, scales)
            if projection.source.bias and f"{projection.slot}_bias" in self._buffers:
                parts = [self._restacked(given, n, "", projection.shape[0]) for n in projection.source.bias]
                bias = torch.cat(parts, dim=1)
                target = self._buffers[f"{projection.slot}_bias"]
                assert target is not None
                target.copy_(
                    get_backend(self.backend).prepare_bias(
                        bias.to(target.device), role=projection.role, params=self.plan.params, layout=self.layout
                    )
                )

    def _restacked(self, given: dict[str, Tensor], name: str, suffix: str, experts: int) -> Tensor:
        """The values given for the members of ``name``, as [E, ...]."""
        values = [given[member + suffix] for member in members(self.original, name)]
        if "#" in name:
            return values[0].reshape(experts, -1, *values[0].shape[1:])
        if "@" in name:
            return values[0][:experts]
        return torch.stack(values) if "*" in name.split(".") else values[0]

    def _write(self, projection: Projection, packed: Tensor, scales: Tensor) -> None:
        """Prepare canonical weights into the existing buffers, expert by expert."""
        targets = self.weights(projection.slot)
        for e in range(projection.shape[0]):
            prepared = get_backend(self.backend).prepare(
                packed[e : e + 1].to(targets[0].device),
                scales[e : e + 1].to(targets[0].device),
                k=projection.shape[2],
                role=projection.role,
                params=self.plan.params,
                layout=self.layout,
            )
            for target, source in zip(targets, prepared, strict=True):
                target[e : e + 1].copy_(source)

    # moving

    def _apply(self, fn: Any, recurse: bool = True) -> MXFP4Experts:
        """``.to(device)`` prepares again for that device; a change of dtype raises, as it is in the graph."""
        probe = torch.zeros(1, dtype=self.plan.weight_dtype, device=self.device)
        moved = fn(probe)
        if moved.dtype != probe.dtype:
            raise TypeError(dtype_message(probe.dtype, moved.dtype))
        if moved.device.type == "meta":
            raise RuntimeError("MXFP4 experts cannot move to the meta device: their weights would be lost")
        if moved.device == probe.device:
            super()._apply(fn, recurse)
            return self
        # What the site asks for, on another device; a backend asked for by name was asked for on the first one.
        shapes = tuple(p.shape for p in self.projections)
        request = replace(self.plan.request, params=self.plan.params, shapes=shapes)
        self.prepare_for(moved.device, choose(self.plan.params, moved.device, None, request))
        for name in {n.split(".")[0] for n in self.plan.retained}:
            child = self._modules.get(name)
            if child is not None:
                child._apply(fn)
            elif self._parameters.get(name) is not None:
                self._parameters[name] = nn.Parameter(fn(self._parameters[name]), requires_grad=False)
            else:
                self._buffers[name] = fn(self._buffers[name])
        return self

    def prepare_for(self, device: torch.device, choice: Choice) -> None:
        """Move the weights to ``device`` in the layout of another backend, through the canonical form."""
        old, new = get_backend(self.backend), get_backend(choice.backend)
        for projection in self.projections:
            experts, n, k = projection.shape
            common: dict[str, Any] = {"role": projection.role, "params": self.plan.params}
            collected: list[list[Tensor]] = []
            for e in range(experts):
                packed, scales = self.canonical(projection, slice(e, e + 1))
                collected.append(new.prepare(packed.to(device), scales.to(device), k=k, layout=choice.layout, **common))
            for i in range(self._counts[projection.slot]):
                del self._buffers[f"{projection.slot}_{i}"]
            tensors = [torch.cat(parts) for parts in zip(*collected, strict=True)]
            for i, tensor in enumerate(tensors):
                self.register_buffer(f"{projection.slot}_{i}", tensor, persistent=False)
            self._counts[projection.slot] = len(tensors)
            bias = self._buffers.get(f"{projection.slot}_bias")
            if bias is not None:
                canonical = old.recover_bias(bias, n=n, layout=self.layout, **common)
                self._buffers[f"{projection.slot}_bias"] = new.prepare_bias(
                    canonical.to(device), layout=choice.layout, **common
                )
        self._reroute(choice.backend, choice.layout)

    def _reroute(self, backend: str, layout: str) -> None:
        """Rebuild the rewritten graph for another backend."""
        from .rewrite import reroute  # the only place where the module needs the pass again

        names = []
        for slot, count in self._counts.items():
            names += [f"{slot}_{i}" for i in range(count)]
        names += [f"{slot}_bias" for slot in self._counts if f"{slot}_bias" in self._buffers]
        self.rewritten = reroute(self.rewritten, self._counts, backend, layout, self.device)
        self._tensor_names = tuple(names)
        self.backend, self.layout = backend, layout

    @property
    def device(self) -> torch.device:
        """Where the prepared weights lie."""
        return self.weights(self.projections[0].slot)[0].device

    def expert_bytes(self) -> int:
        """Bytes of the packed weights and scales (biases not counted, as they are not quantized)."""
        return sum(t.numel() * t.element_size() for p in self.projections for t in self.weights(p.slot))

    def extra_repr(self) -> str:
        return f"{self.plan.spec}, backend={self.backend!r}, layout={self.layout!r}"


def dtype_message(old: torch.dtype, new: torch.dtype) -> str:
    """Why a rewritten model cannot change its dtype."""
    return (
        f"this model's experts were rewritten for {old}; casting it to {new} is not supported, since the casts "
        "of the original forward are part of the rewritten graph. Call mxfp4_compile.restore(model) first, "
        "cast, and optimize again."
    )


def mxfp4_sites(model: nn.Module) -> dict[str, MXFP4Experts]:
    """All rewritten sites of a model by qualified name (a shared module once)."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MXFP4Experts)}


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


def _adopt(module: nn.Module, original: nn.Module, path: str, released: Iterable[str]) -> None:
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


def _get(module: nn.Module, path: str, original: nn.Module) -> Tensor:
    """A parameter or buffer, or a stack of them; TypeError if another module (a PEFT layer) stands in its place."""
    if "*" in path.split("."):
        return torch.stack([_get(module, member, original) for member in members(original, path)])
    *parts, leaf = path.split(".")
    owner: Any = module
    for part in parts:
        owner = getattr(owner, part)
    if leaf not in owner._parameters and leaf not in owner._buffers:
        raise TypeError(
            f"{path} is no parameter of its {type(owner).__name__} any more: these experts were rewritten with the "
            "plain tensor, so an adapter or parametrization put there since would be ignored. "
            "Call mxfp4_compile.restore(model) first"
        )
    return getattr(owner, leaf)  # type: ignore[no-any-return]


def _copy_plain_attributes(source: nn.Module, target: nn.Module) -> None:
    """Attributes that are neither tensors nor modules: config, sizes, flags that other code may read."""
    for name, value in vars(source).items():
        if name.startswith("_") and name not in ("_is_expert_parallel",):
            continue
        if name in target.__dict__ or name in ("training", "forward", "backend", "layout", "plan"):
            continue
        if isinstance(value, (Tensor, nn.Module)):
            continue
        target.__dict__[name] = value


def release(original: nn.Module, names: Iterable[str]) -> None:
    """Drop parameters of ``original``, leaving their shape and dtype on the meta device."""
    for name in (member for n in names for member in members(original, n)):
        owner, _, leaf = name.rpartition(".")
        module = original.get_submodule(owner)
        parameter = module._parameters[leaf]
        assert parameter is not None
        if parameter.device.type != "meta":
            module._parameters[leaf] = nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False
            )


def source_names(projections: Sequence[Projection]) -> tuple[str, ...]:
    """Names of all parameters that prepared weights and biases stand for, without repeats."""
    return tuple(dict.fromkeys(n for p in projections for n in (*p.source.parameters, *p.source.bias)))
