"""Calibration of checkpoints: while one is loaded, and in the converter, which can be killed and resumed.

Contract: statistics are those of the model rounded to nearest, which fits where the unquantized one does not; original
weights are read from the files a group of experts at a time. Text and calibrated sites lie in OUT.partial as soon as
they are made, under names of their own, and are no part of the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.driver import (
    Calibrated,
    Options,
    Shelf,
    Target,
    calibrate_target,
    mxfp4_target,
    plain_target,
    prepare_windows,
)
from ..calibration.model import check_calibrated, tell_calibration
from ..calibration.report import SiteCalibration
from ..calibration.sites import Codes, SiteWeights
from ..calibration.text import Windows, write_windows
from ..passes.build.module import MXFP4Experts, mxfp4_sites
from ..passes.build.prep import ExpertReader
from ..passes.weights import projections_of
from ..planning import OptimizeError, Site
from ..processes import is_spread
from ..report import Report
from .files import CheckpointError, Entry, Unit
from .output import Output
from .reader import CheckpointReader

# loading


def calibrate_loaded(
    model: nn.Module, sites: Sequence[Site], reader_of: Callable[[Site], ExpertReader], options: Options, report: Report
) -> None:
    """Calibrate the sites of a model that was loaded rounded to nearest, in place."""
    if is_spread(model):
        raise OptimizeError("this model is spread over several processes: calibrate it in one, then save and load it")
    if options.sequential:
        raise OptimizeError(
            "layer after layer a model is calibrated to the outputs of the original one, which load() never has in "
            "memory: load it unquantized and call calibrate(model, sequential=True)"
        )
    readers = {name: reader_of(site) for site in sites for name in site.candidate.names}
    built = mxfp4_sites(model)
    for name, site in built.items():
        if any(readers[name].quantized(n) for p in site.projections for n in p.source.parameters):
            raise OptimizeError(f"{name} is MXFP4 in the checkpoint: its original weights, to calibrate, are gone")
        if site._forward_pre_hooks and any("Offload" in type(getattr(h, "__self__", h)).__name__ for h in
                                           site._forward_pre_hooks.values()):  # fmt: skip
            raise OptimizeError(f"{name} is offloaded: calibrate with experts that stay on their device")
    target = mxfp4_target(model, built, lambda site, name, some: readers[site].values(name, some))
    done = calibrate_target(target, options, report.scale_rule, prepare_windows(model, options))
    for site_report in done.report.sites:
        check_calibrated(site_report)
    written: set[int] = set()
    for name, codes in done.codes.items():
        if name in built and id(built[name]) not in written:
            written.add(id(built[name]))
            _write(name, built[name], codes)
    tell_calibration(model, report, done.report)


def _write(name: str, site: MXFP4Experts, codes: Codes) -> None:
    """Put codes into a site's prepared weights; OptimizeError where they do not come out of them again."""
    for projection in site.projections:
        packed, scales = codes[projection.slot]
        site._write(projection, packed, scales)
        again = site.canonical(projection)
        if not (torch.equal(again[0].cpu(), packed) and torch.equal(again[1].cpu(), scales)):
            raise OptimizeError(f"{name}: backend {site.backend} does not give back the codes that it was given")


# converting


