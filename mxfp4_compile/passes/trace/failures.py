"""Failures of a trace in words."""

from __future__ import annotations

import traceback

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode


def in_words(error: BaseException) -> str:
    """One line that says what failed, and where in the model's code."""
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else ""
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in first or "Data-dependent" in first:
        what = "it branches in Python on a value that only the data tells"
    else:
        what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return what + _where(error)


def _where(error: BaseException) -> str:
    """The last line of the model's own code that led to the error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = frame.filename.replace("\\", "/")
        if not any(part in path for part in ("/torch/", "/sympy/", "/mxfp4_compile/", "<")) and frame.line:
            return f" (in {frame.name}: {frame.line.strip()[:120]})"
    return ""


__all__ = ["in_words"]
