"""Text that may be shown: what comes from files, and which package is missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What the extra "hf" installs: modules as they are imported.
HF_MODULES = ("transformers", "safetensors", "huggingface_hub", "accelerate")
INSTALL_HF = 'pip install "mxfp4_compile[hf]"'


def printable(text: str) -> str:
    """``text`` with control characters escaped, but line ends: names in files may hold a terminal's commands."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def missing_package(error: ModuleNotFoundError, what: str = "this") -> str:
    """The sentence for an import that failed since a package is not installed; "" where we do not know the package."""
    name = (error.name or "").partition(".")[0]
    if name == "torch":
        return f"{what} needs torch, which is not installed: pip install torch"
    return f"{what} needs {name}, which is not installed: {INSTALL_HF}" if name in HF_MODULES else ""


def size(count: float) -> str:
    """A number of bytes as people read it: 512 B, 1.5 KiB, 20.0 MiB, 16.94 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to five of the known names that ``name`` may be a slip of, the likeliest first."""
    by_folded = {k.lower().replace("-", "_"): k for k in known}
    folded = name.lower().replace("-", "_")
    return [by_folded[k] for k in difflib.get_close_matches(folded, by_folded, 5, 0.7)]
