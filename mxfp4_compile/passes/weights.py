"""Where a projection's weights lie in the original module: one packed parameter, or one parameter per expert.

``WeightPath`` says it; graphs, specs and reports hold its string form:

- "w1": an ordinary packed parameter [E, ., .];
- "experts.*.up_proj.weight", "gates.*.weight", "ups.*": one parameter per expert, under the children or parameters of a
  list or dict, in its order;
- "expert_*.up.weight", "w1_*": one parameter per expert, under names that end in its number;
- "w1#8": a 2-D parameter [8 * n, k] read as [8, n, k];
- "w1@8": the first 8 experts of a packed parameter [10, ., .] whose others no forward multiplies.

``Stack`` reads all of them a few experts at a time, so that experts which lie apart never exist as a second copy.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..spec import MoESpec, Role, SplitSpec, WeightSource

LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""What holds one thing per expert."""

_NUMBERED = re.compile(r"(.*\D)(\d+)")


@dataclass(frozen=True)
class WeightPath:
    """The parsed form. ``name``: a parameter's, with one "*" where each expert has its own.

    ``flat``: so many experts lie one after the other in one matrix; ``first``: so many of a packed parameter's count.
    """

    name: str
    flat: int | None = None
    first: int | None = None

    @classmethod
    def parse(cls, text: str) -> WeightPath:
        """The path that ``str`` made ``text`` of."""
        for mark, field in (("#", "flat"), ("@", "first")):
            name, found, number = text.partition(mark)
            if found:
                return cls(name, **{field: int(number)})
        return cls(text)

    def __str__(self) -> str:
        return f"{self.name}#{self.flat}" if self.flat else f"{self.name}@{self.first}" if self.first else self.name

    @property
    def apart(self) -> bool:
        """Whether each expert has a parameter of its own."""
        return "*" in self.name

    @property
    def packed(self) -> bool:
        """Whether it is one packed parameter, all of it."""
        return not (self.apart or self.flat or self.first)

    def parts(self, module: nn.Module) -> tuple[str, list[str], str]:
        """Of experts that lie apart: what holds them, their names there, and the rest of the path."""
        before, _, after = self.name.partition("*")
        prefix, _, stem = before.rpartition(".")
        owner = module.get_submodule(prefix)
        keys = [f"{stem}{n}" for n in numbered(owner).get(stem, ())] if stem else listed(owner)
        return prefix, keys, after

    def members(self, module: nn.Module, count: int | None = None) -> tuple[str, ...]:
        """The names of the real parameters, in the experts' order; with ``count``, of so many experts."""
        if not self.apart:
            return (self.name,)
        prefix, keys, after = self.parts(module)
        head = f"{prefix}." if prefix else ""
        return tuple(f"{head}{key}{after}" for key in itertools.islice(keys, count))

    def stacked(self, values: list[Tensor], experts: int) -> Tensor:
        """The values of all members as [E, ...]."""
        if self.flat:
            return values[0].reshape(experts, -1, *values[0].shape[1:])
        if self.first:
            return values[0][:experts]
        return torch.stack(values) if self.apart else values[0]


def listed(owner: nn.Module, count: int | None = None) -> list[str]:
    """The names of a list's or dict's experts, in order: its children with parameters (no dropout), its parameters.

    With ``count``, the first so many.
    """
    children = owner._modules.items()
    named = [name for name, child in children if child is not None and any(True for _ in child.parameters())]
    own = [name for name, parameter in owner._parameters.items() if parameter is not None]
    return (named or own)[:count]


def numbered(owner: nn.Module) -> dict[str, list[int]]:
    """Stems of names that end in numbers, as expert_0, expert_1, ..., and the numbers, none left out."""
    found: dict[str, list[int]] = {}
    for name, part in (*owner._modules.items(), *owner._parameters.items()):
        match = _NUMBERED.fullmatch(name)
        if match is not None and part is not None and str(int(match[2])) == match[2]:
            found.setdefault(match[1], []).append(int(match[2]))
    for numbers in found.values():
        numbers.sort()
    return {stem: n for stem, n in found.items() if len(n) >= 2 and n == list(range(n[0], n[0] + len(n)))}


def families(module: nn.Module) -> dict[str, tuple[str, int]]:
    """Parameters that may be an expert's own: name -> (path with "*", the expert), by the outermost equal parts.

    Parts are equal if they have parameters of the same names and shapes: children or parameters of a list or dict,
    or of names that end in a number.
    """
    found: dict[str, tuple[str, int]] = {}
    for prefix, owner in module.named_modules():
        head = f"{prefix}." if prefix else ""
        kinds = {stem: [f"{stem}{n}" for n in numbers] for stem, numbers in numbered(owner).items()}
        if isinstance(owner, LISTS):
            kinds = {"": listed(owner)}
        for stem, keys in kinds.items():
            inside = [_inside(owner, key) for key in keys]
            if len(keys) < 2 or not inside[0] or any(parts != inside[0] for parts in inside):
                continue
            for expert, key in enumerate(keys):
                for rest, _ in inside[0]:
                    found.setdefault(f"{head}{key}{rest}", (f"{head}{stem}*{rest}", expert))
    return found


