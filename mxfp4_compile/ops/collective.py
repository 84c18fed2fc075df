"""``mxfp4::reduce``: the sum over ranks of what each of them computed, as one op of a rewritten graph.

The group is a name, so that a graph that holds it can be traced, copied, saved and exported; a process finds the group
by it. It is torch.distributed's functional all-reduce: gloo and NCCL give every rank the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reduce(x: Tensor, group: str) -> Tensor:
    """A tensor [...] of every rank of ``group`` -> their sum [...], in the dtype of x, on each rank."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))  # type: ignore[no-any-return]


def fake(x: Tensor, _group: str) -> Tensor:
    """Its shape and dtype."""
    return x.new_empty(x.shape)
