"""Random MXFP4 weights in the canonical form."""

from __future__ import annotations

import math

import torch


def random_weight(e: int, n: int, k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random canonical codes and scales, of about unit row norm; odd K and short blocks zero-padded."""
    codes = torch.randint(0, 16, (e, n, k), generator=generator, dtype=torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, k % 2))
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    exponent = 126 - int(math.log2(max(k, 2)) / 2)
    scales = torch.randint(exponent - 2, exponent + 1, (e, n, -(-k // 32)), generator=generator, dtype=torch.uint8)
    return packed, scales
