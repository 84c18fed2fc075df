"""AMD Quark's form, read only: one linear layer per expert, ``.weight`` the codes and ``.weight_scale`` the scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ... import mx
from ..files import CheckpointError
from .form import QUARK, Form


@dataclass(frozen=True)
class _Quark(Form):
    def declared_by(self, config: Mapping[str, Any]) -> bool:
        return str(getattr(config.get("quant_method"), "value", config.get("quant_method"))) == "quark"

    def check(self, config: Mapping[str, Any], where: str) -> list[str]:
        notes = []
        everywhere = {"global_quant_config": config.get("global_quant_config") or {}}
        for name, layer in {**everywhere, **(config.get("layer_quant_config") or {})}.items():
            weight = layer.get("weight")
            if not weight:
                continue
            if isinstance(weight, list):
                raise CheckpointError(f"{where}: {name!r} quantizes weights in several stages, which is no plain MXFP4")
            found = (weight.get("dtype"), weight.get("group_size"), weight.get("scale_format"))
            if found != ("fp4", mx.BLOCK, "e8m0"):
                raise CheckpointError(f"{where}: {name!r} has weights {found}; MXFP4 is ('fp4', {mx.BLOCK}, 'e8m0')")
            if layer.get("input_tensors"):
                notes.append(f"{name!r} asks for quantized activations; they stay in the model's dtype here")
        return notes


FORM = _Quark(QUARK, ".weight", ".weight_scale", ".weight", written=False)
