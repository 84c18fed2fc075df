"""The kernel of ``mxfp4::route``: one program for each token; see ``ops.route`` for what it computes."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def route_rows(
    logits, weights, ids, row_stride, eps,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """BEFORE: 0 none, 1 softmax, 2 sigmoid; AFTER: 0 none, 1 sum, 2 softmax. ``logits`` rows are dense."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < E
    x = tl.load(logits + row * row_stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    if BEFORE == 1:
        e = tl.where(inside, tl.exp(x - tl.max(x, 0)), 0.0)
        x = e / tl.sum(e, 0)
    elif BEFORE == 2:
        x = 1.0 / (1.0 + tl.exp(-x))
    # NaN counts as the largest score, and every id stays one of an expert.
    key = tl.where(x != x, float("inf"), x)
    place = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.float32)
    at = tl.zeros([BLOCK_K], tl.int32)
    free = inside
    for i in range(K):
        best = tl.max(tl.where(free, key, float("-inf")), 0)
        index = tl.min(tl.where(free & (key == best), expert, BLOCK_E), 0)
        value = tl.sum(tl.where(expert == index, x, 0.0), 0)
        chosen = tl.where(place == i, value, chosen)
        at = tl.where(place == i, index, at)
        free = free & (expert != index)
    kept = place < K
    if AFTER == 1:
        chosen = chosen / (tl.sum(tl.where(kept, chosen, 0.0), 0) + eps)
    elif AFTER == 2:
        top = tl.max(tl.where(kept, chosen, float("-inf")), 0)
        e = tl.where(kept, tl.exp(chosen - top), 0.0)
        chosen = e / tl.sum(e, 0)
    tl.store(weights + row * K + place, chosen.to(weights.dtype.element_ty), mask=kept)
    tl.store(ids + row * K + place, at.to(tl.int64), mask=kept)


_BEFORE = {"none": 0, "softmax": 1, "sigmoid": 2}
_AFTER = {"none": 0, "sum": 1, "softmax": 2}


def launch(logits: Tensor, k: int, before: str, after: str, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits [T, E], E <= 1024, any stride of rows -> (weights [T, K] in ``dtype``, ids [T, K] int64)."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, k), dtype=dtype)
    ids = logits.new_empty((tokens, k), dtype=torch.int64)
    if tokens:
        block = triton.next_power_of_2(experts)
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            route_rows[(tokens,)](
                logits, weights, ids, logits.stride(0), eps,
                E=experts, K=k, BLOCK_E=block, BLOCK_K=triton.next_power_of_2(k),
                BEFORE=_BEFORE[before], AFTER=_AFTER[after],
                num_warps=1 if block <= 256 else 4,
            )  # fmt: skip
    return weights, ids
