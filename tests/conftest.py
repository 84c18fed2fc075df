"""Fixtures shared by the suite."""

from __future__ import annotations

import os

# One thread a process: the suite runs in parallel processes, and tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """No compiled graph of one test may serve another."""
    torch._dynamo.reset()
