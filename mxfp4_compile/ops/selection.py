"""Which backend serves a site: order per architecture as data, support by predicates with reasons."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..spec import MoEParams
from .backend import Requirement
from .registry import get_backend, known_backends

ENVIRONMENT_VARIABLE = "MXFP4_COMPILE_BACKEND"

# Best first. "reference" is last everywhere: it serves whatever has data.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
    "xpu": ("reference",),
    "mps": ("reference",),
}


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot serve a site; the message lists every unmet requirement."""


@dataclass(frozen=True)
class Choice:
    """The backend and layout of a site, and why the ones before it in the order were passed over."""

    backend: str
    layout: str
    rejected: tuple[tuple[str, tuple[Requirement, ...]], ...] = ()


def requested_backend(argument: str) -> str | None:
    """The backend asked for by keyword or environment; None for "auto". ValueError for an unknown name."""
    name = argument
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto"
    if name == "auto":
        return None
    get_backend(name)
    return name


def choose(params: MoEParams | None, device: torch.device, requested: str | None) -> Choice:
    """The backend for a site (``params`` None: a split site) on ``device``.

    Raises BackendUnavailable if ``requested`` cannot serve it, or if nothing can.
    """
    names = (requested,) if requested else ORDER.get(device.type, ("reference",))
    rejected: list[tuple[str, tuple[Requirement, ...]]] = []
    for name in names:
        if name not in known_backends():
            continue
        backend = get_backend(name)
        unmet = tuple(r for r in backend.supports(params, device) if not r.met)
        if not unmet:
            return Choice(name, backend.plan(params, device), tuple(rejected))
        rejected.append((name, unmet))
    lines = "; ".join(f"{name}: " + ", ".join(f"{r.name} ({r.reason})" for r in unmet) for name, unmet in rejected)
    what = f"backend {requested!r}" if requested else "no backend"
    raise BackendUnavailable(f"{what} cannot serve this site on {device}: {lines}")
