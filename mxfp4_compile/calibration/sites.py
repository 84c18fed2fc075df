"""One site: from what its ops got to its codes.

::

    rows --> Hessian of up's inputs --> up --> its outputs, quantized --> Hessian of down's inputs --> down
                                                        |
    rows held back --> output error, calibrated and nearest, by expert --> which of the two each expert keeps

Contract: weights are read a group of experts at a time; what is kept beside the rows is one layer's Hessians and codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import mx
from ..passes.weights import Projection
from ..spec import MoEParams
from .grid import nearest
from .recording import Recorded
from .report import SiteCalibration
from .rows import Reads, Rows, Tile, hessian, output_errors
from .solver import Hessians, shrunk, solve

Codes = dict[str, tuple[Tensor, Tensor]]
"""By slot: packed uint8 [E, N, ceil(K/2)] and scales uint8 [E, N, ceil(K/32)], on the host."""

# Memory for one group of experts, as the solver and the sums over rows use it.
_GROUP_BYTES = {"cpu": 1 << 29}
_GROUP_BYTES_DEVICE = 6 << 30


@dataclass(frozen=True)
class SiteWeights:
    """What is known of a site. ``params``: None for a split one. ``read``: some experts of a projection, [e, N, K].

    ``rows_of``: how many rows each source parameter of a projection has, in order.
    """

    names: tuple[str, ...]
    projections: tuple[Projection, ...]
    params: MoEParams | None
    dtype: torch.dtype
    device: torch.device
    read: Callable[[Projection, slice], Tensor]
    biases: Mapping[str, Tensor]
    rows_of: Callable[[Projection], list[int]]


@dataclass(frozen=True)
class _Text:
    """Rows to calibrate on, rows to judge by, and a few of the first to compare with; the same of the original model.

    ``original``: inputs [T, K] of the original model for the same tokens, where they differ.
    """

    fit: Rows
    judged: Rows
    sample: Rows
    original: Tensor | None


@dataclass
class _Tally:
    """Squared errors by expert, of calibrated and nearest values, on rows calibrated on and rows held back."""

    error: Tensor
    nearest: Tensor
    power: Tensor


def calibrate_site(
    site: SiteWeights,
    recorded: Mapping[str, Recorded],
    scale_rule: str,
    originals: Mapping[str, Recorded] | None = None,
) -> tuple[Codes, SiteCalibration]:
    """Codes for all projections of a site; ``originals``: what its ops got in the original model, if not the same."""
    started = time.perf_counter()
    if site.params is None:
        parts = [_linear(site, p, recorded[p.slot], scale_rule, originals) for p in site.projections]
    else:
        slot = site.projections[0].slot
        text = _text(site, slot, recorded, originals, site.params.weight_on_input)
        parts = [_fused(site, site.params, text, scale_rule)]
    codes: Codes = {}
    drifts, nearest_drifts, by_name, kept = [], [], {}, set[int]()
    for part in parts:
        codes |= part.codes
        kept |= set(part.kept)
        for projection, drift in part.drift.items():
            drifts.append(drift)
            both = {"mean": float(drift.mean()), "max": float(drift.max())}
            by_name.update(dict.fromkeys(projection.source.parameters, both))
        nearest_drifts += part.nearest_drift
    counts = torch.tensor(parts[0].counts)
    fit, held = ([getattr(part, name) for part in parts] for name in ("fit", "held"))
    report = SiteCalibration(
        names=site.names,
        experts=site.projections[0].shape[0],
        tokens_min=int(counts.min()),
        tokens_median=int(counts.median()),
        on_prior=parts[0].on_prior,
        kept_nearest=tuple(sorted(kept)),
        error=_relative(fit, "error"),
        nearest_error=_relative(fit, "nearest"),
        held_error=_relative(held, "error"),
        nearest_held_error=_relative(held, "nearest"),
        drift_mean=float(torch.cat(drifts).mean()),
        drift_max=float(torch.cat(drifts).max()),
        nearest_drift=float(torch.cat(nearest_drifts).mean()),
        by_name=by_name,
        seconds=time.perf_counter() - started,
    )
    return codes, report


def _relative(tallies: list[_Tally], name: str) -> float:
    power = sum(float(t.power.sum()) for t in tallies)
    return sum(float(getattr(t, name).sum()) for t in tallies) / power if power else 0.0


def _text(
    site: SiteWeights,
    slot: str,
    recorded: Mapping[str, Recorded],
    originals: Mapping[str, Recorded] | None,
    scaled: bool,
) -> _Text:
    experts = next(p.shape[0] for p in site.projections if p.slot == slot)
    x, ids, weights, held = recorded[slot].joined(site.device)
    rows = Rows.of_pairs(x, ids, weights, experts, scaled=scaled)
    other = None if originals is None else originals[slot].joined(site.device)[0]
    if not bool(held.any()):
        return _Text(rows, rows, rows, other)
    before = (~held).cumsum(0) <= held.sum()
    return _Text(rows.only(~held), rows.only(held), rows.only(~held & before), other)


@dataclass(frozen=True)
class _Part:
    codes: Codes
    counts: tuple[int, ...]
    on_prior: int
    kept: list[int]
    drift: dict[Projection, Tensor]
    nearest_drift: list[Tensor]
    fit: _Tally
    held: _Tally


def _groups(projection: Projection, device: torch.device) -> Iterator[slice]:
    """Ranges of experts that are solved together."""
    experts, n, k = projection.shape
    # The solver has about ten arrays of the weights' size and eight of the Hessian's, in fp32 or wider.
    each = 4 * (10 * n * k + 10 * k * k)
    size = max(1, _GROUP_BYTES.get(device.type, _GROUP_BYTES_DEVICE) // each)
    return (slice(start, min(start + size, experts)) for start in range(0, experts, size))


def _hessians(
    groups: list[slice], rows: Rows, reads: Callable[[slice], tuple[Reads, Reads | None]], k: int
) -> Hessians:
    sums, cross = [], []
    for some in groups:
        own, other = reads(some)
        both = hessian(rows, some, own, k, other)
        sums.append(both[0])
        cross.append(both[1])
    joined = torch.cat(cross)
    return shrunk(torch.cat(sums), torch.tensor(rows.counts), joined if joined.numel() else None)


def _solved(
    site: SiteWeights, projection: Projection, hessians: Hessians, groups: list[slice]
) -> tuple[Tensor, Tensor]:
    """Values on the grid [E, N, K] of the weights' dtype; which experts [E] no solution was found for."""
    values, failed = [], []
    for some in groups:
        found = solve(site.read(projection, some).float(), hessians[some], site.dtype)
        values.append(found.values.to(site.dtype))
        failed.append(found.failed)
    return torch.cat(values), torch.cat(failed)


