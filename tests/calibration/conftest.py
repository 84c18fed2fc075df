"""Matches are remembered, and matrices this small gain nothing from threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from remembered import remembered_matches  # noqa: F401


@pytest.fixture(autouse=True)
def _matched_once(remembered_matches: None) -> None:  # noqa: F811
    """Every experts module is traced and matched once a process."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
