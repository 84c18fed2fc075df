"""Traces and matches that are made once a process, for tests that are about something else.

Two experts modules of one class, code, shapes, plain attributes and configuration, called alike, trace to one graph:
`same.structure_key` says so of the layers of a model, and this of tiny models made anew by one test after another.
Only modules of transformers are remembered: a test's own may be changed in ways that no key shows.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from mxfp4_compile import planning
from mxfp4_compile.passes import same
from mxfp4_compile.passes.trace.traced import CallPattern, Traced

_graphs: dict[Any, Traced] = {}
_matches: dict[int, Any] = {}  # by the graph's id; _graphs keeps it alive
_KEPT = 200


def _key(module: nn.Module, pattern: CallPattern) -> Any:
    config = getattr(module, "config", None)
    said = None if config is None else (config.to_json_string(), getattr(config, "_experts_implementation", None))
    structure = tuple(
        (name, cls, tuple(a for a in plain if a[0] != "config"), tensors)
        for name, cls, plain, tensors in same.structure_key(module)
    )
    return structure, said, pattern


@pytest.fixture
def remembered_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and match every experts module once a process."""
    trace, match = planning.trace, planning.match

    def remembered_trace(module: nn.Module, pattern: CallPattern) -> Traced:
        if not type(module).__module__.startswith("transformers."):
            return trace(module, pattern)
        key = _key(module, pattern)
        if key not in _graphs:
            if len(_graphs) >= _KEPT:
                _graphs.clear(), _matches.clear()
            _graphs[key] = trace(module, pattern)
        return _graphs[key]

    def remembered_match(traced: Traced) -> Any:
        if not any(traced is graph for graph in _graphs.values()):
            return match(traced)
        if id(traced) not in _matches:
            _matches[id(traced)] = match(traced)
        return _matches[id(traced)]

    monkeypatch.setattr(planning, "trace", remembered_trace)
    monkeypatch.setattr(planning, "match", remembered_match)
