"""One process or several: whether a model is computed by ranks together, and what is asked of them while it is changed.

For a model in one process neither torch.distributed nor the room of several ranks (``ranks``) is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

_T = TypeVar("_T")


def is_spread(model: nn.Module) -> bool:
    """Whether several processes compute this model together: a parameter is a DTensor, or the model says so."""
    sizes = [getattr(model, f"_{kind}_size", None) or 1 for kind in ("tp", "fsdp")]
    if max(sizes) > 1:
        return True
    distributed: Any = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return started and any(is_dtensor(p) for p in model.parameters())  # of one process no parameter is looked at


def share_random_state(model: nn.Module) -> None:
    """Give every rank the first one's random state of the model's device: what they sample then is the same."""
    import torch.distributed as dist

    device = next(model.parameters()).device
    random: Any = torch.cuda if device.type == "cuda" else torch
    of_device = (device,) if device.type == "cuda" else ()
    state = random.get_rng_state(*of_device).to(device)
    dist.broadcast(state, 0)
    random.set_rng_state(state.cpu(), *of_device)


def is_dtensor(tensor: Any) -> bool:
    """Whether a parameter is a part of one that lies on several devices."""
    return type(tensor).__name__ == "DTensor" or type(getattr(tensor, "data", None)).__name__ == "DTensor"


class OneProcess:
    """What ``optimize`` asks of all processes that hold its model, answered for one; ``ranks.session`` for several."""

    def agree(self, what: str, **values: Any) -> None:
        """An error on every rank if a value differs between them."""

    def together(self, what: str, work: Callable[[], _T]) -> _T:
        """Run ``work``; what it raises on one rank is raised on all."""
        return work()

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Around forwards of the whole model."""
        yield

    @contextmanager
    def parts(self, model: nn.Module, skip: str | Sequence[str], example_inputs: Any) -> Iterator[None]:
        """Inside the block each process has its part of the experts as plain weights."""
        yield

    def planned(self, sites: list[Any]) -> None:
        """An error for a site that cannot lie on several ranks."""

    def alike(self, what: str, sites: list[Any]) -> None:
        """An error if the ranks found other sites."""

    def fail_alike(self, sites: list[Any]) -> None:
        """A site that failed on one rank fails on all."""

    def verify_sums(self, sites: list[Any], build: Callable[[Any], Any]) -> None:
        """An error unless the parts of the ranks make the whole."""

    def whole_errors(self, site: str, built: Any, errors: Any, verification: Any) -> tuple[Any, Any]:
        """Errors of the experts of all processes (``built`` is told), and the largest error of verification."""
        return errors, verification

    def attempt(
        self,
        what: str,
        work: Callable[[], _T],
        failures: tuple[type[Exception], ...],
    ) -> tuple[_T | None, str]:
        """The result of ``work`` and "", or None and why it failed, on this rank or another."""
        try:
            return work(), ""
        except failures as error:
            return None, str(error)

    def step(self, what: str) -> None:
        """Between parts of a work that is done together: an error if another rank has failed."""

    def split(self, model: Any, sites: list[Any], rematch: Callable[[Any, Any], Any]) -> list[str]:
        """Cut planned sites, whose weights are not there yet, to the part of each process; notes for the report."""
        return []

    def reader_of(self, site: Any, reader: Any) -> Any:
        """What reads this process's part of a site, where ``reader`` reads the whole."""
        return reader

    def installed(self, site: Any) -> None:
        """A site was replaced: its weights are not needed any more."""

    def tell(self, report: Any) -> None:
        """The report is one of all processes."""


__all__ = ["OneProcess", "is_dtensor", "is_spread", "share_random_state"]
