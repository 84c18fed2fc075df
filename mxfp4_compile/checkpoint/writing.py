"""Save an optimized model: canonical MXFP4 in the form the user picks, sharded, in place of the old one or not at all.

Contract: what cannot be expressed is refused by name before anything is written; memory beyond the model's own
is a few experts.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import mx
from ..passes.build.module import MXFP4Experts, mxfp4_sites
from ..passes.build.prep import groups_of
from ..passes.weights import members
from ..spec import MoESpec, SplitSpec
from .files import (
    DEFAULT_SHARD_BYTES,
    CheckpointError,
    Entry,
    Unit,
    shards_of,
)
from .formats import (
    COMPRESSED_TENSORS,
    GPT_OSS,
    MXFP4,
    NOTE,
    OWN,
    check_format,
    compressed_tensors_config,
    gpt_oss_config,
    mxfp4_config,
    own_config,
)
from .output import CONFIG, Output
from .requirements import require_transformers_5

# Some experts of one parameter in canonical form: slice -> (packed [e, n, ceil(k/2)], scales [e, n, ceil(k/32)]).
Codes = Callable[[slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ExpertWeight:
    """A weight to be written: its name, canonical shape [E, n, k], and its codes.

    ``members``: its parameters in the model, one for all experts or one for each; ``flattened``: one of [E * n, .].
    """

    name: str
    members: tuple[str, ...]
    flattened: bool
    experts: int
    n: int
    k: int
    transposed: bool
    codes: Codes
    facts: dict[str, Any]


@dataclass(frozen=True)
class Linear:
    """One expert's linear layer in a checkpoint that has one per expert: its weight's name, and its rows of n."""

    name: str
    expert: int
    rows: slice


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: str = OWN,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write an optimized model to ``directory`` as a Hugging Face checkpoint with MXFP4 experts.

    format: "mxfp4_compile" (a plain ``from_pretrained`` restores it, after ``import mxfp4_compile``), "gpt_oss"
    (blocks and scales as OpenAI published them; gpt-oss models only), "compressed_tensors"
    (mxfp4-pack-quantized, as vLLM reads it), "mxfp4" (the tensors of "gpt_oss" for any family with packed experts, all
    of them rewritten: what transformers' own quantizer reads from the release on that serves more than gpt-oss). The
    bits are the same in all, and a plain ``from_pretrained`` after ``import mxfp4_compile`` keeps them. The directory
    appears complete or not at all: it is made as DIR.partial and renamed. In a DIR that exists, the weights, their
    index and the configuration are replaced when the new ones are complete, and every other file stays as it is.

    Raises ValueError for an unknown format, CheckpointError (before anything is written) for a model the form
    cannot express, for a directory that another run writes, for files in the way that are no checkpoint's, and for
    a disk that is full or may not be written.
    """
    check_format(format)
    require_transformers_5("saving a checkpoint")
    sites = mxfp4_sites(model)
    if not sites:
        raise CheckpointError("this model has no MXFP4 experts: optimize() it first")
    specs = {name: site.plan.spec for name, site in sites.items()}
    weights = [w for name, site in sites.items() for w in _weights_of(name, site)]
    biases = {f"{name}.{n}": b for name, site in sites.items() for n, b in site.dequantized_biases().items()}
    linears = check_expressible(model, specs, weights, biases, format)
    state = _other_tensors(model, sites)
    units = [_tensor_unit(name, tensor) for name, tensor in {**state, **biases}.items()]
    for weight in weights:
        units += expert_units(weight, format, linears.get(weight.name, []))
    shards = shards_of(units, max_shard_bytes)
    note = checkpoint_note(model, _scale_rule(sites), _merged(w.facts for w in weights))
    with Output(directory) as out:
        out.begin(None, [*shards, CONFIG], sum(unit.bytes for unit in units))
        with out.staged() as folder:
            write_config(model, folder, format, note, [n for n, t in state.items() if t.dim() == 2])
        for file, some in shards.items():
            out.write_shard(file, some)
        out.write_index(shards)
        out.install()


def _merged(facts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for some in facts for name, value in some.items()}


def _scale_rule(sites: Mapping[str, MXFP4Experts]) -> str:
    rules = {site.plan.scale_rule for site in sites.values()}
    return rules.pop() if len(rules) == 1 else ", ".join(sorted(rules))


