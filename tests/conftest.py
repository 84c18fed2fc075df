"""Fixtures and options shared by the suite."""

from __future__ import annotations

import gc
import os

# One thread a process: the suite runs in parallel processes, and tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from cpu_report import CpuReport
from remembered import match_of

from mxfp4_compile import planning


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-report", action="store_true", help="print the CPU time of files and of slow tests")
    parser.addoption("--record-outcomes", metavar="FILE", help="append what became of mutations (support/outcomes.py)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cpu-report"):
        config.pluginmanager.register(CpuReport())


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """What is imported and what fixtures keep is left out of garbage collections, each of which would walk all of it.

    A trace makes so many objects that collections took up to half of a test's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """No compiled graph of one test may serve another."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _matched_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal experts are traced and matched once a process, but where that is the subject."""
    if "matching" not in request.keywords:
        monkeypatch.setattr(planning, "_match_of", match_of)
