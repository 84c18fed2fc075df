"""``mxfp4::route``: a router's scores, top-k and renormalization in one op; the reference is its specification."""

from __future__ import annotations

import torch
from torch import Tensor

BEFORE = ("none", "softmax", "sigmoid")
AFTER = ("none", "sum", "softmax")
MAX_EXPERTS = 1024


def check(logits: Tensor, k: int, before: str, after: str) -> None:
    """ValueError for what no router is: wrong rank, k beyond E, an unknown form."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"mxfp4::route: logits must be floating point [T, E], got {logits.dtype} {list(logits.shape)}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"mxfp4::route: k must lie in 1 to {logits.shape[1]}, got {k}")
    if before not in BEFORE or after not in AFTER:
        raise ValueError(f"mxfp4::route: unknown form {before!r}, {after!r}; known: {BEFORE}, {AFTER}")


def reference(logits: Tensor, k: int, before: str, after: str, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> (weights [T, K] in ``dtype``, ids [T, K] int64), best expert first.

    ``before`` makes scores of logits, ``after`` weights of the chosen scores: "sum" divides by their sum plus
    ``eps``. All of it in fp32 (fp64 for fp64 logits), rounded once at the end. Of equal scores the lowest expert
    comes first; torch.topk leaves that open. NaN counts as the largest score, as in torch.topk.
    """
    scores = logits.double() if logits.dtype == torch.float64 else logits.float()
    if before == "softmax":
        scores = scores.softmax(-1)
    elif before == "sigmoid":
        scores = scores.sigmoid()
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :k], ids[:, :k]
    if after == "sum":
        values = values / (values.sum(-1, keepdim=True) + eps)
    elif after == "softmax":
        values = values.softmax(-1)
    return values.to(dtype).contiguous(), ids.contiguous()


def route(logits: Tensor, k: int, before: str, after: str, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op: the kernel where there is a GPU and up to MAX_EXPERTS experts, else the reference."""
    check(logits, k, before, after)
    if logits.is_cuda and logits.dtype != torch.float64 and logits.shape[1] <= MAX_EXPERTS:
        from .backends.triton.route import launch

        return launch(logits, k, before, after, eps, dtype)
    return reference(logits, k, before, after, eps, dtype)


def fake(logits: Tensor, k: int, before: str, after: str, _eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of ``route``."""
    check(logits, k, before, after)
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)


__all__ = ["AFTER", "BEFORE", "MAX_EXPERTS", "check", "fake", "reference", "route"]