def _choose(
    site: SiteWeights,
    projections: tuple[Projection, ...],
    values: list[Tensor],
    failed: Tensor,
    groups: list[slice],
    text: _Text,
    outputs: Callable[[slice, list[Tensor], bool], Reads],
    scale_rule: str,
    on_prior: Tensor,
) -> _Part:
    """Judge calibrated values against nearest ones, expert by expert, and make codes of the better."""
    tallies: dict[str, list[_Tally]] = {"fit": [], "held": []}
    codes: dict[str, list[tuple[Tensor, Tensor]]] = {p.slot: [] for p in projections}
    drift: dict[Projection, list[Tensor]] = {p: [] for p in projections}
    nearest_drift, kept = [], []
    for some in groups:
        original = [site.read(p, some) for p in projections]
        rounded = [nearest(w, scale_rule) for w in original]
        tried = [torch.where(failed[some, None, None], r, v[some]) for r, v in zip(rounded, values, strict=True)]
        reads = [outputs(some, tried, False), outputs(some, rounded, False)]
        noise, power = output_errors(text.judged, some, outputs(some, original, True), reads)
        worse = failed[some] | ~(noise[0] <= noise[1])
        kept += [some.start + i for i in worse.nonzero().flatten().tolist()]
        tallies["held"].append(_Tally(torch.where(worse, noise[1], noise[0]), noise[1], power))
        final = [torch.where(worse[:, None, None], r, t) for r, t in zip(rounded, tried, strict=True)]
        reads = [outputs(some, final, False), outputs(some, rounded, False)]
        noise, power = output_errors(text.sample, some, outputs(some, original, True), reads)
        tallies["fit"].append(_Tally(noise[0], noise[1], power))
        for p, w, r, f in zip(projections, original, rounded, final, strict=True):
            packed, scales = mx.quantize(f, scale_rule)
            codes[p.slot].append((packed.cpu(), scales.cpu()))
            size = w.float().square().sum((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
            drift[p].append(((f.float() - w.float()).square().sum((1, 2)) / size).cpu())
            nearest_drift.append(((r.float() - w.float()).square().sum((1, 2)) / size).cpu())
    return _Part(
        {slot: (torch.cat([c for c, _ in pairs]), torch.cat([s for _, s in pairs])) for slot, pairs in codes.items()},
        text.fit.counts,
        int(on_prior.sum()),
        kept,
        {p: torch.cat(parts) for p, parts in drift.items()},
        nearest_drift,
        _joined(tallies["fit"]),
        _joined(tallies["held"]),
    )


def _joined(parts: list[_Tally]) -> _Tally:
    return _Tally(*(torch.cat([getattr(p, name).cpu() for p in parts]) for name in ("error", "nearest", "power")))


def _fused(site: SiteWeights, params: MoEParams, text: _Text, scale_rule: str) -> _Part:
    """A site with an op for all of it: down is solved for what the quantized up gives it."""
    up, down = site.projections
    groups = list(_groups(up if up.shape[2] * up.shape[1] > down.shape[2] * down.shape[1] else down, site.device))
    fit, x0 = text.fit, text.original

    def inside(some: slice, weight: Tensor, original: bool, rows: Rows) -> Reads:
        """What down's experts get, given up's weights [e, N, K] of the group."""
        wide = weight.float()
        bias = site.biases[up.slot][some].float() if up.slot in site.biases else None

        def read(tile: Tile) -> Tensor:
            y = rows.inputs(tile, x0 if original else None) @ wide[tile.experts].mT
            return params.activate(y if bias is None else y + bias[tile.experts, None])

        return read

    def outputs(some: slice, weights: list[Tensor], original: bool) -> Reads:
        hidden, wide = inside(some, weights[0], original, text.judged), weights[1].float()
        # A bias of down is the same in all and left out, but for the size that errors are held against.
        bias = site.biases[down.slot][some].float() if down.slot in site.biases else None

        def read(tile: Tile) -> Tensor:
            y = hidden(tile) @ wide[tile.experts].mT
            return y if bias is None else y + bias[tile.experts, None]

        return read

    of_up = _hessians(
        groups, fit, lambda _: (fit.inputs, None if x0 is None else lambda tile: fit.inputs(tile, x0)), up.shape[2]
    )
    ups, failed = _solved(site, up, of_up, groups)
    on_prior = of_up.on_prior
    del of_up

    def hidden(some: slice) -> tuple[Reads, Reads]:
        return inside(some, ups[some], False, fit), inside(some, site.read(up, some), True, fit)

    def hidden_alone(some: slice) -> tuple[Reads, None]:
        return inside(some, ups[some], False, fit), None

    of_down = _hessians(groups, fit, hidden_alone if x0 is None else hidden, down.shape[2])
    downs, failed_down = _solved(site, down, of_down, groups)
    del of_down
    failed |= failed_down
    return _choose(site, (up, down), [ups, downs], failed, groups, text, outputs, scale_rule, on_prior)


def _linear(
    site: SiteWeights,
    projection: Projection,
    recorded: Recorded,
    scale_rule: str,
    originals: Mapping[str, Recorded] | None,
) -> _Part:
    """One grouped projection of a split site."""
    text = _text(site, projection.slot, {projection.slot: recorded}, originals, False)
    groups = list(_groups(projection, site.device))
    fit, x0 = text.fit, text.original
    hessians = _hessians(
        groups, fit, lambda _: (fit.inputs, None if x0 is None else lambda tile: fit.inputs(tile, x0)),
        projection.shape[2],
    )  # fmt: skip
    values, failed = _solved(site, projection, hessians, groups)

    def outputs(some: slice, weights: list[Tensor], original: bool) -> Reads:
        wide = weights[0].float()
        return lambda tile: text.judged.inputs(tile, x0 if original else None) @ wide[tile.experts].mT

    return _choose(site, (projection,), [values], failed, groups, text, outputs, scale_rule, hessians.on_prior)


__all__ = ["Codes", "SiteWeights", "calibrate_site"]
