"""Make transformers know our quantizer and our ``save_pretrained`` as soon as it is there, without importing it.

A plain ``from_pretrained`` of a saved model needs nothing but ``import mxfp4_compile``, in whatever order the two
packages are imported; and whoever never uses transformers never pays for it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from .files import CheckpointError


def _quantizer(module: ModuleType) -> None:
    importlib.import_module(f"{__package__}.loading")


def _save_pretrained(module: ModuleType) -> None:
    importlib.import_module(f"{__package__}.writing").wrap_save_pretrained(module)


# What is done once a module of transformers is imported. Each importing the other, neither can be done at the other's.
_AFTER = {"transformers.quantizers.auto": _quantizer, "transformers.modeling_utils": _save_pretrained}


class _Loader(importlib.abc.Loader):
    """The module's own loader, and our part after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _AFTER[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the import of some modules, each once."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.names:
            return None
        self.names.remove(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register() -> None:
    """Do each part now if its module is imported, else when it is."""
    later = set()
    for name, part in _AFTER.items():
        module = sys.modules.get(name)
        if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
            later.add(name)
        else:
            part(module)
    if later:
        sys.meta_path.insert(0, _Finder(later))


def require_transformers_5(what: str) -> None:
    """CheckpointError where transformers cannot say which tensors of a checkpoint make up which parameters."""
    if importlib.util.find_spec("transformers.core_model_loading") is None:
        version = importlib.import_module("transformers").__version__
        raise CheckpointError(
            f"{what} needs transformers 5 (5.17 or later was tested), which says how checkpoints become parameters; "
            f"this is {version}. With it optimize(), restore() and generate() work in memory, and the state_dict of an "
            "optimized model can be saved and loaded"
        )
