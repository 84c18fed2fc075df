"""Save an optimized model: canonical MXFP4 in the form the user picks, sharded, in place of the old one or not at all.

Contract: what cannot be expressed is refused by name before anything is written; memory beyond the model's own
is a few experts.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..passes.build.module import MXFP4Experts, mxfp4_sites
from ..passes.weights import Projection, members
from ..processes import is_spread
from ..report import Report
from .directories import CONFIG
from .files import (
    DEFAULT_SHARD_BYTES,
    CheckpointError,
    Entry,
    Unit,
    shards_of,
)
from .forms import AUTO, OWN, ExpertWeight, Form, check_format, written
from .gguf_export import GGUF, export
from .note import new_note
from .output import Output
from .requirements import require_transformers_5

if TYPE_CHECKING:
    from ..ranks.gather import Gathering


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: str = AUTO,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write an optimized model to ``directory`` as a Hugging Face checkpoint with MXFP4 experts.

    format: "compressed_tensors" (mxfp4-pack-quantized, as vLLM, SGLang and transformers alone read it), "gpt_oss"
    (blocks and scales as OpenAI published them; gpt-oss models only), "mxfp4" (the tensors of "gpt_oss" for any family
    with packed experts, all of them rewritten: what transformers' own quantizer reads from the release on that serves
    more than gpt-oss), "mxfp4_compile" (our own, for every model; read after ``import mxfp4_compile``). "auto" is
    "compressed_tensors" where that can express the model, else "gpt_oss" for gpt-oss, else "mxfp4_compile"; which and
    why is noted in the model's report, and our own is also told in a warning. The bits are the same in all, and a plain
    ``from_pretrained`` after ``import mxfp4_compile`` keeps them. "gguf" writes the one file DIR/model.gguf for
    llama.cpp and Ollama (gpt_oss and qwen3_moe), beside what is there. With any other form the directory
    appears complete or not at all: it is made as DIR.partial and renamed. In a DIR that exists, the weights, their
    index and the configuration are replaced when the new ones are complete, and every other file stays as it is.

    Raises ValueError for an unknown format, CheckpointError (before anything is written) for a model the form
    cannot express, for a directory that another run writes, for files in the way that are no checkpoint's, and for
    a disk that is full or may not be written.
    """
    if format != GGUF:
        check_format(format)
    require_transformers_5("saving a checkpoint")
    sites = mxfp4_sites(model)
    if not sites:
        raise CheckpointError("this model has no MXFP4 experts: optimize() it first")
    if format == GGUF:
        return _save_gguf(model, directory)
    if not is_spread(model):
        return _save(model, directory, format, max_shard_bytes, WholeWeights())
    from ..ranks.gather import Gathering

    whole = Gathering()
    return whole.together("saving", lambda: _save(model, directory, format, max_shard_bytes, whole))


class WholeWeights:
    """Where the whole weights of a model's sites come from: from its modules. Of several ranks: ``ranks.gather``.

    ``first``: whether this process writes.
    """

    first = True

    def shape(self, site: MXFP4Experts, projection: Projection) -> tuple[int, int, int]:
        """[E, N, K] of a projection."""
        return projection.shape

    def codes(self, site: MXFP4Experts, projection: Projection, experts: slice) -> tuple[Tensor, Tensor]:
        """(packed uint8 [e, N, ceil(K/2)], scales uint8 [e, N, ceil(K/32)]) of some experts."""
        return site.canonical(projection, experts)

    def biases(self, site: MXFP4Experts) -> dict[str, Tensor]:
        """The biases of a site by name."""
        return site.dequantized_biases()

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Any other tensor."""
        return tensor


def _save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: str,
    max_shard_bytes: int,
    whole: WholeWeights | Gathering,
) -> None:
    sites = mxfp4_sites(model)
    weights = [w for name, site in sites.items() for w in _weights_of(name, site, whole)]
    biases = {f"{name}.{n}": b for name, site in sites.items() for n, b in whole.biases(site).items()}
    chosen = written(format, model, weights, biases)
    state, names = _other_tensors(model, sites, whole)
    units = [*(_tensor_unit(name, tensor) for name, tensor in {**state, **biases}.items()), *chosen.units]
    shards = shards_of(units, max_shard_bytes)
    note = new_note(model, _scale_rule(sites), _merged(w.facts for w in weights))
    if not whole.first:  # what the first rank writes is gathered piece by piece, in the same order
        for unit in (unit for some in shards.values() for unit in some):
            for _ in unit.produce():
                pass
        return _note(model, chosen.notes, warn=False)
    with Output(directory) as out:
        out.begin(None, [*shards, CONFIG], sum(unit.bytes for unit in units))
        with out.staged() as folder:
            write_config(model, folder, chosen.form, note, names.union(n for n, t in state.items() if t.dim() == 2))
        for file, some in shards.items():
            out.write_shard(file, some)
        out.write_index(shards)
        out.install()
    _note(model, chosen.notes, warn=chosen.form.name == OWN)  # others cannot read that


def _save_gguf(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    if is_spread(model):
        raise CheckpointError("this model lies on several ranks: load it in one process to write GGUF")
    sites, whole = mxfp4_sites(model), WholeWeights()
    weights = [w for name, site in sites.items() for w in _weights_of(name, site, whole)]
    biases = {f"{name}.{n}": b for name, site in sites.items() for n, b in site.dequantized_biases().items()}
    others, _ = _other_tensors(model, sites, whole)
    _note(model, export(model, directory, weights, biases, others), warn=True)


def _note(model: nn.Module, notes: list[str], *, warn: bool) -> None:
    """Put notes into the model's report; ``warn``: and say them at once."""
    report = getattr(model, "mxfp4_report", None)
    for note in notes:
        if isinstance(report, Report) and note not in report.notes:
            report.notes.append(note)
        if warn:
            warnings.warn(f"mxfp4_compile: {note}", stacklevel=5)


