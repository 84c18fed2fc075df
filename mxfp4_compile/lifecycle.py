"""What becomes of a model once its experts are rewritten: how every way of rewriting ends, and the way back.

Contract: ``optimize``, ``load`` and ``from_pretrained`` all end with ``finish``; copies, pickles and
``load_state_dict`` keep what it left. ``restore`` undoes all of it.

::

    sites installed -> finish: guard (first child) | report | generate | router pass | load_state_dict hook
                                    restore: all of them gone, ordinary experts again
"""

from __future__ import annotations

import time
import types
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .circumstances import StateChange, constants_of, others_wait, plain_modes
from .passes.build.module import MXFP4Experts, dtype_message, mxfp4_sites
from .passes.build.training import changed_by_training
from .planning import OptimizeError, Site
from .report import Report
from .runtime import attach, detach, runtime_of

GUARD = "mxfp4_guard"
REPORT = "mxfp4_report"
SWITCH = "set_experts_implementation"


def finish(model: nn.Module, report: Report, started: float) -> None:
    """The end of every way of rewriting a model: guard it, give it its report, its ``generate`` and the router pass.

    report: complete but for the time and what ``generate`` adds to it. started: when the work began, by
    ``time.perf_counter``. A model of which nothing was rewritten gets the report alone.
    """
    report.seconds = time.perf_counter() - started
    built = mxfp4_sites(model)
    for i, site in enumerate(report.sites):
        if site.rewritten and site.names[0] in built:
            experts = built[site.names[0]]
            constants = constants_of(experts.original)
            experts.constants = frozenset(constants)
            experts.training_only = changed_by_training(experts.original)
            experts.note_dtypes()
            report.sites[i] = replace(site, constants=tuple(f"{k}={v!r}" for k, v in constants.items()))
    model.mxfp4_report = report  # type: ignore[assignment]
    if not report.rewritten:
        return
    put_guard(model)
    if isinstance(getattr(type(model), SWITCH, None), types.FunctionType):
        model.__dict__[SWITCH] = ExpertsSwitch(model)
    attach(model, report.max_capture_size, report)
    if weights_loaded not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(weights_loaded)


def note_state(model: nn.Module, report: Report, changes: list[StateChange], sites: list[Site]) -> None:
    """Tell which attributes forwards set: those of rewritten modules are set no more, the others were put back."""
    inside = {id(m) for site in sites for m in site.candidate.module.modules()}
    lost = [str(c) for c in changes if id(model.get_submodule(c.module)) in inside]
    others = [str(c) for c in changes if str(c) not in lost]
    if lost:
        report.notes.append(f"a forward sets {_some(lost)}: the rewritten experts do not, they compute and return only")
    if others:
        report.notes.append(f"a forward sets {_some(others)}: put back as before the forwards that optimize() runs")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def weights_loaded(model: nn.Module, incompatible_keys: Any) -> None:
    """After ``load_state_dict``: the report says no more of the weights that were replaced than is known."""
    report = getattr(model, REPORT, None)
    if not isinstance(report, Report):
        return
    unknown = {name for name, site in mxfp4_sites(model).items() if not site.weight_errors}
    stale = [i for i, s in enumerate(report.sites) if s.weight_error_mean is not None and unknown.intersection(s.names)]
    for i in stale:
        report.sites[i] = replace(report.sites[i], weight_error_mean=None, weight_error_max=None)
    if stale:
        note = "load_state_dict replaced weights: how far they are from unquantized ones is not known"
        report.notes += [note] if note not in report.notes else []


