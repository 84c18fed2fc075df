"""Text that comes from files, as it may be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with control characters escaped, but line ends: names in files may hold a terminal's commands."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
