"""The Triton kernels of attention.py; imported only where they run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def partial(
    query, keys, values, mask, acc_out, stats_out, length, mask_stride, scaling, softcap,
    kb, kh, kl, vb, vh, vl,
    HKV: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One key/value head of one row, blocks ``split``, ``split + SPLITS``, ...: maximum, sum, weighted values."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    b = (pid // HKV).to(tl.int64)
    h = (pid % HKV).to(tl.int64)
    heads = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, D_PADDED)
    dv = tl.arange(0, DV_PADDED)
    rows = b * HKV * GROUP + h * GROUP + heads
    q = tl.load(query + rows[:, None] * D + d[None, :], (heads[:, None] < GROUP) & (d[None, :] < D), other=0.0)
    top = tl.full([GROUP_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, DV_PADDED], tl.float32)
    for start in range(split * BLOCK, length, SPLITS * BLOCK):
        slots = start + tl.arange(0, BLOCK)
        allowed = tl.load(mask + b * mask_stride + slots, slots < length, other=0).to(tl.int32)
        if tl.max(allowed, 0) > 0:
            k = tl.load(
                keys + b * kb + h * kh + slots[None, :] * kl + d[:, None],
                (slots[None, :] < length) & (d[:, None] < D), other=0.0,
            )  # fmt: skip
            logits = tl.dot(q, k) * scaling
            if softcap > 0:
                scaled = logits / softcap
                logits = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scaled)) - 1.0)
            logits = tl.where(allowed[None, :] > 0, logits, -float("inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            decay = tl.exp(top - new_top)
            p = tl.exp(logits - new_top[:, None])
            v = tl.load(
                values + b * vb + h * vh + slots[:, None] * vl + dv[None, :],
                (slots[:, None] < length) & (dv[None, :] < DV), other=0.0,
            )  # fmt: skip
            total = total * decay + tl.sum(p, 1)
            acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v)
            top = new_top
    where = rows * SPLITS + split
    tl.store(stats_out + where * 2, top, heads < GROUP)
    tl.store(stats_out + where * 2 + 1, total, heads < GROUP)
    tl.store(acc_out + where[:, None] * DV + dv[None, :], acc, (heads[:, None] < GROUP) & (dv[None, :] < DV))


@triton.jit
def merge(
    acc_in, stats_in, sinks, out, SINKS: tl.constexpr, HQ: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    """The splits of one head put together, in fixed order."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS_PADDED)
    dv = tl.arange(0, DV_PADDED)
    top = tl.load(stats_in + (row * SPLITS + s) * 2, s < SPLITS, other=-float("inf"))
    total = tl.load(stats_in + (row * SPLITS + s) * 2 + 1, s < SPLITS, other=0.0)
    highest = tl.max(top, 0)
    if SINKS:
        sink = tl.load(sinks + row % HQ).to(tl.float32)
        highest = tl.maximum(highest, sink)
    weight = tl.where(total > 0, tl.exp(top - highest), 0.0)
    denominator = tl.sum(weight * total, 0)
    if SINKS:
        denominator += tl.exp(sink - highest)
    acc = tl.load(
        acc_in + (row * SPLITS + s[:, None]) * DV + dv[None, :], (s[:, None] < SPLITS) & (dv[None, :] < DV), other=0.0
    )
    result = tl.sum(acc * weight[:, None], 0) / denominator
    tl.store(out + row * DV + dv, result.to(out.dtype.element_ty), dv < DV)
