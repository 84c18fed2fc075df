"""What commands print: JSON, tables, lines of progress."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from ...text import size

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAM = "mxfp4-compile"
_KEPT = "\N{NO-BREAK SPACE}"


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


def columns(rows: Iterable[Sequence[str]], indent: str = "  ", width: int | None = None) -> str:
    """Rows of equally many cells in aligned columns, all to the left; the last is wrapped to ``width`` characters.

    ``width``: by default that of the terminal, at most 120; 120 where there is none. What ``whole`` made is not broken.
    """
    cells = [list(row) for row in rows]
    if not cells:
        return ""
    if width is None:
        width = min(120, shutil.get_terminal_size((120, 24)).columns)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    lines = []
    for row in cells:
        head = indent + "".join(f"{c.ljust(w)}  " for c, w in zip(row, widths, strict=False))
        kept = max(30, width - len(head))
        parts = textwrap.wrap(row[-1], kept, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [(head + part).rstrip() if i == 0 else " " * len(head) + part for i, part in enumerate(parts)]
    return "\n".join(lines).replace(_KEPT, " ")


def whole(command: str) -> str:
    """A command as ``columns`` keeps it in one line, to be copied."""
    return command.replace(" ", _KEPT)


def told(args: argparse.Namespace) -> bool:
    """Whether progress is told: not under --quiet, nor beside JSON for machines."""
    return not (args.quiet or args.json)


def progress_lines(args: argparse.Namespace) -> Callable[[str], None]:
    """What says a step of long work on stderr, in a terminal and in a pipe."""
    if not told(args):
        return lambda line: None
    return lambda line: print(f"... {line}", file=sys.stderr, flush=True)


@contextmanager
def byte_progress(args: argparse.Namespace) -> Iterator[Callable[[int, int], None]]:
    """What is called with bytes done and bytes in all: a bar on a terminal, a line every ten seconds in a pipe."""
    if not told(args):
        yield lambda done, total: None
        return
    if sys.stderr.isatty():
        from ...checkpoint.convert import conversion_bar

        with conversion_bar(True) as show:
            yield show or (lambda done, total: None)
        return
    yield Lines(time.monotonic, lambda line: print(f"... {line}", file=sys.stderr, flush=True))


class Lines:
    """Progress as lines, one every ``EVERY`` seconds at most, so that short work is silent."""

    EVERY = 10.0

    def __init__(self, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self.clock, self.say = clock, say
        self.began = self.last = clock()
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes."""
        now = self.clock()
        if self.first is None:
            self.first = done  # of an earlier run: no measure of this one's speed
        if now - self.last < self.EVERY:
            return
        self.last = now
        left = (total - done) * (now - self.began) / max(done - self.first, 1)
        rest = f", about {left:.0f} s left" if done > self.first else ""
        self.say(f"{size(done)} of {size(total)} ({done / max(total, 1):.0%}){rest}")
