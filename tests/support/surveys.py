"""What becomes of a family: docs/generate_models.py's survey, made once for all tests of a worker that ask for it.

Tests of one family have its ``group``, and so one worker. They are of tracing and matching themselves, too: mark them
with ``pytest.mark.matching``, so that the first to ask does not take another family's trace for this one's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any

import pytest
from paths import REPO


def generator() -> Any:
    """docs/generate_models.py, which is no package."""
    folder = REPO / "docs"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    assert importlib.util.find_spec("generate_models") is not None
    return importlib.import_module("generate_models")


def group(family: str) -> pytest.MarkDecorator:
    """The mark that brings all tests of a family to one worker, one after another."""
    return pytest.mark.xdist_group(f"survey {family}")


@functools.lru_cache(maxsize=4)
def surveyed(family: str) -> tuple[Any, list[dict[str, Any]]]:
    """The optimized model, tiny and in bf16, and its rows. A test that restores the model has it for itself."""
    model, rows = generator().surveyed(family)
    return model, rows
