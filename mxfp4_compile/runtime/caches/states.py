"""States of linear attention and of convolutions: they do not grow, and one graph serves every length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from .base import CannotMove, Clock, LayerForm, LayerView, Place, copy_rows
from .dummy import no_mask

_LAYER = getattr(cache_utils, "LinearAttentionLayer", None)

CONVOLUTION, RECURRENT = "convolution", "recurrent"


@dataclass(frozen=True)
class State:
    """One state of a layer, [B, *shape]; number: which one of its kind. A convolution's last size is its kernel."""

    kind: str
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Unique in its layer."""
        return f"{self.kind} {self.number}"

    def bytes(self, rows: int) -> int:
        """Bytes for ``rows`` rows."""
        count = rows * self.dtype.itemsize
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class StatesForm(LayerForm):
    """The states that a layer has once a prompt has been through it."""

    states: tuple[State, ...]

    forgets = False

    def bytes(self, rows: int, length: int) -> int:
        return sum(s.bytes(rows) for s in self.states)

    def make(self, place: Place) -> StatesView:
        return StatesView(take_states(self.states, place), place.clock)


def take_states(states: Sequence[State], place: Place) -> dict[str, dict[int, Tensor]]:
    """Static tensors of states, by kind and number."""
    made: dict[str, dict[int, Tensor]] = {CONVOLUTION: {}, RECURRENT: {}}
    for s in states:
        made[s.kind][s.number] = place.take(s.name, (place.clock.rows, *s.shape), s.dtype)
    return made


class StatesView(LayerView):
    def __init__(self, states: dict[str, dict[int, Tensor]], clock: Clock) -> None:
        self.conv_states, self.recurrent_states = states[CONVOLUTION], states[RECURRENT]
        self.position = clock.position

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.conv_states[state_idx]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """New columns [B, ..., q], of which the last are kept; returns the old ones followed by them."""
        state = self.conv_states[state_idx]
        whole = torch.cat([state, conv_states], dim=-1)
        state.copy_(whole[..., -state.shape[-1] :])
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.recurrent_states.get(state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self.recurrent_states[state_idx].copy_(recurrent_states)
        return self.recurrent_states[state_idx]

    def _pairs(self, layer: Any) -> list[tuple[Tensor, dict[int, Tensor], int]]:
        """(static tensor, the layer's states of its kind, number)."""
        out = [(t, layer.conv_states, i) for i, t in self.conv_states.items()]
        return out + [(t, layer.recurrent_states, i) for i, t in self.recurrent_states.items()]

    def held(self, layer: Any) -> list[Tensor]:
        return [t for _, theirs, i in self._pairs(layer) if (t := theirs.get(i)) is not None]

    def check(self, layer: Any, seen: int) -> None:
        for static, theirs, number in self._pairs(layer):
            state = theirs.get(number)
            if state is None or state.shape[1:] != static.shape[1:]:
                raise CannotMove("a layer's states are missing or of other sizes")

    def fill(self, layer: Any, seen: int) -> None:
        for static, theirs, number in self._pairs(layer):
            copy_rows(static, theirs[number])

    def drain(self, layer: Any, batch: int, seen: int) -> None:
        for static, theirs, number in self._pairs(layer):
            theirs[number] = static[:batch].clone()

    def release(self, layer: Any) -> None:
        """States are small: they stay until they are written anew."""

    def reorder(self, rows: Tensor) -> None:
        for static in (*self.conv_states.values(), *self.recurrent_states.values()):
            static.copy_(static.index_select(0, rows))


def form_of(layer: Any, kind: str) -> StatesForm | None:
    """The form of transformers' layer that has states alone."""
    return StatesForm(states_of(layer)) if _LAYER is not None and type(layer) is _LAYER else None


def states_of(layer: Any) -> tuple[State, ...]:
    """The states of a layer after a prompt."""
    if layer.record_past:
        raise CannotMove("it records past states")
    found = []
    for kind, states in ((CONVOLUTION, layer.conv_states), (RECURRENT, layer.recurrent_states)):
        for number, state in states.items():
            if state is not None:
                found.append(State(kind, number, tuple(state.shape[1:]), state.dtype))
    if not found:
        raise CannotMove("it has no state of its own")
    return tuple(found)


MASKS = {"linear_attention": no_mask, "conv": no_mask}
