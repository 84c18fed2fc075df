"""Watch: what a forward shows to be a mixture of experts although its weights alone do not.

Contract: hooks are set by ``start`` and removed by ``stop``; the model is run by the caller. Nothing is matched by
name. Each kind needs evidence from the forward, so that ordinary models (stacks of layers, several heads, embeddings,
convolutions) show nothing:

- apart: a module whose children hold one 3-D weight [E, ., .] each (as convolutions do, too), of which two or more were
  called with rows and whole numbers, as many as there are experts or rows: which rows are whose;
- flattened: two or more matrices [E * N, K] of one module, of equal shape, that a forward viewed as [E, N, K];
- uneven: a module with 3-D weights of unequal first dimensions (some experts have no weights of their own), called with
  rows and as many (lists of) whole numbers;
- masked: a list of equal children that all got the same rows, where what two of them give counts for rows of their
  own, or that of some not at all: each is run for every token, and a mask chooses;
- retrieved: two or more tables [N, D] of equal shape, looked up by the same integers, which their owner computed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from ..calls import Call, describe
from ..weights import listed, same_parameters
from .weights_met import apart

_PLAIN = (nn.ModuleList, nn.ModuleDict)


@dataclass
class Sighting:
    """A module that a forward showed to look like a mixture of experts; ``refusal``: why it can be no site, or ""."""

    paths: tuple[str, ...]
    module: nn.Module
    calls: list[Call] = field(default_factory=list)
    refusal: str = ""


def is_plain(module: nn.Module) -> bool:
    """Whether a list has no forward of its own."""
    return isinstance(module, _PLAIN) and type(module).forward in [cls.forward for cls in _PLAIN]


def _lone(module: nn.Module, dims: int) -> nn.Parameter | None:
    """The one parameter a module has, if that has so many dimensions and nothing lies below the module."""
    own = [p for p in module._parameters.values() if p is not None]
    if len(own) != 1 or own[0].dim() != dims or not own[0].is_floating_point() or any(module.children()):
        return None
    return own[0]


class Watch:
    """All watchers of one model."""

    def __init__(self, model: nn.Module, known: set[int]) -> None:
        """``known``: ids of modules that are candidates already."""
        self.model = model
        paths: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(name)
        self.watchers: list[_Apart | _Flattened | _Uneven | _Masked | _Retrieved] = []
        parents = {id(c): m for m in model.modules() for c in m.children()}
        for module in model.modules():
            own = tuple(paths[id(module)])
            if module is model or id(module) in known:
                continue
            weights = [c for c in module.children() if _lone(c, 3) is not None]
            if len(weights) >= 2 and len({_lone(c, 3).shape[0] for c in weights}) == 1:  # type: ignore[union-attr]
                self.watchers.append(_Apart(own, module, weights))
            if _flat(module):
                self.watchers.append(_Flattened(paths, module, parents, model))
            elif _uneven(module):
                self.watchers.append(_Uneven(own, module))
            tables = _tables(module)
            if tables:
                self.watchers.append(_Retrieved(own, module, tables))
            for listed_module in [module, *module.children()]:
                if isinstance(listed_module, _PLAIN) and (listed_module is module) != is_plain(listed_module):
                    parts = listed_module._modules  # a list may hold parameters, too: those of a parametrization
                    children = [part for name in listed(listed_module) if (part := parts.get(name)) is not None]
                    if len(children) >= 2 and same_parameters(children) and _has_matrix(children[0]):
                        self.watchers.append(_Masked(own, module, children, listed_module))
        self.handles: list[Any] = []
        self.views: _Views | None = None

    def start(self) -> None:
        """Set the hooks."""
        flattened = [w for w in self.watchers if isinstance(w, _Flattened)]
        if flattened:
            self.views = _Views(flattened)
            self.views.__enter__()
        for watcher in self.watchers:
            self.handles += watcher.hooks()

    def stop(self) -> None:
        """Remove the hooks."""
        if self.views is not None:
            self.views.__exit__(None, None, None)
            self.views = None
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def recorded(self) -> list[_Apart | _Flattened | _Uneven]:
        """The watchers that keep calls."""
        return [w for w in self.watchers if isinstance(w, (_Apart, _Flattened, _Uneven))]

    def sorted_outside(self) -> list[tuple[tuple[str, ...], nn.Module]]:
        """Paths and modules that may be given rows in the experts' order: the router is around them."""
        return [(w.paths, w.owner) for w in self.watchers if isinstance(w, _Apart)]

    def expects(self) -> bool:
        """Whether some weights alone make experts likely: then a forward that fails is worth an error."""
        return any(isinstance(w, (_Flattened, _Uneven)) for w in self.watchers)

    def sightings(self) -> Iterator[Sighting]:
        """What the forwards since ``start`` showed."""
        for watcher in self.watchers:
            seen = watcher.sighting()
            if seen is not None:
                yield seen


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() == 2 for p in module.parameters())


