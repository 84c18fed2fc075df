"""The solver: weights and Hessians of many experts to values on the MXFP4 grid that keep the outputs.

For each expert with weights W [N, K] and the Hessian H [K, K] of its inputs (the mean of w^2 x x^T), Q is sought with a
small tr((Q - W) H (Q - W)^T), the squared error of the outputs:

1. damping is added to H's diagonal; ``shrunk`` says how much, and mixes in the layer's Hessian, by token counts;
2. GPTQ: columns by descending power; what rounding a column adds is made up for by those that are left;
3. coordinate descent: each code is set to its best, given all others; then each block's exponent may move by one;
4. an expert whose weights have moved too far is solved again with three times the damping.

Everything is batched over the experts; the only loops are over columns, blocks, sweeps, and attempts at 4. On a CUDA
device what happens within 32 columns is one launch (``kernels.py``). The same input gives the same bits on the same
device and version of torch.

Sources: GPTQ (arXiv:2210.17323) for 2; GPTAQ (arXiv:2504.02692) for targets that differ from W.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import mx
from .grid import exponent_range, factors, floor_exponents, on_grid, round_codes, weighted_exponents
from .precision import fp32_products

SWEEPS = 3
"""Sweeps of coordinate descent: a first takes most, eight take half a percent more than three."""

DRIFT = 0.1
"""Largest relative squared error of an expert's weights; rounding to nearest is at 0.013."""

# Columns whose moves reach the slope of all others together, where blocks are kernels.
_WIDE = 128

# Tokens per column up to which the layer's Hessian is mixed in, and the damping by tokens per column.
_PRIOR_BELOW = 8
_LEAST_DAMPING, _DAMPING_PER_COLUMN, _MOST_DAMPING = 0.01, 0.05, 1.0
_ATTEMPTS, _RAISED = 8, 10**0.5


@dataclass(frozen=True)
class Hessians:
    """What an experts' products see: ``mean`` [e, K, K] fp32, ``damping`` [e], both with the layer's share mixed in.

    ``on_prior`` [e] bool: experts with so few tokens that the layer's Hessian counts as K tokens of theirs. ``cross``
    [e, K, K], if the inputs differ from the original model's: the mean of w^2 (x_original - x) x^T.
    """

    mean: Tensor
    damping: Tensor
    on_prior: Tensor
    cross: Tensor | None = None

    def __getitem__(self, experts: Tensor | slice) -> Hessians:
        cross = None if self.cross is None else self.cross[experts]
        return Hessians(self.mean[experts], self.damping[experts], self.on_prior[experts], cross)


def shrunk(sums: Tensor, counts: Tensor, cross: Tensor | None = None) -> Hessians:
    """Hessians of sums of w^2 x x^T [E, K, K] over ``counts`` [E] tokens; ``cross``: such sums as in ``Hessians``."""
    k = sums.shape[-1]
    counts = counts.to(sums.device, torch.float32)
    on_prior = counts < _PRIOR_BELOW * k
    prior = torch.where(on_prior, float(k), 0.0)
    total = counts.sum().clamp(min=1)

    def mixed(values: Tensor) -> Tensor:
        pool = values.sum(0) / total
        return (values + prior[:, None, None] * pool) / (counts + prior).clamp(min=1)[:, None, None]

    damping = (_DAMPING_PER_COLUMN * k / counts.clamp(min=1)).clamp_(_LEAST_DAMPING, _MOST_DAMPING)
    return Hessians(mixed(sums), damping, on_prior, None if cross is None else mixed(cross))


@dataclass(frozen=True)
class Solved:
    """``values`` [e, N, K] fp32 on the grid; ``drift`` [e]: ||Q - W||^2 / ||W||^2; ``damping`` [e] that led there.

    ``failed`` [e] bool: experts that no damping kept within the drift allowed, or without any Hessian; their values are
    W's own, not on the grid.
    """

    values: Tensor
    drift: Tensor
    damping: Tensor
    failed: Tensor


