"""What a kind of cache is: a form, which says how large its static tensors are, and a view, which has them.

A new kind is one file with a form, a view, ``form_of`` and ``MASKS``, and its name in kinds.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import utils as _generation

# What transformers calls a cache in arguments and outputs: "cache" from 5.24 on.
CACHE = "cache" if "cache" in getattr(_generation, "ALL_CACHE_NAMES", ()) else "past_key_values"


class CannotMove(RuntimeError):
    """A cache that has no static form here, or whose contents do not fit into one; the message says which."""


class Arena:
    """Memory that the static caches of all capture sizes share: only one of them is in use at a time."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[int, str], Tensor] = {}

    def take(self, index: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of ``shape`` at the front of what is there, or of new memory where that is too small."""
        count = 1
        for n in shape:
            count *= n
        held = self._tensors.get((index, name))
        if held is None or held.numel() < count or held.dtype != dtype:
            held = self._tensors[(index, name)] = torch.zeros(count, dtype=dtype, device=device)
        return held[:count].view(shape)

    def missing(self, forms: Sequence[LayerForm], rows: int, length: int) -> int:
        """Bytes to be allocated before a cache of this size exists."""
        need = 0
        for i, form in enumerate(forms):
            held = sum(t.numel() * t.element_size() for (j, _), t in self._tensors.items() if j == i)
            wanted = form.bytes(rows, length)
            need += wanted if wanted > held else 0
        return need


class Clock:
    """Where a step stands, for all layers: static tensors that its masks and cache slots come from.

    position: int64 [1], tokens seen so far. allowed: bool [rows, length], False where the prompt was padded. padding:
    int64 [rows], tokens of padding on the left. slots: int64 [length], 0, 1, 2, ...
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length, self.device = rows, length, device
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.allowed = torch.ones(rows, length, dtype=torch.bool, device=device)
        self.padding = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.arange(length, device=device)
        self._rings: dict[int, Tensor] = {}

    def ring_slot(self, size: int) -> Tensor:
        """int64 [1]: the slot of ``position`` in a ring of ``size`` slots, as of the last ``tick``."""
        if size not in self._rings:
            self._rings[size] = torch.zeros(1, dtype=torch.int64, device=self.device)
        return self._rings[size]

    def tick(self) -> None:
        """Work out ring slots for the current position; inside of the recorded step, before any layer."""
        for size, slot in self._rings.items():
            slot.copy_(self.position % size)

    def ring_positions(self, size: int) -> tuple[Tensor, Tensor]:
        """The position that each slot of a ring holds, int64 [size] (negative: none), and bool [rows, size], allowed.

        The latest position whose slot it is, at most the current one.
        """
        held = self.position - (self.position - self.slots[:size]) % size
        return held, self.allowed[:, held.clamp(min=0)] & (held >= 0)

    def set(self, seen: int, attention_mask: Tensor | None) -> None:
        """``seen`` tokens; attention_mask [B <= rows, >= seen], nonzero where a position may be attended to."""
        self.position.fill_(seen)
        self.allowed.fill_(True)
        if attention_mask is not None:
            copy_rows(self.allowed[:, :seen], attention_mask[:, :seen].bool())
        self.padding.copy_((self.allowed.cumsum(-1) == 0).sum(-1))


@dataclass(frozen=True)
class Place:
    """Where the static tensors of one layer are made."""

    index: int
    clock: Clock
    arena: Arena

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of ``shape`` in the arena."""
        return self.arena.take(self.index, name, shape, dtype, self.clock.device)


class LayerForm(ABC):
    """The static form of one layer's cache: a frozen dataclass of sizes and dtypes, equal for layers that are alike."""

    grows_with_length: bool = False  # whether a compilation can serve caches of every length
    forgets: bool = True  # whether the newest token can be taken back
    window: int | None = None

    @abstractmethod
    def bytes(self, rows: int, length: int) -> int:
        """Bytes of the static tensors."""

    @abstractmethod
    def make(self, place: Place) -> LayerView:
        """The static tensors, for ``place.clock.rows`` rows and a cache of ``place.clock.length`` tokens."""


class LayerView:
    """What one decoder layer sees as its cache while a decode step is traced and recorded.

    Whatever a layer may ask of transformers' cache is here under the same name; of ``layer_idx`` nothing is needed.
    """

    position: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values [B, heads, 1, dim]; returns everything."""
        raise NotImplementedError(f"{type(self).__name__} keeps no keys and values")

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen so far, an int64 scalar."""
        return self.position[0]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The position of the new token, an int64 scalar."""
        return self.position[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        """Slots, and what is added to a slot's number to have its position: 0, or int64 [slots]."""
        raise NotImplementedError(f"{type(self).__name__} keeps no keys and values")

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """Whether states can be taken back: not here."""
        return False

    # moving in and out

    def held(self, layer: Any) -> list[Tensor]:
        """The tensors [B, ...] of a dynamic layer that ``fill`` takes over."""
        return []

    def check(self, layer: Any, seen: int) -> None:
        """Raise CannotMove if a dynamic layer does not hold what ``seen`` tokens leave behind."""

    def fill(self, layer: Any, seen: int) -> None:
        """Take over a dynamic layer [B <= rows] of ``seen`` tokens; rows beyond it repeat row 0."""

    def drain(self, layer: Any, batch: int, seen: int) -> None:
        """The reverse of ``fill``: ``seen`` tokens, back into the dynamic layer."""

    def release(self, layer: Any) -> None:
        """Let go of the dynamic layer's memory."""

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was, int64 [rows]."""

    def mark_dynamic(self) -> None:
        """Tell Dynamo which sizes vary between caches of different lengths."""


def copy_rows(target: Tensor, source: Tensor) -> None:
    """source [B, ...] -> target [rows >= B, ...]: rows beyond B repeat row 0."""
    batch, rows = source.shape[0], target.shape[0]
    target[:batch].copy_(source)
    if batch < rows:
        target[batch:].copy_(source[:1].expand(rows - batch, *source.shape[1:]))