def _tables(module: nn.Module) -> list[nn.Module]:
    """Children with one matrix each, at least two of which have the same shape."""
    lone = [c for c in module.children() if _lone(c, 2) is not None]
    shapes = [_lone(c, 2).shape for c in lone]  # type: ignore[union-attr]
    return [c for c, shape in zip(lone, shapes, strict=True) if shapes.count(shape) >= 2]


def _tensors(*values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]


class _Apart:
    def __init__(self, paths: tuple[str, ...], owner: nn.Module, children: list[nn.Module]) -> None:
        self.paths, self.owner, self.children = paths, owner, children
        self.calls: list[Call] = []
        self.routed: set[int] = set()

    def hooks(self) -> list[Any]:
        def owner_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls.append(describe(args, kwargs))

        def child_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            rows = next((t for t in _tensors(args, kwargs) if t.is_floating_point()), None)
            weight = _lone(module, 3)
            if rows is None or weight is None:
                return
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            numbers = [v for v in leaves if isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool)]
            tensors = [t for t in leaves if isinstance(t, Tensor) and not t.is_floating_point()]
            sizes = (weight.shape[0], weight.shape[0] + 1, rows.shape[0])
            if len(numbers) in sizes[:2] or any(t.dim() == 1 and t.shape[0] in sizes for t in tensors):
                self.routed.add(id(module))

        handles = [self.owner.register_forward_pre_hook(owner_hook, with_kwargs=True)]
        return handles + [c.register_forward_pre_hook(child_hook, with_kwargs=True) for c in self.children]

    def sighting(self) -> Sighting | None:
        if len(self.routed) < 2:
            return None
        if self.calls:
            return Sighting(self.paths, self.owner, self.calls)
        names = [n for n, c in self.owner.named_children() if id(c) in self.routed]
        return Sighting(
            self.paths,
            self.owner,
            refusal=f"its grouped projections {', '.join(names)} are called one at a time while its own forward never "
            "is: something else (attention) lies between them, and a site is one call of one module",
        )


