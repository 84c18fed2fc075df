"""Where a projection's weights lie in the original module: one packed parameter, or one parameter per expert.

A name with a ``*`` component ("experts.*.up_proj.weight") stands for the parameters of all children of that
list or dict, in its order: expert e is child e. "w1#8" is a 2-D parameter [8 * n, k] read as [8, n, k]. "w1@8" are
the first 8 experts of a packed parameter [10, ., .] whose others no forward multiplies. Every
other name is an ordinary packed parameter [E, ., .]. ``Stack`` reads all of them a few experts at a time, so
that experts which lie apart never exist as a second copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..spec import MoESpec, Role, SplitSpec, WeightSource


def listed(owner: nn.Module, count: int | None = None) -> list[str]:
    """The names of a list's or dict's experts, in order: its children with parameters (no dropout and the like).

    With ``count``, the first so many.
    """
    children = owner._modules.items()
    named = (name for name, child in children if child is not None and any(True for _ in child.parameters()))
    return list(itertools.islice(named, count))


def equal_children(module: nn.Module) -> bool:
    """Whether a list has two or more children with equal parameters, two or more of them matrices."""
    children = [module.get_submodule(name) for name in listed(module)]
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
    return not set("*#@") & set(name)


def members(module: nn.Module, name: str, count: int | None = None) -> tuple[str, ...]:
    """The names of the real parameters behind ``name``, in the experts' order; with ``count``, of so many experts."""
    if "#" in name or "@" in name:
        return (name.replace("@", "#").partition("#")[0],)
    if "*" not in name.split("."):
        return (name,)
    parts = name.split(".")
    star = parts.index("*")
    prefix, rest = parts[:star], parts[star + 1 :]
    owner = module.get_submodule(".".join(prefix))
    return tuple(".".join([*prefix, child, *rest]) for child in listed(owner, count))


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
    parts = tuple(module.get_parameter(n).detach() for n in members(module, name, count))
    shape = tuple(parts[0].shape)
    if "#" in name:
        experts = int(name.partition("#")[2])
        shape = (experts, shape[0] // experts, *shape[1:])
    elif "@" in name:
        parts = (parts[0][: int(name.partition("@")[2])],)
        shape = tuple(parts[0].shape)
    elif "*" in name.split("."):
        shape = (len(parts), *shape)
    return Stack(parts, shape)


def sizes(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape [n, k] that each expert's weights behind ``name`` have; [n] of a bias."""
    return stack(module, name, 1).shape[1:]


def unstack(module: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """The inverse: a stacked value [e, ...] as the real parameters' values (of the first e experts).

    Experts that no forward multiplies come out as zeros.
    """
    if "@" in name:
        (real,) = members(module, name)
        experts, others = int(name.partition("@")[2]), module.get_parameter(real).shape[0]
        if value.shape[0] == experts:
            value = torch.cat([value, value.new_zeros(others - experts, *value.shape[1:])])
        return {real: value}
    if "#" in name:
        return {members(module, name)[0]: value.flatten(0, 1)}
    if "*" in name.split("."):
        return dict(zip(members(module, name, len(value)), value, strict=True))
    return {name: value}


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
