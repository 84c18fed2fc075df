"""Keys and values of a chunk: attention within blocks of C tokens, of which a ring of C slots holds the current one.

Chunks are counted from a row's first token that is not padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from .base import Clock, LayerForm
from .ring import RingForm, ring_form, window_of


def form_of(layer: Any, kind: str) -> RingForm | None:
    """The form of transformers' layer with a sliding window, where the configuration calls it chunked."""
    return ring_form(layer) if type(layer) is DynamicSlidingWindowLayer and kind == "chunked_attention" else None


def mask(clock: Clock, forms: Sequence[LayerForm]) -> Tensor:
    """bool [rows, 1, 1, slots]: the positions of the current chunk up to the current one that are not padding."""
    chunk = window_of(forms)
    held, allowed = clock.ring_positions(min(chunk, clock.length))
    first = clock.position - (clock.position - clock.padding) % chunk
    return (allowed & (held >= first[:, None]))[:, None, None, :]


MASKS = {"chunked_attention": mask}
