"""The Triton kernel of linear.py; imported only where it runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear_rows(
    x, weight, bias, out, parts, arrived, rows, N, K, x_stride, splits, steps,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the result for all rows, over ``steps`` blocks of K; the last of ``splits`` adds them up.

    Weights are the first operand: 64 of their rows fill a warpgroup's product, however few tokens there are.
    parts: fp32 [splits, blocks of N, BLOCK_N, BLOCK_M]. arrived: int32 [blocks of N], zero before and after.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = split * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        place = step * BLOCK_K + k
        inside_w = n[:, None] < N
        inside_x = m[None, :] < rows
        if not EVEN:
            inside_w = inside_w & (place[None, :] < K)
            inside_x = inside_x & (place[:, None] < K)
        w = tl.load(weight + n[:, None] * K + place[None, :], inside_w, other=0.0, eviction_policy="evict_first")
        a = tl.load(x + m[None, :] * x_stride + place[:, None], inside_x, other=0.0)
        total = tl.dot(w, a, total)
    last = True
    if SPLIT:
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        blocks = tl.num_programs(0)
        tl.store(parts + (split * blocks + block) * BLOCK_N * BLOCK_M + inner, total)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        last = tl.atomic_add(arrived + block, 1, sem="acq_rel") == splits - 1
        if last:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for other in range(0, splits):  # in this order, whoever came last
                place = (other * blocks + block) * BLOCK_N * BLOCK_M
                total += tl.load(parts + place + inner, cache_modifier=".cg")
            tl.store(arrived + block, 0)
    if last:
        if BIAS:
            total += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[:, None]
        place = m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(out + place, total.to(out.dtype.element_ty), (n[:, None] < N) & (m[None, :] < rows))
