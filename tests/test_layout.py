"""The layout of the repository and the direction of imports."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mxfp4_compile"
LINKS = ("ops", "passes")

# A room may import rooms of a lower floor, and its own. With or without a floor, no two rooms import each other.
FLOORS = {
    "activations": 0,
    "mx": 0,
    "timing": 0,
    "hf_models": 0,
    "circumstances": 0,
    "processes": 0,
    "registration": 0,
    "spec": 1,
    "ops": 2,
    "report": 2,
    "passes": 3,
    "planning": 4,
    "ranks": 5,
    "installing": 6,
    "runtime": 6,
    "dynamo": 7,
    "lifecycle": 8,
    "inspection": 8,
    "pipeline": 9,
    "checkpoint": 10,
    "tools": 11,
}
# Where the command line starts, and the front door: whoever imports that takes its version.
OUTSIDE = {"__init__", "__main__"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            names |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return names


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "mxfp4_compile" and len(parts) > 1 else None


@pytest.mark.parametrize("name", LINKS)
def test_links_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / name


def test_nothing_imports_through_the_links() -> None:
    files = modules() + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))
    for path in files:
        through = {n for n in imported(path) if n.split(".")[0] in LINKS}
        assert not through, f"{path}: {through}"
    code = (
        "import sys, mxfp4_compile, mxfp4_compile.tools.families\n"
        "bad = [n for n, m in sys.modules.items() if n.split('.')[0] in ('ops', 'passes')]\n"
        "assert not bad, bad\n"
        f"links = [{str(ROOT / 'ops')!r}, {str(ROOT / 'passes')!r}]\n"
        "for m in list(sys.modules.values()):\n"
        "    f = getattr(m, '__file__', None) or ''\n"
        "    assert not any(f.startswith(link + '/') for link in links), f\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.smoke
def test_imports_go_one_way() -> None:
    for path in modules():
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(path) if own in FLOORS else ():
            other = room(name)
            if other in FLOORS and other != own:
                assert FLOORS[other] < FLOORS[own], f"{path.relative_to(PACKAGE)} imports {name}"


def imported_files() -> dict[str, set[str]]:
    """Module -> the modules of ours that its file imports, inside functions too."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in modules()}
    found: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        package = path.relative_to(ROOT).with_suffix("").parts[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                stem = ".".join([*base, *([node.module] if node.module else [])])
                inner = [f"{stem}.{alias.name}" for alias in node.names]
                found[name] |= {n if n in paths else stem for n in inner}
        found[name] &= paths.keys() - {"mxfp4_compile"}
    return found


def circles(imports: dict[str, set[str]]) -> list[str]:
    """What is left without what imports nothing that is left, and without what nothing that is left imports."""
    size = 0
    while len(imports) != size:
        size = len(imports)
        named = set().union(*imports.values())
        imports = {name: others & imports.keys() for name, others in imports.items() if others and name in named}
    return sorted(imports)


@pytest.mark.smoke
def test_no_two_files_import_each_other() -> None:
    assert not circles(imported_files())


@pytest.mark.smoke
@pytest.mark.parametrize("place", ["mxfp4_compile", "mxfp4_compile.passes"])
def test_no_two_rooms_import_each_other(place: str) -> None:
    """A room is a folder of ``place``, or a file in it."""
    rooms: dict[str, set[str]] = {}
    depth = place.count(".") + 1
    for name, others in imported_files().items():
        if name.startswith(f"{place}.") and name.split(".")[depth] not in OUTSIDE:
            own = name.split(".")[depth]
            inside = {n.split(".")[depth] for n in others if n.startswith(f"{place}.")}
            rooms.setdefault(own, set()).update(inside - {own})
    assert len(rooms) > 5
    assert not circles(rooms)


@pytest.mark.smoke
def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, mxfp4_compile\n"
        "heavy = {'transformers', 'triton_kernels', 'flashinfer', 'humming', 'vllm', 'aiter', 'depyf', 'matplotlib'}\n"
        "assert not heavy & {n.split('.')[0] for n in sys.modules}, heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert tops <= {"mxfp4_compile", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    wanted = ["py.typed", "passes/match/match.py", "passes/match/forms/grouped_mm.py"]
    wanted += ["ops/schema.py", "ops/backends/triton/__init__.py"]
    wanted += ["demo_model/model.safetensors", "demo_model/config.json", "demo_model/heldout.txt"]
    for name in wanted:
        assert f"mxfp4_compile/{name}" in names
    assert not any("__pycache__" in n or n.startswith("mxfp4_compile/ops/ops") for n in names)


def test_no_test_lies_in_the_package() -> None:
    """pytest would find it through a link a second time."""
    assert not list(PACKAGE.rglob("test_*.py"))


@pytest.mark.smoke
def test_tools_skip_the_links() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name in LINKS:
        assert f'"{name}/**"' in text.split("extend-exclude")[1].splitlines()[0]
        assert f'"^{name}/"' in text
