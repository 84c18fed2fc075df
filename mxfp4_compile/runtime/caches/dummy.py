"""Layers without a cache: experts or an MLP alone, or attention that reads the keys and values of another layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import cache_utils

from .base import Clock, LayerForm, LayerView, Place

_LAYER = getattr(cache_utils, "DummyLayer", None)


@dataclass(frozen=True)
class DummyForm(LayerForm):
    """Nothing."""

    def bytes(self, rows: int, length: int) -> int:
        return 0

    def make(self, place: Place) -> DummyView:
        return DummyView(place.clock)


class DummyView(LayerView):
    def __init__(self, clock: Clock) -> None:
        self.position = clock.position


def form_of(layer: Any, kind: str) -> DummyForm | None:
    """The form of transformers' layer that stores nothing."""
    return DummyForm() if _LAYER is not None and type(layer) is _LAYER else None


def no_mask(clock: Clock, forms: Sequence[LayerForm]) -> None:
    """A new token is never padding."""


MASKS = {"moe": no_mask, "mlp": no_mask}