def _is_stack(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() == 3 and parameter.is_floating_point() and parameter.shape[0] >= 2


def _uneven(module: nn.Module) -> bool:
    """Whether a module owns two or more 3-D weights, all of different first dimensions."""
    firsts = [p.shape[0] for p in module._parameters.values() if p is not None and _is_stack(p)]
    return len(firsts) >= 2 and len(set(firsts)) == len(firsts)


def _flat(module: nn.Module) -> list[nn.Parameter]:
    """A module's own matrices of which another has the same shape."""
    own = [p for p in module._parameters.values() if p is not None and p.dim() == 2 and p.is_floating_point()]
    shapes = [p.shape for p in own]
    return [p for p in own if shapes.count(p.shape) >= 2]


class _Flattened:
    """The site is the module whose forward takes the views, which may lie around the one that owns the weights."""

    def __init__(
        self, paths: dict[int, list[str]], owner: nn.Module, parents: dict[int, nn.Module], model: nn.Module
    ) -> None:
        self.all_paths, self.weights = paths, {id(p) for p in _flat(owner)}
        self.around = [owner]
        while (parent := parents.get(id(self.around[-1]))) is not None and parent is not model:
            self.around.append(parent)
        self.active: list[tuple[nn.Module, Call, dict[int, int]]] = []
        self.calls: list[Call] = []
        self.module: nn.Module | None = None

    def hooks(self) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.active.append((module, describe(args, kwargs), {}))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            _, call, viewed = self.active.pop()
            experts = list(viewed.values())
            if any(experts.count(e) >= 2 for e in experts) and self.module in (None, module):
                self.module = module
                self.calls.append(call)

        handles = []
        for module in self.around:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        return handles

    def viewed(self, matrix: Tensor, result: Tensor) -> None:
        """A forward viewed ``matrix`` as ``result``."""
        if id(matrix) in self.weights and self.active and result.dim() == 3 and result.shape[0] >= 2:
            if result.shape[0] * result.shape[1] == matrix.shape[0] and result.shape[2] == matrix.shape[1]:
                self.active[-1][2][id(matrix)] = int(result.shape[0])

    def sighting(self) -> Sighting | None:
        self.active = []  # of a forward that failed
        if self.module is None:
            return None
        return Sighting(tuple(self.all_paths[id(self.module)]), self.module, self.calls)


class _Views(TorchFunctionMode):
    """Tells watchers which matrices a forward views as stacks."""

    def __init__(self, watchers: list[_Flattened]) -> None:
        super().__init__()
        self.watchers = watchers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _VIEWS and isinstance(args[0], Tensor) and args[0].dim() == 2 and isinstance(result, Tensor):
            for watcher in self.watchers:
                watcher.viewed(args[0], result)
        return result


_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten)


