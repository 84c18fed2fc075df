"""Agreement: what fails on one rank fails on all, with the same words, before anything waits for it.

::

    rank 0:  work ... collective? --exchange-- yes, go on ... done   --exchange--> the result
    rank 1:  work ... collective? --exchange-- yes, go on ... failed --exchange--> rank 0 raises rank 1's words

Contract: messages are small and go through a gloo group of our own, whose timeout is minutes; the model's group may
wait for hours. Within ``forwards`` every collective of the model is announced first: a rank that fails says so in the
place of its next announcement, and the others, which are about to wait for it, raise instead. Nothing is announced
inside of ``torch.compile``d code or a recorded step.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import schema
from ..planning import OptimizeError

_T = TypeVar("_T")

TIMEOUT = timedelta(minutes=5)
_SHOWN = 4  # ranks whose words a message repeats

_groups: dict[tuple[int, ...], tuple[Any, Any]] = {}


@dataclass(frozen=True)
class _Message:
    """What a rank says: "step" before a collective, "done" at the end of a piece of work, or that it "failed"."""

    kind: str
    what: str
    words: str = ""
    value: Any = None


class Agreement:
    """The ranks that hold one model. A collective: every rank of ``ranks`` makes it."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.size = len(self.ranks)
        self.group = _group(self.ranks)
        self.failure: OptimizeError | None = None
        self.depth = 0

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message, by rank; OptimizeError if another rank does not answer within the timeout."""
        messages: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(messages, message, group=self.group)
        except RuntimeError as error:
            raise OptimizeError(
                f"rank {self.rank} had no answer from the other ranks: one of them has ended, or does not make this "
                f"call ({str(error).splitlines()[0]})"
            ) from error
        return messages

    def step(self, what: str, value: Any = None) -> list[Any]:
        """Before something that waits for the other ranks: they are about to do the same, or OptimizeError.

        Returns every rank's ``value``, by rank.
        """
        return self._ask("step", what, value)

    def _ask(self, kind: str, what: str, value: Any) -> list[Any]:
        if self.failure is not None:
            raise self.failure
        try:
            messages = self.exchange(_Message(kind, what, value=value))
            self._check(messages, kind, what)
        except OptimizeError as error:
            if self.depth:
                self.failure = error  # whatever the code around makes of it
            raise
        return [m.value for m in messages]

    def together(self, what: str, work: Callable[[], _T]) -> _T:
        """The result of ``work`` if it succeeded on every rank; else OptimizeError with the same words on all.

        What all ranks raise alike is raised as it is. Calls do not nest: an inner one is part of the outer.
        """
        if self.depth:
            return work()
        error: BaseException | None = None
        result: Any = None
        self.failure, self.depth = None, 1
        try:
            result = work()
        except BaseException as raised:
            error = raised
        finally:
            self.depth = 0
        if self.failure is not None:  # the others have said so, or have heard it
            failure, self.failure = self.failure, None
            raise failure from error
        words = "" if error is None else words_of(error)
        messages = self.exchange(_Message("done" if error is None else "failed", what, words))
        if error is not None and (not isinstance(error, Exception) or all(m.words == words for m in messages)):
            raise error
        self._check(messages, "done", what, error)
        return result  # type: ignore[no-any-return]

    def _check(self, messages: list[_Message], kind: str, what: str, error: BaseException | None = None) -> None:
        failed = {rank: m.words for rank, m in enumerate(messages) if m.kind == "failed"}
        if failed:
            told = "; ".join(f"rank {rank}: {words}" for rank, words in list(failed.items())[:_SHOWN])
            more = f"; and {len(failed) - _SHOWN} ranks more" if len(failed) > _SHOWN else ""
            raise OptimizeError(f"{told}{more}", getattr(error, "report", None)) from error
        if any((m.kind, m.what) != (kind, what) for m in messages):
            told = ", ".join(f"rank {rank} at {m.what}" for rank, m in enumerate(messages))
            raise OptimizeError(f"the ranks do different things: {told}. Every rank must make the same calls")

    def agree(self, what: str, **values: Any) -> None:
        """OptimizeError on every rank, naming the first difference, if a value differs between ranks."""
        every = self._ask("done", what, values)
        for rank, known in enumerate(every):
            for name in {**every[0], **known}:
                first, other = every[0].get(name), known.get(name)
                if first != other:
                    raise OptimizeError(
                        f"{what} must be the same on every rank: {name} is {_brief(first)} on rank 0 and "
                        f"{_brief(other)} on rank {rank}. Nothing was changed."
                    )

    def gathered(self, what: str, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return self._ask("done", what, value)

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Forwards of the model in this block announce their collectives."""
        with _Announced(self):
            yield


def _group(ranks: tuple[int, ...]) -> Any:
    """The gloo group of these ranks, made once in the life of the default group."""
    known = _groups.get(ranks)
    if known is None or known[0] is not dist.group.WORLD:
        known = _groups[ranks] = (dist.group.WORLD, dist.new_group(list(ranks), timeout=TIMEOUT, backend="gloo"))
    return known[1]


def words_of(error: BaseException) -> str:
    """An error in words: our own as they are, others with their type and the place in our code."""
    if type(error).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return str(error)
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    return text if str(error) else f"{text} {traceback.extract_tb(error.__traceback__)[-1:]}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:96]} ..."


class _Announced(TorchDispatchMode):
    """Announces collectives before they are run."""

    def __init__(self, agreement: Agreement) -> None:
        super().__init__()
        self.agreement = agreement

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # what it does to its local tensors comes here again
        collective = func.namespace in _COLLECTIVES and func._opname not in _NOT_COLLECTIVE
        if (collective or func is schema.reduce) and not _capturing():
            self.agreement.step(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))


def _capturing() -> bool:
    """Whether ops are being recorded, not run: no rank waits then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
_NOT_COLLECTIVE = ("wait_tensor", "_wrap_tensor_autograd")

__all__ = ["TIMEOUT", "Agreement", "words_of"]
