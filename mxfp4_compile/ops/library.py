"""The packages that backends need: found, dated and probed without importing them.

Import names lie: PyPI's ``triton-kernels`` is not OpenAI's ``triton_kernels``. So every library is known by
features of its files, and a finding says in words what was found and where.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """What was found under an import name. ``folder`` is None if it is not there at all."""

    name: str
    folder: Path | None
    version: str | None

    def has(self, *files: str) -> bool:
        """Whether the package holds every one of ``files`` (paths below its folder)."""
        return self.folder is not None and all((self.folder / f).exists() for f in files)

    def mentions(self, file: str, text: str) -> bool:
        """Whether ``file`` of the package contains ``text``."""
        path = None if self.folder is None else self.folder / file
        return path is not None and path.is_file() and text in path.read_text(encoding="utf-8", errors="replace")

    def at_least(self, *least: int) -> bool:
        """Whether its version is known and not older than ``least``."""
        return self.version is not None and numbers(self.version) >= least

    def __str__(self) -> str:
        if self.folder is None:
            return f"no package {self.name}"
        return f"{self.name} {self.version or 'of unknown version'}"


def find(name: str, distribution: str | None = None) -> Finding:
    """The top-level package ``name``, and the version of ``distribution`` (the pip name), without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: in sys.modules without a spec
        spec = None
    folder = None
    if spec is not None and spec.submodule_search_locations:
        folder = next((Path(p) for p in spec.submodule_search_locations if Path(p).is_dir()), None)
    version = None
    if folder is not None and distribution is not None:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = None
    return Finding(name, folder, version)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in leading.group().split(".")) if leading else ()
