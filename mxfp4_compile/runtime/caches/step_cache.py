"""The static caches of all layers of one recorded decode step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .base import Arena, CannotMove, Clock, LayerForm, LayerView, Place
from .dummy import DummyForm
from .full import FullForm
from .kinds import forms_of, mask_of
from .states import StatesForm, StatesView


class StepCache(Cache):  # type: ignore[misc]
    """Static tensors of all layers with the position of the next token, for ``rows`` rows and ``length`` tokens."""

    def __init__(
        self, forms: tuple[LayerForm, ...], rows: int, length: int, device: torch.device, arena: Arena
    ) -> None:
        self.forms, self.rows, self.length = forms, rows, length
        self.clock = Clock(rows, length, device)
        self.views = [form.make(Place(i, self.clock, arena)) for i, form in enumerate(forms)]

    @property
    def position(self) -> Tensor:
        """int64 [1], tokens seen so far."""
        return self.clock.position

    # what a model's forward may ask of a cache in a decode step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.views[layer_idx].update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.position[0]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.position[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        return self.views[layer_idx].get_mask_sizes(query_length, layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        return self._of_states(layer_idx).get_conv_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self._of_states(layer_idx).update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        return self._of_states(layer_idx).get_recurrent_state(layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return self._of_states(layer_idx).update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        view: Any = self.views[layer_idx]
        written: Tensor = view.update_indexer(indexer_key_states, layer_idx)
        return written

    def _of_states(self, layer_idx: int) -> StatesView:
        view = self.views[layer_idx]
        assert isinstance(view, StatesView), f"layer {layer_idx} has no states"
        return view

    @property
    def layers(self) -> list[LayerView]:
        return self.views

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [f.window is not None for f in self.forms]

    @property
    def is_linear(self) -> list[bool]:
        return [isinstance(f, StatesForm) for f in self.forms]

    @property
    def is_dummy(self) -> list[bool]:
        return [isinstance(f, DummyForm) for f in self.forms]

    # inside the recorded step

    def masks(self, kinds: Iterable[str]) -> dict[str, Tensor | None]:
        """bool [rows, 1, 1, slots] by kind of layer: what the token at ``position`` may attend to."""
        self.clock.tick()
        return {kind: mask_of(kind, self.clock, self.forms) for kind in kinds}

    # moving in and out

    def check(self, cache: Any, config: Any, batch: int) -> None:
        """Raise CannotMove unless a dynamic cache of ``batch`` rows is one that ``fill`` takes, or is still empty."""
        if not len(cache.layers):
            if not all(type(form) is FullForm for form in self.forms):
                raise CannotMove("it was made without the model's configuration")
            return
        seen = int(cache.get_seq_length())
        if len(cache.layers) != len(self.views):
            raise CannotMove(f"it has {len(cache.layers)} layers, not {len(self.views)}")
        if seen == 0:
            return
        for i, (form, theirs) in enumerate(zip(self.forms, forms_of(cache, config), strict=True)):
            if form != theirs:
                raise CannotMove(f"layer {i} is {theirs}, not {form}")
        for i, (view, layer) in enumerate(zip(self.views, cache.layers, strict=True)):
            for held in view.held(layer):
                if held.shape[0] != batch or held.device != self.position.device:
                    raise CannotMove(f"layer {i} has {held.shape[0]} rows on {held.device}")
            view.check(layer, seen)

    def fill(self, cache: Any, attention_mask: Tensor | None) -> int:
        """Take over a dynamic cache [B <= rows]; rows beyond it repeat row 0. Returns the tokens in it.

        attention_mask: [B, >= tokens], nonzero where a position may be attended to, or None for everywhere. Raises
        CannotMove if the cache is not of this form.
        """
        if len(cache.layers) != len(self.views):
            raise CannotMove(f"the cache has {len(cache.layers)} layers and the step {len(self.views)}")
        seen = int(cache.get_seq_length())
        for view, layer in zip(self.views, cache.layers, strict=True):
            view.check(layer, seen)
        self.clock.set(seen, attention_mask)
        for view, layer in zip(self.views, cache.layers, strict=True):
            view.fill(layer, seen)
        return seen

    def drain(self, cache: Any, batch: int, seen: int) -> None:
        """The reverse of ``fill``: what ``seen`` tokens left behind, back into a dynamic cache."""
        for view, layer in zip(self.views, cache.layers, strict=True):
            view.drain(layer, batch, seen)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was (int64 [B <= rows]); padded rows stay copies of row 0."""
        rows = rows.to(self.position.device)
        if rows.numel() < self.rows:
            rows = torch.cat([rows, rows[:1].expand(self.rows - rows.numel())])
        for view in self.views:
            view.reorder(rows)
