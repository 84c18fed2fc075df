"""Attention over latents: what DeepSeek's attention caches is attended to as it is.

transformers keeps latents [B, 1, L, rank] and one rotary key [B, 1, L, rope] of every token, and expands all of them
through ``kv_b_proj`` in every step, used or not. The same numbers without it, per head h with W_h = [K_h; V_h] of
``kv_b_proj``::

    logits = q_nope . (K_h c) + q_rope . k_rope  =  (K_h' q_nope) . c + q_rope . k_rope
    output = sum of p (V_h c)                    =  V_h (sum of p c)

so that heads are one group over one key [c, k_rope] and one value c.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
# Heads that one program of the kernel has: their query and sums are in registers.
_HEADS = 16


def latent_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model that expand latents, as transformers 5.23 has them."""
    return [m for m in model.modules() if callable(getattr(type(m), "expand_kv", None)) and _known(m)]


def _known(module: Any) -> bool:
    if not all(isinstance(getattr(module, name, None), int) for name in _SIZES):
        return False
    expand = getattr(module, "kv_b_proj", None)
    heads = module.qk_nope_head_dim + module.v_head_dim
    return (
        type(expand) is nn.Linear
        and expand.bias is None
        and expand.in_features == module.kv_lora_rank
        and expand.out_features % heads == 0
    )


@contextmanager
def absorbed(model: nn.Module) -> Iterator[None]:
    """Inside the block, and in this thread, latents are not expanded; attention.py's function expects that."""
    modules = latent_modules(model)
    try:
        for module in modules:
            module.__dict__["expand_kv"] = _unexpanded(module, threading.get_ident())
        yield
    finally:
        for module in modules:
            module.__dict__.pop("expand_kv", None)


def _unexpanded(module: Any, thread: int) -> Any:
    def expand_kv(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling() and threading.get_ident() != thread:
            expanded: tuple[Tensor, Tensor] = type(module).expand_kv(module, kv_nope, k_rot)
            return expanded
        return torch.cat([kv_nope, k_rot], dim=-1), kv_nope

    return expand_kv


def is_absorbed(module: nn.Module) -> bool:
    """Whether a module's keys and values are latents now."""
    return "expand_kv" in module.__dict__


def into_latents(module: Any, query: Tensor) -> Tensor:
    """query [B, heads, 1, nope + rope] -> [B, heads, 1, rank + rope]."""
    nope, rope = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    keys = _weight(module)[:, : module.qk_nope_head_dim]  # [heads, nope, rank]
    absorbed_query = torch.bmm(nope.squeeze(2).transpose(0, 1), keys).transpose(0, 1)
    return torch.cat([absorbed_query.unsqueeze(2), rope], dim=-1)


def from_latents(module: Any, output: Tensor) -> Tensor:
    """output [B, heads, 1, rank] -> [B, heads, 1, value]."""
    values = _weight(module)[:, module.qk_nope_head_dim :]  # [heads, value, rank]
    return torch.bmm(output.squeeze(2).transpose(0, 1), values.transpose(1, 2)).transpose(0, 1).unsqueeze(2)


def _weight(module: Any) -> Tensor:
    """[heads, nope + value, rank]."""
    weight: Tensor = module.kv_b_proj.weight
    return weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)


def in_groups(latents: Tensor, heads: int) -> Tensor:
    """[B, 1, L, D] -> [B, groups, L, D] of the same memory: one group for at most 16 heads, where that divides them."""
    groups = heads // _HEADS if heads % _HEADS == 0 else 1
    return latents.expand(-1, groups, -1, -1)
