"""Triton kernels of the solver's steps within 32 columns, for all experts at once; imported only where they run.

Each does what the loop of the same name in ``solver.py`` does in torch: 32 columns there are some hundred launches,
here one. An expert's rows are independent of each other; nothing is added up across programs, so that the same input
gives the same bits. Arrays are contiguous fp32 but for the squares of K x K, whose strides are given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import mx

_ROWS = 32


@triton.jit
def _power_of_two(exponents):
    """2^e of integers in [-126, 127], exactly."""
    return ((exponents + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round_codes(values):
    """As ``grid.round_codes``: the nearest E2M1 value, ties to the even code, at most 6 in magnitude."""
    magnitude = tl.minimum(tl.abs(values), 8.0)
    step = tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))
    steps = (magnitude / step + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
    rounded = tl.minimum(steps * step, 6.0)
    return tl.where(values < 0.0, -rounded, rounded)


@triton.jit
def _gptq(rest, scale, undo, out, errors, start, n, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows of one expert: columns from ``start`` on, each one's error made up for by the later ones."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    own = (row < n)[:, None] & (column < BLOCK)[None, :]
    place = expert * n * k + row[:, None] * k + start + column[None, :]
    values = tl.load(rest + place, own, other=0.0)
    scales = tl.load(scale + place, own, other=1.0)
    made = tl.zeros([ROWS, BLOCK], tl.float32)
    lost = tl.zeros([ROWS, BLOCK], tl.float32)
    square = undo + expert * k * k + start * (k + 1)
    for j in range(BLOCK):
        here = column == j
        undoes = tl.load(square + j * k + column)
        pivot = tl.sum(tl.where(here, undoes, 0.0), 0)
        value = tl.sum(tl.where(here[None, :], values, 0.0), 1)
        step = tl.sum(tl.where(here[None, :], scales, 0.0), 1)
        rounded = _round_codes(value / step) * step
        error = (value - rounded) / pivot
        made = tl.where(here[None, :], rounded[:, None], made)
        lost = tl.where(here[None, :], error[:, None], lost)
        values -= error[:, None] * undoes[None, :]
    tl.store(out + place, made, own)
    tl.store(errors + expert * n * BLOCK + row[:, None] * BLOCK + column[None, :], lost, own)


@triton.jit
def _descend(
    values, weight, slope, exponents, hessian, inverse, change, start, first, n, k, low, high,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some rows of one expert: codes of one block one by one, then its exponent and all of its codes together."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < n
    own = inside[:, None] & (column < BLOCK)[None, :]
    place = expert * n * k + row[:, None] * k + start + column[None, :]
    now = tl.load(values + place, own, other=0.0)
    wanted = tl.load(weight + place, own, other=0.0)
    local = tl.load(slope + place, own, other=0.0)
    scale_place = expert * n * (k // BLOCK) + row * (k // BLOCK) + start // BLOCK
    exponent = tl.load(exponents + scale_place, inside, other=0.0)
    step = _power_of_two(exponent.to(tl.int32))
    before = now
    square = hessian + expert * k * k + start * (k + 1)
    for j in range(BLOCK):
        here = column == j
        weighs = tl.load(square + j * k + column)
        power = tl.sum(tl.where(here, weighs, 0.0), 0)
        value = tl.sum(tl.where(here[None, :], now, 0.0), 1)
        best = value - tl.sum(tl.where(here[None, :], local, 0.0), 1) / power
        moved = _round_codes(best / step) * step - value
        now += tl.where(here[None, :], moved[:, None], 0.0)
        local += moved[:, None] * weighs[None, :]
    between = tl.load(square + column[:, None] * k + column[None, :])
    inverted = tl.load(
        inverse + (expert * (k // BLOCK) + start // BLOCK) * BLOCK * BLOCK + column[:, None] * BLOCK + column[None, :]
    )
    free = now - tl.dot(local, inverted, input_precision="ieee")
    gain = tl.zeros([ROWS], tl.float32)
    chosen = exponent
    step_to = tl.zeros([ROWS, BLOCK], tl.float32)
    for tried in tl.static_range(9):
        at = tl.minimum(tl.maximum(exponent + (tried // 3 - 1), low), high)
        scale = _power_of_two(at.to(tl.int32))
        if tried % 3 == 0:
            origin = free
        elif tried % 3 == 1:
            origin = wanted
        else:
            origin = now
        delta = _round_codes(origin / scale[:, None]) * scale[:, None] - now
        worth = tl.sum(delta * (2.0 * local + tl.dot(delta, between, input_precision="ieee")), 1)
        better = worth < gain
        gain = tl.where(better, worth, gain)
        step_to = tl.where(better[:, None], delta, step_to)
        chosen = tl.where(better, at, chosen)
    now += step_to
    tl.store(values + place, now, own)
    tl.store(exponents + scale_place, chosen, inside)
    where = expert * n * WIDTH + row[:, None] * WIDTH + (start - first) + column[None, :]
    tl.store(change + where, now - before, own)


@triton.jit
def _undoing(hessian, out, batch_in, row_in, batch_out, row_out, BLOCK: tl.constexpr):
    """One square: H = R R^T with R upper triangular, and R's inverse."""
    expert = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    left = tl.load(hessian + expert * batch_in + i[:, None] * row_in + i[None, :])
    upper = tl.zeros([BLOCK, BLOCK], tl.float32)
    for back in range(BLOCK):
        j = BLOCK - 1 - back
        here = i == j
        found = tl.sum(tl.where(here[None, :], left, 0.0), 1)
        pivot = tl.sqrt(tl.sum(tl.where(here, found, 0.0), 0))
        found = tl.where(i <= j, found / pivot, 0.0)
        upper = tl.where(here[None, :], found[:, None], upper)
        across = tl.sum(tl.where(here[:, None], left, 0.0), 0) / pivot
        left -= found[:, None] * tl.where(i <= j, across, 0.0)[None, :]
    inverse = tl.zeros([BLOCK, BLOCK], tl.float32)
    for j in range(BLOCK):
        here = i == j
        found = tl.sum(tl.where(here[None, :], upper, 0.0), 1)
        pivot = tl.sum(tl.where(here, found, 0.0), 0)
        product = tl.sum(inverse * tl.where(i < j, found, 0.0)[None, :], 1)
        new = tl.where(here, 1.0, -product) / pivot
        inverse = tl.where(here[None, :], new[:, None], inverse)
    tl.store(out + expert * batch_out + i[:, None] * row_out + i[None, :], inverse)


