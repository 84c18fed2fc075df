"""Recognize an activation by running it.

::

    up output [S, N]  --region-->  down input [S, I]      -->  Activation, its halves' arrangement; or a reason

Given a region R: [S, N] -> [S, I] (fp64) and the constants that occur in its graph, find the Activation
and the arrangement of its halves for which R equals it on every probe, or say that there is none. The
spelling of the region (decomposed, reordered, with extra casts) plays no part.

1. Probe values from 1e-3 to 1e8 of both signs, zero, and each constant of the graph with a little added
   and taken away; all pairs of them are laid out over rows and columns, the rest filled with noise.
2. For each arrangement (halves or interleaved, first or second activated) read the table h(g, u).
3. The up factor is found first: m(u) = clamp(u) + beta must be proportional to h(g0, u). Then the gate
   factor f(g) = h(g, u0) / m(u0) is compared with every kind and its numbers.
4. A candidate counts only if it equals R on the whole matrix, noise included: an activation that looks
   at its neighbours (a norm, say) fails there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...spec import ACTIVATION_KINDS, Activation, GateLayout

# More constants than this do not occur in an activation; the search would grow with their square.
MAX_CONSTANTS = 24
# fp64 runs of the same formula agree to about 1e-15 relative; 1e-9 leaves room for other spellings of it
# (sigmoid as 1/(1+exp(-x)), erf as a tanh series does NOT pass) and none for another formula.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Recognized:
    """An activation with the arrangement of the up-projection's rows."""

    activation: Activation
    gate_layout: GateLayout
    activated_half: int


def probe_values(constants: Iterable[float]) -> Tensor:
    """Sorted fp64 probe values of both signs."""
    # Far beyond what a network computes: a clamp at any threshold, also one that is not written in the graph as
    # a number, shows in the values beyond it.
    magnitudes = [10.0 ** (e / 2) for e in range(-6, 17)] + [0.5, 2.0, 6.0, 6.5]
    for c in constants:
        c = abs(c)
        if 0 < c < 1e8:
            magnitudes += [c, c * 0.999, c * 1.001, c + 1e-6, c + 0.3]
    values = {0.0} | set(magnitudes) | {-m for m in magnitudes}
    return torch.tensor(sorted(values), dtype=torch.float64)


def recognize(
    region: Callable[[Tensor], Tensor], rows: int, up_rows: int, intermediate: int, constants: Iterable[float]
) -> Recognized | str:
    """The activation that ``region`` ([rows, up_rows] -> [rows, intermediate], fp64) computes, or a reason."""
    # 1 may be hidden in the spelling: (u + 1) * f as u * f + f.
    constants = sorted({1.0} | {abs(float(c)) for c in constants if math.isfinite(float(c)) and c != 0})
    if len(constants) > MAX_CONSTANTS:
        return f"the region between the projections holds {len(constants)} different constants"
    if up_rows == intermediate:
        arrangements: list[tuple[GateLayout, int]] = [("none", 0)]
    elif up_rows == 2 * intermediate:
        arrangements = [("halves", 0), ("halves", 1), ("interleaved", 0), ("interleaved", 1)]
    else:
        return f"the up-projection has {up_rows} rows for {intermediate} columns of the down-projection"
    for layout, half in arrangements:
        found = _try_arrangement(region, rows, intermediate, layout, half, constants)
        if found is not None:
            return Recognized(found, layout, half)
    return "the region between the projections is no activation that a fused kernel knows"


def _arrange(gate: Tensor, up: Tensor | None, layout: GateLayout, half: int) -> Tensor:
    if up is None:
        return gate
    first, second = (gate, up) if half == 0 else (up, gate)
    if layout == "halves":
        return torch.cat([first, second], dim=1)
    return torch.stack([first, second], dim=2).flatten(1)


