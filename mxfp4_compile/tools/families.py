"""A tiny random instance of every transformers family that has mixture-of-experts layers.

What a family needs is data: `GEN` shrinks any configuration, `TOWER` any vision or audio tower, and `SPECIAL`
holds what one family needs beside them. A key is set only where the configuration class has it. Nothing here
reads the network: configurations are built from their classes and weights are drawn from a seeded generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..text import nearest

__all__ = ["decorated_families", "listed_families", "tiny_experts", "tiny_inputs", "tiny_model", "undecorated_families"]

# hidden size, intermediate size (dense, expert), experts, experts per token
H, F, MI, E, K = 64, 96, 32, 8, 2


def _layers(n: int) -> int:
    """A table value that is the number of layers asked for."""
    return n


def _layer_ids(n: int) -> list[int]:
    """A table value that lists every layer."""
    return list(range(n))


def _each(*pattern: Any) -> Callable[[int], list[Any]]:
    """A table value with one entry per layer, `pattern` repeated."""
    return lambda n: [pattern[i % len(pattern)] for i in range(n)]


def _granite_kinds(n: int) -> list[str]:
    """granitemoehybrid's layers: one with attention, one without, by the names that the installed version knows."""
    four = importlib.metadata.version("transformers").startswith("4.")
    kinds = ("attention", "mamba") if four else ("full_attention", "linear_attention")
    return [kinds[i % 2] for i in range(n)]


# A value that is a function is called with the number of layers.
GEN: dict[str, Any] = dict(
    # sizes of any transformer
    vocab_size=128, hidden_size=H, intermediate_size=F, num_hidden_layers=_layers, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, sliding_window=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
    d_model=H, d_ff=F, d_kv=16, num_layers=_layers, num_heads=4, n_layers=_layers, n_heads=4, n_head=4,
    max_seq_len=256, kv_channels=16,
    encoder_layers=_layers, decoder_layers=_layers, num_decoder_layers=_layers, encoder_ffn_dim=F,
    decoder_ffn_dim=F, encoder_attention_heads=4, decoder_attention_heads=4,
    # experts
    moe_intermediate_size=MI, moe_dim=MI, expert_ffn_hidden_size=MI, moe_hidden_size=H,
    num_experts=E, num_local_experts=E, n_routed_experts=E, moe_num_experts=E,
    num_experts_per_tok=K, moe_topk=K, moe_top_k=K, top_k_experts=K, moe_k=K, num_selected_experts=K,
    n_group=2, topk_group=1, zero_expert_num=2, router_hidden_size=32,
    n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1, shared_expert_intermediate_size=MI,
    shared_intermediate_size=MI, moe_shared_expert_intermediate_size=MI, intermediate_size_mlp=F,
    ffn_hidden_size=F, dense_intermediate_size=F,
    # which layers have experts: all of them
    first_k_dense_replace=0, num_dense_layers=0, moe_layer_start_index=0, moe_layer_interval=1,
    decoder_sparse_step=1, mlp_only_layers=[], moe_layer_freq=1, sparse_layer_freq=1,
    mlp_layer_types=_each("sparse"), interleave_moe_layer_step=1, expert_layer_period=1,
    expert_layer_offset=0,
    encoder_sparse_step=1, num_sparse_encoder_layers=_layers, num_sparse_decoder_layers=_layers,
    # attention variants
    q_lora_rank=32, kv_lora_rank=32, o_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    qk_head_dim=16, index_head_dim=16, index_n_heads=2, index_topk=4, swa_num_attention_heads=4,
    swa_num_key_value_heads=2, swa_head_dim=16, num_global_key_value_heads=2, global_head_dim=16,
    global_attn_every_n_layers=1, full_attention_interval=2, attn_layer_offset=1, attn_layer_period=2,
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_head_dim=16, linear_num_heads=4, conv_L_cache=3,
    mamba_d_state=16, mamba_expand=2, mamba_dt_rank=8, mamba_d_conv=4, mamba_n_heads=8, mamba_d_head=16,
    mamba_n_groups=1, mamba_chunk_size=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16,
    n_groups=1, chunk_size=16, expand=2, use_mamba_kernels=False,
    # left out: per-layer embeddings, multi-token prediction
    hidden_size_per_layer_input=0, vocab_size_per_layer_input=128, num_mtp_modules=0, mtp_num_layers=0,
    num_nextn_predict_layers=0,
)  # fmt: skip

