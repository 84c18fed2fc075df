"""Recorded decode steps on several ranks: what is decided while they are made is decided by all ranks.

::

    generate:  one message (random state, digest of what is recorded) -> the same steps on all ranks, or all drop theirs
    making:    probe --together-- free memory (the least) --together-- warm-up, capture, check --together-- step or none
    replay:    no message; the sums over ranks are inside of the graph

Contract: a piece of work that fails on one rank fails on all, and every collective of it is announced (``agree.py``),
of compiled layers too (``layer_backend``); within a capture nothing is exchanged, as no rank waits there. A captured
sum holds its communicator: recordings are dropped before the process group is (``_Released``), or that would not end.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..buffers import as_bytes
from ..circumstances import random_state, set_random_state
from ..processes import ANNOUNCER, OneProcess, is_dtensor
from .agree import Agreement
from .plans import installed_again

_T = TypeVar("_T")

# Set to 0, the steps of a model on several ranks are not recorded.
RECORD_RANKS = "MXFP4_COMPILE_RECORD_RANKS"

_runtimes: weakref.WeakSet[Any] = weakref.WeakSet()


class StepRanks(OneProcess):
    """The ranks that record the steps of one model. A collective."""

    several = True

    def __init__(self) -> None:
        self.agreement = Agreement(range(dist.get_world_size()))

    def refusal(self, recorder: Any) -> str | None:
        """Why steps of several ranks are not recorded here, or None."""
        if os.environ.get(RECORD_RANKS) == "0":
            return f"{RECORD_RANKS}=0, and the model lies on several ranks"
        backend = str(dist.get_backend())
        if recorder.device is not None and "nccl" not in backend:
            return f"the ranks sum by {backend}, which cannot be recorded"
        return None

    def start(self, runtime: Any, reason: str | None) -> str | None:
        """The first rank's random state for all; ``reason`` not to record, or another rank's.

        Ranks that know other steps than the others drop theirs, all of them.
        """
        own = _digest(reason, runtime)
        device = next(runtime.model.parameters()).device
        state = random_state(device)
        message = torch.cat([state, torch.frombuffer(bytearray(own), dtype=torch.uint8)])
        every = [torch.empty_like(message) for _ in range(self.agreement.size)]
        dist.all_gather(every, message, group=self.agreement.group)
        set_random_state(device, every[0][: state.numel()].clone())
        if all(torch.equal(other[state.numel() :], message[state.numel() :]) for other in every):
            return reason
        reason = self.reason("generate", reason)
        runtime.drop()
        runtime.report.note("the ranks knew other recorded steps: all were dropped")
        return reason

    def together(self, what: str, work: Callable[[], _T]) -> _T:
        """Run ``work``, whose collectives are announced; what it raises on one rank is raised on all."""

        def announced() -> _T:
            with self.agreement.forwards(), _announcing(self.agreement):
                return work()

        return self.agreement.together(what, announced)

    def least(self, what: str, value: int | None) -> int | None:
        """The least value of all ranks that have one."""
        known = [other for other in self.agreement.gathered(what, value) if other is not None]
        return min(known, default=None)

    def reason(self, what: str, reason: str | None) -> str | None:
        """``reason``, or that of the first rank that has one."""
        told = [(rank, other) for rank, other in enumerate(self.agreement.gathered(what, reason)) if other]
        if not told or all(other == reason for _, other in told):
            return told[0][1] if told else None
        return f"rank {told[0][0]}: {told[0][1]}"

    def same_bits(self, what: str, tensor: Tensor) -> str | None:
        """What is wrong if the ranks have other values."""
        digests = self.agreement.gathered(what, hashlib.sha256(as_bytes(tensor.cpu().contiguous())).hexdigest())
        return None if len(set(digests)) == 1 else "its logits are not the same bits on all ranks"

    def union(self, what: str, found: dict[Any, str]) -> dict[Any, str]:
        """What any rank found."""
        return {key: words for other in self.agreement.gathered(what, found) for key, words in other.items()}

    def copying(self, module: nn.Module, memo: dict[int, Any]) -> None:
        """Copies of the parameters that lie on several ranks, of this rank's part."""
        from torch.distributed.tensor import DTensor

        for child in module.modules():
            for parameter in child._parameters.values():
                if parameter is not None and is_dtensor(parameter):
                    whole: Any = parameter
                    own = whole._local_tensor.detach().clone()
                    made = DTensor.from_local(
                        own, whole.device_mesh, whole.placements, run_check=False,
                        shape=whole.shape, stride=whole.stride(),
                    )  # fmt: skip
                    memo[id(parameter)] = nn.Parameter(made, requires_grad=False)

    def copied(self, module: nn.Module) -> None:
        """Have the copies inside ``module`` run by transformers' styles, not what they are copies of."""
        for child in module.modules():
            installed_again(child)

    def holds(self, runtime: Any) -> None:
        """``runtime`` is about to record sums: it is to drop them before their process group ends."""
        if not isinstance(dist.destroy_process_group, _Released):
            atexit.register(_drop_all)
            dist.destroy_process_group = _Released(dist.destroy_process_group)
        _runtimes.add(runtime)

    def layer_backend(self, options: dict[str, Any]) -> Callable[..., Any]:
        """Inductor as a backend of torch.compile, whose compiled code announces its collectives where others do."""
        return _Backend(options)


class _Backend:
    def __init__(self, options: dict[str, Any]) -> None:
        from torch._inductor import config

        # What every rank computes for itself, norms and routers, must be the same bits on all: no rank may choose
        # the order of a sum by its own measurements.
        self._options = {**options, "deterministic": True}
        if not hasattr(config, "deterministic"):
            self._options = {n: v for n, v in options.items() if n != "coordinate_descent_tuning"}

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(graph, inputs, config_patches=self._options)

        def run(*args: Any) -> Any:
            agreement = ANNOUNCER.get()
            if agreement is None:
                return compiled(*args)
            with agreement.forwards():
                return compiled(*args)

        return run


@contextmanager
def _announcing(agreement: Agreement) -> Iterator[None]:
    token = ANNOUNCER.set(agreement)
    try:
        yield
    finally:
        ANNOUNCER.reset(token)


def _digest(reason: str | None, runtime: Any) -> bytes:
    """Of what ranks must agree on before a generate, as far as it depends on what was before."""
    known = (reason, sorted(map(str, runtime.steps)), sorted(map(str, runtime.refused)), runtime.max_capture_size)
    return hashlib.sha256(repr(known).encode()).digest()


def _drop_all() -> None:
    for runtime in list(_runtimes):
        runtime.drop()


class _Released:
    """``destroy_process_group``, which would wait forever for recordings that hold a communicator, after they went."""

    def __init__(self, ends: Callable[..., Any]) -> None:
        self.ends = ends
        functools.update_wrapper(self, ends)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _drop_all()
        return self.ends(*args, **kwargs)


__all__ = ["RECORD_RANKS", "StepRanks"]