class ExpertsSwitch:
    """What stands in for ``model.set_experts_implementation``: rewritten experts have no implementations."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, implementation: Any) -> None:
        """Reaches the experts that were left alone, if there are some; the configuration stays true for the others."""
        report: Report = self.model.mxfp4_report
        left = [s for s in report.sites if not s.rewritten]
        what = f"mxfp4_compile: {SWITCH}({implementation!r}) changes nothing about the rewritten experts"
        warnings.warn(f"{what}: backend {report.rewritten[0].backend} serves them", stacklevel=2)
        if left:
            getattr(type(self.model), SWITCH)(self.model, implementation)


# the guard


class DtypeGuard(nn.Module):
    """First child of a rewritten model: refuses a change of dtype before any other module was cast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.training = False
        _install_router_pass(self)

    def __setstate__(self, state: Any) -> None:  # copies and pickles of the model have the pass as well
        super().__setstate__(state)
        _install_router_pass(self)

    def _apply(self, fn: Any, recurse: bool = True) -> DtypeGuard:
        moved = fn(torch.zeros(1, dtype=self.dtype))
        if moved.dtype != self.dtype:
            raise TypeError(dtype_message(self.dtype, moved.dtype))
        return self

    def forward(self) -> None:
        raise RuntimeError("the guard is never called")


# Their children are counted, indexed or called one after the other.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def put_guard(model: nn.Module) -> None:
    """Have a rewritten model refuse a change of dtype: its first child, or in a container the first child's."""
    dtype = next(iter(mxfp4_sites(model).values())).plan.weight_dtype
    place = model
    while isinstance(place, _CONTAINERS):  # one that holds a site has a child
        place = next(child for child in place._modules.values() if child is not None)
    if isinstance(place, MXFP4Experts):
        return  # refuses by itself, before anything else was cast
    children = dict(place._modules)
    place._modules.clear()
    place._modules[GUARD] = DtypeGuard(dtype)
    place._modules.update(children)


def _take_guard(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        if GUARD in module._modules:
            return module._modules.pop(GUARD)
    return None


def _install_router_pass(guard: DtypeGuard) -> None:
    from .dynamo import router_pass  # imports Inductor, which takes seconds: not before it is needed

    router_pass.install(guard)


# the way back


def restore(model: nn.Module) -> Any:
    """Undo optimize(), in place: ordinary experts with dequantized weights, every hook undone; returns the model.

    Weights keep the values MXFP4 gave them (the original ones are gone); those that required gradients before
    optimize() do so again. Raises OptimizeError if the model is not optimized.
    """
    runtime = runtime_of(model)
    with ExitStack() as stack:
        if runtime is not None:  # its generate runs on what is taken away here: before any other lock
            if runtime.generating():
                raise OptimizeError("restore() was called while this model's own generate() runs in the same thread")
            stack.enter_context(runtime.lock)
        stack.enter_context(others_wait(model))
        stack.enter_context(plain_modes())
        return _restore(model)


def _restore(model: nn.Module) -> Any:
    if not mxfp4_sites(model):
        raise OptimizeError("this model is not optimized: there is nothing to restore")
    split = [name for name, site in mxfp4_sites(model).items() if site.plan.shard is not None]
    if split:
        raise OptimizeError(
            f"{split[0]} holds {mxfp4_sites(model)[split[0]].plan.shard}: restore() does not serve experts on several "
            "ranks. Save the model and restore() it in one process, or load the original again"
        )
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, MXFP4Experts):
                module._modules[name] = _restored(child)
    guard = _take_guard(model)
    if isinstance(guard, DtypeGuard):
        from .dynamo import router_pass

        router_pass.uninstall(guard)
    model.__dict__.pop(REPORT, None)
    quantizer = model.__dict__.get("hf_quantizer")
    if quantizer is not None:  # the model was loaded with ours
        quantizer.remove_quantization_config(model)
    detach(model)
    model.__dict__.pop(SWITCH, None)
    for key, hook in list(model._load_state_dict_post_hooks.items()):
        if hook is weights_loaded:
            del model._load_state_dict_post_hooks[key]
    return model


def _restored(site: MXFP4Experts) -> nn.Module:
    original = site.original
    if not any(p.device.type == "meta" for p in original.parameters()):
        return original  # a shared module, restored under its first name
    values = dict(site.dequantized_biases())
    for projection in site.projections:
        values.update(site.dequantized(projection))
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        module = original.get_submodule(owner)
        released = module._parameters[leaf]
        assert released is not None
        module._parameters[leaf] = nn.Parameter(value.clone(), requires_grad=released.requires_grad)
    return original.train(site.training)


__all__ = ["DtypeGuard", "finish", "restore"]
