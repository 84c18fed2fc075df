"""Programs of torch.export: how both ways to trace (``export``, ``unroll``) make one, and its graph functional.

Contract: what a caller runs is read, never changed. What torch logs and prints of failures does not reach the terminal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def exported(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
    """The program of ``caller(args, kwargs)``, op for op as its code has them, in-place ones too.

    ``shapes``: ``dynamic_shapes`` of both. Its fake tensors keep no cache of what ops return: most calls have sizes
    that were not met before, so that the cache took a sixth of a trace's time.
    """
    from torch._dynamo import config

    with _plain(), config.patch(fake_tensor_cache_enabled=False):
        return torch.export.export(caller, (args, kwargs), dynamic_shapes=shapes, strict=False)


def functional(program: Any) -> Any:
    """The program without in-place ops and with no op that may or may not be a view; takes twice as long as a trace."""
    with _plain():
        return program.run_decompositions({})


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings(), quietly():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What torch logs and prints of failures that are handled here does not reach the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


__all__ = ["exported", "functional", "quietly"]
