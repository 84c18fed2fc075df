"""Which backend serves a site: order per architecture as data, support by predicates with reasons.

What decides, strongest first: ``optimize(backend=...)``, the environment variable MXFP4_COMPILE_BACKEND,
the older VLLM_MXFP4_USE_MARLIN (1: Marlin-class kernels first, 0: never), the order of the architecture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from ..spec import MoEParams
from . import platforms
from .backend import Requirement
from .registry import failed_backends, get_backend, known_backends
from .target import Request, Target

ENVIRONMENT_VARIABLE = "MXFP4_COMPILE_BACKEND"
MARLIN_VARIABLE = "VLLM_MXFP4_USE_MARLIN"

# Weight-only kernels of Marlin's kind: what VLLM_MXFP4_USE_MARLIN is about.
MARLIN_CLASS = ("marlin", "humming")


@dataclass(frozen=True)
class Order:
    """Backends of an architecture, best first. ``measured``: from this project's benchmarks, else by repute."""

    backends: tuple[str, ...]
    measured: bool
    source: str


_VLLM = "vLLM 0.33's order, the native kernels where it has nothing better that installs alone; not measured here"

# "reference" is last everywhere: it serves whatever has data.
ORDER: dict[str, Order] = {
    "cpu": Order(("cpu", "reference"), True, "the only ones that run there"),
    "sm_75": Order(("reference",), False, "no MXFP4 kernel begins below sm_80"),
    "sm_80": Order(("marlin", "humming", "triton", "triton_kernels", "reference"), False, _VLLM),
    "sm_86": Order(("marlin", "humming", "triton", "triton_kernels", "reference"), False, _VLLM),
    "sm_89": Order(("marlin", "humming", "triton", "triton_kernels", "reference"), False, _VLLM),
    "sm_90": Order(
        ("triton", "humming", "triton_kernels", "flashinfer_cutlass", "marlin", "reference"),
        True,
        "the first on an H200 (benchmarks/results); humming ahead of triton_kernels by 8% in the geometric mean of "
        "15 points on an H100; the rest by repute",
    ),
    "sm_100": Order(("flashinfer_trtllm", "triton_kernels", "triton", "marlin", "humming", "reference"), False, _VLLM),
    "sm_103": Order(("flashinfer_trtllm", "triton_kernels", "triton", "marlin", "humming", "reference"), False, _VLLM),
    "sm_120": Order(("marlin", "humming", "triton_kernels", "triton", "reference"), False, _VLLM),
    "gfx942": Order(("aiter", "triton_kernels", "triton", "reference"), False, _VLLM),
    "gfx950": Order(("aiter", "triton_kernels", "triton", "reference"), False, _VLLM),
    "xpu": Order(("reference",), False, "nothing else runs there"),
    "mps": Order(("reference",), False, "nothing else runs there"),
    "meta": Order(("reference",), False, "nothing runs there"),
}


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot serve a site; the message lists every unmet requirement."""


@dataclass(frozen=True)
class Choice:
    """The backend and layout of a site, and why the ones before it in the order were passed over.

    ``notes``: what a user should know about the choice: a better backend that is merely not installed, an
    environment variable that had a say.
    """

    backend: str
    layout: str
    rejected: tuple[tuple[str, tuple[Requirement, ...]], ...] = ()
    notes: tuple[str, ...] = ()


def order_of(target: Target) -> tuple[str, Order]:
    """The architecture whose order applies, and the order: the nearest one below where the own is not known."""
    if target.arch in ORDER:
        return target.arch, ORDER[target.arch]
    if target.sm is not None:
        below = [int(a[3:]) for a in ORDER if a.startswith("sm_") and int(a[3:]) <= target.sm]
        name = f"sm_{max(below, default=75)}"
        return name, ORDER[name]
    if target.rocm:
        return "gfx942", ORDER["gfx942"]
    return "meta", ORDER["meta"]


def candidates(target: Target) -> tuple[str, ...]:
    """The backends that "auto" tries for ``target``, best first, after VLLM_MXFP4_USE_MARLIN had its say.

    Backends of other packages come before the last of ours, "reference".
    """
    names = [n for n in order_of(target)[1].backends if n in known_backends()]
    ours = {n for order in ORDER.values() for n in order.backends}
    names[-1:-1] = [n for n in known_backends() if n not in ours and getattr(get_backend(n), "automatic", False)]
    marlin = _marlin()
    if marlin is True:
        names = [n for n in MARLIN_CLASS if n in known_backends()] + [n for n in names if n not in MARLIN_CLASS]
    elif marlin is False:
        names = [n for n in names if n not in MARLIN_CLASS]
    return tuple(names)


def _marlin() -> bool | None:
    value = os.environ.get(MARLIN_VARIABLE, "").strip().lower()
    if not value:
        return None
    if value in ("1", "true"):
        return True
    if value in ("0", "false"):
        return False
    raise ValueError(f"{MARLIN_VARIABLE}={value!r}: must be 0 or 1")


def requested_backend(argument: str) -> str | None:
    """The backend asked for by keyword or environment; None for "auto". ValueError for an unknown name."""
    name = argument
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto"
    if name == "auto":
        return None
    get_backend(name)
    return name


def requirements(name: str, request: Request, target: Target) -> tuple[Requirement, ...]:
    """What backend ``name`` needs for ``request`` on ``target``; a predicate that raises is one that is not met."""
    try:
        return tuple(get_backend(name).supports(request, target))
    except Exception as error:  # a library in a state nobody foresaw must not stop the others
        return (Requirement("supports", False, f"asking it failed: {type(error).__name__}: {error}"),)


def choose(
    params: MoEParams | None,
    device: torch.device | Target,
    requested: str | None,
    request: Request | None = None,
    excluded: dict[str, str] | None = None,
) -> Choice:
    """The backend for a site (``params`` None: a split site) on ``device``.

    ``request`` says more than ``params``. ``excluded``: backends that failed in a run, with the reason; only
    "auto" passes them over. Raises BackendUnavailable if ``requested`` cannot serve it, or if nothing can.
    """
    target = device if isinstance(device, Target) else Target.of(device)
    request = replace(request or Request(params), named=requested is not None)
    excluded = excluded or {}
    names = (requested,) if requested else candidates(target)
    notes = []
    if requested is None and _marlin() is not None:
        notes.append(f"{MARLIN_VARIABLE}={os.environ[MARLIN_VARIABLE]} had a say in the choice of backends")
    notes += [f"the backend {name} of another package could not be loaded: {why}" for name, why in _failed()]
    rejected: list[tuple[str, tuple[Requirement, ...]]] = []
    for name in names:
        found = requirements(name, request, target)
        if name in excluded:
            found = (*found, Requirement("runs", False, excluded[name]))
        unmet = tuple(r for r in found if not r.met)
        if not unmet:
            try:
                layout = get_backend(name).plan(request, target)
            except Exception as error:  # an import that raises, at its first use
                unmet = (Requirement("import", False, f"{type(error).__name__}: {error}"),)
            else:
                notes += _better(rejected, name, target)
                if requested is None:
                    lacks = "; ".join(f"{n}: {', '.join(map(str, unmet))}" for n, unmet in rejected)
                    notes += filter(None, [platforms.note_of_choice(name, target, lacks)])
                return Choice(name, layout, tuple(rejected), tuple(notes))
        rejected.append((name, unmet))
    lines = "; ".join(f"{name}: " + ", ".join(map(str, unmet)) for name, unmet in rejected)
    what, can = (f"backend {requested!r}", "cannot") if requested else ("no backend", "can")
    install = " ".join(dict.fromkeys(f"Install: {r.install}." for _, unmet in rejected for r in unmet if r.install))
    message = f"{what} {can} serve this site on {target}: {lines}"
    raise BackendUnavailable(f"{message}. {install}" if install else message)


def _failed() -> list[tuple[str, str]]:
    return list(failed_backends().items())


def _better(rejected: list[tuple[str, tuple[Requirement, ...]]], chosen: str, target: Target) -> list[str]:
    """Backends before ``chosen`` that lack nothing but an installation."""
    arch, order = order_of(target)
    basis = "measured" if order.measured else "not measured by this project"
    return [
        f"backend {name} comes before {chosen} on {arch} ({basis}) and is only not installed: "
        + "; ".join(dict.fromkeys(r.install for r in unmet))
        for name, unmet in rejected
        if all(r.install for r in unmet)
    ]


__all__ = ["ORDER", "BackendUnavailable", "Choice", "Order", "candidates", "choose", "order_of", "requested_backend"]
