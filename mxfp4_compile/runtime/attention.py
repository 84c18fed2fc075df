"""Attention of one new token per row over a static cache, grouped heads and sinks included.

transformers' ``sdpa`` repeats keys and values for every query head where a mask is given, and its ``eager``
always does: eight copies of the cache per step for Qwen3-MoE. Here each key is read once. The Triton kernel
splits the cache over programs and skips blocks in which nothing may be attended to, so that an unused rest
of a long cache costs nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import latent

NAME = "mxfp4_decode"

_LIB = torch.library.Library("mxfp4_runtime", "DEF")
_LIB.define(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor mask, Tensor? sinks, float scaling, "
    "float? softcap) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """query [B, Hq, 1, D], keys [B, Hkv, L, D], values [B, Hkv, L, Dv], mask bool [B, 1, 1, L] -> [B, Hq, 1, Dv].

    ``sinks`` [Hq]: one more logit per head, whose probability goes nowhere. ``softcap``: c*tanh(logits/c).
    """
    b, hq, _, d = query.shape
    hkv = keys.shape[1]
    grouped = query.reshape(b, hkv, hq // hkv, d)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = torch.matmul(grouped.to(wide), keys.transpose(2, 3).to(wide)) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(logits.dtype).view(1, hkv, hq // hkv, 1).expand(b, -1, -1, -1)
        probabilities = torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :-1]
    else:
        probabilities = torch.softmax(logits, dim=-1)
    return torch.matmul(probabilities, values.to(wide)).to(query.dtype).reshape(b, hq, 1, values.shape[-1])


@cache
def _kernels() -> tuple[Any, Any]:
    from . import attention_kernel

    return attention_kernel.partial, attention_kernel.merge


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


BLOCK = 32
_MAX_SPLITS = 64


def _decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cuda" or not half or keys.dtype != query.dtype:
        return reference(query, keys, values, mask, sinks, scaling, softcap)
    return triton_attention(query, keys, values, mask, sinks, scaling, softcap)


def triton_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """``reference`` as two launches, logits and sums in fp32."""
    partial, merge = _kernels()
    b, hq, _, d = query.shape
    hkv, length, dv = keys.shape[1], keys.shape[2], values.shape[3]
    group = hq // hkv
    # Enough programs for every multiprocessor twice; more splits than blocks would idle.
    splits = min(_MAX_SPLITS, -(-length // BLOCK), max(1, 512 // (b * hkv)))
    query = query.contiguous()
    acc = torch.empty((b, hq, splits, dv), dtype=torch.float32, device=query.device)
    stats = torch.empty((b, hq, splits, 2), dtype=torch.float32, device=query.device)
    out = torch.empty((b, hq, 1, dv), dtype=query.dtype, device=query.device)
    partial[(b * hkv, splits)](
        query, keys, values, mask.view(torch.uint8), acc, stats, length, mask.stride(0), scaling, softcap or 0.0,
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        HKV=hkv, GROUP=group, GROUP_PADDED=max(16, _power_of_two(group)), D=d, D_PADDED=max(16, _power_of_two(d)),
        DV=dv, DV_PADDED=max(16, _power_of_two(dv)), BLOCK=BLOCK, SPLITS=splits, num_warps=4, num_stages=3,
    )  # fmt: skip
    merge[(b * hq,)](
        acc, stats, sinks if sinks is not None else stats, out, SINKS=sinks is not None, HQ=hq, DV=dv,
        DV_PADDED=_power_of_two(dv), SPLITS=splits, SPLITS_PADDED=_power_of_two(splits), num_warps=4,
    )  # fmt: skip
    return out


def _fake(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], 1, values.shape[3]))


_LIB.impl("decode_attention", _decode_attention, "CompositeExplicitAutograd")
torch.library.register_fake("mxfp4_runtime::decode_attention", _fake, lib=_LIB)

# What transformers passes along and attention of one token has no use for: the mask says it all.
_WITHOUT_EFFECT = {
    "sliding_window", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "cache_position", "return_dict", "position_embeddings", "logits_to_keep",
}  # fmt: skip


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers' AttentionInterface wants it, for one query token per row.

    indices: int [B, 1, n], the slots that an indexer has chosen; others are not attended to.

    Called by another thread than the one that records, it is what the model's attention was before.

    Raises NotImplementedError for arguments whose effect is not known here.
    """
    before = None if torch.compiler.is_compiling() else _before(getattr(module, "config", None))
    if before is not None:
        kwargs |= {k: v for k, v in (("softcap", softcap), ("s_aux", s_aux), ("indices", indices)) if v is not None}
        function = _implementation(module, before)
        by_model: tuple[Tensor, Tensor | None] = function(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return by_model
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _WITHOUT_EFFECT]
    if unknown or dropout or attention_mask is None or query.shape[2] != 1 or attention_mask.dtype != torch.bool:
        raise NotImplementedError(f"decode attention does not know {', '.join(unknown) or 'this call'}")
    if indices is not None:
        chosen = torch.zeros_like(attention_mask[:, 0]).expand(query.shape[0], -1, -1)
        attention_mask = attention_mask & chosen.scatter(-1, indices.long(), True)[:, None]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    over_latents = latent.is_absorbed(module)
    if over_latents:
        query = latent.into_latents(module, query)
        key, value = (latent.in_groups(t, query.shape[1]) for t in (key, value))
    out = torch.ops.mxfp4_runtime.decode_attention(query, key, value, attention_mask, s_aux, scaling, softcap)
    if over_latents:
        out = latent.from_latents(module, out)
    return out.transpose(1, 2), None


# Configurations whose attention is exchanged: id -> (thread that records, what their attention was).
_exchanged: dict[int, tuple[int, str]] = {}


@contextmanager
def exchanged(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block attention of ``model``, called by this thread, is the one of this file."""
    _register()
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {i: c for i, c in configs.items() if hasattr(c, "_attn_implementation_internal")}
    before = {i: c._attn_implementation_internal for i, c in configs.items()}
    try:
        for i, config in configs.items():
            _exchanged[i] = threading.get_ident(), before[i]
            config._attn_implementation_internal = NAME
        yield
    finally:
        for i, config in configs.items():
            config._attn_implementation_internal = before[i]
            del _exchanged[i]


def _before(config: Any) -> str | None:
    """What attention of a configuration is for this thread if that is not the one of this file, else None."""
    thread, before = _exchanged.get(id(config), (0, None))
    if thread == threading.get_ident():
        return None
    if before is None:  # put back since the caller looked
        before = getattr(config, "_attn_implementation_internal", None)
    return None if before == NAME else before


def _implementation(module: torch.nn.Module, name: str) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise NotImplementedError(f"{type(module).__name__} has no attention function {name!r}")


def _mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """Masks as the model's attention before wants them; for the recording thread none, as it brings its own."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    before = _before(config)
    return None if before is None else ALL_MASK_ATTENTION_FUNCTIONS[before](*args, config=config, **kwargs)


@cache
def _register() -> None:
    """Make ``NAME`` known to transformers (which needs it for a lookup only: no model is set to it for good)."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
