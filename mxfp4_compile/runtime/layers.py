"""Decoder layers, compiled: the model's own forward calls them, nothing of it is rewritten.

Layers of one structure share one compilation: each is compiled as a function of its module, whose parameters and cache
Dynamo turns into inputs.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..passes.build.module import mxfp4_sites
from ..processes import OneProcess, in_compiled_code
from .caches.base import CACHE, LayerView
from .caches.step_cache import StepCache
from .graph_pass import LayerPass

LayerFunction = Callable[..., Any]


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


def have_biases(layers: Iterable[nn.Module]) -> bool:
    """Whether a parameter of decoder layers is called a bias."""
    return any("bias" in name for layer in layers for name, _ in layer.named_parameters())


def let_compile(modules: list[nn.Module]) -> None:
    """Let Dynamo pass over the hooks by which transformers records hidden states and attentions.

    One forward that asks for them leaves the hooks on the modules for good. They read a ContextVar, which Dynamo
    cannot trace, and do nothing unless a forward asks again; where a whole model is compiled that asks, they stay.
    """
    for module in modules:
        for key, hook in module._forward_hooks.items():
            records = (getattr(hook, "__module__", None) or "").startswith("transformers.utils.output_capturing")
            if records and not hasattr(hook, "__wrapped__"):
                module._forward_hooks[key] = _passed_over(hook)


def _passed_over(hook: Any) -> Any:
    from transformers.utils import output_capturing

    collector: Any = getattr(output_capturing, "_active_collector", None)

    @functools.wraps(hook)
    def record(module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() and not getattr(collector, "compiling", False):
            return None
        return hook(module, args, output)

    return record


@contextmanager
def layers_run_by(
    model: nn.Module,
    cache: StepCache,
    run: LayerFunction | None,
    note: Callable[[str], None],
    teach: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """Inside the block the decoder layers run as ``run`` has it, each with its own view of the cache.

    ``note`` is told of layers that did not; RuntimeError if none did. ``teach(index, args, kwargs, call)``: called in
    the place of a layer that would be called by ``call(args, kwargs)``.
    """
    layers = decoder_layers(model) if run is not None or teach is not None else {}
    if not layers:
        yield
        return
    forwards = [_Forward(run or _run_layer, layer, cache, index, teach) for index, layer in layers.items()]
    with layer_forwards({forward.layer: forward for forward in forwards}), _no_backward_hooks(layers.values()):
        yield
    missed = sorted(index for index, forward in zip(layers, forwards, strict=True) if not forward.used)
    if len(missed) == len(forwards):
        raise RuntimeError("its decoder layers are not called with the cache by its name")
    if missed:
        note(f"decoder layers {missed} are recorded as they are: they are not called with the cache by its name")


@contextmanager
def _no_backward_hooks(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block no module has backward hooks: a step has no gradients, and Dynamo does not trace modules with
    hooks for them (transformers 5.17 puts some on the norms of split attention)."""
    hooked = [m for layer in layers for m in layer.modules() if m._backward_hooks or m._backward_pre_hooks]
    kept = [(m, m._backward_hooks, m._backward_pre_hooks) for m in hooked]
    try:
        for module in hooked:
            module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks


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


def _run_layer(layer: nn.Module, view: LayerView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **{CACHE: view}, **kwargs)


def compile_options(rows: int, changes: tuple[str, ...] = ()) -> dict[str, Any]:
    """What Inductor is told for a step of ``rows`` rows; changes: those of graph_pass.py.

    With one row, matrix products become reductions that fuse with the norms before them (as in gpt-fast): on an
    H200 a layer of Qwen3-30B-A3B takes 63 us instead of 80. With more rows that changes nothing.
    """
    options: dict[str, Any] = {"joint_custom_post_pass": LayerPass(changes)} if changes else {}
    return {**options, "coordinate_descent_tuning": True} if rows == 1 else options


def compiled_layer(rows: int, changes: tuple[str, ...] = (), processes: OneProcess | None = None) -> LayerFunction:
    """The function that runs decoder layers of ``rows`` rows, compiled once per structure of layer."""
    function = own_code(_run_layer, "_".join(("decode_layer", str(rows), *changes)))
    options = compile_options(rows, changes)
    backend = processes.layer_backend(options) if processes is not None else None
    if backend is not None:
        return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def own_code(function: Any, name: str) -> LayerFunction:
    """A copy of a function: Dynamo keeps compilations, and counts them against its limit, by code object."""
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


class _Forward:
    """A decoder layer's forward for the time of recording; other threads' calls have caches of their own."""

    def __init__(
        self, run: LayerFunction, layer: nn.Module, cache: StepCache, index: int, teach: Callable[..., Any] | None
    ) -> None:
        self.layer = layer
        self._index, self._teach = index, teach
        self.used = False
        self._run, self._cache, self._view = run, cache, cache.views[index]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(CACHE) is not self._cache:
            return type(self.layer).forward(self.layer, *args, **kwargs)
        kwargs.pop(CACHE)
        self.used = True
        if self._teach is not None:
            return self._teach(self._index, args, kwargs, self._call)
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._run is _run_layer:
            return self._run(self.layer, self._view, args, kwargs)
        with in_compiled_code():
            return self._run(self.layer, self._view, args, kwargs)
