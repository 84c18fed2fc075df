"""One decode step of a model over static tensors: compiled layer by layer, recorded, replayed.

Decoder layers of one structure share one compilation: each is compiled as a function of its module, whose
parameters and cache Dynamo turns into inputs. The model's own forward calls them; nothing of it is rewritten.
"""

from __future__ import annotations

import inspect
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.build.module import mxfp4_sites
from . import attention
from .cache import CACHE, Arena, LayerShape, StaticKV, StaticLayerView
from .graphs import Recorder

LayerFunction = Callable[..., Any]


@dataclass(frozen=True)
class StepKey:
    """Rows and cache length of a recorded step; planes: how many kinds of positions a token has, 0 for just one."""

    rows: int
    length: int
    planes: int = 0

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Shape of position_ids."""
        return (self.planes, self.rows, 1) if self.planes else (self.rows, 1)

    def __str__(self) -> str:
        return f"batch {self.rows}, {self.length} tokens"


class DecodeStep:
    """The static tensors of one step and its recording.

    tokens int64 [rows, 1] and position_ids int64 [..., rows, 1] are read; logits fp32 [rows, V] and greedy
    int64 [rows] (the argmax) are written. Each ``run`` advances position and position_ids by one.
    """

    def __init__(
        self,
        model: nn.Module,
        key: StepKey,
        shapes: tuple[LayerShape, ...],
        recorder: Recorder,
        arena: Arena,
        *,
        layer: LayerFunction | None,
        any_length: bool = False,
        use_attention: bool,
    ) -> None:
        """``layer``: what ``compiled_layer`` returned for as many rows, or None to record layers as they are.
        ``any_length``: it is to be compiled for caches of every length."""
        started = time.perf_counter()
        device = next(model.parameters()).device
        self.key = key
        self.kv = StaticKV(shapes, key.rows, key.length, device, arena)
        self._any_length = any_length
        for view in self.kv.full_views() if any_length else ():
            torch._dynamo.maybe_mark_dynamic(view.keys, 2)
            torch._dynamo.maybe_mark_dynamic(view.values, 2)
        self.tokens = torch.zeros(key.rows, 1, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros(key.position_shape, dtype=torch.int64, device=device)
        self.logits = torch.empty(0)
        self.greedy = torch.empty(0)
        self.output_class: Any = None
        self.notes: list[str] = []
        self._model = model
        self._names = mask_names(model)
        self._attention = use_attention
        self._layer = layer
        self.recording = recorder.record(self._in_place, 2)
        self.seconds = time.perf_counter() - started
        self.bytes = self.recording.bytes

    def _in_place(self) -> None:
        with _decode_attention(self._model, self._attention), _layers(self._model, self.kv, self._layer):
            self._run()

    def _run(self) -> None:
        masks = self.kv.masks()
        if self._any_length:
            torch._dynamo.maybe_mark_dynamic(masks["full_attention"], 3)
        mask: Any = {name: masks[name] for name in self._names} if self._names else masks["full_attention"]
        if not self._names and self.kv.window is not None:
            mask = masks["sliding_attention"]
        if not self._attention and getattr(self._model.config, "_attn_implementation", None) == "eager":
            mask = _additive(mask, next(self._model.parameters()).dtype)
        out = self._model.forward(
            input_ids=self.tokens,
            attention_mask=mask,
            position_ids=self.position_ids,
            use_cache=True,
            return_dict=True,
            **{CACHE: self.kv},
        )
        self.output_class = type(out)
        logits = out.logits[:, -1]
        if self.logits.shape != logits.shape:
            self.logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            self.greedy = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        self.logits.copy_(logits)
        torch.argmax(self.logits, dim=-1, out=self.greedy)
        self.kv.position.add_(1)
        self.position_ids.add_(1)

    def replay(self) -> None:
        """Run the step on what the static tensors hold, asynchronously."""
        self.recording.replay()


def _additive(mask: Any, dtype: torch.dtype) -> Any:
    """Masks as transformers' eager attention wants them: 0 or the lowest number."""
    if isinstance(mask, dict):
        return {name: _additive(m, dtype) for name, m in mask.items()}
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def mask_names(model: Any) -> tuple[str, ...]:
    """Kinds of layers by which the model's forward wants its masks, as transformers' generate prepares them."""
    config = model.config.get_text_config(decoder=True)
    return tuple(sorted(set(config.layer_types))) if getattr(config, "layer_types", None) else ()


