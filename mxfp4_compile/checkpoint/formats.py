"""The forms MXFP4 checkpoints come in: how each names its tensors, what its configuration says, what it can express.

``FORMATS`` are the forms that are written; ``quark`` is read only. Codes and scales are the same bits in every
form (OCP MX v1.0: E2M1 pairs, the even index in the low nibble, E8M0 bytes); only names and shapes differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import mx
from .files import CheckpointError

OWN = "mxfp4_compile"
GPT_OSS = "gpt_oss"
COMPRESSED_TENSORS = "compressed_tensors"
MXFP4 = "mxfp4"
QUARK = "quark"
FORMATS = (OWN, GPT_OSS, COMPRESSED_TENSORS, MXFP4)

# The key of config.json under which forms that others define keep what they have no place for.
NOTE = "mxfp4_compile"


@dataclass(frozen=True)
class Scheme:
    """How a form names an expert weight ``base``: base + codes and base + scales.

    ``stem`` is what the two suffixes replace: "" where they follow the parameter's name, ".weight" where the
    form has one linear layer per expert.
    """

    format: str
    codes: str
    scales: str
    stem: str = ""

    def split(self, key: str) -> tuple[str, str] | None:
        """("codes" or "scales", base name) of a tensor's name, or None if it is neither."""
        # The longer suffix first: quark's codes end in what its scales only begin with.
        for role, suffix in sorted((("codes", self.codes), ("scales", self.scales)), key=lambda r: -len(r[1])):
            if key.endswith(suffix):
                return role, key[: -len(suffix)] + self.stem
        return None


SCHEMES = {
    OWN: Scheme(OWN, "_packed", "_scales"),
    GPT_OSS: Scheme(GPT_OSS, "_blocks", "_scales"),
    COMPRESSED_TENSORS: Scheme(COMPRESSED_TENSORS, ".weight_packed", ".weight_scale", ".weight"),
    QUARK: Scheme(QUARK, ".weight", ".weight_scale", ".weight"),
}


def check_format(name: str) -> None:
    """ValueError, listing the known ones, unless ``name`` is a form that can be written."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")


def scheme_of(quantization: Any, where: str) -> tuple[Scheme | None, list[str]]:
    """The scheme a ``quantization_config`` declares (None for no quantization), and notes about what is not kept.

    Raises CheckpointError, naming what was found, for anything that is not MXFP4 in a known form.
    """
    if quantization is None:
        return None, []
    if not isinstance(quantization, Mapping) and not hasattr(quantization, "to_dict"):
        raise CheckpointError(f"{where}: quantization_config is a {type(quantization).__name__}, not an object")
    data: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    try:
        return _scheme_of(data, where)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: quantization_config is not understood: {error}") from error


def _scheme_of(data: Mapping[str, Any], where: str) -> tuple[Scheme | None, list[str]]:
    method = str(getattr(data.get("quant_method"), "value", data.get("quant_method")))
    if is_own(data):
        if data.get("format_version", 1) not in (1, 2):
            raise CheckpointError(f"{where} has format_version {data['format_version']}; this version reads 1 and 2")
        return SCHEMES[OWN], []
    if method == "mxfp4":
        return SCHEMES[GPT_OSS], []
    if method == "compressed-tensors":
        return SCHEMES[COMPRESSED_TENSORS], _check_compressed_tensors(data, where)
    if method == "quark":
        return SCHEMES[QUARK], _check_quark(data, where)
    raise CheckpointError(
        f"{where} is quantized with {method!r}; MXFP4 is read from: mxfp4_compile, mxfp4 (gpt-oss), "
        "compressed-tensors (mxfp4-pack-quantized), quark (fp4, e8m0)"
    )


def _check_compressed_tensors(data: Mapping[str, Any], where: str) -> list[str]:
    notes = []
    groups = data.get("config_groups") or {}
    formats = {data.get("format"), *(g.get("format") for g in groups.values() if g.get("format"))}
    formats.discard("mixed-precision")
    if formats != {"mxfp4-pack-quantized"}:
        raise CheckpointError(
            f"{where} is compressed-tensors in the format {', '.join(map(str, sorted(formats, key=str)))}; only "
            "mxfp4-pack-quantized is read"
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


def _check_quark(data: Mapping[str, Any], where: str) -> list[str]:
    notes = []
    layers = {"global_quant_config": data.get("global_quant_config") or {}, **(data.get("layer_quant_config") or {})}
    for name, layer in layers.items():
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


# What config.json says


def facts_of_file(said: Any) -> dict[str, Any]:
    """What is believed of a note in a file: its scale rule, versions and errors of weights, as far as they are such.

    Nothing else: how a model is verified and on what it runs is not for a file to say. ``skip``: what it says was left
    alone, to be held against its tensors.
    """
    if not isinstance(said, Mapping):
        return {}
    facts: dict[str, Any] = {}
    rule = said.get("scale_rule")
    if isinstance(rule, str) and rule in mx.SCALE_RULES:
        facts["scale_rule"] = rule
    versions = said.get("versions")
    if isinstance(versions, Mapping):
        facts["versions"] = {str(k): v for k, v in versions.items() if isinstance(v, str)}
    errors = said.get("weight_errors")
    if isinstance(errors, Mapping):
        facts["weight_errors"] = {str(name): dict(e) for name, e in errors.items() if _is_error(e)}
    skip = said.get("skip")
    if isinstance(skip, (list, tuple)):
        facts["skip"] = [name for name in skip if isinstance(name, str)]
    return facts


def _is_error(value: Any) -> bool:
    return isinstance(value, Mapping) and all(type(v) in (int, float) and abs(v) < 1e30 for v in value.values())


def own_config(note: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config`` of our own form; ``note``: scale rule, versions, errors, skipped modules.

    Without a ``quant_method``: transformers passes over one that it does not know with a line in the log, and then
    makes up the experts at random. Without any it raises, unless this package was imported (``loading.py``).
    """
    return {"format": OWN, "format_version": 2, **note}


def is_own(declared: Any) -> bool:
    """Whether a ``quantization_config`` is that of our own form; version 1 named it as a method."""
    if not isinstance(declared, Mapping):
        return False
    method = declared.get("quant_method")
    return bool(method == OWN or (method is None and declared.get("format") == OWN))


def gpt_oss_config() -> dict[str, Any]:
    """``quantization_config`` as published with gpt-oss."""
    return {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }


def mxfp4_config(ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of transformers' own MXFP4, for any family; ``ignore``: layers that are not quantized."""
    return {"quant_method": "mxfp4", "modules_to_not_convert": sorted(ignore)}


def compressed_tensors_config(ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of weight-only MXFP4 as compressed-tensors defines it (its MXFP4A16 preset).

    ``ignore``: names of the layers that are not quantized. Every other linear layer is.
    """
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
        "format": "mxfp4-pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
