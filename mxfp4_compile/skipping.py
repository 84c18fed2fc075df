"""What ``skip`` leaves alone: patterns against a site's names, the modules around it and the weights inside it.

Contract: a pattern (fnmatch) protects a site if it names the site, a module above it, or a module or parameter inside
it that holds experts' weights. One that names nothing in the model is an error under ``strict``, before anything else.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from .passes.find.discover import Candidate, packed_parameters
from .passes.weights import members


def as_patterns(skip: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns of an argument ``skip``: one string is one pattern. TypeError for anything but strings."""
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"skip takes module-name patterns, got {pattern!r} ({type(pattern).__name__})")
    return patterns


def unknown_patterns(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """For each pattern that names no module or parameter of the model, a message with the names nearest to it."""
    names = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
    names += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    out = []
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.6)
            hint = f"; near it: {', '.join(near)}" if near else ""
            out.append(f"skip pattern {pattern!r} names nothing in this model{hint}")
    return out


def protects(pattern: str, candidate: Candidate, sources: Sequence[str] | None = None) -> bool:
    """Whether a pattern leaves a candidate alone.

    ``sources``: its experts' parameters as far as they are known, None before a forward has shown what a list is.
    """
    return any(fnmatch.fnmatch(name, pattern) for name in _names(candidate, sources))


def _names(candidate: Candidate, sources: Sequence[str] | None) -> Iterator[str]:
    inside = set() if candidate.listed is not None and sources is None else set(_inside(candidate))
    for source in sources or ():
        for member in members(candidate.module, source):
            inside |= set(_above(member))
    for name in candidate.names:
        yield from _above(name)
        yield from (f"{name}.{part}" for part in inside)


def _inside(candidate: Candidate) -> Iterator[str]:
    if candidate.kind == "packed":
        yield from packed_parameters(candidate.module)
    if candidate.listed is not None:
        inside = set(candidate.listed.modules())
        for name, module in candidate.module.named_modules():
            if name and module in inside:
                yield name


def _above(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


__all__ = ["as_patterns", "protects", "unknown_patterns"]
