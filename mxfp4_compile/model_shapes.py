"""The sizes of a model's MoE layers from its configuration alone: no weight is loaded, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .ops.synthetic import LayerShape
from .passes.discover import find_candidates, packed_parameters

# What transformers' configurations call K, the experts of a token.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "top_k_experts",
          "moe_k", "num_selected_experts", "router_top_k")  # fmt: skip


class ShapeError(ValueError):
    """The sizes cannot be told from the configuration; the message says which, and what to pass instead."""


def model_shapes(model: str, dtype: torch.dtype) -> list[LayerShape]:
    """The distinct MoE layers of a model in a directory or on the hub, in model order.

    The model is built without data, so that its parameters' shapes tell E, H and I; K is in its configuration.
    Raises ShapeError where that does not tell them.
    """
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(model)
    cls: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device("meta"):
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            built: nn.Module = cls._from_config(config)  # type: ignore[attr-defined]
        else:
            built = transformers.AutoModelForCausalLM.from_config(config)
    return shapes_of(built, config, dtype)


def shapes_of(model: nn.Module, config: Any, dtype: torch.dtype) -> list[LayerShape]:
    """As ``model_shapes``, of a module (its parameters need no data) and its configuration."""
    experts = [c.module for c in find_candidates(model) if c.kind == "packed"]
    if not experts:
        raise ShapeError(f"{type(model).__name__} has no packed experts; give the sizes: --shape E,K,H,I")
    return list(dict.fromkeys(_shape(module, config, dtype) for module in experts))


def _shape(module: nn.Module, config: Any, dtype: torch.dtype) -> LayerShape:
    weights = packed_parameters(module)
    e = next(iter(weights.values())).shape[0]
    what = f"{type(module).__name__} ({', '.join(f'{n} {list(p.shape)}' for n, p in weights.items())})"
    found = _up_and_down(config, weights)
    if found is None:
        raise ShapeError(f"{what} does not tell hidden and intermediate size; give the sizes: --shape E,K,H,I")
    hidden, inner, rows = found
    top_k = next((k for c in _configs(config) for name in _TOP_K if _is_size(k := getattr(c, name, None))), None)
    if top_k is None:
        raise ShapeError(f"the configuration of {what} does not say how many experts a token has; give --shape E,K,H,I")
    biased = any(p is not None and p.dim() == 2 and p.shape[0] == e for p in module._parameters.values())
    return LayerShape(e, top_k, hidden, inner, rows == 2 * inner, biased, dtype)


def _up_and_down(config: Any, weights: dict[str, nn.Parameter]) -> tuple[int, int, int] | None:
    """(H, I, rows of the up-projection): the first reading of the shapes, by the config's H, that is consistent."""
    matrices = [tuple(p.shape[1:]) for p in weights.values()]
    sizes = [getattr(c, name, None) for c in _configs(config) for name in ("hidden_size", "moe_latent_size", "d_model")]
    for hidden in sizes:
        if not isinstance(hidden, int) or not all(hidden in m for m in matrices):
            continue
        # Square matrices tell as well: both sides are H.
        others = [m[0] if m[1] == hidden else m[1] for m in matrices]
        inner = min(others)
        rows = sum(others) - inner
        if rows in (inner, 2 * inner):
            return hidden, inner, rows
    return None


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it, text first where there are several."""
    yield config
    inside = [(n, c) for n, c in vars(config).items() if hasattr(c, "to_dict") and hasattr(c, "model_type")]
    for _, nested in sorted(inside, key=lambda c: c[0] != "text_config"):
        yield from _configs(nested)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
