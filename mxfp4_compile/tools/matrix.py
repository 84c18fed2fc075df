"""The matrix of backends: for each site and architecture what each backend would need, and what would be chosen.

Works for an architecture that is not there: only packages are looked for on this machine. Data only;
``commands/backends.py`` prints it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .. import planning
from ..circumstances import exclusively, kept_state, plain_modes
from ..ops.backend import Requirement
from ..ops.registry import failed_backends, known_backends
from ..ops.selection import BackendUnavailable, candidates, choose, order_of, requested_backend, requirements
from ..ops.target import Request, Target
from ..passes.find.discover import find_candidates, traceable_experts
from ..report import Report


@dataclass(frozen=True)
class Cell:
    """One backend for one site. ``requirements`` are all of them, met or not."""

    backend: str
    requirements: tuple[Requirement, ...]

    @property
    def usable(self) -> bool:
        """Whether it could serve the site here and now."""
        return all(r.met for r in self.requirements)

    @property
    def available(self) -> bool:
        """Whether it is installed: nothing that an installation would bring is missing."""
        return all(r.met or not r.install for r in self.requirements)

    @property
    def unmet(self) -> tuple[Requirement, ...]:
        """What is missing."""
        return tuple(r for r in self.requirements if not r.met)


@dataclass(frozen=True)
class Row:
    """One kind of site: its names, its spec in words, every backend, and the choice (or why there is none)."""

    names: tuple[str, ...]
    form: str
    cells: tuple[Cell, ...]
    chosen: str
    layout: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """All sites on one architecture. ``order``: the backends "auto" tries, best first."""

    target: str
    order: tuple[str, ...]
    order_of: str
    measured: bool
    source: str
    rows: tuple[Row, ...]
    failed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        for row, source in zip(data["rows"], self.rows, strict=True):
            for cell, of in zip(row["cells"], source.cells, strict=True):
                cell |= {"usable": of.usable, "available": of.available}
        return data


def matrix(target: Target, model: nn.Module | None = None, example_inputs: Any = None) -> Matrix:
    """The matrix for ``target``: of a model's sites, or of availability alone where there is none.

    Raises OptimizeError for a model that optimize() refuses, or that has no mixture of experts.
    """
    arch, order = order_of(target)
    rows = (
        (_row(("any site",), "availability alone", Request(), target),)
        if model is None
        else tuple(_rows(model, example_inputs, target))
    )
    return Matrix(str(target), candidates(target), arch, order.measured, order.source, rows, failed_backends())


def here() -> Target:
    """The first GPU, or the CPU."""
    return Target.of(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def _rows(model: nn.Module, example_inputs: Any, target: Target) -> list[Row]:
    sites = [planning.Site(candidate) for candidate in find_candidates(model)]
    planning.check_model(model, [site.candidate for site in sites])
    with exclusively(), plain_modes(), kept_state(model), traceable_experts(model):
        # Matching says what a site is, which does not depend on where it would run.
        planning.match_all(model, sites, example_inputs, None)
    groups: dict[Any, tuple[list[str], planning.Structure]] = {}
    for site in sites:
        if site.structure is not None:
            names, _ = groups.setdefault(id(site.structure), ([], site.structure))
            names += site.candidate.names
    if not groups:
        planning.check_matches(sites, Report("", "", 0, False), strict=True)
    return [_row(tuple(names), str(s.found.spec), s.request, target) for names, s in groups.values()]


def _row(names: tuple[str, ...], form: str, request: Request, target: Target) -> Row:
    tried = candidates(target)
    listed = [*tried, *[n for n in known_backends() if n not in tried]]
    cells = tuple(Cell(name, requirements(name, request, target)) for name in listed)
    try:
        choice = choose(request.params, target, requested_backend("auto"), request)
    except BackendUnavailable as error:
        return Row(names, form, cells, "", "", (str(error),))
    return Row(names, form, cells, choice.backend, choice.layout, choice.notes)


__all__ = ["Cell", "Matrix", "Row", "here", "matrix"]
