"""The circumstances in which models are run, traced and changed here: one at a time, in plain modes, state put back.

Contract: whatever the caller's thread has switched on (autocast, inference mode) and whatever other threads do, what
is inside ``working_on`` sees neither; when it is left, by an exception too, no module of the model has an attribute or
buffer that a forward inside put there, and none holds a fake tensor.

::

    optimize ------+                                    +-- trace, match, verify
    load, convert -+-> one lock -> plain modes -> state +
    explain -------+   (torch's lock of compilation,    +-- other threads' calls of the model wait
    restore -------+    then ours; re-entrant)
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_P = ParamSpec("_P")
_T = TypeVar("_T")

# one at a time

_lock = threading.RLock()


@contextmanager
def exclusively() -> Iterator[None]:
    """Hold the one lock of what exports, captures or patches global state; other threads wait. Re-entrant.

    torch's lock of compilation comes first: a thread that compiles holds it when it calls our backend.
    """
    from torch._dynamo import convert_frame

    with convert_frame.compile_lock, _lock:
        yield


def exclusive(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function that runs ``exclusively`` and in ``plain_modes``."""

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with exclusively(), plain_modes():
            return function(*args, **kwargs)

    return alone


@contextmanager
def others_wait(model: nn.Module) -> Iterator[None]:
    """Calls of ``model`` from other threads, ``generate``'s too, wait until this is left."""
    owner = threading.get_ident()

    def wait(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != owner:
            with _lock:
                pass

    with exclusively():
        handle = model.register_forward_pre_hook(wait, prepend=True)
        try:
            yield
        finally:
            handle.remove()


# plain modes


@contextmanager
def plain_modes() -> Iterator[None]:
    """Without autocast of any device and outside of inference mode, whose tensors could not be written to later."""
    with ExitStack() as stack:
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


# state between calls


@dataclass(frozen=True)
class StateChange:
    """An attribute or buffer that a forward set: the module's name, and the attribute's."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


_OWN = frozenset(vars(nn.Module())) | {"_hf_hook", "_old_forward", "forward"}


class State:
    """What the modules of a model hold between calls: plain attributes and buffers; which of them changed since."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(name, module, _Kept(module)) for name, module in model.named_modules()]

    def put_back(self) -> list[StateChange]:
        """Put back what changed; what that was, in the model's order."""
        return [StateChange(name, a) for name, module, kept in self._modules for a in kept.put_back(module)]


@contextmanager
def kept_state(model: nn.Module) -> Iterator[list[StateChange]]:
    """Put back what forwards inside change of a model's state, and say what that was."""
    state, changes = State(model), list[StateChange]()
    try:
        yield changes
    finally:
        changes += state.put_back()


class _Kept:
    def __init__(self, module: nn.Module) -> None:
        self.attributes = {k: (v, _shallow(v)) for k, v in vars(module).items() if k not in _OWN}
        self.buffers = {k: (b, _version(b), _copy(b)) for k, b in module._buffers.items()}
        self.parameters = dict(module._parameters)

    def put_back(self, module: nn.Module) -> list[str]:
        found = []
        now = vars(module)
        for name in [k for k in now if k not in _OWN and k not in self.attributes]:
            del now[name]
            found.append(name)
        for name, (value, inside) in self.attributes.items():
            if name not in now or now[name] is not value or not _same(_shallow(value), inside):
                _refill(value, inside)
                if name not in now or not _plainly_equal(now[name], value):
                    found.append(name)
                now[name] = value
        for name in [k for k in module._buffers if k not in self.buffers]:
            del module._buffers[name]
            found.append(name)
        for name, (buffer, version, values) in self.buffers.items():
            current = module._buffers.get(name)
            if current is buffer and _version(buffer) == version:
                continue
            if buffer is not None and _version(buffer) != version and values is not None:
                with torch.no_grad():
                    buffer.copy_(values)
            module._buffers[name] = buffer
            found.append(name)
        for name, parameter in self.parameters.items():
            if _is_fake(module._parameters.get(name)) and not _is_fake(parameter):
                module._parameters[name] = parameter
                found.append(name)
        return found


def constants_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module that its forward reads, by their names in its code and the methods it calls.

    A traced graph holds their values: later changes have no effect in it.
    """
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        found: Any = getattr(type(module), name, None)
        found = getattr(found, "fget", found)  # a property
        found = getattr(found, "__wrapped__", found)
        code = getattr(found, "__code__", None)
        if isinstance(code, types.CodeType):
            codes = (code, *(c for c in code.co_consts if isinstance(c, types.CodeType)))
            names = {n for one in codes for n in one.co_names}
            waiting += names - seen
            seen |= names
    plain = (bool, int, float, str, tuple, type(None))
    return {k: v for k, v in vars(module).items() if k in seen and k not in _OWN and isinstance(v, plain)}


# Larger buffers (a table of a whole vocabulary) are compared, not copied.
_COPIED_BYTES = 1 << 20


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _copy(buffer: Tensor | None) -> Tensor | None:
    if buffer is None or buffer.device.type == "meta" or buffer.numel() * buffer.element_size() > _COPIED_BYTES:
        return None
    return buffer.detach().clone()


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor) or isinstance(getattr(value, "data", None), FakeTensor)


def _shallow(value: Any) -> Any:
    """What a container or tensor holds now, to be compared with what it holds later."""
    if type(value) is list:
        return list(value)
    if type(value) is dict:
        return dict(value)
    if type(value) is set:
        return set(value)
    return _version(value) if isinstance(value, Tensor) else None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    return bool(a == b)


def _plainly_equal(a: Any, b: Any) -> bool:
    """Whether a value was set to what it was."""
    return isinstance(a, (bool, int, float, str, type(None))) and type(a) is type(b) and a == b


def _refill(value: Any, inside: Any) -> None:
    if type(value) is list:
        value[:] = inside
    elif type(value) in (dict, set):
        value.clear()
        value.update(inside)


def random_state(device: torch.device) -> Tensor:
    """Of the generator that draws on ``device``, a tensor on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Put back what ``random_state`` gave."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


__all__ = [
    "State",
    "StateChange",
    "constants_of",
    "exclusive",
    "exclusively",
    "kept_state",
    "others_wait",
    "plain_modes",
    "random_state",
    "set_random_state",
]
