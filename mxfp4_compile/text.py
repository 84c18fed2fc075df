"""Text that may be shown: what comes from files, and which package is missing."""

from __future__ import annotations

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
