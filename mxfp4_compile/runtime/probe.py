"""A short eager generation against which a recorded step is checked."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin

from .caches.base import CACHE, CannotMove, LayerForm
from .caches.kinds import forms_of, mask_kinds, unknown_kinds
from .step import DecodeStep


class Probe:
    """A short eager generation against which a recorded step is checked, with left padding and past a window."""

    def __init__(self, model: Any, rows: int, longest: int) -> None:
        """``rows`` rows of at most ``longest`` tokens."""
        self.model, self.rows = model, rows
        ids = probe_tokens(model, rows, 10, longest)
        self.mask = torch.ones_like(ids)
        if rows > 1:
            self.mask[1, :3] = 0
        positions = positions_of(self.mask)
        self.token, self.positions = ids[:, -1:], positions
        output = model(
            input_ids=ids[:, :-1],
            attention_mask=self._mask(ids.shape[1] - 1),
            position_ids=positions[:, :-1],
            use_cache=True,
            **last_logits(model),  # all of them, for many rows and a large vocabulary, are gigabytes
        )
        self.cache = getattr(output, CACHE)

    def _mask(self, length: int) -> Tensor | None:
        return self.mask[:, :length] if self.rows > 1 else None

    def forms(self) -> tuple[LayerForm, ...]:
        """The layers of the cache that the model made; CannotMove if one has no static form."""
        return forms_of(self.cache, self.model.config.get_text_config(decoder=True))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds by which the forward wants its masks; CannotMove if the model makes others of its own."""
        kinds = mask_kinds(self.model.config.get_text_config(decoder=True))
        usual = getattr(GenerationMixin, "create_masks_for_generate", None)
        if getattr(type(self.model), "create_masks_for_generate", None) is usual:
            return kinds
        masks = self.model.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty(*self.token.shape, 1, device=self.token.device),
            attention_mask=self._mask(self.mask.shape[1]),
            position_ids=self.positions[:, -1:],
            **{CACHE: self.cache},
        )
        if not isinstance(masks, dict) or any(m is not None and m.dim() != 4 for m in masks.values()):
            raise CannotMove("the model makes attention masks of its own, which are not by position")
        others = unknown_kinds(masks)
        if others:
            raise CannotMove(f"the model makes attention masks of its own ({', '.join(others)})")
        return tuple(sorted({*kinds, *masks}))

    def _set(self, step: DecodeStep) -> None:
        """The token after the prompt, for the step to run."""
        step.cache.fill(self.cache, self._mask(self.mask.shape[1] - 1))
        step.tokens.copy_(self.token)
        step.position_ids.copy_(self.positions[:, -1:])

    def difference_when_recorded(self, step: DecodeStep) -> float:
        """Relative difference of the step's logits as recorded from the same step's unrecorded."""
        self._set(step)
        step.run_unrecorded()
        expected = step.logits.clone()
        self._set(step)
        step.replay()
        return relative_error(step.logits, expected)

    def error_of(self, step: DecodeStep) -> float:
        """Relative error of the step's logits for the token after the prompt."""
        self._set(step)
        step.replay()
        return relative_error(step.logits, self.eager_step().logits[:, -1])

    def eager_step(self) -> Any:
        """The model's own output for the token after the prompt."""
        return self.model(
            input_ids=self.token,
            attention_mask=self._mask(self.mask.shape[1]),
            position_ids=self.positions[:, -1:],
            use_cache=True,
            **{CACHE: copy.deepcopy(self.cache)},
        )


def probe_tokens(model: Any, rows: int, length: int, longest: int = 1024) -> Tensor:
    """Random tokens int64 [rows, length] on the model's device, the same ones every time.

    Longer by a sliding window or chunk, to go past it, if that makes at most ``longest`` tokens.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
    length += window if window <= 512 and length + window <= longest else 0
    return random_tokens(model, rows, length, 0)


def random_tokens(model: Any, rows: int, length: int, seed: int) -> Tensor:
    """Random tokens int64 [rows, length] on the model's device."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(next(model.parameters()).device)


def positions_of(mask: Tensor) -> Tensor:
    """Positions int64 [B, T] of left-padded tokens, as transformers counts them: the first that is not padding is 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Of all elements together, in fp64; infinite where shapes differ or something is not finite."""
    if got.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def last_logits(model: nn.Module) -> dict[str, Any]:
    """The argument that asks the model's forward for the last token's logits alone, if it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
