"""What a model is calibrated on: windows of token ids, from a string, files, ids, or written by the model itself.

Contract: whatever is wrong with the text is said here, before anything is computed, with ValueError or TypeError.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..hf_models import text_config, tokenizer_of
from ..passes.find.discover import default_inputs

Text: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Tensor | None"
"""A string is text itself; a PathLike, or a list of paths, are files; an integer tensor is token ids; None: the model
writes its own."""

Encode = Callable[[str], list[int]]

TOKENS = 524288
WINDOW = 2048

# One of so many tokens is held back, to judge by.
_HELD = 8
# Windows that the model writes at a time, and prompts for its own loss.
_WRITTEN, _PROMPTS, _PROMPT_TOKENS = 64, 16, 128
# A loss this near to log(vocabulary) is that of noise; this far above the model's own text's, that of a foreign one.
_NOISE, _FAR = 0.8, 1.0


@dataclass
class Windows:
    """``ids`` [n, window] int64 on the host; the last ``held`` of them are held back. ``text``: what they are of;
    ``file_hashes``: SHA-256 of each file, or of the text that is given.
    """

    ids: Tensor
    held: int
    text: str
    text_hash: str
    notes: list[str] = field(default_factory=list)
    file_hashes: list[str] = field(default_factory=list)

    @property
    def ids_hash(self) -> str:
        """SHA-256 of the ids, int64, little-endian."""
        return ids_hash(self.ids)


def ids_hash(ids: Tensor) -> str:
    """SHA-256 of token ids as int64, little-endian."""
    numbers = ids.flatten().tolist()
    return hashlib.sha256(struct.pack(f"<{len(numbers)}q", *numbers)).hexdigest()


def check_numbers(tokens: Any, window: Any, seed: Any) -> None:
    """ValueError or TypeError for numbers that make no sense, before a model is looked at."""
    for name, value, least in (("tokens", tokens, 2), ("window", window, 2), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if tokens < window:
        raise ValueError(f"tokens={tokens} is less than one window of {window}")


def check_text(text: Any) -> None:
    """TypeError or ValueError for what is no text, or files that cannot be read."""
    if text is None or isinstance(text, str):
        return
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise TypeError(f"a tensor as calibration text holds token ids, integers; this one is {text.dtype}")
        return
    files = [text] if isinstance(text, os.PathLike) else text
    if not isinstance(files, (list, tuple)) or not all(isinstance(f, (str, os.PathLike)) for f in files):
        raise TypeError(
            "calibration text is a str (the text itself), a path or list of paths (files), an integer tensor (token "
            f"ids), or None (the model writes its own); got {type(text).__name__}"
        )
    if not files:
        raise ValueError("an empty list of files is no calibration text")
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{os.fspath(file)} is no file to calibrate on")


def window_for(model: nn.Module, window: int) -> tuple[int, list[str]]:
    """The window, no longer than the model's positions, and a note where it is shorter than asked for."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(most, int) and 2 <= most < window:
        return most, [f"the model has {most} positions: calibrated on windows of {most} tokens, not {window}"]
    return window, []


def read_windows(model: nn.Module, text: Text, *, tokens: int, window: int, seed: int) -> Windows:
    """Windows of a text that is given (not None); a longer one than ``tokens`` is sampled by ``seed``.

    Raises ValueError for text that is shorter than a window, for ids outside the vocabulary, and for a model without a
    tokenizer where ids would be needed.
    """
    window, notes = window_for(model, window)
    hashes: list[str] = []
    if isinstance(text, Tensor):
        ids, what, digest = text.detach().cpu().long().flatten(), "token ids", ids_hash(text)
    else:
        parts, what = _content(text)
        content = "".join(parts)
        hashes = [hashlib.sha256(part.encode()).hexdigest() for part in parts]
        digest = hashlib.sha256(content.encode()).hexdigest()
        ids = torch.tensor(encoder(model)(content), dtype=torch.int64)
        if not len(ids):
            raise ValueError(f"{what} comes to no tokens at all")
    vocabulary = vocabulary_of(model)
    if len(ids) and vocabulary and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise ValueError(f"token ids must be in 0 .. {vocabulary - 1}; {what} has {int(ids.min())} .. {int(ids.max())}")
    if len(ids) < window:
        raise ValueError(f"{what} is {len(ids)} tokens long, less than one window of {window}")
    count = tokens // window
    whole = len(ids) // window
    if whole > count:
        generator = torch.Generator().manual_seed(seed)
        # One start in each of as many equal stretches: windows do not overlap, and all of the text is represented.
        stretch = len(ids) / count
        free = torch.rand(count, generator=generator, dtype=torch.float64) * (stretch - window)
        starts = (torch.arange(count, dtype=torch.float64) * stretch + free).long()
        notes.append(f"{what} has {len(ids)} tokens; {count} windows of {window} were sampled with seed {seed}")
        # Held back are windows of all of the text, not those of its end.
        starts = starts[torch.randperm(count, generator=generator)]
        cut = ids[starts[:, None] + torch.arange(window)]
    else:
        cut = ids[: whole * window].view(whole, window)
    return Windows(cut, held_of(len(cut)), what, digest, notes, hashes)