# For vision and audio towers, which a text-only forward never runs: they only have to build.
TOWER: dict[str, Any] = dict(
    hidden_size=H, intermediate_size=F, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    head_dim=16, depth=1, num_heads=4, image_size=28, out_hidden_size=H, embed_dim=H, num_layers=1,
    d_model=H, encoder_layers=1, encoder_ffn_dim=F, encoder_attention_heads=4, decoder_layers=1,
    decoder_ffn_dim=F, decoder_attention_heads=4, output_dim=H, vocab_size=128,
    max_position_embeddings=64, num_position_embeddings=64, position_embedding_size=64,
    deepstack_visual_indexes=[0], conv_chunksize=8, downsample_hidden_size=8, fullatt_block_indexes=[0],
    num_experts=E, n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=MI,
)  # fmt: skip

_SAM: dict[str, Any] = dict(sam_config=dict(output_channels=16, downsample_channels=[32, H], mlp_dim=F))

# A key that is a sub-configuration holds what that sub-configuration needs.
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": dict(head_dim=8, num_key_value_heads=4),
    "axk2": dict(num_key_value_heads=4),
    "bailing_hybrid": dict(layer_types=_each("linear_attention", "full_attention"), num_key_value_heads=4),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=F, hidden_size=H, moe_num_experts=E, moe_top_k=K),
    ),
    "deepseek_ocr2": dict(vision_config=_SAM),
    "deepseek_v2": dict(num_key_value_heads=4),
    "deepseek_v3": dict(head_dim=8, num_key_value_heads=4),
    "deepseek_v32": dict(num_key_value_heads=4),
    "deepseek_v4": dict(mlp_layer_types=_each("hash_moe", "moe")),
    "diffusion_gemma": dict(enable_moe_block=True, canvas_length=8),
    "doge": dict(is_moe=True, num_experts=16),
    "dots3_note": dict(
        num_key_value_heads=4,
        vision_config=dict(mlp_layer_types=["sparse"], num_local_experts=E, adapter_in_dim=H, adapter_out_dim=H),
        audio_config=dict(adapter_input_size=H, adapter_out_dim=H),
    ),
    "ernie4_5_vl_moe": dict(
        moe_intermediate_size=[MI, MI],
        rope_parameters=dict(rope_type="default", rope_theta=5e5, mrope_section=[3, 3, 2]),
    ),
    "gemma4": dict(enable_moe_block=True),
    "glm4_moe_lite": dict(num_key_value_heads=4),
    "glm4v_moe": dict(
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2], partial_rotary_factor=0.5),
        rope_scaling=dict(rope_type="default", mrope_section=[1, 1, 2]),
    ),
    "glm5_next": dict(
        num_key_value_heads=4,
        qk_rope_head_dim=0,
        index_kpool=2,
        layer_types=_each("linear_attention", "full_attention"),
    ),
    "glm_moe_dsa": dict(num_key_value_heads=4),
    "granitemoehybrid": dict(layer_types=_granite_kinds),
    "hy_v4": dict(indexer_types=_each("full")),
    "inkling2": dict(vision_config=dict(text_hidden_size=H), audio_config=dict(text_hidden_size=H)),
    "kimi_linear": dict(layer_types=_each("linear_attention", "full_attention"), num_key_value_heads=4),
    "lfm2_moe": dict(layer_types=_each("conv", "full_attention")),
    "llama4": dict(moe_layers=_layer_ids, num_experts_per_tok=1, attention_chunk_size=8),
    "longcat_flash": dict(head_dim=8, num_key_value_heads=4),
    "mistral4": dict(num_key_value_heads=4),
    "mistral_large4": dict(num_key_value_heads=4),
    "muse_spark": dict(
        audio_config=dict(num_hidden_layers=1, patch_sizes=[4], hidden_sizes=[H], depths=[1]),
        projector_hidden_size=H,
        out_hidden_size=H,
    ),
    "nemotron_h": dict(layers_block_type=_each("moe", "attention")),
    "qwen3_5_moe": dict(layer_types=_each("linear_attention", "full_attention")),
    "qwen3_next": dict(layer_types=_each("linear_attention", "full_attention")),
    "qwen3_omni_moe": dict(rope_scaling=dict(rope_type="default", mrope_section=[3, 3, 2])),
    "qwen3_vl_moe": dict(rope_scaling=dict(rope_type="default", mrope_section=[3, 3, 2])),
    "qwen4_exp": dict(
        layer_types=_each("linear_attention", "full_attention"),
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=4,
    ),
    "step3p7": dict(layer_types=_each("full_attention"), moe_layers_enum=_layer_ids),
    "unlimited_ocr": dict(vision_config=_SAM),
    "vitpose_backbone": dict(image_size=[32, 32], num_experts=E, part_features=16),
    "zaya": dict(num_experts_per_tok=1),
}

