"""gpt-oss as OpenAI published it: ``NAME_blocks`` [E, N, K/32, 16] and ``NAME_scales`` [E, N, K/32].

``FORM`` is for gpt-oss; ``ANY_FAMILY`` has the same tensors for every model whose experts are packed parameters, as
transformers' own quantizer (``quant_method: mxfp4``) reads them from the release on that serves more than gpt-oss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ... import mx
from ..files import Unit
from .form import GPT_OSS, MXFP4, OWN, CannotExpress, ExpertWeight, Form, check_columns, stacked_unit


@dataclass(frozen=True)
class _Blocks(Form):
    def declared_by(self, config: Mapping[str, Any]) -> bool:
        return str(getattr(config.get("quant_method"), "value", config.get("quant_method"))) == "mxfp4"

    def matrices(self, codes: Tensor) -> Tensor:
        return codes.flatten(-2) if codes.dim() == 4 else codes

    def units(self, model: nn.Module, weights: list[ExpertWeight], biases: Iterable[str]) -> list[Unit]:
        check_columns(weights, self.name)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if self.name == GPT_OSS and kind != "gpt_oss":
            others = f"the form {MXFP4} has the same tensors for any family, and {OWN} can express it"
            raise CannotExpress(f"only implementations of gpt-oss read it, and this is a {kind} model", GPT_OSS, others)
        for weight in weights:
            if len(weight.members) > 1 or weight.flattened:
                raise CannotExpress(f"{weight.name} is no parameter [experts, rows, columns]", self.name)
        for site in getattr(getattr(model, "mxfp4_report", None), "sites", []):
            if not site.rewritten and site.outcome in ("skipped", "unmatched", "failed"):
                raise CannotExpress(f"{site.names[0]} is not in MXFP4, as all experts must be", self.name)
        found = []
        for weight in weights:
            (name,) = weight.members
            last = (weight.blocks, mx.BLOCK // 2)
            found.append(stacked_unit(weight, name + self.codes, name + self.scales, last))
        return found

    def quantization_config(self, note: Mapping[str, Any], ignore: list[str]) -> dict[str, Any]:
        if self.name == MXFP4:
            return {"quant_method": "mxfp4", "modules_to_not_convert": sorted(ignore)}
        published = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quant_method": "mxfp4", "modules_to_not_convert": published}


FORM = _Blocks(GPT_OSS, "_blocks", "_scales")
ANY_FAMILY = _Blocks(MXFP4, "_blocks", "_scales")
