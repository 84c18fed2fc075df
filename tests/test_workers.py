"""How pytest-xdist gives tests to workers."""

from __future__ import annotations

import os

import pytest


@pytest.mark.smoke
@pytest.mark.xdist_group("workers know groups")
def test_tests_of_a_group_have_one_worker(request: pytest.FixtureRequest) -> None:
    """Else each worker makes what a module needs once, without a word (pytest 9.2 with pytest-xdist 3.8)."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("run without workers")
    assert request.node.nodeid.endswith("@workers know groups"), "pytest-xdist does not see groups: see pyproject.toml"
