"""One process or several: whether a model is computed by ranks together, and what is asked of them while it is changed.

For a model in one process neither torch.distributed nor the room of several ranks (``ranks``) is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

_T = TypeVar("_T")


def is_spread(model: nn.Module) -> bool:
    """Whether several processes compute this model together: a parameter is a DTensor, or the model says so."""
    sizes = [getattr(model, f"_{kind}_size", None) or 1 for kind in ("tp", "fsdp")]
    if max(sizes) > 1:
        return True
    distributed: Any = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return started and any(is_dtensor(p) for p in model.parameters())  # of one process no parameter is looked at


# The agreement of ranks that are at work together, to which whatever waits for other ranks is announced.
ANNOUNCER: ContextVar[Any] = ContextVar("mxfp4_compile_announcer", default=None)


def announce(what: str) -> None:
    """Before something that waits for the other ranks and is no op of a forward: OptimizeError if one has failed."""
    agreement = ANNOUNCER.get()
    if agreement is not None:
        agreement.step(what)


@contextmanager
def in_compiled_code() -> Iterator[None]:
    """Around calls of compiled code, which cannot be entered while ops are listened to; it announces by itself."""
    if ANNOUNCER.get() is None:
        yield
        return
    with _disable_current_modes():
        yield


def is_dtensor(tensor: Any) -> bool:
    """Whether a parameter is a part of one that lies on several devices."""
    return type(tensor).__name__ == "DTensor" or type(getattr(tensor, "data", None)).__name__ == "DTensor"


class OneProcess:
    """What is asked of all processes that hold a model, answered for one.

    For several: of ``optimize`` and ``load`` by ``ranks.session``, of recorded steps by ``ranks.recorded``.
    """

    several = False

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

    # recorded steps

    def refusal(self, recorder: Any) -> str | None:
        """Why these processes record no steps with this recorder, or None."""
        return None

    def start(self, runtime: Any, reason: str | None) -> str | None:
        """A generate begins: what is random is the same on all; why none of them records, or None."""
        return reason

    def least(self, what: str, value: int | None) -> int | None:
        """The least value of all processes."""
        return value

    def reason(self, what: str, reason: str | None) -> str | None:
        """``reason``, or another process's."""
        return reason

    def same_bits(self, what: str, tensor: Any) -> str | None:
        """What is wrong if the processes have other values of a tensor that is to be the same, or None."""
        return None

    def union(self, what: str, found: dict[Any, str]) -> dict[Any, str]:
        """What any process found."""
        return found

    def copying(self, module: Any, memo: dict[int, Any]) -> None:
        """``module`` is about to be copied with this memo: what ``copy.deepcopy`` cannot copy is put there."""

    def copied(self, module: Any) -> None:
        """``module`` was copied: what was put into the modules inside of it is to be of the copies."""

    def holds(self, runtime: Any) -> None:
        """A runtime is about to record."""

    def layer_backend(self, options: dict[str, Any]) -> Callable[..., Any] | None:
        """What compiles the layers of recorded steps, None for Inductor as it is."""
        return None


__all__ = ["ANNOUNCER", "OneProcess", "announce", "in_compiled_code", "is_dtensor", "is_spread"]