def _try_arrangement(
    region: Callable[[Tensor], Tensor],
    rows: int,
    intermediate: int,
    layout: GateLayout,
    half: int,
    constants: list[float],
) -> Activation | None:
    probes = probe_values(constants)
    gated = layout != "none"
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cartesian_prod(probes, probes) if gated else torch.stack([probes, probes], dim=1)
    # One operand at a time is also swept densely: a window that no constant names shows if it is wider than 1%.
    sweep = 10.0 ** torch.linspace(-3, 8, 2048, dtype=torch.float64)
    sweep = torch.cat([sweep, -sweep])
    partner = torch.full_like(sweep, 2.25)
    pairs = torch.cat([pairs, torch.stack([sweep, partner], 1), torch.stack([partner, sweep], 1)])
    for start in range(0, pairs.shape[0], rows * intermediate):
        chunk = pairs[start : start + rows * intermediate]
        gate = torch.randn(rows, intermediate, dtype=torch.float64, generator=generator) * 3
        up = torch.randn(rows, intermediate, dtype=torch.float64, generator=generator) * 3
        gate.view(-1)[: chunk.shape[0]] = chunk[:, 0]
        up.view(-1)[: chunk.shape[0]] = chunk[:, 1]
        # The order of probes must not follow the columns, or a region that mixes columns could pass.
        order = torch.randperm(rows * intermediate, generator=generator)
        gate, up = gate.view(-1)[order].view_as(gate), up.view(-1)[order].view_as(up)
        out = region(_arrange(gate, up if gated else None, layout, half))
        if out.shape != gate.shape:
            return None
        if start == 0:
            table = _Table(gate.flatten(), up.flatten() if gated else None, out.flatten())
            candidates = list(_candidates(table, constants, gated))
        # Another spelling may lose digits where halves cancel, in proportion to what it multiplies.
        loss = 1e-12 * (1 + gate.abs()) * (1 + up.abs() if gated else 1)
        candidates = [a for a in candidates if _equal(a(gate, up if gated else None), out, loss)]
        if not candidates:
            return None
    return candidates[0]


def _equal(a: Tensor, b: Tensor, loss: Tensor) -> bool:
    scale = torch.maximum(a.abs(), b.abs())
    return bool(((a - b).abs() <= TOLERANCE * scale + loss).all())


@dataclass(frozen=True)
class _Table:
    """Samples h(g, u), all of one length; ``up`` is None without a gate."""

    gate: Tensor
    up: Tensor | None
    out: Tensor


def _candidates(table: _Table, constants: list[float], gated: bool) -> Iterator[Activation]:
    """Activations that agree with the table, simplest first."""
    limits = [math.inf, *constants]
    alphas = [1.0, *constants]
    if not gated:
        yield from _gate_factors(table.gate, table.out, limits, alphas, lambda **k: Activation(gated=False, **k))
        return
    assert table.up is not None
    betas = [0.0, *constants, *(-c for c in constants)]
    for up_limit, beta in itertools.product(limits, betas):
        factor = table.up.clamp(-up_limit, up_limit) + beta
        usable = factor.abs() > 1e-3
        # Where the factor vanishes the output must too: the cheapest test, and it rules out most.
        vanishing = factor == 0
        if not bool((table.out[vanishing].abs() <= 1e-12 * (1 + table.gate[vanishing].abs())).all()):
            continue
        gate, f = table.gate[usable], table.out[usable] / factor[usable]
        make = lambda **k: Activation(gated=True, beta=beta, up_limit=up_limit, **k)  # noqa: B023
        yield from _gate_factors(gate, f, limits, alphas, make)


def _gate_factors(
    gate: Tensor, values: Tensor, limits: list[float], alphas: list[float], make: Callable[..., Activation]
) -> Iterator[Activation]:
    # A few dozen samples reject nearly every candidate; the whole matrix decides on the rest.
    step = max(1, gate.shape[0] // 64)
    few_gate, few = gate[::step], values[::step]
    for kind in ACTIVATION_KINDS:
        for alpha, gate_limit in itertools.product(alphas if kind == "silu" else [1.0], limits):
            plain = Activation(kind, gated=False, alpha=alpha, gate_limit=gate_limit)
            expected = plain(few_gate)
            close = (expected - few).abs() <= 1e-7 * torch.maximum(expected.abs(), few.abs()) + 1e-9 * (
                1 + few_gate.abs()
            )
            if bool(close.all()):
                yield make(kind=kind, alpha=alpha, gate_limit=gate_limit)