class _Uneven:
    def __init__(self, paths: tuple[str, ...], module: nn.Module) -> None:
        self.paths, self.module = paths, module
        self.calls: list[Call] = []
        self.routed = False

    def hooks(self) -> list[Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls.append(describe(args, kwargs))
            rows = [t.shape[0] for t in _tensors(args, kwargs) if t.is_floating_point() and t.dim() == 2]
            ids = [t for t in _tensors(args, kwargs) if t.dtype in (torch.int64, torch.int32) and t.dim() in (1, 2)]
            self.routed |= any(t.shape[0] in rows for t in ids)

        return [self.module.register_forward_pre_hook(hook, with_kwargs=True)]

    def sighting(self) -> Sighting | None:
        return Sighting(self.paths, self.module, self.calls) if self.routed else None


class _Retrieved:
    def __init__(self, paths: tuple[str, ...], owner: nn.Module, tables: list[nn.Module]) -> None:
        self.paths, self.owner, self.tables = paths, owner, tables
        self.given: list[Tensor] = []
        self.looked_up: dict[int, Tensor] = {}
        self.found: tuple[str, ...] = ()

    def hooks(self) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.given = [t for t in _tensors(args, kwargs) if not t.is_floating_point() and t.dtype != torch.bool]
            self.looked_up = {}

        def look_up(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = _tensors(args, kwargs)
            if len(tensors) == 1 and tensors[0].dtype in (torch.int64, torch.int32):
                self.looked_up[id(module)] = tensors[0]

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            by_ids: dict[int, list[nn.Module]] = {}
            for table in self.tables:
                if id(table) in self.looked_up:
                    by_ids.setdefault(id(self.looked_up[id(table)]), []).append(table)
            for tables in by_ids.values():
                if len(tables) >= 2 and not self.given:
                    self.found = tuple(n for n, c in self.owner.named_children() if c in tables)
            self.looked_up = {}

        handles = [
            self.owner.register_forward_pre_hook(enter, with_kwargs=True),
            self.owner.register_forward_hook(leave, with_kwargs=True),
        ]
        return handles + [t.register_forward_pre_hook(look_up, with_kwargs=True) for t in self.tables]

    def sighting(self) -> Sighting | None:
        if not self.found:
            return None
        shape = list(next(self.owner.get_submodule(self.found[0]).parameters()).shape)
        return Sighting(
            self.paths,
            self.owner,
            refusal=f"its experts are single rows of {', '.join(self.found)} {shape}, looked up by computed indices: "
            "an expert has no weight matrix, so there is no product of rows with an expert's matrix to quantize",
        )


class _Masked:
    def __init__(
        self, paths: tuple[str, ...], owner: nn.Module, children: list[nn.Module], listed_module: nn.Module
    ) -> None:
        self.paths, self.owner, self.children, self.list = paths, owner, children, listed_module
        self.got: dict[int, Tensor] = {}
        self.replaying = False
        self.masked = False

    def hooks(self) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.replaying:
                self.got = {}

        def child(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = _tensors(args, kwargs)
            if tensors and not self.replaying:
                self.got[id(module)] = tensors[0]

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.replaying or self.masked:
                return
            got, self.got = self.got, {}
            first = got.get(id(self.children[0]))
            if first is None or isinstance(first, FakeTensor) or len(got) != len(self.children):
                return
            if all(t is first for t in got.values()):
                self.replaying = True
                try:
                    self.masked = self._chooses(args, kwargs, output)
                finally:
                    self.replaying = False

        handles = [
            self.owner.register_forward_pre_hook(enter, with_kwargs=True),
            self.owner.register_forward_hook(leave, with_kwargs=True),
        ]
        return handles + [c.register_forward_pre_hook(child, with_kwargs=True) for c in self.children]

    def _chooses(self, args: Any, kwargs: Any, output: Any) -> bool:
        """Whether two children's outputs count for rows of their own, or (a list that is a module) some for none."""
        outputs = [t for t in _tensors(output) if t.is_floating_point() and t.dim() >= 2]
        if len(outputs) != 1:
            return False

        def rerun() -> Tensor:
            again = [t for t in _tensors(self.owner(*args, **kwargs)) if t.is_floating_point() and t.dim() >= 2]
            return again[0]

        if not torch.equal(rerun(), outputs[0]):
            return False  # it draws random numbers or keeps a state
        counts = []
        for one in self.children:
            changed = torch.zeros_like(outputs[0][..., 0], dtype=torch.bool)
            for draw in range(3):  # one change may be lost where a softmax is saturated
                handle = one.register_forward_hook(functools.partial(_changed, draw))
                try:
                    changed |= (rerun() != outputs[0]).any(-1)
                finally:
                    handle.remove()
            counts.append(changed)
        some = any(apart(a, b) for a, b in itertools.combinations(counts, 2))
        whole = {bool(c.any()) for c in counts} == {True, False}
        return some or (whole and self.list is self.owner)

    def sighting(self) -> Sighting | None:
        if not self.masked:
            return None
        matrices = sum(p.dim() == 2 for p in self.children[0].parameters())
        missing = "a child is one matrix, not an up- and a down-projection, and " if matrices == 1 else ""
        return Sighting(
            self.paths,
            self.owner,
            refusal=f"each of its {len(self.children)} equal children runs on every token and a mask chooses "
            f"afterwards: {missing}no index says which rows are whose",
        )


def _changed(draw: int, module: nn.Module, args: Any, output: Any) -> Any:
    """Another output of the same size, a different one for each ``draw``."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(draw))
    scale = output.detach().float().std().item() or 1.0
    return output + (values * scale).to(output.dtype).to(output.device)


def subset_of_rows(owner_inputs: list[Tensor], children: list[Tensor]) -> bool:
    """Whether every child got rows of its owner's input, not all of them the same rows in the same order."""
    width = children[0].shape[-1]
    given = [t for t in owner_inputs if t.is_floating_point() and t.dim() >= 2 and t.shape[-1] == width]
    if any(isinstance(t, FakeTensor) for t in (*owner_inputs, *children)) or not given:
        return False
    direction = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def keys(t: Tensor) -> Tensor:
        return (t.reshape(-1, width).double().cpu() * direction).sum(-1)

    known = torch.cat([keys(t) for t in given])
    found = [keys(t) for t in children]
    if not all(bool(torch.isin(k, known).all()) for k in found):
        return False
    return any(k.shape != found[0].shape or not torch.equal(k, found[0]) for k in found[1:])


__all__ = ["Sighting", "Watch", "is_plain", "subset_of_rows"]
