"""Gradient checkpointing of a model of transformers for as long as a test needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def gradient_checkpointing(model: Any, reentrant: bool) -> Iterator[None]:
    """The model trains with checkpoints within; afterwards it evaluates and no hook is left on it.

    transformers 5 makes the embeddings' output require gradients when checkpointing is enabled, transformers 4 does
    not. A second `enable_input_require_grads` would forget the hook of the first, which then stays for good, and
    Dynamo cannot trace it: a later test would fail to compile the model in one graph.
    """
    hooks = model.get_input_embeddings()._forward_hooks
    before = len(hooks)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if len(hooks) == before:
        model.enable_input_require_grads()
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    assert len(hooks) == before