@contextmanager
def _decode_attention(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model's attention goes through attention.py inside the block."""
    if not wanted:
        yield
        return
    attention.register()
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {i: c for i, c in configs.items() if hasattr(c, "_attn_implementation_internal")}
    before = {i: c._attn_implementation_internal for i, c in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = attention.NAME
        yield
    finally:
        for i, config in configs.items():
            config._attn_implementation_internal = before[i]


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layers by the index of their cache: the children of one ModuleList that hold the model's experts.

    Empty where they cannot be told apart; the step is then recorded as it is.
    """
    sites = mxfp4_sites(model)
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not any(s.startswith(f"{name}.") for s in sites):
            continue
        for layer in module:
            numbers = (getattr(m, "layer_idx", None) for m in layer.modules())
            indices = {n for n in numbers if isinstance(n, int)}
            if len(indices) != 1 or indices & found.keys() or "forward" in layer.__dict__:
                return {}
            found[indices.pop()] = layer
        break
    return found


@contextmanager
def _layers(model: nn.Module, kv: StaticKV, run: LayerFunction | None) -> Iterator[None]:
    """Inside the block the decoder layers run as ``run`` has it, each with its own view of the cache."""
    layers = decoder_layers(model) if run is not None else {}
    if run is None or not layers:
        yield
        return
    with layer_forwards({layer: _Forward(run, layer, kv, index) for index, layer in layers.items()}):
        yield


@contextmanager
def layer_forwards(forwards: dict[nn.Module, LayerFunction]) -> Iterator[None]:
    """Inside the block each layer has another forward."""
    try:
        for layer, forward in forwards.items():
            layer.forward = forward
        yield
    finally:
        for layer in forwards:
            layer.__dict__.pop("forward", None)


def _run_layer(layer: nn.Module, view: StaticLayerView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **{CACHE: view}, **kwargs)


def compile_options(rows: int) -> dict[str, Any]:
    """What Inductor is told for a step of ``rows`` rows.

    With one row, matrix products become reductions that fuse with the norms before them (as in gpt-fast): on an
    H200 a layer of Qwen3-30B-A3B takes 63 us instead of 80. With more rows that changes nothing.
    """
    return {"coordinate_descent_tuning": True} if rows == 1 else {}


def compiled_layer(rows: int) -> LayerFunction:
    """The function that runs decoder layers of ``rows`` rows, compiled once per structure of layer."""
    function = own_code(_run_layer, f"decode_layer_{rows}")
    return torch.compile(function, dynamic=False, fullgraph=True, options=compile_options(rows))


def own_code(function: Any, name: str) -> LayerFunction:
    """A copy of a function: Dynamo keeps compilations, and counts them against its limit, by code object."""
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


class _Forward:
    """A decoder layer's forward for the time of recording."""

    def __init__(self, run: LayerFunction, layer: nn.Module, kv: StaticKV, index: int) -> None:
        self._run, self._layer, self._kv, self._view = run, layer, kv, kv.views[index]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(CACHE) is not self._kv:
            return type(self._layer).forward(self._layer, *args, **kwargs)
        kwargs.pop(CACHE)
        return self._run(self._layer, self._view, args, kwargs)


def probe_tokens(model: Any, rows: int, length: int, past_window: bool = True) -> Tensor:
    """Random tokens int64 [rows, length] on the model's device, the same ones every time.

    past_window: longer by a sliding window that is not too long to go past.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or 0
    length += window if past_window and window <= 512 else 0
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def positions_of(mask: Tensor) -> Tensor:
    """Positions int64 [B, T] of left-padded tokens, as transformers counts them: the first that is not padding is 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Of all elements together, in fp64; infinite where shapes differ or something is not finite."""
    if got.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def last_logits(model: nn.Module) -> dict[str, Any]:
    """The argument that asks the model's forward for the last token's logits alone, if it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def expand_rows(source: Tensor, rows: int, dim: int = 0) -> Tensor:
    """[.., B, ..] -> [.., rows, ..] along ``dim``: rows beyond B repeat row 0."""
    missing = rows - source.shape[dim]
    if not missing:
        return source
    first = source.narrow(dim, 0, 1)
    return torch.cat([source, first.expand(*source.shape[:dim], missing, *source.shape[dim + 1 :])], dim)
