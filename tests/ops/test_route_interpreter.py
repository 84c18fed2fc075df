"""The route kernel in Triton's interpreter, on the CPU, against its reference."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret

from mxfp4_compile.ops.route import AFTER, BEFORE, reference

SHAPES = [(3, 60, 4), (2, 128, 8), (4, 7, 7), (1, 1, 1)]


def main() -> None:
    from mxfp4_compile.ops.backends.triton.route import launch

    generator = torch.Generator().manual_seed(0)
    for before in BEFORE:
        for after in AFTER:
            for tokens, experts, k in SHAPES:
                distinct = torch.rand(tokens, experts, generator=generator).argsort(1).float() / 8
                tied = torch.randint(3, (tokens, experts), generator=generator).float()
                minus = distinct.masked_fill(distinct == distinct.max(1, keepdim=True).values, -torch.inf)
                for logits in (distinct, tied, minus if experts > k else distinct, distinct.t().contiguous().t()):
                    weights, ids = launch(logits, k, before, after, 1e-9, torch.float32)
                    want, want_ids = reference(logits, k, before, after, 1e-9, torch.float32)
                    what = f"{before} {after} {tokens}x{experts} k={k}"
                    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-6, equal_nan=True, msg=what)
                    if before == "none":  # exact scores: ties go to the lowest expert
                        assert torch.equal(ids, want_ids), what
                    assert bool((ids.sort(1).values.diff(dim=1) > 0).all()), what
    print("equal")


@pytest.mark.slow
def test_against_the_reference() -> None:
    assert interpret(__file__).strip() == "equal"


if __name__ == "__main__":
    main()
