"""Backends by name: our own, and those that installed packages offer.

A package offers one through an entry point of the group ``mxfp4_compile.backends`` that names a ``Backend``
instance, a subclass, or a function that returns one. Entry points are read when a backend is first looked
up, never on import, and one that fails is remembered with its reason instead of stopping the rest.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .backend import Backend

ENTRY_POINTS = "mxfp4_compile.backends"

_BACKENDS: dict[str, Backend] = {}
_UNLISTED: dict[str, Backend] = {}
_FAILED: dict[str, str] = {}
_loaded = False


def register_backend(backend: Backend) -> None:
    """Make ``backend`` known under ``backend.name``; a name can be registered once."""
    if not isinstance(backend, Backend):
        raise TypeError(f"a backend must be a mxfp4_compile.ops.backend.Backend, got {type(backend).__name__}")
    if backend.name in _BACKENDS:
        raise ValueError(f"a backend named {backend.name!r} is registered already")
    _BACKENDS[backend.name] = backend


@contextmanager
def unlisted(backend: Backend) -> Iterator[None]:
    """Within the block ops that name ``backend`` find it; it is not offered to sites and not among the known ones."""
    if backend.name in _BACKENDS or backend.name in _UNLISTED:
        raise ValueError(f"a backend named {backend.name!r} is registered already")
    _UNLISTED[backend.name] = backend
    try:
        yield
    finally:
        del _UNLISTED[backend.name]


def known_backends() -> tuple[str, ...]:
    """Names of all registered backends."""
    _load_entry_points()
    return tuple(_BACKENDS)


def failed_backends() -> dict[str, str]:
    """Entry points that could not be loaded: name -> reason."""
    _load_entry_points()
    return dict(_FAILED)


def get_backend(name: str) -> Backend:
    """The backend registered as ``name``; ValueError lists the known ones."""
    backend = _BACKENDS.get(name) or _UNLISTED.get(name)
    if backend is None:
        _load_entry_points()
        backend = _BACKENDS.get(name)
    if backend is None:
        failed = f"; the installed one failed to load: {_FAILED[name]}" if name in _FAILED else ""
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(_BACKENDS)}{failed}")
    return backend


def _load_entry_points() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            register_backend(_instance(point.load()))
        except Exception as error:  # somebody else's package must not stop ours
            _FAILED[point.name] = f"{point.value}: {type(error).__name__}: {error}"


def _instance(found: Any) -> Backend:
    return found if isinstance(found, Backend) else found()  # type: ignore[no-any-return]
