"""Layers that have keys and values and states: one attention and one convolution or linear attention each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import cache_utils

from . import full, ring
from .base import LayerForm, Place
from .full import FullForm, FullView, full_form
from .ring import RingForm, RingView, ring_form
from .states import State, StatesView, states_of, take_states

_FULL = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
_RING = getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None)


@dataclass(frozen=True)
class HybridForm(LayerForm):
    """A full layer, or one with a window, and states."""

    attention: FullForm | RingForm
    states: tuple[State, ...]

    forgets = False

    @property
    def window(self) -> int | None:  # type: ignore[override]
        """The window of its attention."""
        return self.attention.window

    @property
    def grows_with_length(self) -> bool:  # type: ignore[override]
        """As its attention does."""
        return self.attention.grows_with_length

    def bytes(self, rows: int, length: int) -> int:
        return self.attention.bytes(rows, length) + sum(s.bytes(rows) for s in self.states)

    def make(self, place: Place) -> HybridView:
        return HybridView(self.attention.make(place), StatesView(take_states(self.states, place), place.clock))


class HybridView(StatesView):
    """States, and the attention's view beside them."""

    def __init__(self, attention: FullView | RingView, states: StatesView) -> None:
        self.conv_states, self.recurrent_states = states.conv_states, states.recurrent_states
        self.position = states.position
        self.attention = attention

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.attention.update(key_states, value_states, layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        return self.attention.get_mask_sizes(query_length, layer_idx)

    def held(self, layer: Any) -> list[Tensor]:
        return [*self.attention.held(layer), *super().held(layer)]

    def check(self, layer: Any, seen: int) -> None:
        self.attention.check(layer, seen)
        super().check(layer, seen)

    def fill(self, layer: Any, seen: int) -> None:
        self.attention.fill(layer, seen)
        super().fill(layer, seen)

    def drain(self, layer: Any, batch: int, seen: int) -> None:
        self.attention.drain(layer, batch, seen)
        super().drain(layer, batch, seen)

    def release(self, layer: Any) -> None:
        self.attention.release(layer)

    def reorder(self, rows: Tensor) -> None:
        self.attention.reorder(rows)
        super().reorder(rows)

    def mark_dynamic(self) -> None:
        self.attention.mark_dynamic()


def form_of(layer: Any, kind: str) -> HybridForm | None:
    """The form of transformers' two layers that have both."""
    if _FULL is not None and type(layer) is _FULL:
        return HybridForm(full_form(layer), states_of(layer))
    if _RING is not None and type(layer) is _RING:
        return HybridForm(ring_form(layer), states_of(layer))
    return None


MASKS = {"hybrid": full.mask, "hybrid_sliding": ring.mask}
