"""The forward of a prompt: compiled decoder layers that fill the same dynamic cache as the eager ones, and recordings.

A short prompt waits for launches: a layer's two hundred microseconds of work are forty operations. One compilation
of each structure of layer serves prompts of every length, and every batch above one (``Prefill``). Where a prompt has
few tokens, the forward is recorded whole (``RecordedPrompt``), for a length to which shorter prompts are padded on the
right: what follows a token does not change it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .caches.base import CACHE
from .caches.handover import HandoverCache
from .caches.kinds import mask_kinds
from .graphs import Recorder, brief
from .layers import LayerFunction, decoder_layers, layer_forwards, own_code
from .probe import last_logits, positions_of, probe_tokens, relative_error
from .step import expand_rows

_PROBE_TOKENS = 160


@dataclass(frozen=True)
class PromptKind:
    """What compilations differ by: one row or more, with padding or without."""

    batched: bool
    padded: bool

    def __str__(self) -> str:
        return f"prompts, {'several rows' if self.batched else 'one row'}{', padded' if self.padded else ''}"


def kind_of(batch: int, attention_mask: Tensor | None) -> PromptKind | None:
    """The kind of a prompt of ``batch`` rows; None for masks that are not [B, T]. Waits for the device."""
    if attention_mask is None:
        return PromptKind(batch > 1, False)
    if attention_mask.dim() != 2:
        return None
    return PromptKind(batch > 1, not bool(attention_mask.all()))


class Prefill:
    """Compiled decoder layers for one kind of prompt.

    error: of logits, keys and values on a probe, relative to the eager layers' (the largest of them). broken: why the
    layers run eagerly again, or None.
    """

    def __init__(self, model: nn.Module, kind: PromptKind) -> None:
        started = time.perf_counter()
        self.kind = kind
        self._model = model
        self._layers = decoder_layers(model)
        self.keys_alone = True
        self.broken = None if self._layers else "its decoder layers cannot be told apart"
        self._run = _compiled(kind)
        self.error = self._error() if self._layers else float("inf")
        self.seconds = time.perf_counter() - started

    @contextmanager
    def applied(self, masks: dict[int, Any] | None = None) -> Iterator[None]:
        """Inside the block the decoder layers are compiled where they begin a cache, and as they are elsewhere.

        masks: what each layer is given as attention_mask, written where it is missing and used where it is not; no
        layer runs eagerly then.
        """
        if self.broken is not None:
            yield
            return
        run = self._run
        with layer_forwards({layer: _Forward(self, run, layer, i, masks) for i, layer in self._layers.items()}):
            yield

    def _error(self) -> float:
        inputs, mask = _probe(self._model, self.kind)
        eager = self._model(**inputs, use_cache=True)
        with self.applied():
            compiled = self._model(**inputs, use_cache=True)
        return _difference(compiled, eager, mask) if self.broken is None else float("inf")


def _difference(got: Any, expected: Any, mask: Tensor) -> float:
    """The largest relative error of the last logits and of what each layer's cache holds where mask [B, T] has it."""
    pairs = [(got.logits[:, -1], expected.logits[:, -1])]
    for ours, theirs in zip(getattr(got, CACHE).layers, getattr(expected, CACHE).layers, strict=True):
        for name in ("keys", "values", "indexer_keys"):
            a, b = getattr(ours, name, None), getattr(theirs, name, None)
            if a is None or b is None:
                continue
            if a.shape != b.shape:
                return float("inf")
            held = mask[:, mask.shape[1] - b.shape[-2] :]
            a, b = (t.transpose(1, 2) if t.dim() == 4 else t for t in (a, b))
            pairs.append((a[held], b[held]))
        for name in ("conv_states", "recurrent_states"):
            a, b = getattr(ours, name, None) or {}, getattr(theirs, name, None) or {}
            pairs += [(a[i], t) for i, t in b.items() if t is not None]
    return max(relative_error(a, b) for a, b in pairs)


def _probe(model: Any, kind: PromptKind) -> tuple[dict[str, Any], Tensor]:
    """A forward's inputs, past a window where there is one, and its mask, bool [B, T]."""
    ids = probe_tokens(model, 3 if kind.batched else 1, _PROBE_TOKENS)
    mask = torch.ones_like(ids)
    if kind.padded:
        mask[0, :5] = 0
    inputs = {"input_ids": ids, "position_ids": positions_of(mask), **last_logits(model)}
    if kind.padded:
        inputs["attention_mask"] = mask
    return inputs, mask.bool()


