"""Watch the weights: which parameters a forward multiplies with rows that the data chose, whoever owns them.

Contract: the model is run by the caller, twice, on real values; nothing of it is changed, but a module that may hold
experts is run again within the second forward, with other values in the place of some of its weights.

1. The first forward is watched op by op: which parameters were multiplied (``_Family``: parts of lists and dicts, of
   numbered names, of packed or flattened weights), inside which module's call, after a choice made of floats (a
   top-k, an argmax, a comparison) within that call or handed to it, and whether one part's rows came of another's
   products, as those of layers do.
2. In the second forward each module so found is run again with one part's weights changed, then another's. Parts are
   experts if each changes rows that the other does not: heads, projections and pruned layers change the same rows, or
   one all that the other changes. That the rows follow the data and not their places is shown by a run on turned rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ...processes import is_spread
from ..calls import Call, describe
from ..weights import LISTS, listed, numbered

# The first operands of these hand on a weight, or a part of it.
_PARTS = frozenset(
    "t transpose view reshape _unsafe_view select slice unbind split split_with_sizes index index_select clone "
    "_to_copy detach permute unsqueeze squeeze expand alias contiguous narrow as_strided cat stack".split()
)
_PRODUCTS = frozenset("mm addmm bmm baddbmm mv addmv _grouped_mm _scaled_mm dot".split())
_MOST_MEMBERS = 12


@dataclass
class _Family:
    """Weights that may be one for each expert. ``members``: each one's parameters; ``packed``: one that has all."""

    members: list[list[nn.Parameter]]
    packed: bool = False
    flat: int = 0  # so many experts in a matrix, as a forward views it
    parallel: dict[int, set[int]] = field(default_factory=dict)  # call -> members whose rows are of no other's products
    all: dict[int, set[int]] = field(default_factory=dict)  # call -> members that were multiplied


@dataclass
class _Site:
    """A module that may compute with experts' weights, and what the tries showed."""

    module: nn.Module
    families: list[_Family]
    given: bool  # it was handed a choice
    known: bool = False  # its weights are a candidate's already
    tried: bool = False
    found: bool = False


