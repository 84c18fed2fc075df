"""Progress bars, by tqdm where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(wanted: bool, **options: Any) -> Iterator[Any]:
    """A bar of tqdm's with these ``options``; None where it is not wanted, or tqdm not installed."""
    if not wanted:
        yield None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield None
        return
    with tqdm(**options) as shown:
        yield shown


@contextmanager
def advancing(wanted: bool, **options: Any) -> Iterator[Callable[[int], None]]:
    """What is called with how much was done since; it moves a bar, if there is one."""
    with bar(wanted, **options) as shown:
        yield (lambda count: None) if shown is None else (lambda count: shown.update(count))


__all__ = ["advancing", "bar"]
