"""Backends by name."""

from __future__ import annotations

from .backend import Backend

_BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make ``backend`` known under ``backend.name``; a name can be registered once."""
    if backend.name in _BACKENDS:
        raise ValueError(f"a backend named {backend.name!r} is registered already")
    _BACKENDS[backend.name] = backend


def known_backends() -> tuple[str, ...]:
    """Names of all registered backends."""
    return tuple(_BACKENDS)


def get_backend(name: str) -> Backend:
    """The backend registered as ``name``; ValueError lists the known ones."""
    try:
        return _BACKENDS[name]
    except KeyError:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(_BACKENDS)}") from None