class DiskShelf(Shelf):
    """Calibrated sites and the text, as finished files of an output that are not installed."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.names: list[str] = []

    def _name(self, what: str) -> str:
        name = f"calibration-{hashlib.sha256(what.encode()).hexdigest()[:16]}.safetensors"
        self.names.append(name)
        return name

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        facts = self.output.finished(name)
        if facts is None:
            return None
        from safetensors.torch import load_file

        return load_file(str(self.output.files / name)), facts

    def _write(self, name: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        units = [
            Unit((Entry(key, tensor.dtype, tuple(tensor.shape)),), lambda key=key, tensor=tensor: [(key, tensor)])  # type: ignore[misc]
            for key, tensor in tensors.items()
        ]
        self.output.write_shard(name, units, facts=lambda: facts)

    def take(self, site: SiteWeights) -> tuple[Codes, SiteCalibration] | None:
        """A site that an earlier run calibrated."""
        found = self._read(self._name(site.names[0]))
        if found is None:
            return None
        tensors, facts = found
        codes = {p.slot: (tensors[f"{p.slot}.packed"], tensors[f"{p.slot}.scales"]) for p in site.projections}
        known = {**facts, "names": tuple(facts["names"]), "kept_nearest": tuple(facts["kept_nearest"])}
        return codes, SiteCalibration(**known)

    def put(self, report: SiteCalibration, codes: Codes) -> None:
        """Keep a site that is done."""
        tensors: dict[str, Tensor] = {}
        for slot, (packed, scales) in codes.items():
            tensors |= {f"{slot}.packed": packed.contiguous(), f"{slot}.scales": scales.contiguous()}
        self._write(self._name(report.names[0]), tensors, asdict(report))

    def windows(self, make: Callable[[], Windows]) -> Windows:
        """The text of an earlier run, or a new one, kept."""
        name = self._name("the text")
        found = self._read(name)
        if found is not None:
            return Windows(found[0]["ids"], **found[1])
        windows = make()
        facts = {n: getattr(windows, n) for n in ("held", "text", "text_hash", "notes", "file_hashes")}
        self._write(name, {"ids": windows.ids.contiguous()}, facts)
        return windows

    def close(self) -> None:
        """Leave what is kept here out of the output."""
        for name in self.names:
            self.output.leave_out(name)


def rounded_sites(model: nn.Module, reader: CheckpointReader) -> Target:
    """The sites of a model that was loaded rounded to nearest; ``reader``: of its checkpoint."""
    return mxfp4_target(model, mxfp4_sites(model), lambda site, name, some: reader.values(f"{site}.{name}", some))


def plain_sites(planned: tuple[nn.Module, Sequence[Site]]) -> Target:
    """The sites of an unquantized model."""
    model, sites = planned
    return plain_target(model, [site for site in sites if site.structure is not None])


def calibrated_codes(
    target: Target, options: Options, windows: Windows | None, scale_rule: str, shelf: DiskShelf
) -> Calibrated:
    """Codes for all sites of a checkpoint's model; ``windows``: of a text that is given, checked."""

    def text() -> Windows:
        if windows is not None:
            return windows
        return write_windows(target.model, tokens=options.tokens, window=options.window, seed=options.seed)

    done = calibrate_target(target, options, scale_rule, shelf.windows(text), shelf=shelf, own=windows is None)
    for site in done.report.sites:
        check_calibrated(site)
    return done


def codes_by_parameter(sites: Sequence[Site], done: Calibrated) -> dict[str, Callable[[slice], tuple[Tensor, Tensor]]]:
    """Full name of each calibrated parameter -> some of its experts' codes [e, n, ceil(k/2)] and scales."""
    found: dict[str, Callable[[slice], tuple[Tensor, Tensor]]] = {}
    for site in sites:
        codes = next((done.codes[n] for n in site.candidate.names if n in done.codes), None)
        if codes is None or site.structure is None:
            continue
        for projection in projections_of(site.structure.found.spec):
            rows = projection.rows(site.candidate.module)
            parts = zip(*(tensor.split(rows, 1) for tensor in codes[projection.slot]), strict=True)
            for name, (packed, scales) in zip(projection.source.parameters, parts, strict=True):

                def read(some: slice, packed: Tensor = packed, scales: Tensor = scales) -> tuple[Tensor, Tensor]:
                    return packed[some].contiguous(), scales[some].contiguous()

                found[f"{site.name}.{name}"] = read
    return found


def check_calibratable(reader: CheckpointReader, wanted: Mapping[str, Any]) -> None:
    """CheckpointError if experts are MXFP4 in the checkpoint already."""
    for name in wanted:
        if reader.quantized(name):
            raise CheckpointError(f"{name} is MXFP4 already: its original weights, which calibration needs, are gone")


__all__ = [
    "DiskShelf",
    "calibrate_loaded",
    "calibrated_codes",
    "check_calibratable",
    "codes_by_parameter",
    "plain_sites",
    "rounded_sites",
]
