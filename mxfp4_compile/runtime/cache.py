"""Static keys and values of one recorded decode step, and the cache object that moves into them.

A generation begins with transformers' own dynamic cache, so that its prefill is the eager one, whatever the
model. After it the keys and values move into static tensors. A full layer holds every position; a layer with a
sliding window of W holds W slots in a ring (position p in slot p mod W): keys carry their rotary position
already, so that their order does not matter to attention, and the same graph is right before and past the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import utils as _generation

# What transformers calls a cache in arguments and outputs: "cache" from 5.24 on.
CACHE = "cache" if "cache" in getattr(_generation, "ALL_CACHE_NAMES", ()) else "past_key_values"


class CannotMove(RuntimeError):
    """A cache of a kind that has no static form here; the message says which."""


@dataclass(frozen=True)
class LayerShape:
    """Keys [B, heads, slots, key_dim] and values [B, heads, slots, value_dim] of one layer; window None: full."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int | None

    def slots(self, length: int) -> int:
        """Slots of a cache for ``length`` positions."""
        return length if self.window is None else min(self.window, length)

    def bytes(self, rows: int, length: int) -> int:
        """Bytes of keys and values."""
        return rows * self.heads * self.slots(length) * (self.key_dim + self.value_dim) * self.dtype.itemsize


def shapes_of(cache: Any) -> tuple[LayerShape, ...]:
    """The layers of a filled dynamic cache; CannotMove names the first that is not plain keys and values."""
    shapes = []
    for i, layer in enumerate(cache.layers):
        kind = type(layer)
        if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise CannotMove(f"layer {i} keeps a {kind.__name__}, which has no static form here")
        if not layer.is_initialized or layer.keys.dim() != 4:
            raise CannotMove(f"layer {i} keeps no keys and values of its own")
        window = layer.sliding_window if kind is DynamicSlidingWindowLayer else None
        keys, values = layer.keys, layer.values
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, window))
    windows = {s.window for s in shapes if s.window is not None}
    if len(windows) > 1:
        raise CannotMove(f"its layers have different sliding windows ({sorted(windows)})")
    if not shapes:
        raise CannotMove("its cache has no layers")
    return tuple(shapes)


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

    def missing(self, shapes: Sequence[LayerShape], rows: int, length: int) -> int:
        """Bytes to be allocated before a cache of this size exists."""
        need = 0
        for i, shape in enumerate(shapes):
            held = sum(t.numel() * t.element_size() for (j, _), t in self._tensors.items() if j == i)
            wanted = shape.bytes(rows, length)
            need += wanted if wanted > held else 0
        return need


class StaticLayerView:
    """What one decoder layer sees as its cache while a decode step is traced and recorded."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.slot = slot

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values [B, heads, 1, dim]; returns everything."""
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values


