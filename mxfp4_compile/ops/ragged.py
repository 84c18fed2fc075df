"""Routing and combination for libraries that multiply rows sorted by expert.

No host synchronization and the same order every run. On GPUs one Triton kernel each (ops/backends/triton/ragged.py);
elsewhere, and without triton, torch operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_last

from .arguments import MoEInputs


@dataclass(frozen=True)
class Sorted:
    """The pairs of a batch by expert.

    ``offsets`` int32 [E+1]: first row of each expert, then the number of rows. ``order`` int32 [pairs]: the
    pair at each row; rows beyond offsets[E] hold some valid pair. ``place`` int32 [pairs]: the row of each
    pair, or anything within range for a pair whose id is no expert.
    """

    offsets: Tensor
    order: Tensor
    place: Tensor

    @property
    def counts(self) -> Tensor:
        """Rows of each expert, int32 [E]."""
        return self.offsets[1:] - self.offsets[:-1]


def sort_pairs(topk_ids: Tensor, num_experts: int) -> Sorted:
    """topk_ids [T, K] -> the pairs sorted by expert; ids outside [0, E) get no row."""
    if topk_ids.is_cuda:
        from .backends.triton.ragged import sort_pairs as kernel

        return Sorted(*kernel(topk_ids.contiguous(), num_experts))
    flat = topk_ids.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    ids, order = flat.sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Sorted(offsets.int(), order.int(), place.int())


def gathered(inputs: MoEInputs, rows: Sorted, columns: int) -> tuple[Tensor, Tensor | None]:
    """The bf16 rows [pairs, columns] that the experts see, zeros beyond H, and the weights that are left to apply."""
    x, weights = inputs.x, inputs.topk_weights
    token = torch.div(rows.order, inputs.topk_ids.shape[1], rounding_mode="trunc")
    seen = pad_last(x, (0, columns - x.shape[1])).index_select(0, token)
    if not inputs.params.weight_on_input:
        return seen.to(torch.bfloat16), weights
    return (seen * weights.reshape(-1).index_select(0, rows.order).unsqueeze(1)).to(torch.bfloat16), None


def combine(
    y: Tensor, rows: Sorted, topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """y [pairs, H'] sorted by expert -> [T, H'] in ``dtype``: the weighted sum over a token's experts, in fp32.

    ``topk_weights`` None: all ones. Pairs whose id is no expert are left out, whatever their row and weight hold.
    """
    if y.is_cuda:
        from .backends.triton.ragged import combine as kernel

        weights = None if topk_weights is None else topk_weights.contiguous()
        return kernel(y, rows.place, topk_ids.contiguous(), weights, num_experts, dtype)
    tokens, top_k = topk_ids.shape
    ok = ((topk_ids >= 0) & (topk_ids < num_experts)).unsqueeze(-1)
    pairs = y.index_select(0, rows.place).view(tokens, top_k, -1).float()
    if topk_weights is not None:
        pairs = pairs * topk_weights.float().unsqueeze(-1)
    return torch.where(ok, pairs, 0.0).sum(1).to(dtype)
