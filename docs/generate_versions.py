"""Which versions of torch, Triton and transformers were run, and where: writes docs/versions.md.

    python docs/generate_versions.py                     renders the page
    python docs/generate_versions.py --check             changes nothing; exits with 1 where the page is another
    python docs/generate_versions.py --run -m smoke      runs pytest with these arguments and keeps the outcome

Three sources, none written by hand: what ``.ci/run`` installs and runs, the versions in the files of
``benchmarks/results/``, and the runs that ``--run`` kept in ``docs/versions.json``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RUNS = ROOT / "docs" / "versions.md", ROOT / "docs" / "versions.json"
PACKAGES = ("torch", "triton", "transformers")
MEASURED = "## Measured"


def environments(script: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """The environments of ``.ci/run``: name, what is installed, what is run; in the order in which they are made."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    name, outer = "", ""
    for line in script.splitlines():
        text = line.strip().partition("  #")[0]
        if text.endswith("() {"):  # a function, which may have an environment of its own
            outer = name
        elif text == "}":
            name = outer
        elif text.startswith("fresh "):
            name = text.split()[1]
            found[name] = ([], [])
        elif text.startswith("pip install ") and name:
            words = [word.strip('"') for word in text.split()[2:]]
            found[name][0].extend(word for word in words if not word.startswith("-"))
        elif text.startswith(("pytest", "ruff", "mypy", "mkdocs", ".ci/", "python")) and name:
            found[name][1].append("`" + re.sub(r'( -d)? "\$.*', "", text) + "`")
        elif text.startswith("readme ") and name:
            found[name][1].append(f"README's line for the extra `{text.split()[1]}`")
    for name, (installed, run) in found.items():
        yield name, installed, run


def measured() -> dict[tuple[str, ...], list[str]]:
    """Versions in result files -> the files."""
    found: dict[tuple[str, ...], list[str]] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        for versions in _versions_in(json.loads(path.read_text(encoding="utf-8"))):
            key = tuple(str(versions.get(name) or "–").partition("+")[0] for name in PACKAGES)
            if path.name not in found.setdefault(key, []):
                found[key].append(path.name)
    return found


def _versions_in(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict) and isinstance(data.get("torch"), str):
        yield data
        return
    inner = data.values() if isinstance(data, dict) else data[:50] if isinstance(data, list) else ()
    for value in inner:
        yield from _versions_in(value)


def render() -> str:
    """The page."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    runs: list[dict[str, str]] = json.loads(RUNS.read_text(encoding="utf-8"))
    ci = [
        [name, ", ".join(f"`{one}`" for one in installed), "; ".join(run)]
        for name, installed, run in environments(script)
    ]
    columns = ("python", *PACKAGES, "command", "outcome", "day")
    by_hand = [[f"`{r[c]}`" if c == "command" else r[c] for c in columns] for r in sorted(runs, key=_order)]
    files = [[*key, f"{len(found)}, as `{found[-1]}`"] for key, found in sorted(measured().items())]
    parts = [
        "# Versions",
        "What was run with which versions, by `docs/generate_versions.py`; what is served stands in the README.",
        "## In CI, on a CPU",
        "`.ci/run`, on the Python that it is started with. What has no version is the newest that pip finds.",
        _table(("environment", "installed", "run"), ci),
        "## By hand, on a CPU",
        "A dash: what pip chose, not noted.",
        _table(("Python", "torch", "Triton", "transformers", "command", "outcome", "day"), by_hand),
        MEASURED,
        "By the files of `benchmarks/results/`, most of them of GPUs; a dash where a file does not say it.",
        _table(("torch", "Triton", "transformers", "files"), files),
    ]
    return "\n\n".join(parts) + "\n"


def _order(run: dict[str, str]) -> tuple[list[int], str]:
    return [int(part) for part in re.findall(r"\d+", run["transformers"])], run["command"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def keep_run(arguments: list[str]) -> None:
    """Run pytest here and keep what came of it, in place of an earlier run of the same versions and arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    print(done.stdout[-2000:])
    outcome = next((s for s in reversed(done.stdout.splitlines()) if re.search(r"\d+ (passed|failed|error)", s)), "")
    row = {name: _version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        "command": " ".join(["pytest", *arguments]),
        "outcome": re.sub(r" in [\d.]+s.*| \(.*|=", "", outcome).strip() or f"exit code {done.returncode}",
        "day": datetime.date.today().isoformat(),
    }
    same = ("python", "command", *PACKAGES)
    kept = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else []
    kept = [r for r in kept if any(r[k] != row[k] for k in same)] + [row]
    RUNS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "–"


def main(argv: list[str]) -> int:
    if argv[:1] == ["--run"]:
        keep_run(argv[1:])
    page = render()
    if argv == ["--check"]:
        return int(page != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
