"""How exactly fp32 products on a CUDA device are taken, whatever the process has set, and put back afterwards.

``"ieee"``: as fp32 is. ``"tf32"``: factors cut to 11 significant bits, sums in fp32; several times as quick. fp16 and
bf16 values are such factors already, so that products of them are exact; what is computed from them keeps as many bits
as the model itself keeps of it, or more. So sums over a half-precision model's activations take TF32, and everything
that inverts or accumulates corrections takes fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def fp32_products(kind: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Within the block fp32 matrix products on CUDA devices are taken so."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        legacy = matmul.allow_tf32
    except RuntimeError:  # a process that has set it in the newer way only: the older flag cannot be read then
        legacy = None
    try:
        if legacy is None:
            matmul.fp32_precision = kind
        else:
            matmul.allow_tf32 = kind == "tf32"
        yield
    finally:
        if legacy is not None:
            matmul.allow_tf32 = legacy
        matmul.fp32_precision = before


def products_of(x: torch.Tensor) -> Literal["ieee", "tf32"]:
    """How products with activations ``x`` and what comes of them are taken."""
    return "tf32" if x.dtype in HALVES else "ieee"


__all__ = ["fp32_products", "products_of"]
