"""What commands print: JSON, tables, lines of progress."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAM = "mxfp4-compile"


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1))


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Rows of cells in aligned columns; the first column to the left, the others to the right."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        indent + "  ".join([row[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]])
        for row in cells
    ]
    return "\n".join(lines)


def progress_line(line: str) -> None:
    """A line on a terminal's stderr; nothing in a pipe."""
    if sys.stderr.isatty():
        print(f"... {line}", file=sys.stderr)
