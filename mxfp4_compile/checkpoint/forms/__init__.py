"""The forms MXFP4 checkpoints come in, one file each; ``form.py`` is what a form is.

``FORMATS`` are the names that ``save`` takes: of each form that is written, and ``AUTO``, which is the first of
``PREFERRED`` that can express the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..files import CheckpointError, Unit
from . import compressed_tensors, gpt_oss, own, quark
from .form import COMPRESSED_TENSORS, GPT_OSS, MXFP4, NOTE, OWN, QUARK, CannotExpress, ExpertWeight, Form

# In the order in which they are asked whether a configuration declares them.
FORMS: tuple[Form, ...] = (own.FORM, gpt_oss.FORM, compressed_tensors.FORM, gpt_oss.ANY_FAMILY, quark.FORM)
# The form that every reader reads first, then gpt-oss as published, then the one that can express everything.
PREFERRED: tuple[Form, ...] = (compressed_tensors.FORM, gpt_oss.FORM, own.FORM)
AUTO = "auto"
FORMATS = (AUTO, *(form.name for form in FORMS if form.written))


@dataclass(frozen=True)
class Written:
    """The form of a checkpoint that is going to be written, and what of it the experts' weights become.

    ``reasons``: why each of the forms that were preferred cannot express the model, by name.
    """

    form: Form
    units: list[Unit]
    reasons: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """Which form it became, where that is not the one that everybody reads, and why."""
        if not self.reasons:
            return []
        why = next(iter(self.reasons.values()))
        readers = "load() and, after import mxfp4_compile, from_pretrained read it; nothing else does"
        if self.form is not own.FORM:
            readers = "transformers alone reads it, too"
        return [f"saved in the form {self.form.name}, as {PREFERRED[0].name} cannot express it ({why}): {readers}"]


def check_format(name: str) -> None:
    """ValueError, listing the known ones, unless ``name`` is one of ``FORMATS``."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")


def written(name: str, model: nn.Module, weights: list[ExpertWeight], biases: Iterable[str]) -> Written:
    """The form called ``name`` and what it makes of a model's experts (as ``Form.units``).

    Raises CannotExpress; for ``AUTO`` never, as our own form expresses everything.
    """
    check_format(name)
    biases = list(biases)
    if name != AUTO:
        form = next(form for form in FORMS if form.name == name)
        return Written(form, form.units(model, weights, biases), {})
    reasons: dict[str, str] = {}
    for form in PREFERRED[:-1]:
        try:
            return Written(form, form.units(model, weights, biases), reasons)
        except CannotExpress as error:
            reasons[form.name] = error.reason
    return Written(PREFERRED[-1], PREFERRED[-1].units(model, weights, biases), reasons)


def declared_form(quantization: Any, where: str) -> tuple[Form | None, list[str]]:
    """The form a ``quantization_config`` declares (None for no quantization), and notes about what is not kept.

    Raises CheckpointError, naming what was found, for anything that is not MXFP4 in a known form.
    """
    if quantization is None:
        return None, []
    if not isinstance(quantization, Mapping) and not hasattr(quantization, "to_dict"):
        raise CheckpointError(f"{where}: quantization_config is a {type(quantization).__name__}, not an object")
    try:
        data: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
        form = next((form for form in FORMS if form.declared_by(data)), None)
        if form is not None:
            return form, form.check(data, where)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: quantization_config is not understood: {error}") from error
    method = str(getattr(data.get("quant_method"), "value", data.get("quant_method")))
    raise CheckpointError(
        f"{where} is quantized with {method!r}; MXFP4 is read from: mxfp4_compile, mxfp4 (gpt-oss), "
        "compressed-tensors (mxfp4-pack-quantized), quark (fp4, e8m0)"
    )


def is_own(declared: Any) -> bool:
    """Whether a ``quantization_config`` is that of our own form."""
    return isinstance(declared, Mapping) and own.FORM.declared_by(declared)


def own_config(note: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config`` of our own form; ``note``: scale rule, versions, errors, skipped modules."""
    return own.FORM.quantization_config(note, [])


__all__ = [
    "AUTO",
    "COMPRESSED_TENSORS",
    "FORMATS",
    "FORMS",
    "GPT_OSS",
    "MXFP4",
    "NOTE",
    "OWN",
    "QUARK",
    "CannotExpress",
    "ExpertWeight",
    "Form",
    "Written",
    "check_format",
    "declared_form",
    "is_own",
    "own_config",
    "written",
]
