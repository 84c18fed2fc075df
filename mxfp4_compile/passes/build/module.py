"""The module that takes an experts module's place: the rewritten graph on prepared weights, called as the original.

::

    call's tensors, retained state of the original, prepared weights  -->  rewritten graph  -->  the original's result

Contract: called in any other way than the traced one, or with other dtypes, it raises TypeError: both are part of the
rewritten graph. Two cases are cast, and the result cast back: under autocast, which hands on other dtypes than the ones
without it, and fp32 where 16 bits were traced, which is what preparing a model for training leaves (fp32 norms and
routers around frozen experts). ``.to(device)`` prepares the weights again and rewrites the ops for that device's
backend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ops.backend import BackendError
from ...ops.selection import Choice, choose
from ..calls import TensorInfo
from ..weights import is_apart, members, source_names
from .rewrite import reroute
from .state import BLUEPRINT, PreparedWeights, SitePlan, adopt

RUNS = "mxfp4_runs"
"""A keyword by which a wrapper hands on what runs the rewritten graph in its place: (graph, inputs) -> results."""

_HALF = (torch.bfloat16, torch.float16)


class MXFP4Experts(PreparedWeights):
    """Experts in MXFP4, called exactly as the module they replace.

    Raises TypeError when called in another way than the one traced, or with other dtypes: both are
    part of the rewritten graph.
    """

    rewritten: fx.GraphModule
    constants: frozenset[str] = frozenset()
    """Plain attributes that the original's forward read: part of the graph, so that they cannot be set any more."""
    training_only: tuple[str, ...] = ()
    """What the original does in training mode only (dropout, noise), in words: the rewritten graph does not have it."""

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
        self._retained_dtypes: dict[int, torch.dtype] = {}
        _copy_plain_attributes(original, self)
        released = {m for n in source_names(self.projections) for m in members(original, n)}
        for name in plan.retained:
            top = name.split(".")[0]
            if "*" in top or any(n.startswith(f"{top}.") for n in released):
                # A part of the experts themselves (a norm between their projections) without what is released.
                for member in members(original, name):
                    adopt(self, original, member, released)
            elif top in original._modules:
                self.add_module(top, original._modules[top])
            elif top in original._parameters:
                self.register_parameter(top, original._parameters[top])
            else:
                self.register_buffer(top, original._buffers[top])
        self.set_tensors(weights, biases)
        self.rewritten = graph

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.constants and self.__dict__.get(name) != value:
            raise AttributeError(
                f"{name}={self.__dict__.get(name)!r} is part of the rewritten graph: setting it to {value!r} would "
                "change nothing. Call mxfp4_compile.restore(model) first, set it, and optimize again"
            )
        super().__setattr__(name, value)

    # forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's forward on MXFP4 weights; arguments as traced."""
        pattern, runs = self.plan.pattern, kwargs.pop(RUNS, None)
        if len(args) != pattern.positional or len(kwargs) != len(pattern.keywords):
            raise TypeError(
                f"these experts were rewritten for calls as {pattern}, got {len(args)} positional arguments "
                f"and keywords {sorted(kwargs)}"
            )
        if self.training and self.training_only:
            raise RuntimeError(
                f"{self.__dict__.get('site_name', 'these experts')}: in training mode the original has "
                f"{', '.join(self.training_only)}, which the rewritten graph lacks. Set it to 0 before optimize(), or "
                "leave these experts in eval mode"
            )
        if self.__dict__.get("_is_fsdp_managed_module") and torch.is_grad_enabled():  # either FSDP sets it
            raise NotImplementedError(
                f"{self.__dict__.get('site_name', 'these experts')}: MXFP4 experts are not trained under FSDP, which "
                "shards parameters that they no longer have. Train with all experts on each rank (DDP)"
            )
        leaves = [*args, *[kwargs[name] for name in pattern.keywords]]
        autocast = torch.is_autocast_enabled(self.device.type)
        cast = [
            (leaf, expected)
            for leaf, expected in zip(leaves, pattern.leaves, strict=True)
            if isinstance(expected, TensorInfo) and (_is_wider(leaf, expected) or (autocast and _float(leaf, expected)))
        ]
        return self._in_traced_dtypes(leaves, cast, runs) if cast or autocast else self._run(leaves, runs)

    def _in_traced_dtypes(self, leaves: list[Any], floating: list[tuple[Tensor, TensorInfo]], runs: Any) -> Any:
        """The graph in the dtypes it was traced in; what has the tokens' dtype there has the caller's here."""
        traced = {id(leaf): leaf.to(expected.dtype) for leaf, expected in floating}
        with torch.autocast(self.device.type, enabled=False):
            result = self._run([traced.get(id(leaf), leaf) for leaf in leaves], runs)
        if not floating:
            return result
        tokens, expected = floating[0]
        given, had = tokens.dtype, expected.dtype
        if given == had:
            return result
        if isinstance(result, Tensor):
            return result.to(given) if result.dtype == had else result
        parts, spec = torch.utils._pytree.tree_flatten(result)
        parts = [r.to(given) if isinstance(r, Tensor) and r.dtype == had else r for r in parts]
        return torch.utils._pytree.tree_unflatten(parts, spec)

    def _run(self, leaves: list[Any], runs: Any = None) -> Any:
        inputs = []
        for leaf, expected in zip(leaves, self.plan.pattern.leaves, strict=True):
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
        if runs is not None:
            return self._arranged(runs(self.rewritten, inputs))
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
        kept = [state_of(self, name, self.original) for name in self.plan.retained]
        for i, dtype in self._retained_dtypes.items():
            if kept[i].dtype == torch.float32:  # cast since, with the rest of the model, for training
                kept[i] = kept[i].to(dtype)
        return kept + [getattr(self, name) for name in self._tensor_names]

    def note_dtypes(self) -> None:
        """Remember which retained state is 16 bits wide, as the rewritten graph was made for."""
        kept = [state_of(self, name, self.original) for name in self.plan.retained]
        self._retained_dtypes = {i: t.dtype for i, t in enumerate(kept) if t.dtype in _HALF}

    def requires_grad_(self, requires_grad: bool = True) -> MXFP4Experts:
        """As for every module, but that asking for gradients of the experts is an error: their weights are codes."""
        if requires_grad:
            name = self.__dict__.get("site_name", "these experts")
            raise RuntimeError(
                f"{name}: weights of MXFP4 experts are 4-bit codes and cannot be trained. Train adapters or other "
                "parameters, or mxfp4_compile.restore(model) for full fine-tuning"
            )
        super().requires_grad_(False)
        return self

    def _arranged(self, result: Any) -> Any:
        """One tensor, or several as the original returned them."""
        spec = self.plan.out_spec
        return result if spec is None else torch.utils._pytree.tree_unflatten(list(result), spec)

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
                self._parameters[name] = _moved(self._parameters[name], fn)
            else:
                self._buffers[name] = fn(self._buffers[name])
        return self

    def prepare_for(self, device: torch.device, choice: Choice) -> None:
        """Move the weights to ``device`` in the layout of another backend, and the graph's ops to that backend."""
        super().prepare_for(device, choice)
        self.rewritten = reroute(self.rewritten, self._counts, self.backend, self.layout, self.device)

    def extra_repr(self) -> str:
        return f"{self.plan.spec}, backend={self.backend!r}, layout={self.layout!r}"


def _float(tensor: Tensor, traced: TensorInfo) -> bool:
    return traced.dtype.is_floating_point and tensor.is_floating_point()


def _is_wider(tensor: Tensor, traced: TensorInfo) -> bool:
    """fp32 where 16 bits were traced: norms and routers that were cast for training."""
    return traced.dtype in _HALF and tensor.dtype == torch.float32


def _moved(parameter: Any, fn: Any) -> nn.Parameter:
    with torch.no_grad():
        return nn.Parameter(fn(parameter), requires_grad=parameter.requires_grad)


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


def state_of(module: nn.Module, path: str, original: nn.Module) -> Tensor:
    """A parameter or buffer, or a stack of them; TypeError if another module (a PEFT layer) stands in its place."""
    if is_apart(path):
        return torch.stack([state_of(module, member, original) for member in members(original, path)])
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