# By configuration class: what the model reads from it although the class does not declare it.
EXTRA: dict[str, dict[str, Any]] = {
    "Qwen3OmniMoeTalkerConfig": dict(spatial_merge_size=2),
    "Qwen3OmniMoeTalkerTextConfig": dict(shared_expert_intermediate_size=MI),
    "Qwen3OmniMoeThinkerConfig": dict(vision_start_token_id=120),
}

# Where the order of `_CLASS_SUFFIXES` would not pick the right class.
MODEL_CLASS: dict[str, str] = {"qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}

_UNDECORATED = (
    "step3p7", "longcat_flash", "dbrx", "llama4", "jetmoe", "switch_transformers", "nllb_moe", "doge",
    "vitpose_backbone",
)  # fmt: skip
_CLASS_SUFFIXES = (
    "ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification", "ForMaskedLM",
    "Backbone", "Model",
)  # fmt: skip
_TOWER_WORDS = ("vision", "audio", "image", "video", "code2wav", "backbone_config")
_DECORATOR = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)
# Experts that are modules of a list or packed weights read one expert at a time.
_LISTED = re.compile(r"experts = nn\.Module(List|Dict)|class \w*Experts?(Gemm|GLU)?\(nn\.Module")
_DECORATED_CLASS = re.compile(r"^@use_experts_implementation\b[^\n]*(?:\n[^\n]*)*?\nclass (\w+)", re.MULTILINE)


# ------------ which families


def _models_dir() -> Path | None:
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "models"


def _modeling_file(family: str) -> Path | None:
    models = _models_dir()
    file = models / family / f"modeling_{family}.py" if models is not None else None
    return file if file is not None and file.is_file() else None


@functools.lru_cache(maxsize=1)
def _scan() -> tuple[str, ...]:
    models = _models_dir()
    if models is None:
        return ()
    found = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if file.stem == f"modeling_{file.parent.name}"
        and _DECORATOR.search(file.read_text(encoding="utf-8", errors="replace"))
    }
    return tuple(sorted(found))


def decorated_families() -> list[str]:
    """Names, sorted, of the transformers model folders whose modeling file decorates a class with
    `@use_experts_implementation`.

    Read from the installed source without importing any model. Empty if transformers is not installed or too
    old to have the decorator.
    """
    return list(_scan())


def undecorated_families() -> list[str]:
    """Names, sorted, of the installed mixture-of-experts families that do not use the decorator.

    Their experts are packed with a loop, a dense product over all experts, module lists, or embeddings.
    """
    decorated = set(_scan())
    return sorted(name for name in _UNDECORATED if _modeling_file(name) is not None and name not in decorated)


@functools.lru_cache(maxsize=1)
def _scan_listed() -> tuple[str, ...]:
    models = _models_dir()
    if models is None:
        return ()
    others = {*decorated_families(), *undecorated_families()}
    return tuple(
        sorted(
            file.parent.name
            for file in models.glob("*/modeling_*.py")
            if file.stem == f"modeling_{file.parent.name}"
            and file.parent.name not in others
            and _LISTED.search(file.read_text(encoding="utf-8", errors="replace"))
        )
    )


