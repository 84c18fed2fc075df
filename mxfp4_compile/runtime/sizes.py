"""Which batch sizes and cache lengths are captured."""

from __future__ import annotations

MIN_LENGTH = 512


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
