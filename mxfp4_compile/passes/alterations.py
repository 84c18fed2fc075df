"""What changes a module's values from outside its class: hooks, parametrizations, a forward of the instance's own.

A rewritten module keeps the hooks of the module itself, and none of those inside it. What these observe is lost, which
a note says; what they change is found by verification, whose original has them, and is named in the refusal. A trace is
made without hooks: they would become a part of the graph.

Contract: modules are read; ``without_hooks`` puts back what it took away.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def parametrized(model: nn.Module, name: str) -> str:
    """What is computed anew at each use among the weights of the module ``name`` or around it, "" if nothing is.

    The name may be that of a list of parametrizations itself, which holds the weights proper.
    """
    name = name.partition(".parametrizations.")[0]
    for inner, part in model.get_submodule(name).named_modules():
        if parametrize.is_parametrized(part):
            for weight, chain in part.parametrizations.items():  # type: ignore[union-attr,operator]
                kinds = ", ".join(type(step).__name__ for step in chain)
                path = ".".join(filter(None, (name, inner, weight)))
                return (
                    f"{path} is parametrized ({kinds}): it is computed anew at each use, which MXFP4 weights are not; "
                    f"torch.nn.utils.parametrize.remove_parametrizations(module, {weight!r}) keeps its present value"
                )
    return ""


def hooks_of(module: nn.Module) -> list[str]:
    """The forward hooks of a module and of what it holds, as ``path: function``."""
    found = []
    for path, part in module.named_modules():
        for kind in _HOOKS:
            found += [f"{path or 'itself'}: {_called(hook)}" for hook in getattr(part, kind).values()]
    return found


def copy_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give ``other`` the forward hooks of ``module`` itself, in place of its own."""
    for name in (*_HOOKS, *_FLAGS):
        setattr(other, name, copy.copy(getattr(module, name)))


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy without the hooks of the module itself, which a rewritten one keeps: what is verified is the module.

    ``memo``: as for ``copy.deepcopy``, what is not to be copied. Nor is its configuration: the caller decides which
    implementation of experts that names.
    """
    config = getattr(module, "config", None)
    if config is not None:
        memo[id(config)] = config
    twin = copy.deepcopy(module, memo)
    for name in _HOOKS:
        getattr(twin, name).clear()
    return twin


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside the block a module and what it holds run without their forward hooks."""
    kept = [(part, name, getattr(part, name)) for part in module.modules() for name in (*_HOOKS, *_FLAGS)]
    for part, name, hooks in kept:
        setattr(part, name, type(hooks)())
    try:
        yield
    finally:
        for part, name, hooks in kept:
            setattr(part, name, hooks)


def own_forwards(module: nn.Module) -> list[str]:
    """The forwards that were set on instances instead of classes, as ``path: function``; accelerate's are left out."""
    return [
        f"{path or 'itself'}: {_called(vars(part)['forward'])}"
        for path, part in module.named_modules()
        if "forward" in vars(part) and "_hf_hook" not in vars(part)
    ]


def _called(function: Any) -> str:
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


__all__ = ["copied", "copy_hooks", "hooks_of", "own_forwards", "parametrized", "without_hooks"]