def listed_families() -> list[str]:
    """Names, sorted, of the installed families whose experts are called one by one: those of transformers 4."""
    return list(_scan_listed())


def _check_family(family: str) -> None:
    known = decorated_families() + undecorated_families() + listed_families()
    if family not in known:
        near = nearest(family, known)
        names = f"the nearest: {', '.join(near)}" if near else f"known families: {', '.join(sorted(known)) or 'none'}"
        raise ValueError(f"unknown family {family!r}; {names}")


# ------------ configurations


def _modeling_module(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _model_class(family: str, name: str | None = None) -> Any:
    from transformers import PreTrainedModel

    module = _modeling_module(family)
    name = name or MODEL_CLASS.get(family)
    if name is not None:
        if not hasattr(module, name):
            raise ValueError(f"{family}: {module.__name__} has no class {name}")
        return getattr(module, name)
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and not value.__name__.endswith("PreTrainedModel")
    ]
    for suffix in _CLASS_SUFFIXES:
        for cls in own:
            if cls.__name__.endswith(suffix):
                return cls
    raise RuntimeError(f"{family}: no model class in {module.__name__}; `tiny_experts({family!r})` may still work")


def _resolve(value: Any, layers: int) -> Any:
    if inspect.isfunction(value):
        return value(layers)
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


def _sub_config(spec: Any) -> tuple[type | None, dict[str, Any]]:
    """The configuration class and the arguments behind one entry of `sub_configs_defaults`."""
    from transformers import PretrainedConfig as PreTrainedConfig  # the name that 4.57 and 5.x share
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls, arguments = getattr(spec, "config_class", spec), dict(getattr(spec, "init_kwargs", None) or {})
    if inspect.isclass(cls) and issubclass(cls, PreTrainedConfig):
        return cls, arguments
    model_type = str(getattr(spec, "model_type", None))
    if model_type not in CONFIG_MAPPING:  # a lazy mapping: its `get` does not find what was not used yet
        return None, arguments
    return CONFIG_MAPPING[model_type], arguments


def _config_fields(cls: type) -> dict[str, Any]:
    """Names and defaults of a configuration's fields: a dataclass in transformers 5, a signature in 4."""
    if dataclasses.is_dataclass(cls):
        return {f.name: f.default for f in dataclasses.fields(cls)}
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


