"""Which batch sizes and cache lengths are captured."""

from __future__ import annotations

MIN_LENGTH = 512
MIN_PROMPT = 16


def capture_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes 1, 2, 4, 8, 16, 24, 32, ... up to ``largest``, which is itself the last one."""
    if largest < 1:
        return ()
    sizes = [s for s in (1, 2, 4) if s < largest] + list(range(8, largest, 8))
    return (*sizes, largest)


def size_for(batch: int, largest: int) -> int | None:
    """The smallest capture size that holds ``batch`` rows, or None above ``largest``."""
    return next((s for s in capture_sizes(largest) if s >= batch), None) if batch >= 1 else None


def length_for(tokens: int) -> int:
    """Length of the static cache for ``tokens`` tokens: the next power of two, at least 512."""
    return max(MIN_LENGTH, 1 << max(tokens - 1, 0).bit_length())


def prompt_lengths(rows: int, largest: int) -> tuple[int, ...]:
    """Lengths 16, 32, 64, ... to which prompts of ``rows`` rows are padded: up to ``largest`` tokens in all."""
    lengths = []
    length = MIN_PROMPT
    while rows * length <= largest:
        lengths.append(length)
        length *= 2
    return tuple(lengths)


def prompt_length_for(tokens: int, rows: int, largest: int) -> int | None:
    """The shortest of ``prompt_lengths`` that holds ``tokens`` tokens a row, or None above them."""
    return next((n for n in prompt_lengths(rows, largest) if n >= tokens), None)
