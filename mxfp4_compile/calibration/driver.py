"""Calibrate a model's sites: run the text through it, then solve site by site.

::

    windows --> the model, its sites recording --> calibrate_site, site by site --> codes, report
                    ^      as many sites at once as the host has memory for              |
                    +---------- sequential: once more for each site, on the codes so far +

Contract: the model is the same afterwards; codes lie on the host. How many sites are recorded at once changes how
often the model runs, never a result: without ``sequential`` every site sees what the model as it came gives it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..circumstances import kept_state
from ..passes.build.module import MXFP4Experts
from ..passes.find.discover import default_inputs
from ..passes.find.foreign_hooks import underlying
from ..passes.match import FusedMatch
from ..passes.weights import Projection, projections_of, stack
from ..planning import OptimizeError, Site, weight_ids
from ..report import versions_used
from . import text as texts
from .recording import Enough, Recorded, Recorder, canonical, plain_weight, recorded, recorded_mxfp4
from .report import CalibrationReport, SiteCalibration
from .sites import Codes, SiteWeights, calibrate_site

# Tokens of one forward.
_BATCH = {"cpu": 4096}
_BATCH_DEVICE = 16384
# Share of the host's free memory that recorded inputs may take.
_HOST_SHARE = 0.5
# Bytes that solving a site takes on a CUDA device; recorded inputs stay there if they fit beside it in so many passes.
_SOLVING_BYTES = 16e9
_PASSES = 3
# Windows whose loss is taken.
_JUDGED = 8

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """How a calibration was asked for. ``text``: as ``text.Text`` says."""

    text: Any = None
    tokens: int = texts.TOKENS
    window: int = texts.WINDOW
    seed: int = 0
    sequential: bool = False

    def check(self) -> None:
        """TypeError or ValueError for what makes no sense, whatever the model."""
        texts.check_numbers(self.tokens, self.window, self.seed)
        texts.check_text(self.text)

    @classmethod
    def of(cls, calibration: Any) -> Options:
        """What ``optimize(calibration=...)`` was given: a text, True for the model's own, or Options."""
        if isinstance(calibration, Options):
            return calibration
        return cls(None if calibration is True else calibration)


@dataclass(frozen=True)
class Target:
    """What is calibrated. ``sites``: by key, with what they weigh; ``recording``: has them record within its block."""

    model: nn.Module
    sites: Mapping[int, SiteWeights]
    recording: Callable[[Recorder], AbstractContextManager[None]]


def plain_target(model: nn.Module, sites: Sequence[Site]) -> Target:
    """A model with its weights in memory and its planned sites; those that share their weights are one."""
    keys: dict[tuple[int, ...], list[Site]] = {}
    for site in sites:
        keys.setdefault(site.tied or weight_ids(site), []).append(site)
    groups = dict(enumerate(keys.values()))
    return Target(
        model,
        {key: _plain_weights(same) for key, same in groups.items()},
        lambda recorder: recorded(groups, recorder),
    )


def _plain_weights(same: Sequence[Site]) -> SiteWeights:
    site = same[0]
    assert site.structure is not None
    module, found = site.candidate.module, site.structure.found
    projections = projections_of(found.spec)
    first = stack(module, projections[0].source.parameters[0])
    biases = {
        p.slot: torch.cat([stack(module, name)[:] for name in p.source.bias], 1) for p in projections if p.source.bias
    }
    return SiteWeights(
        tuple(name for s in same for name in s.candidate.names),
        projections,
        found.spec.params if isinstance(found, FusedMatch) else None,
        first.dtype,
        first.parts[0].device,
        lambda projection, some: plain_weight(module, projection, some),
        biases,
        lambda projection: projection.rows(module),
    )


