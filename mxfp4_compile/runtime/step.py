"""One decode step of a model over static tensors: compiled layer by layer, recorded, replayed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import announce
from . import attention, latent
from .caches.base import CACHE, Arena, LayerForm
from .caches.kinds import DYNAMIC_MASKS
from .caches.step_cache import StepCache
from .graphs import Recorder
from .layers import LayerFunction, layers_run_by
from .packing import Siblings, packed_forwards


@dataclass(frozen=True)
class StepKey:
    """Rows and cache length of a recorded step; planes: how many kinds of positions a token has, 0 for just one."""

    rows: int
    length: int
    planes: int = 0

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Shape of position_ids."""
        return (self.planes, self.rows, 1) if self.planes else (self.rows, 1)

    def __str__(self) -> str:
        return f"batch {self.rows}, {self.length} tokens"


class DecodeStep:
    """The static tensors of one step and its recording.

    tokens int64 [rows, 1] and position_ids int64 [..., rows, 1] are read; logits fp32 [rows, V] and greedy
    int64 [rows] (the argmax) are written. Each ``run`` advances position and position_ids by one.
    """

    def __init__(
        self,
        model: nn.Module,
        key: StepKey,
        forms: tuple[LayerForm, ...],
        kinds: tuple[str, ...],
        recorder: Recorder,
        arena: Arena,
        *,
        layer: LayerFunction | None,
        any_length: bool = False,
        use_attention: bool,
        absorb: bool = False,
        siblings: Sequence[Siblings] = (),
    ) -> None:
        """``kinds``: by which the forward wants its masks, empty for just one. ``layer``: what ``compiled_layer``
        returned for as many rows, or None to record layers as they are. ``any_length``: it is to be compiled for
        caches of every length. ``absorb``: attention over latents (latent.py). ``siblings``: Linear modules that are
        one product (packing.py), for a ``layer`` that was compiled for it."""
        started = time.perf_counter()
        device = next(model.parameters()).device
        self.key = key
        self.cache = StepCache(forms, key.rows, key.length, device, arena)
        self._any_length = any_length
        for view in self.cache.views if any_length else ():
            view.mark_dynamic()
        self.tokens = torch.zeros(key.rows, 1, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros(key.position_shape, dtype=torch.int64, device=device)
        self.logits = torch.empty(0)
        self.greedy = torch.empty(0)
        self.output_class: Any = None
        self.notes: list[str] = []
        self._model = model
        self._kinds = kinds
        self._attention, self._absorb = use_attention, absorb
        self._layer, self._siblings = layer, tuple(siblings)
        self.recording = recorder.record(self._in_place, 2)
        self.seconds = time.perf_counter() - started
        self.bytes = self.recording.bytes

    def run_taught(self, teach: Callable[..., Any]) -> None:
        """Run the step once as it was recorded, each decoder layer through ``teach(index, args, kwargs, call)``."""
        self._in_place(teach)

    def run_unrecorded(self) -> None:
        """Run the step once as it was recorded."""
        self._in_place()

    def _in_place(self, teach: Callable[..., Any] | None = None) -> None:
        layers = layers_run_by(self._model, self.cache, self._layer, self.notes.append, teach)
        own = attention.exchanged(self._model) if self._attention else nullcontext()
        packed = packed_forwards(self._siblings)
        with own, latent.absorbed(self._model) if self._absorb else nullcontext(), packed, layers:
            self._run()

    def _run(self) -> None:
        out = self._model.forward(
            input_ids=self.tokens,
            attention_mask=self._masks(),
            position_ids=self.position_ids,
            use_cache=True,
            return_dict=True,
            **{CACHE: self.cache},
        )
        self.output_class = type(out)
        logits = out.logits[:, -1]
        if self.logits.shape != logits.shape:
            self.logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            self.greedy = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        self.logits.copy_(logits)
        torch.argmax(self.logits, dim=-1, out=self.greedy)
        self.cache.position.add_(1)
        self.position_ids.add_(1)

    def _masks(self) -> Any:
        """What the model's forward is given as attention_mask."""
        only = "full_attention" if all(f.window is None for f in self.cache.forms) else "sliding_attention"
        masks: dict[str, Any] = self.cache.masks(self._kinds or (only,))
        for kind in DYNAMIC_MASKS & masks.keys() if self._any_length else ():
            torch._dynamo.maybe_mark_dynamic(masks[kind], 3)
        if not self._attention and getattr(self._model.config, "_attn_implementation", None) == "eager":
            dtype = next(self._model.parameters()).dtype
            masks = {kind: None if mask is None else _additive(mask, dtype) for kind, mask in masks.items()}
        return masks if self._kinds else masks[only]

    def replay(self) -> None:
        """Run the step on what the static tensors hold, asynchronously."""
        announce("a recorded step")
        self.recording.replay()


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as transformers' eager attention wants it: 0 or the lowest number."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def expand_rows(source: Tensor, rows: int, dim: int = 0) -> Tensor:
    """[.., B, ..] -> [.., rows, ..] along ``dim``: rows beyond B repeat row 0."""
    missing = rows - source.shape[dim]
    if not missing:
        return source
    first = source.narrow(dim, 0, 1)
    return torch.cat([source, first.expand(*source.shape[:dim], missing, *source.shape[dim + 1 :])], dim)
