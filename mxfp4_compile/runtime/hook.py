"""``model.generate`` of an optimized model: put in place, taken away, and recorded ahead.

Nothing here imports transformers before a model of its is met.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ..passes.build.module import mxfp4_sites
from ..report import Report, RuntimeReport
from .sizes import MIN_LENGTH, capture_sizes, prompt_lengths

if TYPE_CHECKING:
    from .state import Runtime

HOOK = "generate"


class Generate:
    """What stands in for ``model.generate``; called the same way."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def __wrapped__(self) -> Any:
        return type(self.runtime.model).generate.__get__(self.runtime.model)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return str(type(self.runtime.model).generate.__doc__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.runtime
        function: Any = type(runtime.model).generate
        if not runtime.lock.acquire(blocking=False):
            # Another thread decodes, or a user's callback calls generate: the static caches are in use.
            runtime.report.note("a generate that began while another one of this model ran had no graphs")
            return function(runtime.model, *args, **kwargs)
        runtime.owner = threading.get_ident()
        try:
            reason = runtime.begin()
            if reason is not None:
                runtime.report.note(f"generate runs without graphs: {reason}")
                return function(runtime.model, *args, **kwargs)
            from .session import Session

            return Session(runtime).generate(function, args, kwargs)
        finally:
            runtime.owner = None
            runtime.lock.release()


def attach(model: Any, max_capture_size: int, report: Report) -> None:
    """Let ``model.generate`` use recorded steps. Models without a generate of transformers' are left alone."""
    if not _generates(model):
        return
    from .state import Runtime

    model.__dict__[HOOK] = Generate(Runtime(model, max_capture_size, report.runtime))


def detach(model: Any) -> None:
    """Undo ``attach``."""
    if isinstance(model.__dict__.get(HOOK), Generate):
        del model.__dict__[HOOK]


def runtime_of(model: Any) -> Runtime | None:
    """The runtime of an optimized model, or None where generate is not transformers'."""
    hook = model.__dict__.get(HOOK)
    return hook.runtime if isinstance(hook, Generate) else None


def _generates(model: Any) -> bool:
    try:
        from transformers.generation import GenerationMixin
    except ImportError:
        return False
    return isinstance(model, GenerationMixin) and HOOK not in model.__dict__ and model.can_generate()


def capture(model: Any, sizes: Any = None, max_length: int = MIN_LENGTH, progress: bool | None = None) -> RuntimeReport:
    """Record the decode steps of an optimized model and short prompts, and compile for others, ahead of their use.

    Prompts with padding are compiled for when the first one comes. sizes: batch sizes, by default all up to
    ``max_capture_size``. max_length: tokens of prompt and answer together. progress: None shows a bar on a terminal.
    Returns what was captured, and why not the rest.

    Raises TypeError if the model is not one that optimize() has rewritten and whose generate is transformers'.
    """
    runtime = runtime_of(model)
    if runtime is None or not mxfp4_sites(model):
        raise TypeError("capture() takes an optimized model with transformers' generate")
    with runtime.lock:
        reason = runtime.begin()
        if reason is not None:
            runtime.report.note(f"generate runs without graphs: {reason}")
            return runtime.report
        wanted = capture_sizes(runtime.max_capture_size) if sizes is None else tuple(sizes)
        # The largest first: the smaller ones then share its cache.
        for size in _bar(sorted(wanted, reverse=True), progress):
            runtime.step(size, max_length)
        for size in wanted if "model" not in runtime.refused else ():
            runtime.prefill(size, None)
            for length in reversed(prompt_lengths(size, runtime.max_capture_size)):
                runtime.recorded_prompt(size, length, ahead=True)
    return runtime.report


def _bar(sizes: list[int], wanted: bool | None) -> Any:
    import sys

    if wanted is None:
        wanted = sys.stderr.isatty()
    if not wanted:
        return sizes
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return sizes
    return tqdm(sizes, desc="CUDA graphs")
