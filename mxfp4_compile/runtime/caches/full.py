"""Keys and values of every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .base import CannotMove, Clock, LayerForm, LayerView, Place, copy_rows


@dataclass(frozen=True)
class FullForm(LayerForm):
    """Keys [B, heads, length, key_dim] and values [B, heads, length, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    grows_with_length = True

    def bytes(self, rows: int, length: int) -> int:
        return rows * self.heads * length * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def make(self, place: Place) -> FullView:
        lead = (place.clock.rows, self.heads, place.clock.length)
        keys = place.take("keys", (*lead, self.key_dim), self.dtype)
        return FullView(keys, place.take("values", (*lead, self.value_dim), self.dtype), place.clock)


class FullView(LayerView):
    def __init__(self, keys: Tensor, values: Tensor, clock: Clock) -> None:
        self.keys, self.values = keys, values
        self.position = self.slot = clock.position  # of the next token, and where it is written

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        return self.keys.shape[2], 0

    def held(self, layer: Any) -> list[Tensor]:
        return [layer.keys, layer.values]

    def check(self, layer: Any, seen: int) -> None:
        if layer.keys.shape[2] != seen or seen > self.keys.shape[2]:
            raise CannotMove(
                f"a layer holds {layer.keys.shape[2]} tokens of {seen}, and has room for {self.keys.shape[2]}"
            )

    def fill(self, layer: Any, seen: int) -> None:
        for target, source in ((self.keys, layer.keys), (self.values, layer.values)):
            target.zero_()
            copy_rows(target[:, :, :seen], source)

    def drain(self, layer: Any, batch: int, seen: int) -> None:
        layer.keys = self.keys[:batch, :, :seen].clone()
        layer.values = self.values[:batch, :, :seen].clone()

    def release(self, layer: Any) -> None:
        layer.keys = layer.keys[:, :, :0].clone()
        layer.values = layer.values[:, :, :0].clone()

    def reorder(self, rows: Tensor) -> None:
        self.keys.copy_(self.keys.index_select(0, rows))
        self.values.copy_(self.values.index_select(0, rows))

    def mark_dynamic(self) -> None:
        torch._dynamo.maybe_mark_dynamic(self.keys, 2)
        torch._dynamo.maybe_mark_dynamic(self.values, 2)


def form_of(layer: Any, kind: str) -> FullForm | None:
    """The form of transformers' plain layer."""
    return full_form(layer) if type(layer) is DynamicLayer else None


def full_form(layer: Any) -> FullForm:
    """The form of a layer's keys [B, heads, T, key_dim] and values [B, heads, T, value_dim]."""
    keys, values = keys_and_values(layer)
    return FullForm(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)


def keys_and_values(layer: Any) -> tuple[Tensor, Tensor]:
    """What a filled layer holds; CannotMove if that is nothing of its own."""
    if not layer.is_initialized or layer.keys is None or layer.keys.dim() != 4:
        raise CannotMove("it keeps no keys and values of its own")
    return layer.keys, layer.values


def mask(clock: Clock, forms: Sequence[LayerForm]) -> Tensor:
    """bool [rows, 1, 1, length]: every position up to the current one that is not padding."""
    return (clock.allowed & (clock.slots <= clock.position))[:, None, None, :]


MASKS = {"full_attention": mask}
