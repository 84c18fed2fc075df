"""What a calibration did, layer by layer, and on which text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SiteCalibration:
    """One site. Errors are relative squared ones.

    ``tokens_min``, ``tokens_median``: of its experts, of the text that was calibrated on. ``on_prior``: experts with so
    few tokens that the layer's statistics were mixed in. ``kept_nearest``: experts that stay rounded to nearest, since
    calibration did no better on the text held back (or moved the weights too far). ``error``: of the site's output,
    weighted by routing, on a part of the text calibrated on; ``held_error``: on text held back; ``nearest_error`` and
    ``nearest_held_error``: the same rounded to nearest. ``drift_mean``, ``drift_max``: of the experts' weights, whose
    change is the method; ``nearest_drift``: the mean rounded to nearest. ``by_name``: drift by source parameter.
    """

    names: tuple[str, ...]
    experts: int
    tokens_min: int
    tokens_median: int
    on_prior: int
    kept_nearest: tuple[int, ...]
    error: float
    nearest_error: float
    held_error: float
    nearest_held_error: float
    drift_mean: float
    drift_max: float
    nearest_drift: float
    by_name: Mapping[str, Mapping[str, float]]
    seconds: float

    def __str__(self) -> str:
        line = (
            f"{self.names[0]}: tokens per expert {self.tokens_min} / {self.tokens_median} (least / median), "
            f"{self.on_prior} of {self.experts} experts on the layer's statistics; output error {self.error:.5f} "
            f"(nearest {self.nearest_error:.5f}), on text held back {self.held_error:.5f} "
            f"(nearest {self.nearest_held_error:.5f}); weights moved by {self.drift_mean:.4f}, at most "
            f"{self.drift_max:.4f} (nearest {self.nearest_drift:.4f}); {self.seconds:.1f} s"
        )
        if self.kept_nearest:
            shown = ", ".join(map(str, self.kept_nearest[:8])) + (", ..." if len(self.kept_nearest) > 8 else "")
            line += f"; {len(self.kept_nearest)} experts stay rounded to nearest ({shown})"
        return line


# What a checkpoint keeps of a report, and of which type it is.
_FACTS = {
    "text": str, "text_hash": str, "ids_hash": str, "tokens": int, "window": int, "seed": int, "sequential": bool,
    "device": str,
}  # fmt: skip


@dataclass
class CalibrationReport:
    """The report of one calibration; ``str()`` is a readable account.

    ``text``: what was read, in words; ``text_hash``: SHA-256 of the text's bytes, of token ids (int64, little-endian)
    where ids were given, "" where the model wrote it; ``ids_hash``: SHA-256 of the ids that were run. ``nll``: mean
    nats per token that the model gives the text; ``own_nll``: the same of text it wrote itself.
    """

    text: str
    text_hash: str
    ids_hash: str
    tokens: int
    window: int
    held_back: int
    seed: int
    sequential: bool
    scale_rule: str
    device: str
    nll: float | None = None
    own_nll: float | None = None
    sites: list[SiteCalibration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    file_hashes: list[str] = field(default_factory=list)

    def of(self, name: str) -> SiteCalibration | None:
        """The site of that name, if it was calibrated."""
        return next((site for site in self.sites if name in site.names), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of how it was calibrated."""
        hashes = {"file_hashes": list(self.file_hashes)} if len(self.file_hashes) > 1 else {}
        return {**{name: getattr(self, name) for name in _FACTS}, **hashes, "versions": dict(self.versions)}

    def lines(self) -> list[str]:
        """A readable account, line by line."""
        how = ", layer after layer" if self.sequential else ""
        lines = [
            f"calibrated on {self.tokens} tokens of {self.text} (windows of {self.window}, seed {self.seed}{how}), "
            f"{self.held_back} more held back; {self.seconds:.1f} s"
        ]
        if self.nll is not None:
            own = "" if self.own_nll is None else f"; on text of its own {self.own_nll:.3f}"
            lines.append(f"the model's own loss on that text: {self.nll:.3f} nats per token{own}")
        lines += [f"- {site}" for site in self.sites]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class SavedCalibration:
    """What a checkpoint says of how it was calibrated when it was made."""

    said: Mapping[str, Any]

    @classmethod
    def of(cls, said: Any) -> SavedCalibration | None:
        """What is believed of a note in a file: facts of the kinds that ``CalibrationReport.facts`` has."""
        if not isinstance(said, Mapping):
            return None
        known = {name: said[name] for name, kind in _FACTS.items() if type(said.get(name)) is kind}
        hashes = said.get("file_hashes")
        if isinstance(hashes, list) and all(isinstance(h, str) for h in hashes):
            known["file_hashes"] = hashes
        versions = said.get("versions")
        if isinstance(versions, Mapping):
            known["versions"] = {str(k): v for k, v in versions.items() if isinstance(v, str)}
        return cls(known) if "text_hash" in known or "ids_hash" in known else None

    def facts(self) -> dict[str, Any]:
        """The same again, for a checkpoint that is made of it."""
        return dict(self.said)

    def lines(self) -> list[str]:
        """One line."""
        return [
            f"calibrated when it was made, on {self.said.get('tokens', 'some')} tokens of "
            f"{self.said.get('text', 'a text')} (SHA-256 {self.said.get('text_hash') or self.said.get('ids_hash')})"
        ]


__all__ = ["CalibrationReport", "SavedCalibration", "SiteCalibration"]
