"""compressed-tensors' form (mxfp4-pack-quantized): one linear layer per expert, as vLLM and llm-compressor have it.

Read by transformers alone (with the compressed-tensors package), vLLM, SGLang and, as MXFP4, by ``load`` and
``from_pretrained`` after ``import mxfp4_compile``. Written for families whose own checkpoints have a layer per expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import mx
from ..files import CheckpointError, Stored, Unit
from .form import COMPRESSED_TENSORS, CannotExpress, ExpertWeight, Form, Linear, check_columns, linears_unit

_FORMAT = "mxfp4-pack-quantized"


@dataclass(frozen=True)
class _CompressedTensors(Form):
    def declared_by(self, config: Mapping[str, Any]) -> bool:
        return str(getattr(config.get("quant_method"), "value", config.get("quant_method"))) == "compressed-tensors"

    def check(self, config: Mapping[str, Any], where: str) -> list[str]:
        notes = []
        groups = config.get("config_groups") or {}
        formats = {config.get("format"), *(g.get("format") for g in groups.values() if g.get("format"))}
        formats.discard("mixed-precision")
        if formats != {_FORMAT}:
            raise CheckpointError(
                f"{where} is compressed-tensors in the format {', '.join(map(str, sorted(formats, key=str)))}; only "
                f"{_FORMAT} is read"
            )
        for name, group in groups.items():
            weights = group.get("weights") or {}
            if (weights.get("num_bits"), weights.get("type"), weights.get("group_size")) != (4, "float", mx.BLOCK):
                raise CheckpointError(
                    f"{where}: {name!r} has {weights.get('num_bits')}-bit {weights.get('type')} weights in groups of "
                    f"{weights.get('group_size')}; MXFP4 is 4-bit float in groups of {mx.BLOCK}"
                )
            if weights.get("symmetric") is False:
                raise CheckpointError(f"{where}: {name!r} has zero points, which MXFP4 does not")
            if group.get("input_activations"):
                notes.append(f"{name!r} asks for quantized activations; they stay in the model's dtype here")
        return notes

    def check_tensor(self, stored: Stored) -> None:
        if stored.name.endswith(("weight_global_scale", "input_global_scale")):
            raise CheckpointError(f"{stored}: a global scale is part of NVFP4; MXFP4 has none")

    def units(self, model: nn.Module, weights: list[ExpertWeight], biases: Iterable[str]) -> list[Unit]:
        check_columns(weights, self.name)
        for bias in biases:
            raise CannotExpress(f"{bias} is a bias of experts", self.name)
        found = []
        for weight in weights:
            linears = per_expert_linears(model, weight)
            for expert in range(weight.experts):
                some = [linear for linear in linears if linear.expert == expert]
                found.append(linears_unit(weight, expert, some, "_packed", "_scale"))
        return found

    def quantization_config(self, note: Mapping[str, Any], ignore: list[str]) -> dict[str, Any]:
        """Weight-only MXFP4 as compressed-tensors defines it (its MXFP4A16 preset), of every layer but ``ignore``."""
        weights = {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": mx.BLOCK,
            "symmetric": True,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
            "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        }
        group = {
            "targets": ["Linear"],
            "format": _FORMAT,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": sorted(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


FORM = _CompressedTensors(COMPRESSED_TENSORS, ".weight_packed", ".weight_scale", ".weight")


def per_expert_linears(model: nn.Module, weight: ExpertWeight) -> list[Linear]:
    """The linear layers a packed parameter is made of in the family's own checkpoints.

    Found by sending row numbers through transformers' own conversion, reversed, so that whatever it does to
    rows is seen. CannotExpress if the family's checkpoints have no layer per expert.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if len(weight.members) > 1:
        return _own_linears(model, weight)
    if weight.flattened or weight.name != weight.members[0]:
        raise CannotExpress(f"{weight.name} holds all experts in one matrix", COMPRESSED_TENSORS)
    rows = torch.arange(weight.experts * weight.n).view(weight.experts, weight.n, 1).expand(-1, -1, 2)
    tensor = rows.transpose(1, 2) if weight.transposed else rows
    found: dict[str, Tensor] = {}
    kept = model.__dict__.get("_weight_conversions")
    # The conversions the model was loaded with; where those have none for experts, the family's.
    for conversions in (kept, None):
        try:
            model.__dict__["_weight_conversions"] = conversions
            found = revert_weight_conversion(model, {weight.name: tensor})
        except Exception as error:
            raise CannotExpress(
                f"{weight.name}: transformers cannot say which layers it is saved as ({error})", COMPRESSED_TENSORS
            ) from error
        finally:
            model.__dict__.pop("_weight_conversions", None)
            if kept is not None:
                model.__dict__["_weight_conversions"] = kept
        if all(t.dim() == 2 for t in found.values()):
            break
    linears = []
    for name, ids in found.items():
        ids = ids.squeeze(0) if ids.dim() == 3 and ids.shape[0] == 1 and weight.experts > 1 else ids
        numbers = ids[:, 0] if ids.dim() == 2 and ids.shape[1] == 2 else None
        if numbers is None or not name.endswith(".weight") or not torch.equal(ids[:, 1], numbers):
            raise CannotExpress(
                f"{weight.name}: the checkpoints of this family have no linear layer per expert", COMPRESSED_TENSORS
            )
        expert, first = divmod(int(numbers[0]), weight.n)
        if not torch.equal(numbers, torch.arange(len(numbers)) + numbers[0]) or first + len(numbers) > weight.n:
            raise CannotExpress(f"{weight.name}: the rows of {name} are not in order", COMPRESSED_TENSORS)
        linears.append(Linear(name, expert, slice(first, first + len(numbers))))
    covered = sum(linear.rows.stop - linear.rows.start for linear in linears)
    if covered != weight.experts * weight.n:
        raise CannotExpress(f"{weight.name}: its per-expert layers have {covered} rows together", COMPRESSED_TENSORS)
    return sorted(linears, key=lambda linear: (linear.expert, linear.rows.start))


def _own_linears(model: nn.Module, weight: ExpertWeight) -> list[Linear]:
    """One linear layer for each expert's own parameter, under the name transformers saves it by."""
    from transformers.core_model_loading import revert_weight_conversion

    found = []
    for expert, member in enumerate(weight.members):
        (name,) = revert_weight_conversion(model, {member: torch.empty(weight.n, weight.k, device="meta")})
        if weight.transposed or not name.endswith(".weight"):
            raise CannotExpress(f"{member} is the weight of no linear layer", COMPRESSED_TENSORS)
        found.append(Linear(name, expert, slice(0, weight.n)))
    return found
