"""Calibrate a model whose weights are in memory: in place (``calibrate``), or for ``optimize`` to take over.

Contract: nothing of the model changes before all of it is calibrated; the loop that writes has nothing left to fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import mx
from ..circumstances import StateChange, exclusively, kept_state, others_wait, plain_modes
from ..ops.target import DEFAULT_CAPTURE_SIZE
from ..passes.build.module import mxfp4_sites
from ..passes.build.prep import ExpertReader
from ..passes.build.verify import WRONG_LAYOUT, VerificationError
from ..passes.weights import Projection, members, projections_of, stack, unstack
from ..planning import OptimizeError, Site, plan_model
from ..processes import is_spread
from ..progress import advancing
from ..report import Report
from .driver import Calibrated, Options, calibrate_target, plain_target, prepare_windows
from .report import CalibrationReport, SiteCalibration
from .sites import Codes
from .text import TOKENS, WINDOW, Text

MARK = "mxfp4_calibration"


@dataclass(frozen=True)
class Mark:
    """Left on a model that was calibrated in place. ``sums``: of the bytes of its experts' parameters, by path."""

    report: CalibrationReport
    sums: Mapping[str, int]


def calibrate(
    model: nn.Module,
    text: Text = None,
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
    seed: int = 0,
    sequential: bool = False,
    progress: bool | None = None,
) -> CalibrationReport:
    """Put the weights of a model's experts on the MXFP4 grid, in place, so that its outputs change least on a text.

    ``optimize`` makes codes of such weights without changing one; its report then says how they were calibrated.

    text: a str is the text itself; a PathLike, or a list of paths, are files (UTF-8); an integer tensor is token ids;
    None: the model writes its own. tokens: of the text, an eighth of which is held back to judge by; a longer text is
    sampled with ``seed``. window: tokens that are read together. sequential: site after site on the model calibrated
    so far, which takes a forward over the text for each. progress: None shows a bar on a terminal only.

    Returns the report. Raises TypeError or ValueError for a text that will not do, OptimizeError for a model that
    cannot be calibrated. The model is untouched then.
    """
    options = Options(text, tokens, window, seed, bool(sequential))
    options.check()
    check_model_kind(model)
    with exclusively(), plain_modes(), others_wait(model):
        windows = prepare_windows(model, options)
        report = Report(mx.DEFAULT_SCALE_RULE, "bf16", DEFAULT_CAPTURE_SIZE, False)
        seen: list[StateChange] = []
        with kept_state(model):
            sites = plan_model(model, report, None, (), True, None, seen)
        todo = [site for site in sites if site.structure is not None]
        done = _calibrated(model, todo, options, mx.DEFAULT_SCALE_RULE, windows, progress)
        sums = {}
        for site in todo:
            for name in site.candidate.names:
                if name in done.codes:
                    sums.update(_write(model, site, name, done.codes[name]))
                    break
        model.__dict__[MARK] = Mark(done.report, sums)
    return done.report


def check_model_kind(model: Any) -> None:
    """TypeError or OptimizeError for what is no plain model in eval mode."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate() takes a torch.nn.Module, got {type(model).__name__}")
    if mxfp4_sites(model):
        raise OptimizeError(
            "this model is optimized already: its original weights, which calibration starts from, are gone. Load the "
            "unquantized model again and calibrate that, or load(path, calibration=...)"
        )
    if is_spread(model):
        raise OptimizeError("this model is spread over several processes: calibrate it in one, then save and load it")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or model._compiled_call_impl is not None:
        raise OptimizeError("this model is compiled already: calibrate it first, then torch.compile it")
    if model.training:
        raise OptimizeError("this model is in training mode; MXFP4 is for inference: call model.eval() first")


def calibrate_sites(
    model: nn.Module, sites: Sequence[Site], options: Options, scale_rule: str, windows: Any, progress: bool | None
) -> Calibrated:
    """Codes for planned sites of a model, for ``optimize``."""
    return _calibrated(model, sites, options, scale_rule, windows, progress)


def _calibrated(
    model: nn.Module, sites: Sequence[Site], options: Options, scale_rule: str, windows: Any, progress: bool | None
) -> Calibrated:
    with _bar(progress) as advance:
        done = calibrate_target(plain_target(model, sites), options, scale_rule, windows, advance=advance)
    try:
        for site in done.report.sites:
            check_calibrated(site)
    except VerificationError as error:
        raise OptimizeError(f"{error}. Nothing was changed.") from error
    return done


def _bar(wanted: bool | None) -> AbstractContextManager[Callable[[int], None]]:
    """Tokens that were run, and how many a second; None: on a terminal."""
    wanted = sys.stderr.isatty() if wanted is None else wanted
    return advancing(wanted, unit="tok", unit_scale=True, desc="calibration")


def check_calibrated(site: SiteCalibration) -> None:
    """VerificationError for a site whose outputs are worse than rounded to nearest on text held back, or whose weights
    are those of another layout.
    """
    if not site.held_error <= site.nearest_held_error:
        raise VerificationError(
            f"{site.names[0]}: calibrated, its output error on text held back is {site.held_error:.3g}; rounded to "
            f"nearest {site.nearest_held_error:.3g}"
        )
    if not site.drift_max < WRONG_LAYOUT:
        raise VerificationError(
            f"{site.names[0]}: calibrated weights have a relative squared error of {site.drift_max:.3g} against the "
            f"original ones; no right layout gives more than {WRONG_LAYOUT}"
        )


def _write(model: nn.Module, site: Site, name: str, codes: Codes) -> dict[str, int]:
    """Write a site's values into its parameters; the sums of their bytes, by path."""
    module = site.candidate.module
    assert site.structure is not None
    sums = {}
    with torch.no_grad():
        for projection in projections_of(site.structure.found.spec):
            packed, scales = codes[projection.slot]
            rows = projection.rows(module)
            sources = projection.source.parameters
            for source, p, s in zip(sources, packed.split(rows, 1), scales.split(rows, 1), strict=True):
                like = stack(module, source)
                values = mx.dequantize(p.contiguous(), s.contiguous(), projection.shape[2], like.dtype)
                values = values.transpose(1, 2) if projection.source.transposed else values
                for member, value in unstack(module, source, values).items():
                    parameter = module.get_parameter(member)
                    if "@" in source:  # experts that no forward multiplies stay as they are
                        parameter.data[: projection.shape[0]].copy_(value[: projection.shape[0]])
                    else:
                        parameter.data.copy_(value)
                    sums[f"{name}.{member}"] = _sum(parameter)
    return sums


