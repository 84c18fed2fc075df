"""The kinds of cache that have a static form: one line each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from . import chunks, dummy, full, hybrid, indexed, ring, states
from .base import CannotMove, Clock, LayerForm

KINDS: tuple[Any, ...] = (full, ring, chunks, states, dummy, indexed, hybrid)

_MASKS: dict[str, Any] = {name: mask for kind in KINDS for name, mask in kind.MASKS.items()}
# Those whose masks are as long as the cache.
DYNAMIC_MASKS = {name for name, mask in _MASKS.items() if mask is full.mask}
# What a model with layers of one kind makes masks for beside it, as transformers does.
_BESIDE = {
    "hybrid": ("full_attention", "linear_attention"),
    "hybrid_sliding": ("sliding_attention", "linear_attention"),
}


def layer_kinds(config: Any) -> list[str]:
    """What a model's configuration calls the kind of each layer; empty where it does not say."""
    return list(getattr(config, "layer_types", None) or ())


def mask_kinds(config: Any) -> tuple[str, ...]:
    """The kinds by which the model's forward wants its masks, as transformers prepares them; empty for just one."""
    kinds = set(layer_kinds(config))
    return tuple(sorted(kinds.union(*(_BESIDE.get(kind, ()) for kind in kinds))))


def unknown_kinds(kinds: Iterable[str]) -> list[str]:
    """Those of ``kinds`` whose masks are not known here, sorted."""
    return sorted(set(kinds) - _MASKS.keys())


def forms_of(cache: Any, config: Any) -> tuple[LayerForm, ...]:
    """The layers of a filled dynamic cache; CannotMove names the first that has no static form."""
    kinds = layer_kinds(config)
    forms = []
    for i, layer in enumerate(cache.layers):
        kind = kinds[i] if i < len(kinds) else ""
        try:
            form = next((f for k in KINDS if (f := k.form_of(layer, kind)) is not None), None)
        except CannotMove as error:
            raise CannotMove(f"layer {i}: {error}") from None
        if form is None:
            raise CannotMove(f"layer {i} keeps a {type(layer).__name__}, which has no static form here")
        forms.append(form)
    if any(f.window is not None for f in forms):
        ring.window_of(forms)
    if not forms:
        raise CannotMove("its cache has no layers")
    return tuple(forms)


def mask_of(kind: str, clock: Clock, forms: Sequence[LayerForm]) -> Tensor | None:
    """What the token at the clock's position may attend to in layers of one kind, bool [rows, 1, 1, slots]."""
    mask: Tensor | None = _MASKS[kind](clock, forms)
    return mask
