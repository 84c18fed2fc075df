"""What a backend's methods are given: the tensors of a call, and which projection prepared weights are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..spec import MoEParams, Role


@dataclass(frozen=True)
class Slot:
    """Which projection of a layer prepared weights or a prepared bias are of, and the id of their layout.

    ``role`` and ``params`` are None together for a projection of ``grouped_linear``, which has its sizes alone.
    """

    role: Role | None
    params: MoEParams | None
    layout: str

    @property
    def gated(self) -> bool:
        """Whether its rows are those of two halves, of which one goes through the activation."""
        return self.role == "up" and self.params is not None and self.params.activation.gated


@dataclass(frozen=True)
class LinearInputs:
    """A call of ``mxfp4::grouped_linear``: one projection of E experts, of N rows and K columns.

    x: [S, K], floating point, its rows sorted by expert.
    offsets: [E], int32, the end row of each expert; rows at or beyond the last belong to no expert.
    weight: the tensors that ``Backend.prepare`` returned, of first dimension E.
    n: N. round_dtype: the dtype of the result [S, N]. layout: the id of the layout of the prepared tensors.
    """

    x: Tensor
    offsets: Tensor
    weight: Sequence[Tensor]
    n: int
    round_dtype: torch.dtype
    layout: str

    def of_experts(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, and these; waits for the device."""
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = max(start, end)


@dataclass(frozen=True)
class MoEInputs:
    """A call of ``mxfp4::moe``: T tokens of hidden size H, K experts for each of them, E experts in all.

    x: [T, H], floating point, of any strides.
    topk_ids: [T, K], int32 or int64, at least 0; ids >= E contribute nothing.
    topk_weights: [T, K], floating point; anything, NaN too, where an id contributes nothing.
    up, down: the tensors that ``Backend.prepare`` returned for the projection, of first dimension E.
    up_bias, down_bias: what ``Backend.prepare_bias`` returned, of first dimension E, or None.
    params: what the layer computes. layout: the id of the layout of the prepared tensors.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    up: Sequence[Tensor]
    down: Sequence[Tensor]
    up_bias: Tensor | None
    down_bias: Tensor | None
    params: MoEParams
    layout: str

    def slot(self, role: Role) -> Slot:
        """What the tensors of ``role`` were prepared for."""
        return Slot(role, self.params, self.layout)

    def biases(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """(up_bias, down_bias) in ``dtype``."""
        up, down = self.up_bias, self.down_bias
        return None if up is None else up.to(dtype), None if down is None else down.to(dtype)

    def of_tokens(self, part: slice) -> MoEInputs:
        """The same call for some of its tokens."""
        return replace(self, x=self.x[part], topk_ids=self.topk_ids[part], topk_weights=self.topk_weights[part])


@dataclass(frozen=True)
class MoETypes:
    """What is known of a layer's calls of ``mxfp4::moe`` before there are any: what it computes, and dtypes.

    ``top_k``: K. ``up_bias``, ``down_bias``: the dtypes of prepared biases, None where there are none.
    """

    params: MoEParams
    top_k: int
    x: torch.dtype
    ids: torch.dtype
    weights: torch.dtype
    up_bias: torch.dtype | None
    down_bias: torch.dtype | None
    layout: str
