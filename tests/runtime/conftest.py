"""What several of these tests run."""

from __future__ import annotations

import pytest
from torch import nn

import mxfp4_compile
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, load


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """The demo's trained model in fp32, optimized."""
    return mxfp4_compile.optimize(load(MODEL_DIRECTORY).float(), verify=False)