def gptq_block(rest: Tensor, scale: Tensor, undo: Tensor, out: Tensor, errors: Tensor, start: int) -> None:
    """Round columns ``start`` to ``start + 32`` of ``rest`` [e, N, K] into ``out``; what each lost into ``errors``
    [e, N, 32], divided by its pivot. undo: [e, K, K].
    """
    e, n, k = rest.shape
    _gptq[(triton.cdiv(n, _ROWS), e)](rest, scale, undo, out, errors, start, n, k, ROWS=_ROWS, BLOCK=mx.BLOCK)


def descend_block(
    values: Tensor, weight: Tensor, slope: Tensor, exponents: Tensor, hessian: Tensor, inverse: Tensor,
    change: Tensor, start: int, first: int, limits: tuple[int, int],
) -> None:  # fmt: skip
    """Move columns ``start`` to ``start + 32`` of ``values`` [e, N, K], and their exponent, in place.

    inverse: [e, K / 32, 32, 32], of the Hessian's blocks on the diagonal. change: [e, N, C], what columns from
    ``first`` on moved by; the 32 of this block are written.
    """
    e, n, k = values.shape
    _descend[(triton.cdiv(n, _ROWS), e)](
        values, weight, slope, exponents, hessian, inverse, change, start, first, n, k, float(limits[0]),
        float(limits[1]), ROWS=_ROWS, BLOCK=mx.BLOCK, WIDTH=change.shape[2],
    )  # fmt: skip


def undoing(hessian: Tensor) -> Tensor:
    """As ``solver.undoing``, for K a multiple of 32: halves of halves, products on the way; NaN where H is indefinite.

    With H = [[A, B], [B^T, C]], U of C makes X = B U_C^T, and what is left for A is A - X X^T.
    """
    out = torch.zeros_like(hessian)
    _fill(hessian, out)
    return out


def _fill(hessian: Tensor, out: Tensor) -> None:
    k = hessian.shape[1]
    if k == mx.BLOCK:
        _undoing[(len(hessian),)](
            hessian, out, hessian.stride(0), hessian.stride(1), out.stride(0), out.stride(1), BLOCK=mx.BLOCK
        )
        return
    m = k // mx.BLOCK // 2 * mx.BLOCK
    _fill(hessian[:, m:, m:], out[:, m:, m:])
    lower = out[:, m:, m:]
    x = hessian[:, :m, m:] @ lower.mT
    _fill(torch.baddbmm(hessian[:, :m, :m], x, x.mT, alpha=-1), out[:, :m, :m])
    out[:, :m, m:] = -(out[:, :m, :m] @ (x @ lower))


__all__ = ["descend_block", "gptq_block", "undoing"]
