"""The sizes of a model's MoE layers from its configuration alone: no weight is loaded, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..hf_models import empty_model, read_config
from ..ops.synthetic import LayerShape
from ..passes.find.discover import Candidate, find_candidates, packed_parameters
from ..passes.weights import listed

# What transformers' configurations call K, the experts of a token.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "top_k_experts",
          "moe_k", "num_selected_experts", "router_top_k")  # fmt: skip


class ShapeError(ValueError):
    """The sizes cannot be told from the configuration; the message says which, and what to pass instead."""


def model_shapes(model: str, dtype: torch.dtype, *, trust_remote_code: bool = False) -> list[LayerShape]:
    """The distinct MoE layers of a model in a directory or on the hub, in model order.

    The model is built without data, so that its parameters' shapes tell E, H and I; K is in its configuration.
    Raises ShapeError where that does not tell them.
    """
    config = read_config(model, trust_remote_code=trust_remote_code)
    return shapes_of(empty_model(config, trust_remote_code=trust_remote_code), config, dtype)


def shapes_of(model: nn.Module, config: Any, dtype: torch.dtype) -> list[LayerShape]:
    """As ``model_shapes``, of a module (its parameters need no data) and its configuration."""
    layers = [_weights_of(candidate) for candidate in find_candidates(model)]
    shapes = [_shape(layer, config, dtype) for layer in layers if layer is not None]
    if not shapes:
        raise ShapeError(f"{type(model).__name__} has no experts that can be told; give the sizes: --shape E,K,H,I")
    return list(dict.fromkeys(shapes))


@dataclass(frozen=True)
class _Layer:
    """What it is called in messages, the shapes [E, ., .] of its experts' weights, whether they have biases."""

    name: str
    weights: dict[str, tuple[int, ...]]
    biased: bool


def _weights_of(candidate: Candidate) -> _Layer | None:
    """A candidate's weights; None for a list of something else than experts."""
    module = candidate.weights
    if candidate.kind == "packed":
        sizes = {n: tuple(p.shape) for n, p in packed_parameters(module).items()}
        e = next(iter(sizes.values()))[0]
        biased = any(p is not None and p.dim() == 2 and p.shape[0] == e for p in module._parameters.values())
    else:
        children = [module.get_submodule(name) for name in listed(module)]
        parameters = dict(children[0].named_parameters())
        sizes = {f"*.{n}": (len(children), *p.shape) for n, p in parameters.items() if p.dim() == 2}
        # A layer of the model has more matrices, and norms.
        if len(sizes) not in (2, 3) or any("norm" in n for n in parameters):
            return None
        biased = any(n.endswith("bias") for n in parameters)
    name = type(module if candidate.kind == "packed" else candidate.module).__name__
    return _Layer(f"{name} ({', '.join(f'{n} {list(s)}' for n, s in sizes.items())})", sizes, biased)


def _shape(layer: _Layer, config: Any, dtype: torch.dtype) -> LayerShape:
    what, e = layer.name, next(iter(layer.weights.values()))[0]
    found = _up_and_down(config, layer.weights)
    if found is None:
        raise ShapeError(f"{what} does not tell hidden and intermediate size; give the sizes: --shape E,K,H,I")
    hidden, inner, rows = found
    top_k = next((k for c in _configs(config) for name in _TOP_K if _is_size(k := getattr(c, name, None))), None)
    if top_k is None:
        raise ShapeError(f"the configuration of {what} does not say how many experts a token has; give --shape E,K,H,I")
    return LayerShape(e, top_k, hidden, inner, rows == 2 * inner, layer.biased, dtype)


def _up_and_down(config: Any, weights: dict[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    """(H, I, rows of the up-projection): the first reading of the shapes, by the config's H, that is consistent."""
    matrices = [shape[1:] for shape in weights.values()]
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