class WeightWatch:
    """Both steps for one model; ``covered``: ids of parameters that are some candidate's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Modules run again would run their collectives again, on some ranks more often than on others.
        self.real = not is_spread(model) and not any(
            isinstance(p, FakeTensor) or p.device.type == "meta" for p in model.parameters()
        )
        self.families: list[_Family] = []
        self.of: dict[int, list[tuple[int, int]]] = {}  # parameter -> families and members
        self.of_list: dict[int, int] = {}
        self.calls: dict[int, list[Call]] = {}
        self.chosen: set[int] = set()  # calls with a choice of floats inside
        self.handed: set[int] = set()  # calls that were handed one
        self.sites: list[_Site] = []
        self.stack: list[tuple[int, nn.Module]] = []
        self.module_of: dict[int, nn.Module] = {}
        self.depth: dict[int, int] = {}
        self.trying = False
        if self.real:
            self._find_families()

    def _find_families(self) -> None:
        for module in self.model.modules():
            kinds = [[f"{stem}{n}" for n in numbers] for stem, numbers in numbered(module).items()]
            for keys in [listed(module)] if isinstance(module, LISTS) else kinds:
                members = [below for key in keys if (below := _below(module, key))]
                if len(members) >= 2:
                    if isinstance(module, LISTS):
                        self.of_list[id(module)] = len(self.families)
                    self._add(_Family(members))
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point() and parameter.dim() >= 2:
                    if parameter.dim() >= 3 and max(parameter.shape[:-2]) >= 2:
                        self._add(_Family([[parameter]], packed=True))
                    elif parameter.dim() == 2:
                        self._add(_Family([[parameter]], packed=True, flat=-1))

    def _add(self, family: _Family) -> None:
        for member, parameters in enumerate(family.members):
            for parameter in parameters:
                self.of.setdefault(id(parameter), []).append((len(self.families), member))
        self.families.append(family)

    # 1. the first forward

    @contextmanager
    def watched(self, run: int) -> Iterator[None]:
        """Around one forward: the first is watched, in the second what it showed is tried."""
        if not self.real:
            yield
            return
        self.stack, self.module_of, self.depth = [], {}, {}
        handles = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        sites = {id(s.module): s for s in self.sites}
        for site in sites.values():
            handles.append(site.module.register_forward_hook(self._try(site), with_kwargs=True))
        try:
            if run == 0:
                self.mode = _Ops(self)
                with self.mode:
                    yield
            else:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.stack = []

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self.trying:
            return
        call = len(self.module_of)
        self.stack.append((call, module))
        self.module_of[call], self.depth[call] = module, len(self.stack)
        mode = getattr(self, "mode", None)
        if mode is not None and any(mode.choice.get(a) for a in pytree.tree_leaves(args) if isinstance(a, Tensor)):
            self.handed.add(call)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.trying and self.stack:
            self.stack.pop()

    def entered(self, module: nn.Module, call: Call, run: int) -> None:
        """A module was called so in forward number ``run``; the first call of each forward is kept."""
        calls = self.calls.setdefault(id(module), [])
        if len(calls) == run and not self.trying:
            calls.append(call)

    def recorders(self, run: Callable[[], int]) -> list[Any]:
        """Hooks that keep calls of every module that may hold a family, with keywords."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.entered(module, describe(args, kwargs), run())

        if not self.real:
            return []
        return [
            m.register_forward_pre_hook(hook, with_kwargs=True) for m in self.model.modules() if m is not self.model
        ]

    def choose_sites(self, covered: set[int]) -> None:
        """After the first forward: the modules in which parts are multiplied beside each other after a choice."""
        self.mode = None  # type: ignore[assignment]
        found: dict[int, _Site] = {}
        for family in self.families:
            known = any(id(p) in covered for member in family.members for p in member)
            if family.packed and family.flat < 0:
                continue  # a matrix that nothing views as several
            least = 1 if family.packed else 2
            calls = [c for c, members in family.parallel.items() if len(members) >= least]
            calls = [c for c in calls if c in self.chosen or c in self.handed]
            if not calls or (known and (not family.packed or any(c in self.handed for c in calls))):
                continue
            call = max(calls, key=lambda c: self.depth[c])
            module = self.module_of[call]
            site = found.setdefault(id(module), _Site(module, [], call in self.handed, known))
            site.families.append(family)
            site.known &= known
        self.sites = list(found.values())

    def sequential(self, listed_module: nn.Module) -> bool:
        """Whether a list's parts work on each other's results, as layers do and experts do not."""
        number = self.of_list.get(id(listed_module))
        if number is None:
            return False
        family = self.families[number]
        several = [call for call, members in family.all.items() if len(members) >= 2]
        return bool(several) and all(len(family.parallel.get(call, ())) < 2 for call in several)

    # 2. the second forward

    def _try(self, site: _Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.trying or site.found:
                return
            self.trying = True
            try:
                with torch.no_grad():
                    site.tried = True
                    site.found = any(_Try(site, family, args, kwargs).run(output) for family in site.families)
            except Exception:
                site.tried = site.found = False  # it does not run twice: no word on what it is
            finally:
                self.trying = False

        return hook

    def unrouted(self, module: nn.Module) -> bool:
        """Whether a module was tried, and no part of its weights has rows of its own."""
        return any(s.module is module and s.tried and not s.found for s in self.sites)

    def found(self) -> Iterator[tuple[nn.Module, list[Call], set[int]]]:
        """The modules whose parts turned out to be experts, how each was called, and the ids of the parameters."""
        for site in self.sites:
            if site.found and not site.known:
                weights = {id(p) for family in site.families for member in family.members for p in member}
                yield site.module, self.calls.get(id(site.module), []), weights


def _below(module: nn.Module, key: str) -> list[nn.Parameter]:
    child = module._modules.get(key)
    own = list(child.parameters()) if child is not None else [module._parameters[key]]
    return [p for p in own if p is not None and p.dim() >= 2 and p.is_floating_point()]


class _Ops(TorchDispatchMode):
    """Follows weights to their products, products to later products, and choices made of floats."""

    def __init__(self, watch: WeightWatch) -> None:
        super().__init__()
        self.watch = watch
        self.weights: Any = WeakTensorKeyDictionary()  # tensor -> parameters it is (a part of)
        self.after: Any = WeakTensorKeyDictionary()  # tensor -> bits of the members whose products it depends on
        self.choice: Any = WeakTensorKeyDictionary()  # integers and masks made of floats
        self.bits: dict[tuple[int, int], int] = {}
        self.of_family: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        plain = name.rstrip("_") if not name.startswith("__") else name
        given = [a for a in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(a, Tensor)]
        made = [r for r in pytree.tree_leaves(result) if isinstance(r, Tensor)]
        after = 0
        for tensor in given:
            after |= self.after.get(tensor, 0)
        if plain in _PRODUCTS:
            after |= self._product(given)
        elif plain in _PARTS:
            parameters = frozenset().union(*(self._of(t) for t in (given if plain in ("cat", "stack") else given[:1])))
            if parameters:
                for tensor in made:
                    self.weights[tensor] = parameters
                self._viewed(plain, args, parameters, made)
        chosen = any(self.choice.get(t) for t in given) or any(t.is_floating_point() for t in given)
        for tensor in made:
            if after:
                self.after[tensor] = after
            if chosen and not tensor.is_floating_point():
                self.choice[tensor] = True
                self.watch.chosen.update(call for call, _ in self.watch.stack)
        if func._schema.is_mutable and after and given:
            self.after[given[0]] = after
        return result

    def _of(self, tensor: Tensor) -> frozenset[Any]:
        if isinstance(tensor, nn.Parameter) or id(tensor) in self.watch.of:
            return frozenset({id(tensor)}) if id(tensor) in self.watch.of else frozenset()
        return self.weights.get(tensor, frozenset())  # type: ignore[no-any-return]

    def _viewed(self, name: str, args: Any, parameters: frozenset[Any], made: list[Tensor]) -> None:
        """A matrix that is taken apart into blocks of rows, or viewed as a stack, may hold experts."""
        source = args[0]
        if not isinstance(source, Tensor) or source.dim() != 2 or len(parameters) != 1:
            return
        parts = 0
        if name in ("view", "reshape", "_unsafe_view") and made[0].dim() == 3 and made[0].shape[2] == source.shape[1]:
            parts = int(made[0].shape[0])
        elif name in ("split", "split_with_sizes") and (args[2] if len(args) > 2 else 0) == 0:
            parts = len(made)
        elif name == "slice" and (args[1] if len(args) > 1 else 0) == 0 and 0 < made[0].shape[0] < source.shape[0]:
            parts = source.shape[0] // made[0].shape[0]
        if parts >= 2 and source.shape[0] % parts == 0:
            for number, _ in self.watch.of[next(iter(parameters))]:
                if self.watch.families[number].flat:
                    self.watch.families[number].flat = parts

    def _product(self, given: list[Tensor]) -> int:
        """Note a product of some member's weights with rows; the bits of the members it is of."""
        found = [(t, self._of(t)) for t in given]
        rows = [t for t, parameters in found if not parameters]
        before, own = 0, 0
        for tensor in rows:
            before |= self.after.get(tensor, 0)
        calls = [call for call, _ in self.watch.stack]
        for _, parameters in found:
            for parameter in parameters:
                for number, member in self.watch.of[parameter]:
                    family = self.watch.families[number]
                    bit = self.bits.setdefault((number, member), 1 << len(self.bits))
                    own |= bit
                    others = self.of_family.get(number, 0) & ~bit
                    self.of_family[number] = self.of_family.get(number, 0) | bit
                    for call in calls:
                        family.all.setdefault(call, set()).add(member)
                        if not before & others:
                            family.parallel.setdefault(call, set()).add(member)
        return own


class _Try:
    """One module, run again with the weights of one of a family's parts changed."""

    def __init__(self, site: _Site, family: _Family, args: Any, kwargs: Any) -> None:
        self.site, self.family, self.args, self.kwargs = site, family, args, kwargs
        self.names = {id(p): n for n, p in site.module.named_parameters()}
        self.generator = torch.Generator().manual_seed(0)

    def run(self, output: Any) -> bool:
        """Whether two parts change different rows, and which ones follows the data."""
        before = _rows(output)
        again = self._rerun({})
        if before is None or again is None or not torch.equal(before, again):
            return False  # random numbers, or a state
        for parts in self._parts():
            changed: list[tuple[Tensor, Callable[[], dict[str, Tensor]]]] = []
            for part in parts:
                one = self._changed(before, part)
                if one is None or not bool(one.any()):
                    continue
                if any(apart(one, other) and self._follow(before, part, earlier) for other, earlier in changed):
                    return True
                changed.append((one, part))
        return False

    def _follow(self, before: Tensor, *parts: Callable[[], dict[str, Tensor]]) -> bool:
        """Whether two parts change different rows whatever their values become, and which ones follows the data."""
        found = [self._changed(before, part, draws=3) for part in parts]
        if found[0] is None or found[1] is None or not apart(found[0], found[1]):
            return False
        if self.site.given:
            return True
        turned = self._rerun({}, turn=True)
        moved = [None if turned is None else self._changed(turned, part, turn=True, draws=3) for part in parts]
        return any(m is not None and f is not None and not torch.equal(m, f) for m, f in zip(moved, found, strict=True))

    def _parts(self) -> Iterator[list[Callable[[], dict[str, Tensor]]]]:
        """What gives other values for the weights of each part, in each way that the family may be made of parts."""
        if not self.family.packed:
            step = max(1, len(self.family.members) // _MOST_MEMBERS)
            yield [partial(self._others, member) for member in self.family.members[::step]]
            return
        (parameter,) = self.family.members[0]
        shape = tuple(parameter.shape)
        if self.family.flat > 0:
            shape = (self.family.flat, shape[0] // self.family.flat, shape[1])
        for dim in range(len(shape) - 2):
            if shape[dim] > 1:
                step = max(1, shape[dim] // _MOST_MEMBERS)
                yield [partial(self._sliced, parameter, shape, dim, i) for i in range(0, shape[dim], step)]

    def _others(self, member: list[nn.Parameter]) -> dict[str, Tensor]:
        return {self.names[id(p)]: self._other(p) for p in member if id(p) in self.names}

    def _sliced(self, parameter: nn.Parameter, shape: tuple[int, ...], dim: int, index: int) -> dict[str, Tensor]:
        other = parameter.detach().clone().view(shape)
        part = other.select(dim, index)
        part.copy_(self._other(part))
        return {self.names[id(parameter)]: other.view(parameter.shape)}

    def _other(self, weight: Tensor) -> Tensor:
        values = torch.randn(weight.shape, generator=self.generator) * float(weight.detach().float().std())
        return (values + weight.detach().float().cpu()).to(weight.dtype).to(weight.device)

    def _changed(
        self, before: Tensor, part: Callable[[], dict[str, Tensor]], turn: bool = False, draws: int = 1
    ) -> Tensor | None:
        """The rows that some of so many other values for a part change."""
        changed: Tensor | None = None
        for _ in range(draws):
            after = self._rerun(part(), turn)
            if after is None or after.shape != before.shape:
                return None
            now = (after != before).any(-1).flatten()
            changed = now if changed is None else changed | now
        return changed

    def _rerun(self, values: dict[str, Tensor], turn: bool = False) -> Tensor | None:
        args, kwargs = self.args, self.kwargs
        if turn:
            args, kwargs = pytree.tree_map(_turned, (args, kwargs))
        return _rows(torch.func.functional_call(self.site.module, values, args, kwargs))


def apart(one: Tensor, other: Tensor) -> bool:
    """Whether each has rows that the other has not."""
    return bool((one & ~other).any()) and bool((other & ~one).any())


def _turned(value: Any) -> Any:
    """Rows in the opposite order."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
        return value.flip(-2) if value.shape[-2] > 1 else value.flip(0)
    return value


def _rows(output: Any) -> Tensor | None:
    """The rows that a module gives."""
    found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2]
    return found[0] if found and not isinstance(found[0], FakeTensor) else None


__all__ = ["WeightWatch", "apart"]
