"""What torch and transformers learn of this package, each as soon as it is imported, whichever came first.

``import mxfp4_compile`` imports neither. What has to be known without a further call is told here:

- after torch: the ops, so that an exported program with ``torch.ops.mxfp4.moe`` can be loaded;
- after Dynamo's table of backends: ``torch.compile(model, backend="mxfp4_compile")``. An installed package is found by
  its entry point as well; this holds for a checkout on ``sys.path`` too;
- after two modules of transformers: our quantizer, so that a plain ``from_pretrained`` reads a saved model, and
  ``save_pretrained`` and ``push_to_hub`` of optimized models;
- after PEFT's LoRA: adapters on rewritten experts.

A module that is there already is served at once. For the others one finder waits at the head of ``sys.meta_path``; it
takes itself away when all have come. The modules keep the loaders they had.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_PACKAGE = __name__.partition(".")[0]
# The rooms of ours that import torch only inside of functions, if at all.
_LIGHT = (f"{_PACKAGE}.tools", f"{_PACKAGE}.__main__")


def _ops() -> None:
    importlib.import_module(f"{_PACKAGE}.ops")


def _dynamo() -> None:
    registry: Any = sys.modules["torch._dynamo.backends.registry"]
    if _PACKAGE not in registry._COMPILER_FNS:
        registry.register_backend(compiler_fn=_compile, name=_PACKAGE)


def _compile(gm: Any, example_inputs: Sequence[Any], **arguments: Any) -> Callable[..., Any]:
    """``dynamo.backend.mxfp4_backend``, imported when the first graph comes."""
    backend: Any = importlib.import_module(f"{_PACKAGE}.dynamo.backend")
    compiled: Callable[..., Any] = backend.mxfp4_backend(gm, example_inputs, **arguments)
    return compiled


def _quantizer() -> None:
    importlib.import_module(f"{_PACKAGE}.checkpoint.quantizer")


def _save_and_load() -> None:
    modeling_utils = sys.modules["transformers.modeling_utils"]
    writing: Any = importlib.import_module(f"{_PACKAGE}.checkpoint.writing")
    writing.wrap_save_pretrained(modeling_utils)
    hub: Any = importlib.import_module(f"{_PACKAGE}.checkpoint.hub")
    hub.wrap_push_to_hub(modeling_utils)
    if hasattr(modeling_utils, "get_hf_quantizer"):
        loading: Any = importlib.import_module(f"{_PACKAGE}.checkpoint.loading")
        loading.wrap_get_hf_quantizer(modeling_utils)


def _peft() -> None:
    hooks: Any = importlib.import_module(f"{_PACKAGE}.adapters.hooks")
    hooks.install(sys.modules["peft.tuners.lora.model"].LoraModel)


# Our two modules for transformers import each other's triggers, so that neither can be done at the other's.
_AFTER: dict[str, Callable[[], None]] = {
    "torch": _ops,
    "torch._dynamo.backends.registry": _dynamo,
    "transformers.quantizers.auto": _quantizer,
    "transformers.modeling_utils": _save_and_load,
    "peft.tuners.lora.model": _peft,
}


def _trigger(name: str) -> str | None:
    """The entry of ``_AFTER`` that the import of a module stands for.

    Our own modules import torch at their top, and the ops need some of them complete: if one of them is the first
    to ask for torch, the ops are registered after it, not in its midst.
    """
    if name in _AFTER:
        return name
    own = name.startswith(f"{_PACKAGE}.") and not f"{name}.".startswith(tuple(f"{room}." for room in _LIGHT))
    return "torch" if own else None


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, and has ``waiting`` triggers served after the first import of each."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting
        self.asking: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        trigger = _trigger(name)
        # Asking for a spec need not be followed by an import (transformers looks for torch in this way), so that
        # nothing is crossed off here. Another finder may ask all finders in its turn, this one among them.
        if trigger not in self.waiting or name in self.asking:
            return None
        self.asking.add(name)
        try:
            others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
            spec = next(filter(None, (f.find_spec(name, path, target) for f in others)), None)
        finally:
            self.asking.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self, trigger)
        return spec

    def serve(self, trigger: str) -> None:
        """Do what waited for ``trigger``; a failure is a warning, for the other package was imported all the same."""
        try:
            _AFTER[trigger]()
        except Exception as error:
            warnings.warn(
                f"mxfp4_compile: {trigger} was imported, but could not be told of mxfp4_compile: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


class _Loader(importlib.abc.Loader):
    """A module's own loader, and our part after it."""

    def __init__(self, loader: Any, finder: _Finder, trigger: str) -> None:
        self.loader, self.finder, self.trigger = loader, finder, trigger

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        waiting = self.finder.waiting
        first = self.trigger in waiting
        waiting.discard(self.trigger)  # before: what the module imports itself is no second occasion
        try:
            self.loader.exec_module(module)
        except BaseException:
            if first:
                waiting.add(self.trigger)
            raise
        if first and self.trigger in sys.modules:
            self.finder.serve(self.trigger)
        elif first:  # a module of ours that does not need torch
            waiting.add(self.trigger)
        if not waiting and self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)


def register() -> None:
    """Do each part now if its module is imported, else when it is."""
    finder = _Finder(set(_AFTER))
    for trigger, part in _AFTER.items():
        module = sys.modules.get(trigger)
        # transformers may be importing us in the midst of its own modules; torch does so only at its end.
        unready = getattr(getattr(module, "__spec__", None), "_initializing", False) and trigger != "torch"
        if module is not None and not unready:
            finder.waiting.discard(trigger)
            part()
    if finder.waiting:
        sys.meta_path.insert(0, finder)
