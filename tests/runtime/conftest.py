"""What these tests are about comes after matching."""

from __future__ import annotations

import pytest
from remembered import remembered_matches  # noqa: F401


@pytest.fixture(autouse=True)
def _matched_once(remembered_matches: None) -> None:  # noqa: F811
    """Every experts module is traced and matched once a process."""
