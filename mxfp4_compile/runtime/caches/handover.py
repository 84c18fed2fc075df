"""The cache object that ``generate`` runs on: transformers' dynamic one, whose contents move into a recorded step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from .step_cache import StepCache


class HandoverCache(DynamicCache):  # type: ignore[misc]
    """A dynamic cache that lends its contents to a StepCache while recorded steps run, and is itself otherwise.

    Anything but a recorded step takes the contents back first (``settle``), so that the object is always a
    true account of the tokens seen.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.__dict__.update(cache.__dict__)  # the layers are the same objects
        self._origin = cache
        self._static: StepCache | None = None
        self._batch = 0
        self._seen = 0

    @property
    def static(self) -> StepCache | None:
        """Where the contents are now, if not here."""
        return self._static

    def lend(self, static: StepCache, attention_mask: Tensor | None, batch: int) -> None:
        """Move the contents, of ``batch`` rows, to ``static``; the dynamic tensors are let go."""
        self._seen = static.fill(self, attention_mask)
        self._static, self._batch = static, batch
        for view, layer in zip(static.views, self.layers, strict=True):
            view.release(layer)

    def advance(self) -> None:
        """One recorded step was run."""
        self._seen += 1

    def settle(self, seen: int | None = None) -> None:
        """Take the contents back: those of ``seen`` tokens, or of all."""
        static, self._static = self._static, None
        if static is not None:
            static.drain(self, self._batch, self._seen if seen is None else seen)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen if self._static is not None else super().get_seq_length(layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().update(*args, **kwargs)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().get_mask_sizes(*args, **kwargs)

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().get_conv_state(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().update_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().get_recurrent_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().update_recurrent_state(*args, **kwargs)

    def update_indexer(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().update_indexer(*args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._static is not None:
            self._static.reorder(beam_idx)
        else:
            super().reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super().crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.settle()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.settle()
        super().batch_select_indices(indices)

    def plain(self) -> DynamicCache:
        """The cache that this one stands in for, with these contents, for the user to keep."""
        self.settle()
        return self._origin
