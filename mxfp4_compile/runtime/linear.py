"""Products of few rows with a dense weight, ``mxfp4_runtime::linear_rows``: one launch, however K is split.

cuBLAS takes two launches where it splits K, and a tile of it per 64 columns leaves most of a GPU idle where a result
has few columns, as a router's. Here programs split K until the device is full, and the last one to finish adds the
parts up, in an order that does not depend on who that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 64
_BLOCK_N = 64
_PROGRAMS = 264  # twice the multiprocessors of an H100

_LIB = torch.library.Library("mxfp4_runtime", "FRAGMENT")
_LIB.define(
    "linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@dataclass(frozen=True)
class Plan:
    """How a product is launched. steps: blocks of K a program; splits: programs that share a block of columns."""

    block_m: int
    block_k: int
    blocks: int
    steps: int
    splits: int
    stages: int


def plan(rows: int, columns: int, depth: int, block_k: int | None = None, programs: int = _PROGRAMS) -> Plan:
    """For ``rows`` rows of ``depth`` numbers and ``columns`` columns of the result."""
    block_k = block_k or (128 if depth % 128 == 0 else 64)
    block_m = max(16, 1 << (rows - 1).bit_length())
    blocks = -(-columns // _BLOCK_N)
    all_steps = -(-depth // block_k)
    steps = -(-all_steps // max(1, min(programs // blocks, all_steps // 2)))
    return Plan(
        block_m=block_m,
        block_k=block_k,
        blocks=blocks,
        steps=steps,
        splits=-(-all_steps // steps),
        # Two programs on a multiprocessor: at most 96 KiB of shared memory each.
        stages=min(6, (96 << 10) // (2 * block_k * (_BLOCK_N + block_m))),
    )


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, how: Plan) -> Tensor:
    """x [M, K] (M at most 64) times weight [N, K] transposed, plus bias [N]; sums in fp32, rounded once -> [M, N]."""
    from .linear_kernel import linear_rows

    rows, depth = x.shape
    columns = weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    split = how.splits > 1
    size = how.splits * how.blocks * _BLOCK_N * how.block_m
    parts = torch.empty(size, dtype=torch.float32, device=x.device) if split else out
    arrived = _arrived(weight, how.blocks) if split else out
    linear_rows[(how.blocks, how.splits)](
        x, weight, weight if bias is None else bias, out, parts, arrived,
        rows, columns, depth, x.stride(0), how.splits, how.steps,
        BIAS=bias is not None, SPLIT=split, EVEN=depth % how.block_k == 0, BLOCK_M=how.block_m, BLOCK_N=_BLOCK_N,
        BLOCK_K=how.block_k, num_warps=4, num_stages=how.stages,
    )  # fmt: skip
    return out


@cache
def _counters() -> dict[tuple[Any, int, int], Tensor]:
    return {}


def _arrived(weight: Tensor, blocks: int) -> Tensor:
    """Counters of a product with a weight, zero between launches.

    Two launches with one weight never run at once: a step's tensors are static, and one thread has them. What was
    handed out stays, as recorded steps hold its address.
    """
    key = weight.device, weight.data_ptr(), blocks
    if key not in _counters():
        _counters()[key] = torch.zeros(blocks, dtype=torch.int32, device=weight.device)
    return _counters()[key]


def _linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type != "cuda":
        return F.linear(x, weight, bias)
    return launch(x, weight, bias, plan(x.shape[0], *weight.shape))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_LIB.impl("linear_rows", _linear_rows, "CompositeExplicitAutograd")
torch.library.register_fake("mxfp4_runtime::linear_rows", _fake, lib=_LIB)
