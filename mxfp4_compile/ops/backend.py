"""The interface a backend of ``mxfp4::moe`` and ``mxfp4::grouped_linear`` implements.

A backend is a stateless object registered by name. Everything it needs between calls lies in plain
tensors (the prepared weights) and in the layout id that ``plan`` chose, so that a call can be traced,
captured, saved and moved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import MoEParams, Role


@dataclass(frozen=True)
class Requirement:
    """One thing a backend needs: its name, whether it is met, and the reason in words."""

    name: str
    met: bool
    reason: str


class Backend(ABC):
    """A way to compute MXFP4 experts. Subclasses import their library inside methods only."""

    name: str

    @abstractmethod
    def supports(self, params: MoEParams | None, device: torch.device) -> list[Requirement]:
        """What this backend needs to serve ``params`` on ``device``, met or not.

        ``params`` is None when it is asked about grouped_linear, or about availability alone.
        """

    def plan(self, params: MoEParams | None, device: torch.device) -> str:
        """The id of the prepared layout for a site; "canonical" is packed [E,N,ceil(K/2)] and its scales."""
        return "canonical"

    def prepare(
        self, packed: Tensor, scales: Tensor, *, k: int, role: Role | None, params: MoEParams | None, layout: str
    ) -> list[Tensor]:
        """Canonical -> prepared weights of any number of experts.

        packed: uint8 [e, N, ceil(K/2)], scales: uint8 [e, N, ceil(K/32)], ``k`` = K. ``role`` is None for
        grouped_linear. The first dimension of every result must be e: sites are prepared expert by
        expert and the results laid one after the other.
        """
        return [packed, scales]

    def recover(
        self,
        tensors: Sequence[Tensor],
        *,
        n: int,
        k: int,
        role: Role | None,
        params: MoEParams | None,
        layout: str,
    ) -> tuple[Tensor, Tensor]:
        """Prepared -> canonical (packed [e, N, ceil(K/2)], scales [e, N, ceil(K/32)]), bit for bit."""
        packed, scales = tensors
        return packed, scales

    def prepare_bias(self, bias: Tensor, *, role: Role | None, params: MoEParams | None, layout: str) -> Tensor:
        """Bias [e, N] in the model's row order and dtype -> as the kernel reads it (first dimension e)."""
        return bias

    def recover_bias(self, bias: Tensor, *, n: int, role: Role | None, params: MoEParams | None, layout: str) -> Tensor:
        """Inverse of ``prepare_bias``, exact."""
        return bias

    @abstractmethod
    def moe(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        params: MoEParams,
        layout: str,
    ) -> Tensor:
        """x [T,H], topk_ids [T,K] int32/int64, topk_weights [T,K] -> a new tensor [T,H] in x's dtype.

        Ids >= E contribute nothing. ``up``, ``down`` and the biases are what ``prepare`` returned.
        """

    @abstractmethod
    def grouped_linear(
        self,
        x: Tensor,
        offsets: Tensor,
        weight: Sequence[Tensor],
        n: int,
        round_dtype: torch.dtype,
        layout: str,
    ) -> Tensor:
        """x [S,K] sorted by expert, offsets [E] int32 (end row of each expert) -> [S,N] in ``round_dtype``.

        Rows at or beyond offsets[-1] belong to no expert and become zero.
        """