def _sum(parameter: Tensor) -> int:
    return int(parameter.detach().contiguous().view(-1).view(torch.uint8).view(-1).sum(dtype=torch.int64))


def mark_of(model: nn.Module, sites: Sequence[Site]) -> CalibrationReport | None:
    """The report of a calibration in place, if the weights of all these sites are still those that it wrote."""
    mark = model.__dict__.get(MARK)
    if not isinstance(mark, Mark):
        return None
    for site in sites:
        assert site.structure is not None
        sources = [n for p in projections_of(site.structure.found.spec) for n in p.source.parameters]
        for source in sources:
            for member in members(site.candidate.module, source):
                known = [mark.sums.get(f"{name}.{member}") for name in site.candidate.names]
                if any(k is not None for k in known) and _sum(site.candidate.module.get_parameter(member)) not in known:
                    return None
    return mark.report


@dataclass(frozen=True)
class CodesReader(ExpertReader):
    """Reads a site's calibrated codes; its biases from the module itself."""

    module: nn.Module
    projections: tuple[Projection, ...]
    codes_of: Codes

    def quantized(self, name: str) -> bool:
        """Whether ``name`` is one of the calibrated weights."""
        return any(name in p.source.parameters for p in self.projections)

    def values(self, name: str, experts: slice) -> Tensor:
        """A view of some experts of a parameter that is not quantized."""
        return stack(self.module, name)[experts]

    def codes(self, name: str, experts: slice, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of one source parameter, on the device of its weights."""
        projection = next(p for p in self.projections if name in p.source.parameters)
        number = projection.source.parameters.index(name)
        start = sum(projection.rows(self.module)[:number])
        device = stack(self.module, name).parts[0].device
        packed, scales = (part[experts, start : start + n].to(device) for part in self.codes_of[projection.slot])
        return packed, scales


def reader_of(site: Site, done: Calibrated) -> ExpertReader | None:
    """Where ``optimize`` reads a site's weights: its codes, or None for the module where it has none."""
    codes = next((done.codes[name] for name in site.candidate.names if name in done.codes), None)
    if codes is None:
        return None
    assert site.structure is not None
    return CodesReader(site.candidate.module, projections_of(site.structure.found.spec), codes)


def tell_calibration(model: nn.Module, report: Report, calibration: CalibrationReport | None) -> None:
    """Put a calibration in the report: how far it moved the weights is their error, not what rounding them again is."""
    if calibration is None:
        return
    report.calibration = calibration
    built = mxfp4_sites(model)
    for i, site in enumerate(report.sites):
        known = calibration.of(site.names[0]) if site.rewritten else None
        if known is not None:
            report.sites[i] = replace(
                site, weight_error_mean=known.drift_mean, weight_error_max=known.drift_max, calibrated=True
            )
            if site.names[0] in built:
                built[site.names[0]].weight_errors = {n: dict(e) for n, e in known.by_name.items()}


__all__ = ["calibrate", "calibrate_sites", "check_calibrated", "mark_of", "reader_of", "tell_calibration"]
