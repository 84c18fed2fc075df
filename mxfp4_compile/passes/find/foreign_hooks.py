"""What other libraries put around modules: accelerate's device hooks and PEFT's adapters.

Neither library is imported here: where one was used, it is in ``sys.modules``.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..calls import Call, TensorInfo

_HOOKED = ("forward", "_hf_hook", "_old_forward")
"""What ``accelerate.hooks.add_hook_to_module`` sets on a module."""


# accelerate: AlignDevicesHook moves a module's inputs to where its weights are (device_map over several devices)


@contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Inside the block ``module`` and what it holds run without accelerate's hooks."""
    kept = []
    for part in module.modules():
        if "_hf_hook" in vars(part) and "_old_forward" in vars(part):
            kept.append((part, {name: vars(part)[name] for name in _HOOKED if name in vars(part)}))
    try:
        for part, state in kept:
            for name in state:
                del part.__dict__[name]
            own = state["_old_forward"]
            if getattr(own, "__func__", None) is not type(part).forward:
                part.__dict__["forward"] = own
        yield
    finally:
        for part, state in kept:
            part.__dict__.pop("forward", None)
            part.__dict__.update(state)


def on_execution_device(module: nn.Module, call: Call) -> Call:
    """A recorded call as ``module`` itself sees it: after its hook moved the arguments."""
    hooks = [h for h in _each(getattr(module, "_hf_hook", None)) if getattr(h, "execution_device", None) is not None]
    if not hooks:
        return call
    target = hooks[-1].execution_device
    device = torch.device("cuda", target) if isinstance(target, int) else torch.device(target)
    left = getattr(hooks[-1], "skip_keys", None) or ()

    def moved(value: Any) -> Any:
        return replace(value, device=device) if isinstance(value, TensorInfo) else value

    names = (left,) if isinstance(left, str) else left
    return Call(tuple(map(moved, call.args)), {k: v if k in names else moved(v) for k, v in call.kwargs.items()})


def carry_hooks(original: nn.Module, built: nn.Module) -> None:
    """Give ``built`` the hook of the module it replaces, which keeps its own.

    The hook moves arguments and results only: prepared weights are where they belong, and what it knew of the
    original's weights (an offload map, tied pointers) does not hold for them.
    """
    hook = getattr(original, "_hf_hook", None)
    if hook is None or "_old_forward" not in vars(original):
        return
    hook = copy.copy(hook)
    if hasattr(hook, "hooks"):
        hook.hooks = [copy.copy(one) for one in hook.hooks]
    for one in _each(hook):
        for name, value in (("offload", False), ("weights_map", None), ("tied_params_map", None)):
            if hasattr(one, name):
                setattr(one, name, value)
    built.__dict__["_old_forward"] = built.forward
    built.__dict__["_hf_hook"] = hook
    built.__dict__["forward"] = functools.partial(_hooked_forward, built)


def _hooked_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
    return module._hf_hook.post_forward(module, module._old_forward(*args, **kwargs))


def offload_hook(module: nn.Module) -> str | None:
    """The name of the accelerate hook that offloads weights of ``module``, or None."""
    for part in module.modules():
        for one in _each(getattr(part, "_hf_hook", None)):
            if getattr(one, "offload", False):
                return type(one).__name__
    return None


def _each(hook: Any) -> list[Any]:
    return list(getattr(hook, "hooks", None) or ([] if hook is None else [hook]))


# PEFT: a tuner layer stands in a module's place and holds it


def adapter_on(model: nn.Module, name: str) -> str:
    """How the module ``name``, one it holds, or one that holds it is adapted; "" if none is."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return ""
    parts = name.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts))]
    within = [f"{name}.{inner}".rstrip(".") for inner, _ in model.get_submodule(name).named_modules()]
    for path in (*around, *within):
        layer = model.get_submodule(path)
        if isinstance(layer, tuners.BaseTunerLayer):
            adapters = ", ".join(repr(a) for a in layer.active_adapters) or "none active"
            return f"{path} is a PEFT layer [{type(layer).__name__}] with the adapter {adapters}"
    return ""


def underlying(model: nn.Module) -> Any:
    """The model whose ``forward`` says what it takes: the base model of a PEFT model, else ``model`` itself."""
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


__all__ = ["adapter_on", "carry_hooks", "offload_hook", "on_execution_device", "underlying", "unhooked"]