def _build_config(
    cls: type,
    special: Mapping[str, Any],
    layers: int,
    overrides: Mapping[str, Any],
    used: set[str],
    *,
    tower: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """An instance of configuration class `cls` with the tables applied, sub-configurations included.

    `special` and `overrides` win over the tables, the tables over `arguments`. Names that found a field are
    added to `used`.
    """
    mine = {**special, **overrides} if not tower else dict(special)
    fields = _config_fields(cls)
    kwargs: dict[str, Any] = {}
    # Transformers 5 says there what it builds; 4 has the classes only.
    nested = getattr(cls, "sub_configs_defaults" if dataclasses.is_dataclass(cls) else "sub_configs", None) or {}
    for key, spec in nested.items():
        sub, sub_arguments = _sub_config(spec)
        if sub is None:
            continue
        sub_tower = tower or any(word in key for word in _TOWER_WORDS)
        sub_special = {} if sub_tower else dict(special)
        if isinstance(special.get(key), dict):
            sub_special.update(special[key])
        built = _build_config(sub, sub_special, layers, overrides, used, tower=sub_tower, arguments=sub_arguments)
        # Not all of transformers 4 take objects, nor more in a dictionary than they know.
        known = {*_config_fields(sub), *EXTRA.get(sub.__name__, {}), "model_type"}
        named = {k: v for k, v in built.to_dict().items() if k in known}
        kwargs[key] = built if dataclasses.is_dataclass(cls) else named
    for key, value in {**(TOWER if tower else GEN), **mine}.items():
        if key not in fields or key in kwargs:
            continue
        listed = isinstance(fields[key], (list, tuple, dict))
        if listed and key not in mine and not isinstance(value, (list, tuple, dict)):
            continue  # one value per layer or axis: its length means something
        kwargs[key] = _resolve(value, layers)
        used.add(key)
    return cls(**{**(arguments or {}), **EXTRA.get(cls.__name__, {}), **kwargs})


class _NoSuchField(ValueError):
    """An override that no configuration of the family has."""


def _tiny_config(family: str, cls: type, layers: int, overrides: Mapping[str, Any]) -> Any:
    used: set[str] = set()
    config = _build_config(cls, SPECIAL.get(family, {}), layers, overrides, used)
    unknown = sorted(set(overrides) - used)
    if unknown:
        raise _NoSuchField(f"{family}: no configuration of {cls.__name__} has {', '.join(unknown)}")
    return config


# ------------ weights


@contextlib.contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """While active, `torch.empty` fills floats with NaN, so that what nobody initialised can be told."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def _new_values(module: nn.Module, name: str, old: torch.Tensor, rng: torch.Generator) -> torch.Tensor | None:
    """Random values for one floating parameter of `module`, or None to keep those it has."""
    noise = torch.randn(old.shape, generator=rng)
    finite = bool(old.isfinite().all())
    if "norm" in type(module).__name__.lower() and old.dim() <= 1:
        # A weight that starts at zero is used as (1 + weight): keep its start and move a little from it.
        start = old.float() if finite else torch.full(old.shape, 0.0 if "bias" in name else 1.0)
        return start + 0.1 * noise
    if isinstance(module, nn.Embedding):
        noise = noise / math.sqrt(old.shape[-1])
        if module.padding_idx is not None:
            noise[module.padding_idx] = 0
        return noise
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # experts with the decorator
        if name.endswith("bias"):
            return 0.5 * noise
        if old.dim() == 3:
            return noise / math.sqrt(old.shape[-2 if module.is_transposed else -1])
    if old.dim() >= 2 and name.endswith("weight"):
        fan_in = old[0].numel() if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) else old.shape[-1]
        return noise / math.sqrt(fan_in)
    if old.dim() >= 3:  # packed experts without the decorator, relative-position tables and the like
        return noise / math.sqrt(old.shape[-1])
    if name.endswith("bias"):
        return (old.float() if finite else torch.zeros(old.shape)) + 0.1 * noise
    if finite and (old.dim() == 0 or bool((old != 0).any())):
        return None  # decays, gates, scales: what the model's own initialisation says
    if old.dim() >= 2:
        return noise / math.sqrt(old.shape[-1])
    return 0.1 * noise


@torch.no_grad()
def _randomise(model: nn.Module, seed: int) -> None:
    """Give every floating parameter of `model` well-conditioned values, in place, from `seed` alone."""
    rng = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or not parameter.is_floating_point():
                continue
            done.add(id(parameter))
            values = _new_values(module, name, parameter, rng)
            if values is not None:
                parameter.copy_(values)
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_floating_point():
                experts = getattr(module, "num_experts", 0)
                if buffer.dtype == torch.int64 and buffer.dim() == 2 and experts and not bool(buffer.any()):
                    # A router that looks experts up by token id: distinct ones for every token.
                    order = torch.rand(len(buffer), experts, generator=rng).argsort(dim=1)
                    buffer.copy_(order[:, : buffer.shape[1]])
                continue
            selection_bias = name.endswith("bias") and not bool(buffer.any())  # the router's
            if selection_bias or bool(buffer.isnan().any()):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=rng))


@torch.no_grad()
def _keep_in_fp32(model: nn.Module, dtype: torch.dtype) -> None:
    """Widen what the model keeps in float32 when it is loaded as `dtype`, as `from_pretrained` does."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not patterns or dtype not in (torch.float16, torch.bfloat16):
        return
    # Whole components of a name: "gate" is not "gate_proj".
    keep = re.compile("|".join(rf"(^|\.){re.escape(p)}($|\.)".replace(r"\*", ".*") for p in sorted(patterns)))
    for prefix, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and keep.search(f"{prefix}.{name}"):
                tensor.data = tensor.data.float()


def _construct(make: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, seed: int) -> nn.Module:
    """`make(dtype)` in eval mode with well-conditioned values that are those of `make(float32)`, rounded."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        with _uninitialised_is_nan():
            model = make(torch.float32)
        _randomise(model, seed)
        if dtype != torch.float32:
            reference, model = model, make(dtype)
            _keep_in_fp32(model, dtype)
            model.load_state_dict(reference.state_dict())
    return model.eval()


def tiny_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = 2,
    model_class: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """A whole model of `family` in eval mode: hidden size 64, 8 experts, random weights of type `dtype`.

    The class is `model_class`, by default the family's `ForCausalLM` where there is one, else the nearest to
    it. Values depend on `seed` only, a lower-precision model holds the float32 one's values rounded (and in
    float32 what `from_pretrained` would keep so), and the global random state is left as it was. `overrides`
    are configuration fields, set in every configuration but those of vision and audio towers.

    Raises ValueError for an unknown family or an override no configuration has, RuntimeError if the installed
    transformers cannot build the whole model.
    """
    _check_family(family)
    cls = _model_class(family, model_class)

    def make(kind: torch.dtype) -> nn.Module:
        config = _tiny_config(family, cls.config_class, layers, overrides)
        model: nn.Module = cls._from_config(config, dtype=kind)
        return model

    try:
        return _construct(make, dtype, seed)
    except _NoSuchField:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()}"
        raise RuntimeError(
            f"{family}: no tiny {cls.__name__} could be built ({reason}); "
            f"`tiny_experts({family!r})` builds its experts modules alone"
        ) from error


# ------------ experts alone


def _nested_configs(config: Any) -> list[Any]:
    found = [config]
    for key in getattr(type(config), "sub_configs", None) or {}:
        sub = getattr(config, key, None)
        if sub is not None:
            found += _nested_configs(sub)
    return found


def tiny_experts(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[tuple[str, nn.Module]]:
    """(class name, module) of each class that `family`'s modeling file decorates with
    `@use_experts_implementation`, built alone in eval mode with random weights of type `dtype`.

    A module takes hidden states [T, H], expert ids [T, K] (int64), routing weights [T, K] and returns [T, H].
    Raises ValueError for an unknown family, RuntimeError for one without decorated classes or whose classes
    cannot be built alone.
    """
    _check_family(family)
    file = _modeling_file(family)
    names = _DECORATED_CLASS.findall(file.read_text(encoding="utf-8")) if file is not None else []
    if not names:
        raise RuntimeError(f"{family} has no class decorated with @use_experts_implementation")
    module = _modeling_module(family)
    root = _model_class(family)
    return [(name, _experts_alone(family, getattr(module, name), root, dtype, seed)) for name in names]


def _experts_of_model(family: str, cls: type[nn.Module], dtype: torch.dtype, seed: int) -> nn.Module | None:
    """The first module of class `cls` in the whole tiny model, or None."""
    try:
        model = tiny_model(family, dtype=dtype, seed=seed)
    except RuntimeError:
        return None
    return next((module for module in model.modules() if type(module) is cls), None)


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _experts_alone(family: str, cls: type[nn.Module], root: Any, dtype: torch.dtype, seed: int) -> nn.Module:
    configuration = importlib.import_module(_modeling_module(family).__name__.replace("modeling_", "configuration_"))
    from transformers import PreTrainedConfig

    classes = [
        value
        for value in vars(configuration).values()
        if inspect.isclass(value) and issubclass(value, PreTrainedConfig) and value.__module__ == configuration.__name__
    ]
    if root.config_class not in classes:
        classes.append(root.config_class)
    # XTalkerTextExperts goes with XTalkerTextConfig: the longest common prefix first.
    classes.sort(key=lambda c: -_common_prefix(c.__name__, cls.__name__))
    required = [
        p.name
        for p in list(inspect.signature(cls.__init__).parameters.values())[2:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    reasons = []
    for config_class in classes:

        def make(kind: torch.dtype, config_class: type = config_class) -> nn.Module:
            config = _tiny_config(family, config_class, 2, {})
            extra = {name: _argument(config, name) for name in required}
            before = torch.get_default_dtype()
            torch.set_default_dtype(kind)
            try:
                return cls(config, **extra)
            finally:
                torch.set_default_dtype(before)

        try:
            built = _construct(make, dtype, seed)
        except Exception as error:  # another configuration may fit
            reasons.append(f"{config_class.__name__}: {type(error).__name__}: {error}")
            continue
        return built
    found = _experts_of_model(family, cls, dtype, seed)  # its arguments come from the layer that holds it
    if found is None:
        raise RuntimeError(f"{cls.__name__} cannot be built alone ({'; '.join(reasons)})")
    return found


def _argument(config: Any, name: str) -> Any:
    if name == "layer_idx":
        return 0
    value = getattr(config, f"moe_{name}", getattr(config, name, None))
    if isinstance(value, (list, tuple)):
        value = value[0]
    if value is None:
        raise ValueError(f"no value for argument {name}")
    return value


# ------------ inputs


def _special_ids(model: Any) -> set[int]:
    """Every token id that the model's configurations give a meaning to, sub-configurations included."""
    found: set[int] = set()

    def walk(node: Any) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                if re.search(r"token_(id|index)", str(key)):
                    values = value if isinstance(value, (list, tuple)) else [value]
                    found.update(v for v in values if type(v) is int)
                walk(value)

    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            walk(config.to_dict())
    return found