def solve(weight: Tensor, hessians: Hessians, dtype: torch.dtype, *, sweeps: int = SWEEPS) -> Solved:
    """Values on the grid for ``weight`` [e, N, K] fp32 that will be stored in ``dtype``."""
    blank = hessians.mean.diagonal(dim1=1, dim2=2).sum(1) <= 0
    power = weight.square().sum((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    values, drift, damping = weight.clone(), torch.full_like(power, torch.inf), hessians.damping.clone()
    todo = (~blank).nonzero().flatten()
    for _ in range(_ATTEMPTS):
        if not len(todo):
            break
        some = Hessians(
            hessians.mean[todo], damping[todo], hessians.on_prior[todo],
            None if hessians.cross is None else hessians.cross[todo],
        )  # fmt: skip
        with fp32_products("ieee"):
            found = _attempt(weight[todo], some, exponent_range(dtype), sweeps)
        values[todo] = found
        drift[todo] = (found - weight[todo]).square().sum((1, 2)) / power[todo]
        todo = todo[~(drift[todo] <= DRIFT)]  # NaN included
        damping[todo] *= _RAISED
    failed = ~(drift <= DRIFT)
    return Solved(torch.where(failed[:, None, None], weight, values), drift, damping, failed)


def _kernels(device: torch.device) -> ModuleType | None:
    """What the steps within 32 columns run on, where that is not torch."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from . import kernels

    return kernels


def _attempt(weight: Tensor, hessians: Hessians, limits: tuple[int, int], sweeps: int) -> Tensor:
    k = weight.shape[-1]
    missing = -k % mx.BLOCK
    hessian = damped(pad(hessians.mean, (0, missing, 0, missing)), hessians.damping, k)
    target = pad(weight, (0, missing))
    if hessians.cross is not None:
        cross = pad(hessians.cross, (0, missing, 0, missing))
        target = target + _right_solved(hessian, target @ cross)
    values, exponents = gptq(target, hessian, limits)
    values, _ = descend(target, values, exponents, hessian, limits, sweeps)
    return values[..., :k]


def _right_solved(hessian: Tensor, right: Tensor) -> Tensor:
    """``right`` [e, N, K] times the inverse of ``hessian`` [e, K, K]."""
    if _kernels(hessian.device) is None:
        out: Tensor = torch.linalg.solve(hessian, right, left=False)
        return out
    undo = undoing(hessian)
    return right @ undo.mT @ undo


def damped(hessian: Tensor, damping: Tensor, k: int) -> Tensor:
    """[e, K, K] plus ``damping`` [e] times the mean of the first ``k`` diagonal elements, on the diagonal."""
    out = hessian.clone()
    diagonal = out.diagonal(dim1=1, dim2=2)
    diagonal += (damping * diagonal.sum(1) / k)[:, None]
    return out


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """tr((Q - W) H (Q - W)^T) of each expert: [e, N, K], [e, N, K], [e, K, K] -> [e]."""
    error = values - weight
    return ((error @ hessian) * error).sum((1, 2))


def gptq(weight: Tensor, hessian: Tensor, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Round ``weight`` [e, N, K] column by column, the most powerful first: values and exponents [e, N, K / 32].

    hessian: [e, K, K], positive definite; K a multiple of 32.
    """
    e, n, k = weight.shape
    power = hessian.diagonal(dim1=1, dim2=2)
    exponents = weighted_exponents(weight, power, limits)
    order = torch.argsort(power, dim=1, descending=True, stable=True)
    rows = order[:, None].expand(e, n, k)
    rest = weight.gather(2, rows)
    scale = factors(exponents).repeat_interleave(mx.BLOCK, -1).gather(2, rows)
    arranged = hessian.gather(1, order[..., None].expand(e, k, k)).gather(2, order[:, None].expand(e, k, k))
    undo = undoing(arranged)
    out = torch.empty_like(rest)
    kernels = _kernels(weight.device)
    for start in range(0, k, mx.BLOCK):
        end = start + mx.BLOCK
        errors = rest.new_empty(e, n, mx.BLOCK)
        if kernels is not None:
            kernels.gptq_block(rest, scale, undo, out, errors, start)
            if end < k:
                rest[:, :, end:].baddbmm_(errors, undo[:, start:end, end:], alpha=-1)
            continue
        for column in range(start, end):
            step = scale[:, :, column]
            value = round_codes(rest[:, :, column] / step).mul_(step)
            error = (rest[:, :, column] - value) / undo[:, column, column, None]
            out[:, :, column], errors[:, :, column - start] = value, error
            rest[:, :, column:end] -= error[..., None] * undo[:, None, column, column:end]
        rest[:, :, end:] -= errors @ undo[:, start:end, end:]
    back = torch.argsort(order, dim=1)[:, None].expand(e, n, k)
    return out.gather(2, back), exponents


def undoing(hessian: Tensor) -> Tensor:
    """U [e, K, K], upper triangular, with U^T U the inverse of ``hessian``: row k says what undoes column k's error.

    One factorization: of H with rows and columns in reverse, L L^T, R = L in reverse is upper triangular with
    H = R R^T, and U is its inverse.
    """
    kernels = _kernels(hessian.device)
    if kernels is not None:
        undo: Tensor = kernels.undoing(hessian)
        return undo
    k = hessian.shape[-1]
    exact = torch.float64 if hessian.device.type == "cpu" and k <= 1024 else torch.float32
    lower = torch.linalg.cholesky(hessian.to(exact).flip(1, 2))
    identity = torch.eye(k, dtype=exact, device=hessian.device).expand_as(lower)
    out: Tensor = torch.linalg.solve_triangular(lower.flip(1, 2), identity, upper=True)
    return out.to(hessian.dtype)


def descend(
    weight: Tensor, values: Tensor, exponents: Tensor, hessian: Tensor, limits: tuple[int, int], sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """Coordinate descent from ``values`` at ``exponents``: block by block the codes, then the exponent; both returned.

    The loss never rises but for rounding in fp32.
    """
    values, exponents = values.clone(), exponents.clone()
    kernels = _kernels(weight.device)
    if kernels is not None:
        _descend_by_kernels(kernels, weight.contiguous(), values, exponents, hessian.contiguous(), limits, sweeps)
        return values, exponents
    power = hessian.diagonal(dim1=1, dim2=2)
    slope = (values - weight) @ hessian  # half of the loss's gradient
    k = weight.shape[-1]
    blocks = [slice(start, start + mx.BLOCK) for start in range(0, k, mx.BLOCK)]
    inverses = [torch.linalg.inv(hessian[:, b, b]) for b in blocks] if sweeps else []
    for _ in range(sweeps):
        for number, block in enumerate(blocks):
            own, inside = values[:, :, block], hessian[:, block, block]
            before = own.clone()
            step = factors(exponents[:, :, number])
            local = slope[:, :, block].clone()
            for column in range(mx.BLOCK):
                best = own[:, :, column] - local[:, :, column] / power[:, None, block.start + column]
                change = round_codes(best / step).mul_(step) - own[:, :, column]
                own[:, :, column] += change
                local += change[..., None] * inside[:, None, column]
            moved, exponent = _moved(own, weight[:, :, block], local, inside, inverses[number], step, limits)
            own += moved
            exponents[:, :, number] = exponent
            slope += (own - before) @ hessian[:, block]
    return values, exponents


def _descend_by_kernels(
    kernels: ModuleType, weight: Tensor, values: Tensor, exponents: Tensor, hessian: Tensor, limits: tuple[int, int],
    sweeps: int,
) -> None:  # fmt: skip
    """``descend`` in place; the slope of columns further away learns of moves ``_WIDE`` columns at a time."""
    if not sweeps:
        return
    e, n, k = weight.shape
    slope = (values - weight) @ hessian
    starts = torch.arange(0, k, mx.BLOCK, device=hessian.device)
    inside = starts[:, None] + torch.arange(mx.BLOCK, device=hessian.device)
    inverses = torch.linalg.inv(hessian[:, inside[:, :, None], inside[:, None, :]]).contiguous()
    for _ in range(sweeps):
        for first in range(0, k, _WIDE):
            last = min(first + _WIDE, k)
            change = weight.new_empty(e, n, last - first)
            for start in range(first, last, mx.BLOCK):
                kernels.descend_block(
                    values, weight, slope, exponents, hessian, inverses, change, start, first, limits
                )  # fmt: skip
                moved = change[:, :, start - first : start - first + mx.BLOCK]
                slope[:, :, first:last].baddbmm_(moved, hessian[:, start : start + mx.BLOCK, first:last])
            for others in (slice(0, first), slice(last, k)):
                if others.start < others.stop:
                    slope[:, :, others].baddbmm_(change, hessian[:, first:last, others])


def _moved(
    values: Tensor,
    weight: Tensor,
    slope: Tensor,
    hessian: Tensor,
    inverse: Tensor,
    step: Tensor,
    limits: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The change of one block [e, N, 32] that gains most with its exponent as it is, or one off; and that exponent."""
    exponent = torch.frexp(step).exponent.float() - 1
    free = values - slope @ inverse  # the best without a grid, given all other blocks
    gain = torch.zeros_like(exponent)
    change, chosen = torch.zeros_like(values), exponent
    for offset in (-1, 0, 1):
        tried = (exponent + offset).clamp(*limits)
        for start in (free, weight, values):
            delta = on_grid(start, tried[..., None]) - values
            worth = (delta * (2 * slope + delta @ hessian)).sum(-1)
            better = worth < gain
            gain = torch.where(better, worth, gain)
            change = torch.where(better[..., None], delta, change)
            chosen = torch.where(better, tried, chosen)
    return change, chosen


__all__ = ["DRIFT", "Hessians", "Solved", "descend", "floor_exponents", "gptq", "loss", "shrunk", "solve"]
