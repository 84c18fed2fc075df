"""Keys and values of a sliding window of W tokens, in a ring: position p in slot p mod W.

Keys carry their rotary position already, so that their order does not matter to attention, and the same graph is right
before and past the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from .base import CannotMove, Clock, LayerForm, Place
from .full import FullView, keys_and_values


@dataclass(frozen=True)
class RingForm(LayerForm):
    """Keys [B, heads, slots, key_dim] and values [B, heads, slots, value_dim]; slots: window or length, the smaller."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int  # type: ignore[assignment, misc]  # of every ring

    forgets = False  # the token that the newest one took the place of is gone

    def bytes(self, rows: int, length: int) -> int:
        slots = min(self.window, length)
        return rows * self.heads * slots * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def make(self, place: Place) -> RingView:
        lead = (place.clock.rows, self.heads, min(self.window, place.clock.length))
        keys = place.take("keys", (*lead, self.key_dim), self.dtype)
        values = place.take("values", (*lead, self.value_dim), self.dtype)
        return RingView(keys, values, place.clock, self.window)


class RingView(FullView):
    def __init__(self, keys: Tensor, values: Tensor, clock: Clock, window: int) -> None:
        super().__init__(keys, values, clock)
        self.slot = clock.ring_slot(keys.shape[2])
        self._window = window

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        size = self.keys.shape[2]
        slots = torch.arange(size, device=self.keys.device)
        return size, self.position - (self.position - slots) % size - slots

    def check(self, layer: Any, seen: int) -> None:
        held = layer.keys.shape[2]
        if layer.get_seq_length() != seen or held < min(seen, self._window - 1):
            raise CannotMove(f"a layer with a window of {self._window} holds {held} tokens of {seen}")

    def fill(self, layer: Any, seen: int) -> None:
        ring, held = self.keys.shape[2], layer.keys.shape[2]
        keep = min(held, ring)
        slots = torch.arange(seen - keep, seen, device=self.keys.device) % ring
        for target, source in ((self.keys, layer.keys), (self.values, layer.values)):
            target.zero_()
            part = source[:, :, held - keep :]
            target[: part.shape[0]].index_copy_(2, slots, part)
            if part.shape[0] < target.shape[0]:
                target[part.shape[0] :] = target[:1]

    def drain(self, layer: Any, batch: int, seen: int) -> None:
        slots = torch.arange(max(seen - self._window + 1, 0), seen, device=self.keys.device) % self.keys.shape[2]
        layer.cumulative_length = seen
        layer.keys = self.keys[:batch].index_select(2, slots)
        layer.values = self.values[:batch].index_select(2, slots)

    def mark_dynamic(self) -> None:
        """A window is of one size in caches of every length."""


def form_of(layer: Any, kind: str) -> RingForm | None:
    """The form of transformers' layer with a sliding window."""
    if type(layer) is not DynamicSlidingWindowLayer or kind == "chunked_attention":
        return None
    return ring_form(layer)


def ring_form(layer: Any) -> RingForm:
    """The form of a layer that keeps the keys and values of its last tokens."""
    keys, values = keys_and_values(layer)
    if getattr(layer, "record_past", False):
        raise CannotMove("it records tokens beyond its window")
    return RingForm(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, layer.sliding_window)


def window_of(forms: Sequence[LayerForm]) -> int:
    """The sliding window of these layers; CannotMove if there is none or more than one."""
    windows = sorted({f.window for f in forms if f.window is not None})
    if len(windows) != 1:
        raise CannotMove(f"its layers have different sliding windows ({windows})" if windows else "it has no window")
    return windows[0]


def mask(clock: Clock, forms: Sequence[LayerForm]) -> Tensor:
    """bool [rows, 1, 1, slots]: the positions of the window up to the current one that are not padding."""
    window = window_of(forms)
    held, allowed = clock.ring_positions(min(window, clock.length))
    return (allowed & (held > clock.position - window))[:, None, None, :]


MASKS = {"sliding_attention": mask}
