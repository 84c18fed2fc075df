"""Keys and values of every position beside the keys of an indexer, which chooses positions to attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from .base import CannotMove, Clock, LayerForm, Place, copy_rows
from .full import FullForm, FullView, full_form, mask

_LAYER = getattr(cache_utils, "DynamicIndexedLayer", None)


@dataclass(frozen=True)
class IndexedForm(LayerForm):
    """A full layer and the indexer's keys, [B, length, indexer_dim]."""

    full: FullForm
    indexer_dim: int
    indexer_dtype: torch.dtype

    grows_with_length = True

    def bytes(self, rows: int, length: int) -> int:
        return self.full.bytes(rows, length) + rows * length * self.indexer_dim * self.indexer_dtype.itemsize

    def make(self, place: Place) -> IndexedView:
        full = self.full.make(place)
        shape = (place.clock.rows, place.clock.length, self.indexer_dim)
        indexer = place.take("indexer_keys", shape, self.indexer_dtype)
        return IndexedView(full.keys, full.values, indexer, place.clock)


class IndexedView(FullView):
    def __init__(self, keys: Tensor, values: Tensor, indexer_keys: Tensor, clock: Clock) -> None:
        super().__init__(keys, values, clock)
        self.indexer_keys = indexer_keys

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Write one token's indexer keys [B, 1, dim]; returns everything, of which the mask shows what is used."""
        self.indexer_keys.index_copy_(1, self.position, indexer_key_states)
        return self.indexer_keys

    def held(self, layer: Any) -> list[Tensor]:
        return [*super().held(layer), layer.indexer_keys]

    def check(self, layer: Any, seen: int) -> None:
        super().check(layer, seen)
        if layer.indexer_keys is None or layer.indexer_keys.shape[1] != seen:
            raise CannotMove("a layer's indexer has not seen all tokens")

    def fill(self, layer: Any, seen: int) -> None:
        super().fill(layer, seen)
        self.indexer_keys.zero_()
        copy_rows(self.indexer_keys[:, :seen], layer.indexer_keys)

    def drain(self, layer: Any, batch: int, seen: int) -> None:
        super().drain(layer, batch, seen)
        layer.indexer_keys = self.indexer_keys[:batch, :seen].clone()

    def release(self, layer: Any) -> None:
        super().release(layer)
        layer.indexer_keys = layer.indexer_keys[:, :0].clone()

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.indexer_keys.copy_(self.indexer_keys.index_select(0, rows))

    def mark_dynamic(self) -> None:
        super().mark_dynamic()
        torch._dynamo.maybe_mark_dynamic(self.indexer_keys, 1)


def form_of(layer: Any, kind: str) -> LayerForm | None:
    """The form of transformers' layer with an indexer; of one whose indexer is another layer's, a full one."""
    if _LAYER is None or type(layer) is not _LAYER:
        return None
    if layer.indexer_position_ids is not None:
        raise CannotMove("its indexer keeps positions, which have no static form here")
    if not layer.is_indexer_initialized:
        return full_form(layer)
    keys = layer.indexer_keys
    if keys.dim() != 3:
        raise CannotMove("its indexer's keys have several heads")
    return IndexedForm(full_form(layer), keys.shape[2], keys.dtype)


MASKS = {"indexed_attention": mask}