class StaticKV(Cache):  # type: ignore[misc]
    """Static keys and values of all layers with the position of the next token, for ``rows`` rows.

    position: int64 [1], tokens seen so far. allowed: bool [rows, length], False where the prompt was padded.
    """

    def __init__(
        self, shapes: tuple[LayerShape, ...], rows: int, length: int, device: torch.device, arena: Arena
    ) -> None:
        self.shapes, self.rows, self.length = shapes, rows, length
        self.window = next((s.window for s in shapes if s.window is not None), None)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.ring_slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.allowed = torch.ones(rows, length, dtype=torch.bool, device=device)
        self._slots = torch.arange(length, device=device)
        self.views = []
        for i, shape in enumerate(shapes):
            lead = (rows, shape.heads, shape.slots(length))
            keys = arena.take(i, "keys", (*lead, shape.key_dim), shape.dtype, device)
            values = arena.take(i, "values", (*lead, shape.value_dim), shape.dtype, device)
            slot = self.position if shape.window is None else self.ring_slot
            self.views.append(StaticLayerView(keys, values, slot))

    def full_views(self) -> list[StaticLayerView]:
        """The layers without a window."""
        return [v for s, v in zip(self.shapes, self.views, strict=True) if s.window is None]

    # what a model's forward may ask of a cache in a decode step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.views[layer_idx].update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.position[0]

    @property
    def layers(self) -> list[StaticLayerView]:
        return self.views

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [s.window is not None for s in self.shapes]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.shapes)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self.shapes)

    # inside the recorded step

    def masks(self) -> dict[str, Tensor]:
        """bool [rows, 1, 1, slots] by kind of layer: what the token at ``position`` may attend to."""
        out = {"full_attention": (self.allowed & (self._slots <= self.position))[:, None, None, :]}
        if self.window is not None:
            ring = min(self.window, self.length)
            self.ring_slot.copy_(self.position % ring)
            slots = self._slots[:ring]
            # The latest position whose slot this is, at most the current one; negative: not written yet.
            held = self.position - (self.position - slots) % ring
            valid = (held >= 0) & (held > self.position - self.window)
            out["sliding_attention"] = (self.allowed[:, held.clamp(min=0)] & valid)[:, None, None, :]
        return out

    # moving in and out

    def fill(self, cache: Any, attention_mask: Tensor | None) -> int:
        """Take over a dynamic cache [B <= rows]; rows beyond it repeat row 0. Returns the tokens in it.

        attention_mask: [B, >= tokens], nonzero where a position may be attended to, or None for everywhere.
        """
        seen = int(cache.get_seq_length())
        self.position.fill_(seen)
        self.allowed.fill_(True)
        if attention_mask is not None:
            self._rows(self.allowed[:, :seen], attention_mask[:, :seen].bool())
        for shape, view, layer in zip(self.shapes, self.views, cache.layers, strict=True):
            for target, source in ((view.keys, layer.keys), (view.values, layer.values)):
                target.zero_()
                held = source.shape[2]
                if shape.window is None:
                    self._rows(target[:, :, :held], source)
                else:
                    ring = target.shape[2]
                    keep = min(held, ring)
                    slots = torch.arange(seen - keep, seen, device=target.device) % ring
                    part = source[:, :, held - keep :]
                    target[: part.shape[0]].index_copy_(2, slots, part)
                    if part.shape[0] < self.rows:
                        target[part.shape[0] :] = target[:1]
        return seen

    def _rows(self, target: Tensor, source: Tensor) -> None:
        batch = source.shape[0]
        target[:batch].copy_(source)
        if batch < self.rows:
            target[batch:].copy_(source[:1].expand(self.rows - batch, *source.shape[1:]))

    def drain(self, cache: Any, batch: int, seen: int) -> None:
        """The reverse of ``fill``: keys and values of ``seen`` tokens, back into a dynamic cache."""
        for shape, view, layer in zip(self.shapes, self.views, cache.layers, strict=True):
            if shape.window is None:
                slots = torch.arange(seen, device=view.keys.device)
            else:
                slots = torch.arange(max(seen - shape.window + 1, 0), seen, device=view.keys.device)
                slots %= view.keys.shape[2]
                layer.cumulative_length = seen
            layer.keys = view.keys[:batch].index_select(2, slots)
            layer.values = view.values[:batch].index_select(2, slots)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was (int64 [B <= rows]); padded rows stay copies of row 0."""
        rows = rows.to(self.position.device)
        if rows.numel() < self.rows:
            rows = torch.cat([rows, rows[:1].expand(self.rows - rows.numel())])
        for view in self.views:
            view.keys.copy_(view.keys.index_select(0, rows))
            view.values.copy_(view.values.index_select(0, rows))


class HandoverCache(DynamicCache):  # type: ignore[misc]
    """A dynamic cache that lends its contents to a StaticKV while recorded steps run, and is itself otherwise.

    Anything but a recorded step takes the contents back first (``settle``), so that the object is always a
    true account of the tokens seen.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.__dict__.update(cache.__dict__)
        self._static: StaticKV | None = None
        self._batch = 0
        self._seen = 0

    @property
    def static(self) -> StaticKV | None:
        """Where the contents are now, if not here."""
        return self._static

    def lend(self, static: StaticKV, attention_mask: Tensor | None) -> None:
        """Move the contents to ``static``; the dynamic tensors are let go."""
        self._batch = self.layers[0].keys.shape[0]
        self._seen = static.fill(self, attention_mask)
        self._static = static
        for layer in self.layers:
            layer.keys = layer.keys[:, :, :0].clone()
            layer.values = layer.values[:, :, :0].clone()

    def advance(self) -> None:
        """One recorded step was run."""
        self._seen += 1

    def settle(self, forget: int = 0) -> None:
        """Take the contents back, without the last ``forget`` tokens."""
        static, self._static = self._static, None
        if static is not None:
            static.drain(self, self._batch, self._seen - forget)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen if self._static is not None else super().get_seq_length(layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().update(*args, **kwargs)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().get_mask_sizes(*args, **kwargs)

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
        """An ordinary DynamicCache with these contents, for the user to keep."""
        self.settle()
        cache = DynamicCache.__new__(DynamicCache)
        cache.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_static", "_batch", "_seen")})
        return cache
