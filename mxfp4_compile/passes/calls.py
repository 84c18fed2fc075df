"""A recorded call of a module, without its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """What is recorded of a tensor argument: shape, dtype, device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """A real tensor of this description, all zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Call:
    """One recorded call of a module; tensors are kept as TensorInfo."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def describe(args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """Record a call without keeping its tensors alive."""

    def info(value: Any) -> Any:
        return TensorInfo(tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value

    return Call(tuple(map(info, args)), {name: info(value) for name, value in kwargs.items()})


__all__ = ["Call", "TensorInfo", "describe"]
