"""The bytes of a tensor without NumPy, which torch does not bring along."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def as_bytes(tensor: Tensor) -> bytes:
    """The values of a strided tensor in order, of any dtype and device, as their bytes in memory (a copy)."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return ctypes.string_at(plain.data_ptr(), plain.numel()) if plain.numel() else b""


__all__ = ["as_bytes"]