def mxfp4_target(
    model: nn.Module,
    sites: Mapping[str, MXFP4Experts],
    values: Callable[[str, str, slice], Tensor],
) -> Target:
    """A model that runs on MXFP4, rounded to nearest; ``values``: name of a site, of a parameter, some experts ->
    their original values, in the parameter's own layout.
    """
    keys: dict[int, list[tuple[str, MXFP4Experts]]] = {}
    for name, site in sites.items():
        keys.setdefault(site.weights(site.projections[0].slot)[0].data_ptr(), []).append((name, site))
    groups = dict(enumerate(keys.values()))

    def weights(same: Sequence[tuple[str, MXFP4Experts]]) -> SiteWeights:
        name, site = same[0]

        def read(projection: Projection, some: slice) -> Tensor:
            parts = [values(name, parameter, some).to(site.device) for parameter in projection.source.parameters]
            return canonical(parts, projection)

        biases = {p.slot: b for p in site.projections if (b := site.canonical_bias(p)) is not None}
        return SiteWeights(
            tuple(n for n, _ in same), site.projections, site.plan.params, site.plan.weight_dtype, site.device, read,
            biases, lambda projection: projection.rows(site.original),
        )  # fmt: skip

    modules = {key: [site for _, site in same] for key, same in groups.items()}
    return Target(
        model,
        {key: weights(same) for key, same in groups.items()},
        lambda recorder: recorded_mxfp4(modules, recorder),
    )


class Shelf:
    """Where calibrated sites are kept for a run that is resumed; this one keeps nothing."""

    def take(self, site: SiteWeights) -> tuple[Codes, SiteCalibration] | None:
        """What an earlier run left of a site."""
        return None

    def put(self, report: SiteCalibration, codes: Codes) -> None:
        """Keep a site that is done."""


@dataclass
class Calibrated:
    """``codes``: site name -> slot -> packed and scales, on the host; every name of a site has them."""

    codes: dict[str, Codes]
    report: CalibrationReport


def prepare_windows(model: nn.Module, options: Options) -> texts.Windows | None:
    """The windows of a text that is given, all of it checked; None where the model is to write its own.

    Raises ValueError, or OptimizeError for a text that the model cannot be run on.
    """
    if options.text is None:
        texts.window_for(model, options.window)
        texts.first_token(model)
        return None
    return texts.read_windows(model, options.text, tokens=options.tokens, window=options.window, seed=options.seed)


def calibrate_target(
    target: Target,
    options: Options,
    scale_rule: str,
    windows: texts.Windows | None,
    *,
    advance: Advance = lambda _: None,
    shelf: Shelf | None = None,
    own: bool | None = None,
) -> Calibrated:
    """Codes for all sites of a target. ``windows``: of ``prepare_windows``. advance: called with tokens run.

    own: whether ``windows`` were written by the model. shelf: what an interrupted calibration of the same text left;
    sites that are there are not calibrated again.
    """
    started = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad(), kept_state(target.model):
        own = windows is None if own is None else own
        if windows is None:
            windows = texts.write_windows(target.model, tokens=options.tokens, window=options.window, seed=options.seed)
        report = _report(target, options, scale_rule, windows)
        _judge(target.model, windows, report, own=own, ids=isinstance(options.text, Tensor))
        codes = _Run(target, windows, scale_rule, options.sequential, report, advance, shelf or Shelf()).all()
    report.seconds = time.perf_counter() - started
    return Calibrated(codes, report)


def _report(target: Target, options: Options, scale_rule: str, windows: texts.Windows) -> CalibrationReport:
    device = next(iter(target.sites.values())).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    report = CalibrationReport(
        text=windows.text,
        text_hash=windows.text_hash,
        ids_hash=windows.ids_hash,
        tokens=(len(windows.ids) - windows.held) * windows.ids.shape[1],
        window=windows.ids.shape[1],
        held_back=windows.held * windows.ids.shape[1],
        seed=options.seed,
        sequential=options.sequential,
        scale_rule=scale_rule,
        device=name,
        notes=list(windows.notes),
        versions=versions_used(),
        file_hashes=list(windows.file_hashes),
    )
    if not windows.held:
        report.notes.append("a single window: no text was held back, so that overfitting would not show")
    return report