def _embeddings(model: Any) -> nn.Module | None:
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _vocabulary(model: Any) -> int:
    rows = getattr(_embeddings(model), "num_embeddings", None)
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    size = rows or getattr(text, "vocab_size", None)
    if not size:
        raise ValueError(f"{type(model).__name__}: neither input embeddings nor a vocabulary size")
    return int(size)


def _random_ids(shape: tuple[int, int], vocabulary: int, avoid: set[int], rng: torch.Generator) -> torch.Tensor:
    allowed = torch.tensor([i for i in range(vocabulary) if i not in avoid] or [0])
    return allowed[torch.randint(len(allowed), shape, generator=rng)]


def tiny_inputs(model: nn.Module, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one forward of a Hugging Face `model`, drawn from `seed`.

    `input_ids` [batch, length] int64 within the vocabulary and outside every id that a configuration gives a
    meaning to (padding, image placeholders); `decoder_input_ids` alike where the forward accepts them; for a
    model whose main input is an image, `pixel_values` [batch, C, height, width] of the model's dtype;
    `use_cache=False` where the forward names it. Tensors are on the device of the input embeddings.

    Raises ValueError if the forward requires an argument that cannot be derived.
    """
    config: Any = model.config
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    required = {
        key
        for key, parameter in accepted.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    rng = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {}
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(batch, config.num_channels, height, width, generator=rng)
        inputs["pixel_values"] = pixels.to(next(model.parameters()).dtype)
    elif "input_ids" in accepted or open_ended:
        vocabulary, avoid = _vocabulary(model), _special_ids(model)
        inputs["input_ids"] = _random_ids((batch, length), vocabulary, avoid, rng)
        if "decoder_input_ids" in accepted:
            canvas = getattr(config, "canvas_length", None) or length  # block diffusion refines blocks of one size
            inputs["decoder_input_ids"] = _random_ids((batch, canvas), vocabulary, avoid, rng)
    if "attention_mask" in required:
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
    if "dataset_index" in accepted:  # which expert, for a backbone with one per data set
        inputs["dataset_index"] = torch.arange(batch) % int(getattr(config, "num_experts", 1))
    if required - set(inputs) or not inputs:
        wanted = sorted(required - set(inputs)) or [str(model.main_input_name)]
        raise ValueError(f"{name}.forward needs {', '.join(map(repr, wanted))}, which cannot be derived")
    first = next((_embeddings(model) or model).parameters(), next(model.parameters()))
    device = first.device if first.device.type != "meta" else torch.device("cpu")
    inputs = {key: value.to(device) for key, value in inputs.items()}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs
