"""When two modules are one: equal keys mean that they trace to the same graph, with other weights.

Contract: the module is read, never changed. What is compared: classes, the names and layouts of parameters and buffers
and which of them are one tensor, and every attribute by its value: containers, enums, dataclasses, partials, bound
methods, functions by code, defaults and closure, small tensors by content, modules inside by their names. Anything
else is compared by identity: one trace more is cheap, a wrong graph is not.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import weakref
from collections import deque
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..buffers import as_bytes

# Larger tensors among the attributes are compared by identity.
_READ = 1 << 20

_PLAIN = frozenset(
    (bool, int, float, complex, str, bytes, range, type(None), type(...), types.CodeType,
     torch.dtype, torch.device, torch.layout, torch.memory_format)
)  # fmt: skip
_OWN_STATE = frozenset(vars(nn.Module()))


def structure_key(module: nn.Module) -> tuple[Any, ...]:
    """A hashable key: (name, class, attributes, tensors) of the module and each module in it.

    It keeps alive what it compares by identity.
    """
    return _Key(module).of_module(module)


class Itself:
    """Equal to nothing but the same object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Key:
    def __init__(self, module: nn.Module) -> None:
        self.modules = {id(m): name for name, m in module.named_modules()}
        self.tensors: dict[int, str] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self.tensors.setdefault(id(tensor), name)
        self.met: dict[int, int] = {}  # containers by the order in which they are met: they may hold themselves
        self.kept: list[Any] = []  # what is made on the way keeps its id as long as the key is made

    def of_module(self, module: nn.Module) -> tuple[Any, ...]:
        """The key of a module and of what it holds."""
        parts = []
        for name, child in module.named_modules():
            own = [(a, v) for a, v in sorted(vars(child).items()) if a not in _OWN_STATE or isinstance(v, bool)]
            tensors = [
                (n, tuple(t.shape), t.dtype, t.device, t.stride(), self.tensors.get(id(t)))
                for n, t in (*child._parameters.items(), *child._buffers.items())
                if t is not None
            ]
            parts.append((name, type(child), tuple((a, self.of(v)) for a, v in own), tuple(tensors)))
        return tuple(parts)

    def of(self, value: Any) -> Hashable:
        """The key of a value."""
        kind = type(value)
        if kind in _PLAIN:
            return kind, repr(value) if kind in (float, complex) else value
        if id(value) in self.modules:
            return "module", self.modules[id(value)]
        if id(value) in self.met:
            return "again", self.met[id(value)]
        if isinstance(value, enum.Enum):
            return kind, value.name
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        try:
            parts = self._parts(value)
        except Exception:  # code of the object's own
            parts = None
        if parts is None:
            return Itself(value)
        self.met[id(value)] = len(self.met)
        self.kept.append(value)
        return kind, tuple(p if isinstance(p, Itself) else self.of(p) for p in parts)

    def _parts(self, value: Any) -> list[Any] | None:
        """What a value consists of; None for one that is only equal to itself."""
        kind = type(value)
        extra = [] if isinstance(value, type) else _state(value)
        if isinstance(value, (list, tuple, deque)):
            return [*value, *extra]
        if isinstance(value, (set, frozenset)):
            # In an order of their own, which equal sets share.
            return [*sorted(value, key=lambda v: (type(v).__name__, repr(v))), *extra]
        if isinstance(value, (dict, types.MappingProxyType)):
            return [part for item in value.items() for part in item] + extra
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords, *extra]
        if kind is types.MethodType:
            return [value.__func__, value.__self__]
        if kind is types.FunctionType:
            cells = [c.cell_contents if _full(c) else Itself(types.CellType) for c in value.__closure__ or ()]
            own = [value.__code__, Itself(value.__globals__), value.__defaults__, value.__kwdefaults__]
            return [*own, len(cells), *cells, *extra]
        if kind is slice:
            return [value.start, value.stop, value.step]
        if kind is weakref.ref:
            return [value()]
        if kind is types.SimpleNamespace:
            return extra
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            slots = [f.name for f in dataclasses.fields(value) if not extra or f.name not in extra[0]]
            return [*(object.__getattribute__(value, name) for name in slots), *extra]
        if kind.__module__ == "numpy" and hasattr(value, "tobytes") and not getattr(value.dtype, "hasobject", True):
            return [value.dtype.str, value.shape, value.tobytes()] if value.nbytes <= _READ else None
        return None

    def _of_tensor(self, tensor: Tensor) -> Hashable:
        if id(tensor) in self.tensors:
            return "tensor", self.tensors[id(tensor)]
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type == "meta" or tensor.numel() * tensor.element_size() > _READ:
            return Itself(tensor)
        return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), as_bytes(tensor)


def _state(value: Any) -> list[dict[str, Any]]:
    """The attributes of an object, past whatever its class does when they are read."""
    try:
        return [object.__getattribute__(value, "__dict__")]
    except AttributeError:
        return []


def _full(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


__all__ = ["Itself", "structure_key"]
