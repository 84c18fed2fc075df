"""The plain loop: greedy decoding and sampling whose only reasons to stop are a length and end tokens.

The same operations as transformers' ``_sample`` in the same order, but the device is never waited for; whether
everything has finished is read one step late and the surplus token is dropped.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

from ..circumstances import random_state, set_random_state


class Decoding(Protocol):
    """What the loop needs of a call of ``generate``: the model, its recorded step, and the cache that moves into it."""

    model: Any
    driver: Any
    step: Any
    cache: Any
    handed_in: bool
    exact: bool

    def enter(self, attention_mask: Tensor | None, batch: int) -> None:
        """Move the cache of ``batch`` rows into the step, if it is not there."""

    def feed(self, tokens: Tensor, positions: Tensor | None) -> None:
        """The next token of each row, int64 [B]; positions [..., B or 1, 1], or None where they follow the cache."""


class _Late:
    """Values from the device, read one step after they were asked for; nothing waits for the newest step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[tuple[Tensor, ...], Any]] = deque()

    def put(self, *values: Tensor) -> None:
        copies = tuple(
            torch.empty(v.shape, dtype=v.dtype, pin_memory=self._cuda).copy_(v, non_blocking=self._cuda) for v in values
        )
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending.append((copies, event))

    def take(self, leave: int) -> list[tuple[Tensor, ...]]:
        """All but the newest ``leave`` of what was put, in order."""
        out = []
        while len(self._pending) > leave:
            copies, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            out.append(copies)
        return out


def plain_loop(
    session: Decoding,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """transformers' ``_sample`` without waiting for the device: int64 [B, prompt] -> [B, prompt + new]."""
    model, step = session.model, session.step
    device, batch = input_ids.device, input_ids.shape[0]
    do_sample: bool = generation_config.do_sample
    pad: Any = generation_config._pad_token_tensor
    ends = [c.eos_token_id.to(device) for c in stopping_criteria if hasattr(c, "eos_token_id")]
    max_length = stopping_criteria.max_length or generation_config.max_length
    pad = None if pad is None else pad.to(device)
    unfinished = torch.ones(batch, dtype=torch.int64, device=device)
    late = _Late(device)

    outputs = session.driver._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    del outputs
    start, seen = input_ids.shape[1], session.cache.get_seq_length()
    total = max(max_length, start + 1)
    sequences = torch.empty(batch, total, dtype=input_ids.dtype, device=device)
    sequences[:, :start] = input_ids
    positions = model_kwargs.get("position_ids")
    plain_greedy = not do_sample and len(logits_processor) == 0

    length, stopped, drawn = start, False, None
    greedy: Tensor | None = None
    while True:
        if plain_greedy:
            tokens = torch.argmax(logits, dim=-1) if greedy is None else greedy[:batch]
        else:
            scores = logits_processor(sequences[:, :length].contiguous(), logits)
            if do_sample:
                drawn = random_state(device) if ends else None
                tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                tokens = torch.argmax(scores, dim=-1)
        if ends:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        sequences[:, length] = tokens
        tokens = sequences[:, length]  # what the step writes is overwritten by the next one
        length += 1
        if ends:
            for end in ends:
                unfinished = unfinished & ~torch.isin(tokens, end)
        # Where no token can be taken back, the step after the last token must not run: the device is waited for.
        last = length >= total or (session.exact and bool(ends) and bool(unfinished.max() == 0))
        if not last:
            # Launched before anything is read back: the device has its next step while the host looks.
            if length == start + 1:
                session.enter(model_kwargs.get("attention_mask"), batch)
                session.feed(tokens, positions)
            else:
                feed_tokens(step, tokens)  # positions advance by themselves
            step.replay()
            session.cache.advance()
            greedy, logits = step.greedy, step.logits[:batch]
            if not plain_greedy:
                logits = logits.clone()  # processors may write to it
        if streamer is not None or ends:
            late.put(unfinished.max() == 0, tokens)
            for finished, streamed in late.take(0 if last else 1):
                if stopped:
                    break  # the surplus step: its tokens were never asked for
                if streamer is not None:
                    streamer.put(streamed.clone())
                stopped = bool(finished) and bool(ends)
        if last or stopped:
            break
    if stopped and not last:
        # Everything had finished one step before the newest token was drawn.
        length -= 1
        if drawn is not None:
            set_random_state(device, drawn)
    if session.handed_in:
        session.cache.settle(seen + length - start - 1)
    if streamer is not None:
        streamer.end()
    return sequences[:, :length].clone() if length < total else sequences


def feed_tokens(step: Any, tokens: Tensor) -> None:
    """The next token of each row, int64 [B]; padded rows take that of row 0."""
    batch = tokens.shape[0]
    step.tokens[:batch, 0].copy_(tokens)
    if batch < step.key.rows:
        step.tokens[batch:, 0].copy_(tokens[0].expand(step.key.rows - batch))
