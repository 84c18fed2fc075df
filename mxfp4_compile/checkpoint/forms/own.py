"""Our own form: ``NAME_packed`` and ``NAME_scales`` beside every parameter, for any model.

Read by ``load`` and, after ``import mxfp4_compile``, by ``from_pretrained``; transformers alone refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..files import CheckpointError, Unit
from .form import NOTE, OWN, ExpertWeight, Form, Linear, linears_unit, stacked_unit


@dataclass(frozen=True)
class _Own(Form):
    def declared_by(self, config: Mapping[str, Any]) -> bool:
        """Version 1 named the form as a method."""
        method = config.get("quant_method")
        return bool(method == OWN or (method is None and config.get("format") == OWN))

    def check(self, config: Mapping[str, Any], where: str) -> list[str]:
        if config.get("format_version", 1) not in (1, 2):
            raise CheckpointError(f"{where} has format_version {config['format_version']}; this version reads 1 and 2")
        return []

    def units(self, model: nn.Module, weights: list[ExpertWeight], biases: Iterable[str]) -> list[Unit]:
        found = []
        for weight in weights:
            if len(weight.members) > 1:  # each expert's own parameter
                for expert, member in enumerate(weight.members):
                    linear = Linear(member, expert, slice(0, weight.n))
                    found.append(linears_unit(weight, expert, [linear], self.codes, self.scales))
            else:
                (name,) = weight.members
                found.append(stacked_unit(weight, name + self.codes, name + self.scales, (weight.code_bytes,)))
        return found

    def quantization_config(self, note: Mapping[str, Any], ignore: list[str]) -> dict[str, Any]:
        """Without a ``quant_method``: transformers passes over one that it does not know with a line in the log, and
        then makes up the experts at random. Without any it raises, unless this package was imported.
        """
        return {"format": OWN, "format_version": 2, **note}

    def declare(self, config: Any, note: Mapping[str, Any], ignore: list[str]) -> None:
        config.quantization_config = self.quantization_config(note, ignore)
        config.__dict__.pop(NOTE, None)


FORM = _Own(OWN, "_packed", "_scales")