def _inside(owner: nn.Module, key: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names, from ``key`` on, and shapes of the parameters at or below it."""
    child = owner._modules.get(key)
    if child is not None:
        return [(f".{n}", tuple(p.shape)) for n, p in child.named_parameters()]
    parameter = owner._parameters[key]
    assert parameter is not None
    return [("", tuple(parameter.shape))]


def equal_children(module: nn.Module) -> bool:
    """Whether a list has two or more children with equal parameters, two or more of them matrices."""
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if len(children) < 2 or sum(p.dim() == 2 for p in children[0].parameters()) < 2:
        return False
    return same_parameters(children)


def same_parameters(children: list[nn.Module]) -> bool:
    """Whether all have parameters of the same names and shapes."""

    def shape(child: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
        return [(n, tuple(p.shape)) for n, p in child.named_parameters()]

    return all(shape(child) == shape(children[0]) for child in children[1:])


def is_packed(name: str) -> bool:
    """Whether a name stands for one packed parameter, all of it."""
    return WeightPath.parse(name).packed


def is_apart(name: str) -> bool:
    """Whether a name stands for one parameter per expert."""
    return WeightPath.parse(name).apart


def members(module: nn.Module, name: str, count: int | None = None) -> tuple[str, ...]:
    """The names of the real parameters behind ``name``, in the experts' order; with ``count``, of so many experts."""
    return WeightPath.parse(name).members(module, count)


@dataclass(frozen=True)
class Stack:
    """A stack [E, ...] of weights; slices are made when they are asked for."""

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype all parts have."""
        return self.parts[0].dtype

    def numel(self) -> int:
        """The number of elements of all experts."""
        return sum(p.numel() for p in self.parts)

    def element_size(self) -> int:
        """Bytes of one element."""
        return self.parts[0].element_size()

    def __getitem__(self, experts: slice) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0].reshape(self.shape)[experts]
        return torch.stack(self.parts[experts])

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts) if len(self.parts) > 1 else iter(self.parts[0].reshape(self.shape))


def stack(module: nn.Module, name: str, count: int | None = None) -> Stack:
    """The weights behind ``name``, without gradients; nothing is copied.

    With ``count``, of the first so many experts where each has parameters of its own.
    """
    path = WeightPath.parse(name)
    parts = tuple(module.get_parameter(n).detach() for n in path.members(module, count))
    if path.first:
        parts = (parts[0][: path.first],)
    shape = tuple(parts[0].shape)
    if path.flat:
        shape = (path.flat, shape[0] // path.flat, *shape[1:])
    elif path.apart:
        shape = (len(parts), *shape)
    return Stack(parts, shape)


def sizes(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape [n, k] that each expert's weights behind ``name`` have; [n] of a bias."""
    return stack(module, name, 1).shape[1:]


def unstack(module: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """The inverse: a stacked value [e, ...] as the real parameters' values (of the first e experts).

    Experts that no forward multiplies come out as zeros.
    """
    path = WeightPath.parse(name)
    if path.apart:
        return dict(zip(path.members(module, len(value)), value, strict=True))
    if path.flat:
        value = value.flatten(0, 1)
    if path.first and value.shape[0] == path.first:
        others = module.get_parameter(path.name).shape[0] - path.first
        value = torch.cat([value, value.new_zeros(others, *value.shape[1:])])
    return {path.name: value}


def restacked(module: nn.Module, name: str, values: dict[str, Tensor], suffix: str, experts: int) -> Tensor:
    """The values given for the members of ``name``, under their names and ``suffix``, as [E, ...]."""
    path = WeightPath.parse(name)
    return path.stacked([values[member + suffix] for member in path.members(module)], experts)


@dataclass(frozen=True)
class Projection:
    """One packed weight of a site: where it comes from and the shape [E, N, K] it has in canonical form."""

    slot: str
    source: WeightSource
    shape: tuple[int, int, int]
    role: Role | None

    def rows(self, original: nn.Module) -> list[int]:
        """N of each source parameter, in order."""
        dim = 1 if self.source.transposed else 0
        return [sizes(original, name)[dim] for name in self.source.parameters]


def projections_of(spec: MoESpec | SplitSpec) -> tuple[Projection, ...]:
    """The projections of a spec, in the order in which the rewritten graph takes them."""
    if isinstance(spec, MoESpec):
        return (
            Projection("up", spec.up, spec.params.shape("up"), "up"),
            Projection("down", spec.down, spec.params.shape("down"), "down"),
        )
    return tuple(Projection(f"linear{i}", s.source, s.shape, None) for i, s in enumerate(spec.linears))


def source_names(projections: Sequence[Projection]) -> tuple[str, ...]:
    """Names of all parameters that prepared weights and biases stand for, without repeats."""
    return tuple(dict.fromkeys(n for p in projections for n in (*p.source.parameters, *p.source.bias)))


__all__ = [
    "LISTS",
    "Projection",
    "Stack",
    "WeightPath",
    "equal_children",
    "families",
    "is_apart",
    "is_packed",
    "listed",
    "members",
    "numbered",
    "projections_of",
    "restacked",
    "same_parameters",
    "sizes",
    "source_names",
    "stack",
    "unstack",
]