def _merged(facts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for some in facts for name, value in some.items()}


def _scale_rule(sites: Mapping[str, MXFP4Experts]) -> str:
    rules = {site.plan.scale_rule for site in sites.values()}
    return rules.pop() if len(rules) == 1 else ", ".join(sorted(rules))


def _weights_of(name: str, site: MXFP4Experts, whole: WholeWeights | Gathering) -> Iterator[ExpertWeight]:
    for projection in site.projections:
        first = 0
        e, n, k = whole.shape(site, projection)
        for source, own in zip(projection.source.parameters, projection.rows(site.original), strict=True):
            rows = own * n // projection.shape[1]
            part = slice(first, first + rows)
            first += rows

            def codes(experts: slice, projection: Any = projection, part: slice = part) -> tuple[Tensor, Tensor]:
                packed, scales = whole.codes(site, projection, experts)
                return packed[:, part], scales[:, part]

            yield ExpertWeight(
                f"{name}.{source}",
                tuple(f"{name}.{member}" for member in members(site.original, source)),
                "#" in source,
                e,
                rows,
                k,
                projection.source.transposed,
                codes,
                {f"{name}.{source}": error} if (error := site.weight_errors.get(source)) else {},
            )


def _other_tensors(
    model: nn.Module, sites: Mapping[str, MXFP4Experts], whole: WholeWeights | Gathering
) -> tuple[dict[str, Tensor], set[str]]:
    """Everything but the packed experts, under the names transformers saves it by; the model's names of matrices."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    for site in sites.values():
        site.canonical_in_state_dict = False
    try:
        state: dict[str, Tensor] = dict(model.state_dict())
    finally:
        for site in sites.values():
            site.canonical_in_state_dict = True
    matrices = {name for name, tensor in state.items() if tensor.dim() == 2}
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name} is offloaded: load the model without offloading to save it")
    state = {name: whole.tensor(name, tensor) for name, tensor in state.items()}
    if not whole.first:
        return {}, matrices
    state = remove_tied_weights_from_state_dict(state, model)
    return dict(revert_weight_conversion(model, state)), matrices


def _tensor_unit(name: str, tensor: Tensor) -> Unit:
    return Unit((Entry(name, tensor.dtype, tuple(tensor.shape)),), lambda: [(name, tensor)])


# configuration


def write_config(
    model: nn.Module, directory: Path, form: Form, note: Mapping[str, Any], matrices: Iterable[str]
) -> None:
    """config.json and what else transformers keeps beside the weights.

    ``matrices``: names of unquantized [., .], those of the checkpoint and those of the model: readers that replace
    layers look for the latter.
    """
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    vars(config).pop("distributed_config", None)  # how this model lies on ranks is no matter of the checkpoint
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if floats:
        config.dtype = str(floats[0]).removeprefix("torch.")
    ignore = sorted({name.removesuffix(".weight") for name in matrices if name.endswith(".weight")})
    form.declare(config, note, ignore)
    remote = getattr(model, "is_remote_code", None)
    if remote is not None and remote():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, str(directory), config=config)
    config.save_pretrained(directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)


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
    format: str = AUTO,
    safe_serialization: bool = True,
    **kwargs: Any,
) -> None:
    """``save_pretrained`` of an optimized model, with transformers' own parameters; see ``save``.

    max_shard_size: bytes, or "5GB" and the like. Parameters that mean nothing here are taken at their defaults;
    ValueError, naming it, for another value of one.
    """
    for name, value, default, instead in (
        ("state_dict", state_dict, None, "save it, then upload the directory"),
        ("push_to_hub", push_to_hub, False, "model.push_to_hub(NAME) saves and uploads it"),
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
    if is_main_process or is_spread(model):
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
