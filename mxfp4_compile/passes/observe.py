"""Who wants to see graphs as they pass: ``mxfp4_compile.inspect`` does, nobody else by default."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

Observer = Callable[[str, fx.Graph], None]
observers: list[Observer] = []


def observe(stage: str, graph: fx.Graph) -> None:
    """Show ``graph`` to every observer; ``stage`` says what it is."""
    for observer in observers:
        observer(stage, graph)


__all__ = ["Observer", "observe", "observers"]
