"""What happened to a model: every MoE-looking module, what it became, and why."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from .text import size

Outcome = Literal["fused", "split", "skipped", "dense", "unmatched", "failed"]


@dataclass(frozen=True)
class SiteReport:
    """One MoE-looking module.

    ``names``: every path to it. ``form``: what it is, in words. ``bytes_before`` and ``bytes_after`` count
    the expert weights (not biases). ``weight_error``: mean and largest relative squared error of its
    experts' quantization. ``error``: relative error of the rewritten module against an fp32 run of the
    original on the same dequantized weights; ``original_error``: that of the original in its own dtype. Where
    activations are quantized for many tokens only: ``quantized_error``, that of calls with ``quantized_from`` tokens or
    more, which ``error`` leaves out. ``constants``: plain attributes that the original's forward reads, with the values
    that are part of the rewritten graph. ``calibrated``: its codes were chosen by its outputs, so that
    ``weight_error`` is how far that moved the weights.
    """

    names: tuple[str, ...]
    module_class: str
    outcome: Outcome
    form: str = ""
    reason: str = ""
    backend: str = ""
    layout: str = ""
    rejected: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    weight_error_mean: float | None = None
    weight_error_max: float | None = None
    error: float | None = None
    original_error: float | None = None
    quantized_from: int | None = None
    quantized_error: float | None = None
    warnings: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    calibrated: bool = False

    @property
    def rewritten(self) -> bool:
        """Whether the site runs on MXFP4 weights now."""
        return self.outcome in ("fused", "split")


@dataclass(frozen=True)
class CaptureReport:
    """One recorded decode step: rows, tokens its cache holds, how it is replayed and how it was made.

    ``cache_bytes``: its keys and values, in memory that all steps share. ``graph_bytes``: what recording it
    added to the pool that all graphs share. ``error``: relative error of its logits against an eager step.
    ``products``: which matrix products are computed otherwise than the model has them, in words, "" if none.
    """

    batch: int
    length: int
    replay: str
    made: str
    seconds: float
    cache_bytes: int
    graph_bytes: int
    error: float
    products: str = ""


@dataclass
class PrefillReport:
    """Decoder layers compiled for one kind of prompt, of any length; or the forward of some of them, recorded.

    ``error``: the largest relative error of logits, keys and values against eager layers, on a probe. ``replay``: how
    it is replayed, "" if not recorded; ``graph_bytes``: what recording it added to the pool that all graphs share.
    """

    prompts: str
    seconds: float
    error: float
    replay: str = ""
    graph_bytes: int = 0


@dataclass
class RuntimeReport:
    """What ``generate`` runs on; grows as it is used. Copies start without captures, as models' copies do."""

    captures: list[CaptureReport] = field(default_factory=list)
    prefills: list[PrefillReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    packed: str = ""  # which weights were put side by side, in words

    def note(self, text: str) -> None:
        """Say something, once."""
        if text not in self.notes:
            self.notes.append(text)

    def __getstate__(self) -> dict[str, Any]:
        return {"captures": [], "prefills": [], "notes": [], "packed": ""}

    def lines(self) -> list[str]:
        """A readable account."""
        out = [
            f"decode step: batch {c.batch}, {c.length} tokens, {c.replay}, {c.made}"
            f"{f' ({c.products})' if c.products else ''}: {c.seconds:.1f} s, cache {size(c.cache_bytes)}, "
            f"graph {size(c.graph_bytes)}, error {c.error:.1e} against eager"
            for c in self.captures
        ]
        out += [
            f"{p.prompts}: {p.replay + ', ' if p.replay else ''}compiled layers: {p.seconds:.1f} s, "
            f"{'graph ' + size(p.graph_bytes) + ', ' if p.replay else ''}error {p.error:.1e} against eager"
            for p in self.prefills
        ]
        out += [f"compiled steps: {self.packed}"] if self.packed else []
        return out + [f"generate: {note}" for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Account(Protocol):
    """A part of a report that says what it has to say line by line."""

    def lines(self) -> list[str]: ...


@dataclass
class Report:
    """The report of one ``optimize`` call; ``str()`` is a readable account, ``to_json()`` for machines."""

    scale_rule: str
    activation_dtype: str
    max_capture_size: int
    verified: bool
    sites: list[SiteReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    runtime: RuntimeReport = field(default_factory=RuntimeReport)
    calibration: Account | None = None

    @property
    def rewritten(self) -> list[SiteReport]:
        """The sites that run on MXFP4 weights."""
        return [s for s in self.sites if s.rewritten]

    @property
    def bytes_before(self) -> int:
        """Bytes of the rewritten sites' expert weights before."""
        return sum(s.bytes_before for s in self.rewritten)

    @property
    def bytes_after(self) -> int:
        """Bytes of the rewritten sites' packed weights and scales."""
        return sum(s.bytes_after for s in self.rewritten)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **{k: v for k, v in asdict(self).items() if k != "sites"},
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "sites": [asdict(s) for s in self.sites],
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        done = self.rewritten
        lines = [f"MXFP4: {len(done)} of {len(self.sites)} MoE modules rewritten, scale rule {self.scale_rule}"]
        if done:
            ratio = self.bytes_before / max(self.bytes_after, 1)
            lines[0] += (
                f", experts {size(self.bytes_before)} -> {size(self.bytes_after)} ({ratio:.2f}x smaller), "
                f"{self.seconds:.1f} s"
            )
        for group in _groups(self.sites):
            lines += _describe(group)
        if self.calibration is not None:
            lines += self.calibration.lines()
        lines += [f"note: {note}" for note in self.notes]
        lines += self.runtime.lines()
        if done and not self.verified:
            lines.append("note: verify=False, nothing above was checked against the original module")
        return "\n".join(lines)


def _groups(sites: list[SiteReport]) -> list[list[SiteReport]]:
    """Consecutive sites that differ in name and numbers only, so that 48 equal layers read as one line."""
    groups: list[list[SiteReport]] = []
    for site in sites:
        key = (site.outcome, site.form, site.reason, site.backend, site.rejected, site.module_class)
        last = groups[-1][0] if groups else None
        if last is not None and key == (
            last.outcome,
            last.form,
            last.reason,
            last.backend,
            last.rejected,
            last.module_class,
        ):
            groups[-1].append(site)
        else:
            groups.append([site])
    return groups


def _describe(group: list[SiteReport]) -> list[str]:
    first = group[0]
    name = first.names[0] if len(group) == 1 else f"{first.names[0]} ... {group[-1].names[0]} ({len(group)} sites)"
    head = f"- {name} [{first.module_class}]: "
    if not first.rewritten:
        return [f"{head}{first.outcome}, stays as it was: {first.reason}"]
    lines = [f"{head}{first.outcome}, backend {first.backend} ({first.layout}): {first.form}"]
    if first.reason:
        lines.append(f"    {first.reason}")
    before, after = sum(s.bytes_before for s in group), sum(s.bytes_after for s in group)
    detail = f"    {size(before)} -> {size(after)}"
    means = [s.weight_error_mean for s in group if s.weight_error_mean is not None]
    if means:
        what = "moved by calibration, " if any(s.calibrated for s in group) else ""
        detail += f"; weights: {what}relative squared error {sum(means) / len(means):.4f}"
    errors = [s.error for s in group if s.error is not None]
    if errors:
        originals = [s.original_error or 0.0 for s in group if s.error is not None]
        detail += f"; verified: error {max(errors):.1e} against fp32 (original module {max(originals):.1e})"
    lines.append(detail)
    quantized = [s for s in group if s.quantized_error is not None]
    if quantized:
        lines.append(
            f"    activations of {min(s.quantized_from or 0 for s in quantized)} tokens and more are quantized: error "
            f"{max(s.quantized_error or 0.0 for s in quantized):.1e}"
        )
    lines += [f"    not {line}" for line in first.rejected]
    lines += [f"    warning: {s.names[0]}: {w}" for s in group for w in s.warnings]
    return lines


def versions_used() -> dict[str, str]:
    """Versions of what a result depends on."""
    import torch  # a report can be read without it

    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        versions["transformers"] = transformers.__version__
    return versions
