"""Imports go one way: between rooms as docs/architecture.md draws them, and without a circle inside of rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mxfp4_compile"

# From the bottom up. A module may import modules of its own room and of those before it.
ROOMS = (
    "registration", "text", "__init__", "activations", "spec", "mx", "buffers", "progress", "timing",
    "circumstances", "processes", "hf_models", "report", "ops",
    "passes", "passes.trace", "passes.find", "passes.match", "passes.build",
    "adapters",
    "skipping", "planning", "ranks", "installing", "calibration", "runtime", "dynamo", "lifecycle", "pipeline",
    "checkpoint", "inspection", "tools", "__main__",
)  # fmt: skip
# Circles that are known, to be taken out.
KNOWN_CIRCLES = [{"mxfp4_compile.ops.backends.triton.select", "mxfp4_compile.ops.backends.triton.tuned"}]


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    files = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def room(module: str) -> str:
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    inner = ".".join(parts[:2])
    return inner if inner in ROOMS else parts[0]


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports, inside functions too; not what is there for the type checker alone."""
    package = path.relative_to(ROOT).parts[:-1]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        pending += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{a.name}" if f"{stem}.{a.name}" in known else stem for a in node.names]
        yield from (name for name in names if name in known)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> the others of ours that it imports, but for the package itself, which has the version."""
    known = modules()
    return {module: set(imports(path, known)) - {module, "mxfp4_compile"} for module, path in known.items()}


@pytest.mark.smoke
def test_between_rooms(graph: dict[str, set[str]]) -> None:
    for module in graph:
        assert room(module) in ROOMS, f"{module}: give its room a place, here and in docs/architecture.md"
    for module, others in graph.items():
        for other in others:
            assert ROOMS.index(room(other)) <= ROOMS.index(room(module)), f"{module} imports {other}"


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected sets of two and more."""
    reach = {start: {start} for start in graph}
    changed = True
    while changed:
        changed = False
        for start, seen in reach.items():
            more = seen.union(*(graph[name] for name in seen))
            if more != seen:
                reach[start], changed = more, True
    together = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph}
    return [set(found) for found in together if len(found) > 1]


def test_no_circles_inside_rooms(graph: dict[str, set[str]]) -> None:
    assert [found for found in circles(graph) if found not in KNOWN_CIRCLES] == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [{"a", "b", "c"}]