def _weights_of(name: str, site: MXFP4Experts) -> Iterator[ExpertWeight]:
    for projection in site.projections:
        first = 0
        for source, rows in zip(projection.source.parameters, projection.rows(site.original), strict=True):
            part = slice(first, first + rows)
            first += rows

            def codes(experts: slice, projection: Any = projection, part: slice = part) -> tuple[Tensor, Tensor]:
                packed, scales = site.canonical(projection, experts)
                return packed[:, part], scales[:, part]

            yield ExpertWeight(
                f"{name}.{source}",
                tuple(f"{name}.{member}" for member in members(site.original, source)),
                "#" in source,
                projection.shape[0],
                rows,
                projection.shape[2],
                projection.source.transposed,
                codes,
                {f"{name}.{source}": error} if (error := site.weight_errors.get(source)) else {},
            )


def _other_tensors(model: nn.Module, sites: Mapping[str, MXFP4Experts]) -> dict[str, Tensor]:
    """Everything but the packed experts, under the names transformers saves it by."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    for site in sites.values():
        site.canonical_in_state_dict = False
    try:
        state: dict[str, Tensor] = dict(model.state_dict())
    finally:
        for site in sites.values():
            site.canonical_in_state_dict = True
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name} is offloaded: load the model without offloading to save it")
    return dict(revert_weight_conversion(model, state))


def _tensor_unit(name: str, tensor: Tensor) -> Unit:
    return Unit((Entry(name, tensor.dtype, tuple(tensor.shape)),), lambda: [(name, tensor)])


# what a form can express


def check_expressible(
    model: nn.Module,
    specs: Mapping[str, MoESpec | SplitSpec],
    weights: list[ExpertWeight],
    biases: Iterable[str],
    format: str,
) -> dict[str, list[Linear]]:
    """The per-expert layers of each weight, for forms that have them; CheckpointError naming what cannot be said."""
    if format == OWN:
        return {}
    for weight in weights:
        if weight.k % mx.BLOCK:
            raise CheckpointError(
                f"{weight.name} has K = {weight.k}, no multiple of {mx.BLOCK}: the {format} form cannot express it; "
                f"the form {OWN} can. Nothing was written."
            )
    if format in (GPT_OSS, MXFP4):
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if format == GPT_OSS and kind != "gpt_oss":
            raise CheckpointError(
                f"the gpt_oss form is read by implementations of gpt-oss only, and this is a {kind} model; the form "
                f"{MXFP4} has the same tensors for any, and {OWN} can express it. Nothing was written."
            )
        for weight in weights:
            if len(weight.members) > 1 or weight.flattened:
                raise CheckpointError(
                    f"{weight.name} is no parameter [experts, rows, columns]: the {format} form cannot express it; the "
                    f"form {OWN} can. Nothing was written."
                )
        _check_all_rewritten(model, format)
        return {}
    for bias in biases:
        raise CheckpointError(
            f"{bias} is a bias of experts: the {format} form cannot express it; the form {OWN} can. "
            "Nothing was written."
        )
    return {weight.name: per_expert_linears(model, weight) for weight in weights}


def _check_all_rewritten(model: nn.Module, format: str) -> None:
    report = getattr(model, "mxfp4_report", None)
    for site in getattr(report, "sites", []):
        if not site.rewritten and site.outcome in ("skipped", "unmatched", "failed"):
            raise CheckpointError(
                f"{site.names[0]} is not in MXFP4, but the {format} form has all experts so; the form {OWN} can "
                "express it. Nothing was written."
            )


def per_expert_linears(model: nn.Module, weight: ExpertWeight) -> list[Linear]:
    """The linear layers a packed parameter is made of in the family's own checkpoints.

    Found by sending row numbers through transformers' own conversion, reversed, so that whatever it does to
    rows is seen. CheckpointError if the family's checkpoints have no layer per expert.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if len(weight.members) > 1:
        return _own_linears(model, weight)
    if weight.flattened or weight.name != weight.members[0]:
        raise CheckpointError(
            f"{weight.name} holds all experts in one matrix: the {COMPRESSED_TENSORS} form cannot express it; the form "
            f"{OWN} can. Nothing was written."
        )
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
            raise CheckpointError(
                f"{weight.name}: transformers cannot say which layers it is saved as ({error}), so the "
                f"{COMPRESSED_TENSORS} form cannot express it; the form {OWN} can. Nothing was written."
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
            raise CheckpointError(
                f"{weight.name}: the checkpoints of this family have no linear layer per expert, so the "
                f"{COMPRESSED_TENSORS} form cannot express it; the form {OWN} can. Nothing was written."
            )
        expert, first = divmod(int(numbers[0]), weight.n)
        if not torch.equal(numbers, torch.arange(len(numbers)) + numbers[0]) or first + len(numbers) > weight.n:
            raise CheckpointError(f"{weight.name}: the rows of {name} are not in order; {OWN} can express it")
        linears.append(Linear(name, expert, slice(first, first + len(numbers))))
    covered = sum(linear.rows.stop - linear.rows.start for linear in linears)
    if covered != weight.experts * weight.n:
        raise CheckpointError(f"{weight.name}: its per-expert layers have {covered} rows together")
    return sorted(linears, key=lambda linear: (linear.expert, linear.rows.start))


def _own_linears(model: nn.Module, weight: ExpertWeight) -> list[Linear]:
    """One linear layer for each expert's own parameter, under the name transformers saves it by."""
    from transformers.core_model_loading import revert_weight_conversion

    found = []
    for expert, member in enumerate(weight.members):
        (name,) = revert_weight_conversion(model, {member: torch.empty(weight.n, weight.k, device="meta")})
        if weight.transposed or not name.endswith(".weight"):
            raise CheckpointError(
                f"{member} is the weight of no linear layer: the {COMPRESSED_TENSORS} form cannot express it; the form "
                f"{OWN} can. Nothing was written."
            )
        found.append(Linear(name, expert, slice(0, weight.n)))
    return found


def expert_units(weight: ExpertWeight, format: str, linears: list[Linear]) -> list[Unit]:
    """What is written for one weight of all experts."""
    e, n, half, blocks = weight.experts, weight.n, (weight.k + 1) // 2, -(-weight.k // mx.BLOCK)
    per_expert = n * weight.k * 2
    if format == COMPRESSED_TENSORS:
        by_expert = [[linear for linear in linears if linear.expert == i] for i in range(e)]
        return [_linear_unit(weight, i, some, half, blocks) for i, some in enumerate(by_expert)]
    if len(weight.members) > 1:
        whole = slice(0, n)
        each = enumerate(weight.members)
        return [_linear_unit(weight, i, [Linear(name, i, whole)], half, blocks, "_scales") for i, name in each]
    (name,) = weight.members
    codes, scales = f"{name}_packed", f"{name}_scales"
    shape: tuple[int, ...] = (e, n, half)
    if format in (GPT_OSS, MXFP4):
        codes, shape = f"{name}_blocks", (e, n, blocks, mx.BLOCK // 2)

    def produce() -> Iterator[tuple[str, Tensor]]:
        for some in groups_of(e, per_expert):
            packed, exponents = weight.codes(some)
            yield codes, packed.flatten(0, 1) if weight.flattened else packed
            yield scales, exponents.flatten(0, 1) if weight.flattened else exponents

    last: tuple[int, ...] = (e, n, blocks)
    if weight.flattened:
        shape, last = (e * n, half), (e * n, blocks)
    entries = (Entry(codes, torch.uint8, shape), Entry(scales, torch.uint8, last))
    return [Unit(entries, produce, weight.facts)]


def _linear_unit(
    weight: ExpertWeight, expert: int, linears: list[Linear], half: int, blocks: int, suffix: str = "_scale"
) -> Unit:
    """One expert's layers; ``suffix``: what the form calls their scales."""
    entries = []
    for linear in linears:
        rows = linear.rows.stop - linear.rows.start
        entries.append(Entry(linear.name + "_packed", torch.uint8, (rows, half)))
        entries.append(Entry(linear.name + suffix, torch.uint8, (rows, blocks)))

    def produce() -> Iterator[tuple[str, Tensor]]:
        packed, scales = weight.codes(slice(expert, expert + 1))
        for linear in linears:
            yield linear.name + "_packed", packed[0, linear.rows]
            yield linear.name + suffix, scales[0, linear.rows]

    return Unit(tuple(entries), produce, weight.facts)


# configuration


def checkpoint_note(model: nn.Module, scale_rule: str, errors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a checkpoint of ours says about itself: scale rule, versions, error of each weight, what was left out."""
    from .. import __version__

    transformers = sys.modules.get("transformers")
    versions = {"mxfp4_compile": __version__, "torch": torch.__version__.split("+")[0]}
    if transformers is not None:
        versions["transformers"] = transformers.__version__
    report = getattr(model, "mxfp4_report", None)
    left = [n for s in getattr(report, "sites", []) if s.outcome in ("skipped", "unmatched", "failed") for n in s.names]
    return {"scale_rule": scale_rule, "skip": left, "versions": versions, "weight_errors": dict(errors)}


def write_config(model: nn.Module, directory: Path, format: str, note: Mapping[str, Any], matrices: list[str]) -> None:
    """config.json and what else transformers keeps beside the weights. ``matrices``: names of unquantized [., .]."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if floats:
        config.dtype = str(floats[0]).removeprefix("torch.")
    if format == OWN:
        config.quantization_config = own_config(note)
        config.__dict__.pop(NOTE, None)
    else:
        ignore = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
        ignore += tied_linears(model, ignore)
        known = {
            GPT_OSS: gpt_oss_config,
            COMPRESSED_TENSORS: lambda: compressed_tensors_config(ignore),
            MXFP4: lambda: mxfp4_config(ignore),
        }
        config.quantization_config = known[format]()
        setattr(config, NOTE, dict(note))
    remote = getattr(model, "is_remote_code", None)
    if remote is not None and remote():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, str(directory), config=config)
    config.save_pretrained(directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)


def tied_linears(model: nn.Module, named: Iterable[str]) -> list[str]:
    """Linear layers that no tensor of the checkpoint names, as their weights are another's (an output layer's)."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    layers = [name.rpartition(".")[0] for name in tied if name.endswith(".weight")]
    return [n for n in layers if n not in named and isinstance(model.get_submodule(n), nn.Linear)]


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    variant: str | None = None,
    token: Any = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    *,
    format: str = OWN,
    safe_serialization: bool = True,
    **kwargs: Any,
) -> None:
    """``save_pretrained`` of an optimized model, with transformers' own parameters; see ``save``.

    max_shard_size: bytes, or "5GB" and the like. Parameters that mean nothing here are taken at their defaults;
    ValueError, naming it, for another value of one.
    """
    for name, value, default, instead in (
        ("state_dict", state_dict, None, "save it, then upload the directory"),
        ("push_to_hub", push_to_hub, False, "save it, then upload the directory"),
        ("variant", variant, None, "readers of MXFP4 look for model.safetensors"),
        ("save_peft_format", save_peft_format, True, "adapters are saved by PEFT"),
        ("save_original_format", save_original_format, True, "experts are saved as MXFP4, in no other form"),
        ("distributed_checkpoint", distributed_checkpoint, False, "one process writes safetensors"),
        ("safe_serialization", safe_serialization, True, "it is saved as safetensors only"),
    ):
        if value is not default and value != default:
            raise ValueError(f"save_pretrained of an optimized model takes no {name}={value!r:.40}: {instead}")
    if kwargs:
        raise TypeError(f"save_pretrained of an optimized model does not know {', '.join(sorted(kwargs))}")
    if is_main_process:
        save(model, save_directory, format, max_shard_bytes=parse_size(max_shard_size))


def wrap_save_pretrained(modeling_utils: Any) -> None:
    """Have transformers' ``save_pretrained`` hand models with MXFP4 experts to ours, and all others to its own.

    On the class, since an attribute of the model that knows the model would be a cycle: the weights would
    outlive ``del model`` until the next garbage collection.
    """
    original = modeling_utils.PreTrainedModel.save_pretrained

    @functools.wraps(original)
    def dispatch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if mxfp4_sites(self):
            return save_pretrained(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    modeling_utils.PreTrainedModel.save_pretrained = dispatch


def parse_size(size: int | str) -> int:
    """Bytes of 5000000000, "5GB", "512MiB", ...; ValueError for anything else."""
    if isinstance(size, int):
        if size <= 0:
            raise ValueError(f"a size must be positive, got {size}")
        return size
    units = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    for unit, factor in units.items():
        number = size.strip().upper().removesuffix(unit)
        if number != size.strip().upper() and number.strip().isdecimal() and int(number):
            return int(number) * factor
    raise ValueError(f"{size!r} is no size; examples: 5GB, 512MiB")
