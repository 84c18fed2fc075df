"""Which models, and which calls of them, may be decoded by recorded steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..processes import is_dtensor
from .caches.kinds import layer_kinds, unknown_kinds

# What a decode step is called with that a recorded one has, or has no need of.
PLAIN_INPUTS = {
    "input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep",
}  # fmt: skip

# Attributes of PEFT's layers that say which adapters their forward applies.
_ADAPTER = "_disable_adapters"
_ADAPTER_STATE = ("_active_adapter", "merged_adapters", "scaling")


def refusal_of(model: Any, modules: list[nn.Module]) -> str | None:
    """Why no step of this model may be recorded as it is now, or None."""
    device = next(model.parameters()).device
    if len({p.device for module in modules for p in module._parameters.values() if p is not None}) > 1:
        return "the model is spread over several devices"
    if model.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    odd = odd_attention(model)
    if odd is not None:
        return odd
    if any(getattr(type(module), "adapts_mxfp4", False) for module in modules):
        return "it has adapters on experts, whose products are not recorded"
    hooked = hooked_module(model, modules)
    if hooked is not None:
        return f"{hooked} has forward hooks, which a recorded step would not call"
    return None


def odd_attention(model: Any) -> str | None:
    """Why the masks of this model are not those of the kinds of layers that are known, or None."""
    config = model.config.get_text_config(decoder=True)
    kinds = unknown_kinds(layer_kinds(config))
    if kinds:
        return f"its layers are of kinds whose caches have no static form here ({', '.join(kinds)})"
    if getattr(config, "attention_chunk_size", None) is not None and not layer_kinds(config):
        return "its attention is chunked, and its configuration does not say in which layers"
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    return None


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules, each once: every generate looks at them, and ``model.modules()`` makes a name for each."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting.extend(module._modules.values())
    return list(found.values())


def hooked_module(model: nn.Module, modules: list[nn.Module]) -> str | None:
    """The name of a module with forward hooks of the user's; transformers' own, which record outputs, do no harm."""
    from torch.nn.modules import module as registry

    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return "torch"
    for module in modules:
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith("transformers.utils.output_capturing"):
                return next(name for name, m in model.named_modules() if m is module) or "the model"
    return None


def fingerprint_of(model: nn.Module, modules: list[nn.Module]) -> int:
    """Changes when a parameter, buffer or module was exchanged or moved: recorded addresses are stale then.

    Also when other adapters of PEFT are active than before: a recorded step has the ones that were.
    """
    parts: list[Any] = [getattr(getattr(model, "config", None), "_attn_implementation", None)]
    for module in modules:
        parts.append(id(module))
        if _ADAPTER in module.__dict__:
            parts += [repr(module.__dict__.get(name)) for name in (_ADAPTER, *_ADAPTER_STATE)]
        parts += [_own(t).data_ptr() for t in module._parameters.values() if t is not None]
        parts += [t.data_ptr() for t in module._buffers.values() if t is not None]
    return hash(tuple(parts))


def versions_of(modules: list[nn.Module]) -> int:
    """Changes when a parameter was written to, as an optimizer does; buffers, which forwards may count in, aside."""
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    return hash(tuple(-1 if p.is_inference() else _own(p)._version for p in parameters))


def _own(parameter: Any) -> Any:
    """This process's part of a parameter, whose address and version the whole does not have."""
    return parameter._local_tensor if is_dtensor(parameter) else parameter


def unusual_inputs(inputs: dict[str, Any]) -> list[str]:
    """Names of what a model is called with beside tokens, their places and the cache."""
    usual = PLAIN_INPUTS | {"return_dict"}
    return [k for k, v in inputs.items() if k not in usual and v is not None and v is not False]


def planes_of(inputs: dict[str, Any]) -> int:
    """Kinds of positions that a token has (multimodal models: three or four), 0 for just one."""
    positions = inputs.get("position_ids")
    return positions.shape[0] if positions is not None and positions.dim() == 3 else 0
