"""GGUF, the file of llama.cpp and Ollama: one model.gguf with the experts' codes and scales, bit for bit.

Contract: experts are written in ggml's MXFP4 blocks, the rest in the dtype it has (vectors, biases and routers in fp32,
as llama.cpp wants them). An existing file is never replaced. The vocabulary comes from a tokenizer.json beside the file
or in the directory that the model was loaded from. Names and metadata follow llama.cpp's own converter; memory beyond
the model's is one weight of a layer.

A block of ggml is 17 bytes for 32 values: the E8M0 scale, then 16 bytes of codes, element j in the low and j + 16 in
the high nibble. Ours has elements 2j and 2j + 1 in one byte.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import mx
from .files import CheckpointError, named_errors, sync
from .forms import CannotExpress, ExpertWeight
from .forms.form import check_columns

if TYPE_CHECKING:
    import numpy

GGUF = "gguf"
FILE = "model.gguf"
_HALVES, _INTERLEAVED = "halves", "interleaved"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a family, how gate and up lie in one parameter, and the pre-tokenizer it is served with."""

    name: str
    gate_up: str
    pre_tokenizer: str
    expert_width: str  # the key of the configuration

    def rows(self, which: str, count: int) -> slice:
        """The rows of "gate" or "up" among ``count`` of both."""
        if self.gate_up == _INTERLEAVED:
            return slice(0 if which == "gate" else 1, None, 2)
        return slice(0, count // 2) if which == "gate" else slice(count // 2, count)


ARCHITECTURES = {
    "gpt_oss": Architecture("gpt-oss", _INTERLEAVED, "gpt-4o", "intermediate_size"),
    "qwen3_moe": Architecture("qwen3moe", _HALVES, "qwen2", "moe_intermediate_size"),
}


def blocks(packed: Tensor, scales: Tensor) -> Tensor:
    """Canonical codes [..., K/2] and scales [..., K/32] -> ggml's blocks as bytes, [..., K/32 * 17] uint8."""
    codes = torch.stack((packed & 15, packed >> 4), -1).unflatten(-2, (-1, mx.BLOCK // 2)).flatten(-2)
    paired = codes[..., : mx.BLOCK // 2] | codes[..., mx.BLOCK // 2 :] << 4
    return torch.cat((scales.unsqueeze(-1), paired), -1).flatten(-2)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: name, shape (of bytes where ``quantized``), ggml's type, and its data when written."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    data: Callable[[], numpy.ndarray[Any, Any]]

    @property
    def quantized(self) -> bool:
        """Whether the shape counts bytes."""
        return self.kind.name in ("MXFP4", "BF16")


def export(
    model: nn.Module,
    directory: str | os.PathLike[str],
    weights: list[ExpertWeight],
    biases: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
) -> list[str]:
    """Write DIRECTORY/model.gguf; returns notes on what it lacks.

    weights, biases: of the experts; others: every other tensor by its name in the family's checkpoints. Raises
    CheckpointError for another family, experts that are not MXFP4, a file that is there, or without the package gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError('GGUF needs the package gguf: pip install "mxfp4_compile[gguf]"') from error
    config: Any = model.config
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise CheckpointError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, and this is a {config.model_type} model. Nothing was "
            "written."
        )
    for site in getattr(getattr(model, "mxfp4_report", None), "sites", []):
        if not site.rewritten and site.outcome in ("skipped", "unmatched", "failed"):
            raise CannotExpress(f"{site.names[0]} is not in MXFP4, as all experts must be", GGUF)
    check_columns(weights, GGUF)
    target = Path(directory) / FILE
    if os.path.lexists(target):
        raise CheckpointError(f"{target} is there already; it is not replaced: move it away")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[known.name.upper().replace("-", "_")], config.num_hidden_layers)
    tensors = [*_plain(others, names), *_experts(weights, biases, names, known)]
    with named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{FILE}.{secrets.token_hex(8)}.partial")
        try:
            writer = gguf.GGUFWriter(temporary, known.name)
            _metadata(writer, config, known)
            notes = _vocabulary(writer, config, known, Path(directory))
            _write(writer, tensors)
            sync(temporary)
            if os.path.lexists(target):
                raise CheckpointError(f"{target} is there already; it is not replaced: move it away")
            os.rename(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return notes


def _write(writer: Any, tensors: list[_Tensor]) -> None:
    import numpy

    for tensor in tensors:
        dtype = numpy.dtype(numpy.uint8) if tensor.quantized else numpy.dtype(_NUMPY[tensor.kind.name])
        nbytes = dtype.itemsize
        for size in tensor.shape:
            nbytes *= size
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, nbytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data())
    writer.close()


_NUMPY = {"F32": "float32", "F16": "float16"}


def _name(names: Any, name: str) -> str:
    """What llama.cpp calls a tensor."""
    base, dot, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        base, dot, suffix = name, ".", "weight"  # a parameter of its own: attention sinks
    found = names.get_name(base)
    if found is None:
        raise CheckpointError(f"{name} has no name in GGUF. Nothing was written.")
    return f"{found}{dot}{suffix}"


def _plain(others: Mapping[str, Tensor], names: Any) -> Iterator[_Tensor]:
    from gguf import GGMLQuantizationType as Kind

    kinds = {torch.bfloat16: Kind.BF16, torch.float16: Kind.F16, torch.float32: Kind.F32}
    for full, tensor in others.items():
        name = _name(names, full)
        if tensor.dtype not in kinds:
            raise CheckpointError(f"{full} is {tensor.dtype}, which GGUF is not written with. Nothing was written.")
        small = tensor.dim() < 2 or name.endswith((".bias", "ffn_gate_inp.weight"))
        yield _values(name, tensor.float() if small else tensor, Kind.F32 if small else kinds[tensor.dtype])


def _values(name: str, tensor: Tensor, kind: Any) -> _Tensor:
    """Values in the dtype they have; bf16 as bytes, which numpy has no dtype for."""

    def data() -> numpy.ndarray[Any, Any]:
        whole = tensor.detach().cpu().contiguous()
        return (whole.view(torch.uint8) if kind.name == "BF16" else whole).numpy()

    *lead, last = tensor.shape
    return _Tensor(name, (*lead, 2 * last) if kind.name == "BF16" else (*lead, last), kind, data)


def _experts(
    weights: Iterable[ExpertWeight], biases: Mapping[str, Tensor], names: Any, known: Architecture
) -> Iterator[_Tensor]:
    from gguf import GGMLQuantizationType as Kind

    for weight in weights:
        for name, rows, count in _parts(weight.name, weight.n, known):

            def data(weight: ExpertWeight = weight, rows: slice = rows) -> numpy.ndarray[Any, Any]:
                packed, scales = weight.codes(slice(0, weight.experts))
                return blocks(packed[:, rows].cpu(), scales[:, rows].cpu()).numpy()

            shape = (weight.experts, count, weight.blocks * (1 + mx.BLOCK // 2))
            yield _Tensor(_name(names, f"{name}.weight"), shape, Kind.MXFP4, data)
    for full, bias in biases.items():
        for name, rows, _ in _parts(full.removesuffix("_bias"), bias.shape[1], known):
            yield _values(_name(names, f"{name}.bias"), bias[:, rows].float(), Kind.F32)


def _parts(name: str, count: int, known: Architecture) -> list[tuple[str, slice, int]]:
    """The projections in one parameter of ``count`` rows: name, rows, and how many they are."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        return [(f"{stem}.{which}_proj", known.rows(which, count), count // 2) for which in ("gate", "up")]
    return [(name, slice(0, count), count)]


def _metadata(writer: Any, config: Any, known: Architecture) -> None:
    import gguf

    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(getattr(config, known.expert_width))
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    theta: Any = rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    writer.add_rope_freq_base(float(theta))
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", 4096))
    elif rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"rope of the kind {rope['rope_type']!r} is not written to GGUF. Nothing was written.")
    if known.name == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(writer: Any, config: Any, known: Architecture, directory: Path) -> list[str]:
    """Tokens, merges, special tokens and the chat template; a note where no tokenizer is to be found."""
    import gguf

    places = [directory, Path(getattr(config, "_name_or_path", "") or directory)]
    place = next((p for p in places if (p / "tokenizer.json").is_file()), None)
    lack = "model.gguf has no vocabulary, so that it runs on token ids alone"
    if place is None:
        writer.add_tokenizer_model("none")
        return [f"{lack}: there is no tokenizer.json in {' or '.join(dict.fromkeys(map(str, places)))}"]
    try:
        data = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
        model, added = data["model"], {entry["id"]: entry for entry in data.get("added_tokens") or ()}
        known_tokens = {number: token for token, number in model["vocab"].items()} if model["type"] == "BPE" else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place / 'tokenizer.json'} is no tokenizer: {error}") from error
    if not known_tokens:
        writer.add_tokenizer_model("none")
        return [f"{lack}: {place / 'tokenizer.json'} is no BPE tokenizer"]
    tokens, kinds = [], []
    for number in range(config.vocab_size):
        if number in added:
            tokens.append(added[number]["content"])
            kinds.append(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED)
        elif number in known_tokens:
            tokens.append(known_tokens[number])
            kinds.append(gguf.TokenType.NORMAL)
        else:  # rows of the embedding beyond the tokenizer
            tokens.append(f"[PAD{number}]")
            kinds.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known.pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(place, load_merges=True, n_vocab=config.vocab_size).add_to_gguf(writer, quiet=True)
    return []