def _judge(model: nn.Module, windows: texts.Windows, report: CalibrationReport, *, own: bool, ids: bool) -> None:
    """Take the model's loss on the text, and say what it says of the text."""
    report.nll = texts.loss(model, windows.ids[:: max(1, len(windows.ids) // _JUDGED)][:_JUDGED])
    if own:
        report.own_nll = report.nll
        return
    if report.nll is None:  # no causal model, or one that gives NaN here, which names itself where it is met
        return
    measured = texts.own_loss(model, report.window, report.seed)
    report.own_nll = None if measured is None or math.isnan(measured) else measured
    report.warnings += texts.judge_loss(report.nll, measured, texts.vocabulary_of(model), ids=ids)


class _Run:
    """One calibration: passes over the text, and what is left to do."""

    def __init__(
        self,
        target: Target,
        windows: texts.Windows,
        scale_rule: str,
        sequential: bool,
        report: CalibrationReport,
        advance: Advance,
        shelf: Shelf,
    ) -> None:
        self.target, self.windows, self.scale_rule = target, windows, scale_rule
        self.sequential, self.report, self.advance, self.shelf = sequential, report, advance, shelf
        self.recorder = Recorder()
        self.inputs = _inputs_of(target.model)
        device = next(iter(target.sites.values())).device
        size = max(1, _BATCH.get(device.type, _BATCH_DEVICE) // windows.ids.shape[1])
        fit = len(windows.ids) - windows.held
        self.batches = [(i, windows.ids[i : min(i + size, fit)], False) for i in range(0, fit, size)]
        self.batches += [(i, windows.ids[i : i + size], True) for i in range(fit, len(windows.ids), size)]

    def all(self) -> dict[str, Codes]:
        with self.target.recording(self.recorder):
            self._forward(self.batches[0])  # shows which sites there are, in which order, and how much they get
            order = list(self.recorder.order)
            sizes, calls = {}, set()
            for key in order:
                kept = self.recorder.take(key)
                sizes[key] = sum(r.bytes for r in kept.values())
                calls |= {len(r.x) for r in kept.values()}
            self.once = calls == {1}
            unreached = [n for key, site in self.target.sites.items() if key not in order for n in site.names]
            if unreached:
                shown = ", ".join(unreached[:4]) + (f" and {len(unreached) - 4} more" if len(unreached) > 4 else "")
                self.report.notes.append(f"the text does not reach {shown}: rounded to nearest")
            found = {key: self.shelf.take(self.target.sites[key]) for key in order}
            codes = {key: known[0] for key, known in found.items() if known is not None}
            groups = self._groups([key for key in order if key not in codes], sizes)
            done = self._sequential(groups, codes) if self.sequential else self._at_once(groups)
            codes.update(done)
            known_sites = {known[1].names: known[1] for known in found.values() if known is not None}
            known_sites |= {site.names: site for site in self.report.sites}
            self.report.sites = [known_sites[self.target.sites[key].names] for key in order]
        return {name: codes[key] for key in order for name in self.target.sites[key].names}

    def _at_once(self, groups: list[list[int]]) -> dict[int, Codes]:
        codes: dict[int, Codes] = {}
        for some in groups:
            self._pass(some)
            for key in some:
                codes[key] = self._solve(key, self.recorder.take(key), None)
        return codes

    def _sequential(self, groups: list[list[int]], known: Mapping[int, Codes]) -> dict[int, Codes]:
        """Site after site: inputs of the model calibrated so far, outputs of the original."""
        self.recorder.codes.update(known)
        for some in groups:
            self._pass(some)
            originals = {key: self.recorder.take(key) for key in some}
            for key in some:
                self.recorder.calibrated = True
                self._pass([key])
                self.recorder.calibrated = False
                fused = self.target.sites[key].params is not None
                # The rows of a split site are sorted by expert: those of both models do not belong together.
                own = originals.pop(key)
                self.recorder.codes[key] = self._solve(key, self.recorder.take(key), own if fused else None)
        return dict(self.recorder.codes)  # type: ignore[arg-type]

    def _solve(self, key: int, kept: dict[str, Recorded], originals: dict[str, Recorded] | None) -> Codes:
        site = self.target.sites[key]
        _check_finite(site, kept, self.windows, [len(ids) for _, ids, _ in self.batches])
        try:
            codes, report = calibrate_site(site, kept, self.scale_rule, originals)
        except torch.cuda.OutOfMemoryError as error:
            raise OptimizeError(
                f"calibrating {site.names[0]} takes more memory than is free on {site.device}: about "
                f"{_needed(site, kept) / 1e9:.1f} GB beside the model. Nothing was changed."
            ) from error
        self.report.sites.append(report)
        self.shelf.put(report, codes)
        return codes

    def _groups(self, order: list[int], sizes: Mapping[int, int]) -> list[list[int]]:
        """Sites to record in one pass over the text, as many as the host has room for; sizes: a batch's."""
        times = self.windows.ids.numel() / self.batches[0][1].numel()
        room = free_host_memory()
        needed = [sizes[key] * times * (2 if self.sequential else 1) for key in order]
        here = free_device_memory({site.device for site in self.target.sites.values()}) - _SOLVING_BYTES
        self.recorder.stays = bool(needed) and max(needed) <= here and sum(needed) <= here * _PASSES
        share = _HOST_SHARE
        if self.recorder.stays:
            room, share = here, 1.0
        groups: list[list[int]] = [[]]
        used = 0.0
        for key in order:
            size = sizes[key] * times * (2 if self.sequential else 1)
            if size > room:
                raise OptimizeError(
                    f"calibrating {self.target.sites[key].names[0]} on {self.windows.ids.numel()} tokens keeps "
                    f"{size / 1e9:.1f} GB of its inputs; the host has {room / 1e9:.1f} GB free. Fewer tokens need "
                    "less. Nothing was changed."
                )
            if groups[-1] and used + size > room * share:
                groups.append([])
                used = 0.0
            groups[-1].append(key)
            used += size
        return [some for some in groups if some]

    def _pass(self, keys: Sequence[int]) -> None:
        """Run all of the text, recording these sites (of which the last is the last that a forward reaches)."""
        self.recorder.wanted = set(keys)
        self.recorder.last = keys[-1] if self.once else None
        for batch in self.batches:
            self._forward(batch)
        self.recorder.last = None
        for device in {site.device for site in self.target.sites.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # copies to the host are there

    def _forward(self, batch: tuple[int, Tensor, bool]) -> None:
        _, ids, self.recorder.held = batch
        inputs = {**self.inputs}
        for name in ("input_ids", "decoder_input_ids"):
            if name in inputs:
                inputs[name] = ids.to(self.inputs[name].device)
        with suppress(Enough):
            self.target.model(**inputs)
        self.advance(ids.numel())


def _inputs_of(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of one forward; of the logits the last token's only, where the model can."""
    import inspect

    inputs = default_inputs(model, 1, 2)
    if "logits_to_keep" in inspect.signature(underlying(model).forward).parameters:
        inputs["logits_to_keep"] = 1
    return inputs


def _check_finite(site: SiteWeights, kept: Mapping[str, Recorded], windows: texts.Windows, counts: list[int]) -> None:
    """OptimizeError naming the layer and the token for activations that are NaN or Inf."""
    width = windows.ids.shape[1]
    for record in kept.values():
        if record.finite and all(bool(flag) for flag in record.finite):
            continue
        window = 0
        for call, x in enumerate(record.x):
            bad = ~x.isfinite().flatten(1).all(1)
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                here = counts[call] if len(record.x) == len(counts) else 0
                at = f"row {row}"
                if here * width == x.shape[0]:
                    at = f"token {row % width} of window {window + row // width}"
                    at += f" (id {int(windows.ids[window + row // width, row % width])})"
                raise OptimizeError(
                    f"{site.names[0]} gets activations that are NaN or Inf at {at} of the calibration text. Nothing "
                    "was changed."
                )
            window += counts[call] if len(record.x) == len(counts) else 0


def _needed(site: SiteWeights, kept: Mapping[str, Recorded]) -> float:
    """Bytes that one site's calibration takes: its inputs, Hessians, and weights in fp32 a few times."""
    inputs = max(r.bytes for r in kept.values())
    return inputs + max(4.0 * e * (3 * k * k + n * k) for e, n, k in (p.shape for p in site.projections))


def free_device_memory(devices: Set[torch.device]) -> float:
    """Bytes free on the one CUDA device that all sites are on, with what PyTorch holds unused; 0 for all others."""
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return 0.0
    (device,) = devices
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


def free_host_memory() -> float:
    """Bytes that the host could give, by the operating system; 8 GB where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 8e9


__all__ = [
    "Calibrated",
    "Options",
    "Shelf",
    "Target",
    "calibrate_target",
    "mxfp4_target",
    "plain_target",
    "prepare_windows",
]