def held_of(count: int) -> int:
    """How many of ``count`` windows are held back: an eighth, one at least, none of a single one."""
    return 0 if count < 2 else max(1, count // _HELD)


def _content(text: Any) -> tuple[list[str], str]:
    if isinstance(text, str):
        return [text], "the text given"
    files = [Path(f) for f in ([text] if isinstance(text, os.PathLike) else text)]
    parts = []
    for file in files:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    return parts, ", ".join(file.name for file in files)


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens the model knows, 0 if it does not say."""
    return int(getattr(text_config(model), "vocab_size", 0) or 0)


def encoder(model: nn.Module) -> Encode:
    """How a text becomes token ids: by the tokenizer beside the model's weights; bytes for a vocabulary of 256."""
    place = str(getattr(model, "name_or_path", "") or "")
    tokenizer = tokenizer_of(place) if place else None
    if tokenizer is not None:
        return lambda content: list(tokenizer(content)["input_ids"])
    if vocabulary_of(model) == 256:  # a byte-level model, as the demo's
        return lambda content: list(content.encode())
    where = f"{place} has" if place else "the model has"
    raise ValueError(f"{where} no tokenizer to read a text with: pass token ids, an integer tensor, instead")


# text that the model writes itself


def write_windows(
    model: nn.Module, *, tokens: int, window: int, seed: int, progress: Callable[[int], None] = lambda _: None
) -> Windows:
    """Windows that the model writes itself, at temperature 1 from its first token.

    Raises ValueError for a model that cannot.
    """
    window, notes = window_for(model, window)
    count = tokens // window
    start = first_token(model)
    pieces = []
    for done in range(0, count, _WRITTEN):
        pieces.append(written(model, start, min(_WRITTEN, count - done), window, seed + done))
        progress(pieces[-1].numel())
    ids = torch.cat(pieces)
    return Windows(ids, held_of(count), "text that the model wrote itself", "", notes)


def first_token(model: nn.Module) -> int:
    """The token that text begins with: the first of a sequence, else the last of one, else a newline's byte."""
    holders = [getattr(model, "generation_config", None), getattr(model, "config", None), text_config(model)]
    for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"):
        for holder in holders:
            value = getattr(holder, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    if vocabulary_of(model) == 256:
        return 10
    raise ValueError("the model names no first token to begin a text of its own with: pass a text to calibrate on")


def written(model: Any, start: int, count: int, length: int, seed: int) -> Tensor:
    """[count, length] token ids on the host, drawn at temperature 1; torch's random state stays as it was."""
    if not callable(getattr(model, "generate", None)) or getattr(model, "can_generate", lambda: True)() is False:
        raise ValueError(f"{type(model).__name__} does not generate text: pass a text to calibrate on")
    device = default_inputs(model, 1, 2)["input_ids"].device
    first = torch.full((count, 1), start, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out: Tensor = model.generate(
            input_ids=first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, min_new_tokens=length, max_new_tokens=length, pad_token_id=start,
        )  # fmt: skip
    return out[:, -length:].cpu()


# whether the text is one that the model knows


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float | None:
    """Mean nats per token that a causal model gives ``ids`` [n, T], n windows one by one; None if it has no logits."""
    inputs = default_inputs(model, 1, 2)
    if "decoder_input_ids" in inputs:
        return None
    total, count, vocabulary = 0.0, 0, vocabulary_of(model)
    for window in ids:
        inputs["input_ids"] = window[None].to(inputs["input_ids"].device)
        logits = getattr(model(**inputs), "logits", None)
        if logits is None or logits.dim() != 3 or logits.shape[1:] != (ids.shape[1], vocabulary):
            return None
        losses = nn.functional.cross_entropy(logits[0, :-1].float(), inputs["input_ids"][0, 1:], reduction="sum")
        total, count = total + float(losses), count + ids.shape[1] - 1
    return total / count if math.isfinite(total) and count else None


def own_loss(model: nn.Module, window: int, seed: int) -> float | None:
    """The loss on a little text of the model's own; None for a model that writes none, NaN for one that fails."""
    try:
        length = min(window, _PROMPT_TOKENS)
        return loss(model, written(model, first_token(model), _PROMPTS, length, seed))
    except ValueError:
        return None
    except RuntimeError:  # probabilities that are NaN: where they come from is told when activations are looked at
        return math.nan


def judge_loss(nll: float | None, own: float | None, vocabulary: int, *, ids: bool) -> list[str]:
    """Warnings about a text that the model does not know; ValueError for token ids at random.

    nll, own: the model's loss on the text and on its own.
    """
    if nll is None or not vocabulary:
        return []
    noise = math.log(vocabulary)
    says = f"the model gives the calibration text {nll:.2f} nats per token"
    against = "" if own is None or math.isnan(own) else f", its own text {own:.2f}"
    knows = own is None or own < _NOISE * noise  # an untrained model has this loss on any text; of NaN nothing is known
    if ids and knows and nll >= noise:
        raise ValueError(
            f"{says}{against}; ids drawn at random would have {noise:.2f}: these token ids are no text of this model. "
            "Calibrated on noise a model gets worse"
        )
    if nll > _NOISE * noise:
        return [f"{says}{against}; noise has {noise:.2f}: calibrated on what it does not know, a model may get worse"]
    if own is not None and nll > own + max(_FAR, own / 2):
        return [f"{says}{against}: this is text of a kind that it does not know well"]
    return []


__all__ = [
    "TOKENS",
    "WINDOW",
    "Text",
    "Windows",
    "check_numbers",
    "check_text",
    "encoder",
    "judge_loss",
    "loss",
    "own_loss",
    "read_windows",
    "write_windows",
]
