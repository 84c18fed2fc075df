"""Batch sizes, cache lengths and prompt lengths."""

from __future__ import annotations

from mxfp4_compile.runtime.sizes import capture_sizes, length_for, prompt_length_for, prompt_lengths, size_for


def test_prompt_sizes() -> None:
    assert prompt_lengths(1, 512) == (16, 32, 64, 128, 256, 512)
    assert prompt_lengths(8, 512) == (16, 32, 64)
    assert prompt_lengths(33, 512) == ()
    assert [prompt_length_for(t, 1, 512) for t in (2, 16, 17, 512, 513)] == [16, 16, 32, 512, None]
    assert prompt_length_for(65, 8, 512) is None
    assert prompt_length_for(2, 1, 0) is None


def test_sizes() -> None:
    assert capture_sizes(0) == ()
    assert capture_sizes(1) == (1,)
    assert capture_sizes(3) == (1, 2, 3)
    assert capture_sizes(4) == (1, 2, 4)
    assert capture_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert capture_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert len(capture_sizes(512)) == 3 + 64
    for largest in (1, 5, 8, 30, 512):
        for batch in range(1, largest + 1):
            size = size_for(batch, largest)
            assert size in capture_sizes(largest)
            assert batch <= size
            assert not [s for s in capture_sizes(largest) if batch <= s < size]
        assert size_for(largest + 1, largest) is None
    assert [length_for(n) for n in (1, 512, 513, 1024, 1025)] == [512, 512, 1024, 1024, 2048]