class _Beginning:
    """The cache of one layer before the first token, which keeps what it is given.

    calls: (method of transformers' cache, tensors, the other arguments) in order, for the cache itself to be given.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.calls.append(("update", (key_states, value_states), {}))
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        self.calls.append(("update_indexer", (indexer_key_states,), {}))
        return indexer_key_states

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        size = {} if conv_kernel_size is None else {"conv_kernel_size": conv_kernel_size}
        self.calls.append(("update_conv_state", (conv_states,), {"state_idx": state_idx, **size}))
        missing = (conv_kernel_size or 0) - conv_states.shape[-1]
        return torch.nn.functional.pad(conv_states, (missing, 0)) if missing > 0 else conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self.calls.append(("update_recurrent_state", (recurrent_states,), {"state_idx": state_idx}))
        return recurrent_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def _run_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    cache = _Beginning()
    out = type(layer).forward(layer, *args, **{CACHE: cache}, **kwargs)
    return out, cache.calls


def _compiled(kind: PromptKind) -> Callable[..., tuple[Any, list[Any]]]:
    name = f"prompt_layer_{'batch' if kind.batched else 'row'}{'_padded' if kind.padded else ''}"
    return torch.compile(own_code(_run_layer, name), dynamic=True, fullgraph=True, options={})


class _Forward:
    """A decoder layer's forward for the time of one prompt, of the thread that makes it."""

    def __init__(
        self, owner: Prefill, run: LayerFunction, layer: nn.Module, index: int, masks: dict[int, Any] | None
    ) -> None:
        self._owner, self._run, self._layer, self._index, self._masks = owner, run, layer, index, masks
        self._thread = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if threading.get_ident() != self._thread:
            return type(self._layer).forward(self._layer, *args, **kwargs)
        if self._masks is not None:
            kwargs["attention_mask"] = self._masks.setdefault(self._index, kwargs.get("attention_mask"))
        if (
            self._owner.broken is None
            and isinstance(cache, DynamicCache)
            and _begins(cache, self._index)
            and isinstance(hidden, Tensor)
            and hidden.shape[1] > 1
        ):
            try:
                rest = {k: v for k, v in kwargs.items() if k != CACHE}
                out, calls = self._run(self._layer, args, rest)
            except torch.OutOfMemoryError:
                raise
            except Exception as failure:  # whatever the compiler says: the layer itself is still there
                if self._masks is not None:
                    raise
                self._owner.broken = brief(failure)
            else:
                for method, tensors, others in calls:
                    self._owner.keys_alone &= method == "update"
                    getattr(cache, method)(*tensors, self._index, **others)
                return out
        return type(self._layer).forward(self._layer, *args, **kwargs)


def _begins(cache: DynamicCache, index: int) -> bool:
    """Whether a layer's cache has seen no token."""
    if isinstance(cache, HandoverCache) and cache.static is not None:
        return False
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    states = getattr(layer, "has_previous_state", None) or {}
    seen = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
    return not seen and not any(states.values())


class _EmptyCache(DynamicCache):  # type: ignore[misc]
    """A cache that stays empty, as a prompt's layers see it, and hands out what they put in."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep one layer's keys and values [B, heads, T, dim]; returns them."""
        self.given[layer_idx] = (key_states, value_states)
        return key_states, value_states


class RecordedPrompt:
    """The forward of prompts of up to ``length`` tokens and ``rows`` rows without padding, recorded.

    tokens int64 [rows, length] and last int64 [1], the last token's index, are read; logits [rows, 1, V] and every
    layer's keys and values are written. error: as ``Prefill``'s, of a prompt that is shorter than ``length``.
    """

    def __init__(self, model: Any, rows: int, length: int, recorder: Recorder, prefill: Prefill) -> None:
        started = time.perf_counter()
        device = next(model.parameters()).device
        self.rows, self.length = rows, length
        self.tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.last = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.empty(0)
        self.output_class: Any = None
        self._model, self._prefill = model, prefill
        self._positions = torch.arange(length, device=device).expand(rows, length)
        self._cache = _EmptyCache(model.config.get_text_config(decoder=True))
        # What transformers makes of no mask depends on whether a graph is being recorded, and so would compilations.
        # Each layer is therefore given what it had outside of one; the model itself, something it only passes on.
        self._masks: dict[int, Any] = {}
        self._mask: Any = None
        self._run()
        whole = torch.ones(rows, 1, length, length, dtype=torch.bool, device=device)
        kinds = mask_kinds(model.config.get_text_config(decoder=True))
        self._mask = dict.fromkeys(kinds, whole) if kinds else whole
        self.recording = recorder.record(self._run, 2)
        self.error = self._error()
        self.seconds = time.perf_counter() - started
        self.bytes = self.recording.bytes

    def _run(self) -> None:
        with self._prefill.applied(self._masks):
            out = self._model.forward(
                input_ids=self.tokens,
                attention_mask=self._mask,
                position_ids=self._positions,
                use_cache=True,
                return_dict=True,
                logits_to_keep=self.last,
                **{CACHE: self._cache},
            )
        self.output_class = type(out)
        self.logits = out.logits

    def __call__(self, tokens: Tensor, cache: DynamicCache) -> Any:
        """tokens int64 [B, T] and an empty cache, which is filled; returns the model's output for the last token."""
        batch, count = tokens.shape
        self.tokens[:, :count].copy_(expand_rows(tokens, self.rows))
        self.tokens[:, count:].copy_(self.tokens[:, count - 1 : count].expand(-1, self.length - count))
        self.last.fill_(count - 1)
        self.recording.replay()
        for index, (keys, values) in sorted(self._cache.given.items()):
            cache.update(keys[:batch, :, :count], values[:batch, :, :count], index)
        return self.output_class(logits=self.logits[:batch].clone(), **{CACHE: cache})

    def _error(self) -> float:
        config = self._model.config.get_text_config(decoder=True)
        ids = probe_tokens(self._model, self.rows, self.length - 3, longest=0)
        positions = self._positions[:, : ids.shape[1]]
        expected = self._model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1)
        got = self(ids, DynamicCache(config=config))
        return _difference(got, expected, torch.ones_like(ids).bool())
