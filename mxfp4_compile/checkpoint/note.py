"""What a checkpoint of ours says about itself beside its form: scale rule, versions, errors, what was left alone.

Contract: of a note in a file only facts about its weights are believed; how a model is verified and on what it runs is
not for a file to say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import mx
from ..calibration.report import CalibrationReport, SavedCalibration
from .forms import NOTE, is_own


def note_of(config: Any, declared: Any) -> Any:
    """The note in a configuration whose ``quantization_config`` is ``declared``: in it (our own form), or beside it."""
    return declared if is_own(declared) else getattr(config, NOTE, None)


def facts_of(note: Any) -> dict[str, Any]:
    """What is believed of a note in a file: its scale rule, versions and errors of weights, as far as they are such.

    ``skip``: what it says was left alone, to be held against its tensors.
    """
    if not isinstance(note, Mapping):
        return {}
    facts: dict[str, Any] = {}
    rule = note.get("scale_rule")
    if isinstance(rule, str) and rule in mx.SCALE_RULES:
        facts["scale_rule"] = rule
    versions = note.get("versions")
    if isinstance(versions, Mapping):
        facts["versions"] = {str(k): v for k, v in versions.items() if isinstance(v, str)}
    errors = note.get("weight_errors")
    if isinstance(errors, Mapping):
        facts["weight_errors"] = {str(name): dict(e) for name, e in errors.items() if _is_error(e)}
    calibration = SavedCalibration.of(note.get("calibration"))
    if calibration is not None:
        facts["calibration"] = calibration.facts()
    skip = note.get("skip")
    if isinstance(skip, (list, tuple)):
        facts["skip"] = [name for name in skip if isinstance(name, str)]
    return facts


def _is_error(value: Any) -> bool:
    return isinstance(value, Mapping) and all(type(v) in (int, float) and abs(v) < 1e30 for v in value.values())


def new_note(model: nn.Module, scale_rule: str, errors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The note of a checkpoint that is being written: scale rule, versions, error of each weight, what was left out."""
    from .. import __version__

    transformers = sys.modules.get("transformers")
    versions = {"mxfp4_compile": __version__, "torch": torch.__version__.split("+")[0]}
    if transformers is not None:
        versions["transformers"] = transformers.__version__
    report = getattr(model, "mxfp4_report", None)
    left = [n for s in getattr(report, "sites", []) if s.outcome in ("skipped", "unmatched", "failed") for n in s.names]
    known = {name: {k: _rounded(v) for k, v in error.items()} for name, error in errors.items()}
    note = {"scale_rule": scale_rule, "skip": left, "versions": versions, "weight_errors": known}
    calibration = getattr(report, "calibration", None)
    if isinstance(calibration, (CalibrationReport, SavedCalibration)):
        note["calibration"] = calibration.facts()
    return note


def _rounded(value: Any) -> Any:
    """Six digits, which sums in another order (on several ranks) do not change."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
