"""Values on the MXFP4 grid, as floats: rounding at a given exponent, and the exponents worth a try.

``mx.quantize`` makes codes of such values without changing one of them, under every scale rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import mx

# Exponents whose grid a dtype represents, codes 0.5 and 6 included.
_RANGE = {torch.float16: (-23, 13)}
_WIDE = (-126, 125)


def exponent_range(dtype: torch.dtype) -> tuple[int, int]:
    """The smallest and largest exponent of a block whose values are stored in ``dtype``."""
    return _RANGE.get(dtype, _WIDE)


def floor_exponents(values: Tensor, limits: tuple[int, int]) -> Tensor:
    """[..., K] fp32, K a multiple of 32 -> [..., K / 32] fp32: floor(log2 amax) - 2, the smallest for a zero block."""
    amax = values.unflatten(-1, (-1, mx.BLOCK)).abs().amax(-1)
    floor = torch.frexp(amax).exponent.float() - 3
    out: Tensor = torch.where(amax > 0, floor, float(limits[0])).clamp_(*limits)
    return out


def factors(exponents: Tensor) -> Tensor:
    """2^e, exactly."""
    return torch.ldexp(torch.ones_like(exponents), exponents.int())


def round_codes(values: Tensor) -> Tensor:
    """The nearest E2M1 value of each element, ties to the even code, at most 6 in magnitude."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step).mul_(step).clamp_(max=6.0), values)


def on_grid(values: Tensor, exponents: Tensor) -> Tensor:
    """[..., K] rounded to the grid of its blocks' exponents [..., K / 32]."""
    scale = factors(exponents).repeat_interleave(mx.BLOCK, -1)
    return round_codes(values / scale).mul_(scale)


def weighted_exponents(values: Tensor, power: Tensor, limits: tuple[int, int]) -> Tensor:
    """[e, N, K] -> [e, N, K / 32]: of the floor rule's exponent and the next, the one of the smaller squared error.

    power: [e, K], the weight of each column's error. Of two equals the smaller exponent.
    """
    floor = floor_exponents(values, limits)
    above = (floor + 1).clamp_(*limits)

    def loss(exponents: Tensor) -> Tensor:
        error = (on_grid(values, exponents) - values).square_().mul_(power[:, None])
        out: Tensor = error.unflatten(-1, (-1, mx.BLOCK)).sum(-1)
        return out

    return torch.where(loss(above) < loss(floor), above, floor)


def nearest(values: Tensor, scale_rule: str) -> Tensor:
    """What ``mx.quantize`` makes of ``values`` [..., K], in their dtype."""
    packed, scales = mx.quantize(values, scale_rule)
    return mx.dequantize(packed, scales, values.shape[-1], values.dtype)
