"""The forms MXFP4 checkpoints come in, one file each; ``form.py`` is what a form is.

``FORMATS`` are the names of those that are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files import CheckpointError
from . import compressed_tensors, gpt_oss, own, quark
from .form import COMPRESSED_TENSORS, GPT_OSS, MXFP4, NOTE, OWN, QUARK, CannotExpress, ExpertWeight, Form

# In the order in which they are asked whether a configuration declares them.
FORMS: tuple[Form, ...] = (own.FORM, gpt_oss.FORM, compressed_tensors.FORM, gpt_oss.ANY_FAMILY, quark.FORM)
FORMATS = tuple(form.name for form in FORMS if form.written)


def form_to_write(name: str) -> Form:
    """The form of that name; ValueError, listing the known ones, unless it can be written."""
    for form in FORMS:
        if form.written and form.name == name:
            return form
    raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")


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


__all__ = [
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
    "declared_form",
    "form_to_write",
    "is_own",
]
