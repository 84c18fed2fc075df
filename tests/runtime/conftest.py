"""What these tests are about comes after matching."""

from __future__ import annotations

import pytest
from remembered import remembered_matches  # noqa: F401
from torch import nn

import mxfp4_compile
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, load


@pytest.fixture(autouse=True)
def _matched_once(remembered_matches: None) -> None:  # noqa: F811
    """Every experts module is traced and matched once a process."""


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """The demo's trained model in fp32, optimized."""
    return mxfp4_compile.optimize(load(MODEL_DIRECTORY).float(), verify=False)
