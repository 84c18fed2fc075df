"""Where each expert parameter of a model lies in a checkpoint, and reading a few experts of it at a time.

transformers knows how checkpoints are called (its weight conversions rename, stack and concatenate); here the
same conversions are applied to names once and to values a few experts at a time. Values come out as the
model's parameter (float checkpoints) or as canonical codes and scales (MXFP4 checkpoints), bits unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import mx
from ..passes.weights import projections_of
from ..planning import Site
from .files import CheckpointError, Weights
from .forms import Form
from .meta_planning import ExpertParameter
from .names import Names, Recipe, literal, recipe_of

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass
class Part:
    """The checkpoint tensors of one parameter: role ("values", "codes", "scales") -> source pattern -> names."""

    converter: Any = None
    names: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def all(self) -> list[str]:
        """Every tensor name."""
        return [n for patterns in self.names.values() for names in patterns.values() for n in names]

    @property
    def quantized(self) -> bool:
        """Whether the checkpoint holds the parameter in MXFP4."""
        return "codes" in self.names or "scales" in self.names


class CheckpointReader:
    """Reads parameters of experts from a checkpoint. ``wanted``: as ``expert_parameters`` names them."""

    def __init__(
        self, model: nn.Module, wanted: Mapping[str, ExpertParameter], weights: Weights, form: Form | None
    ) -> None:
        from transformers.core_model_loading import dot_natural_key

        self.model, self.weights, self.form = model, weights, form
        self.wanted = wanted
        self.shapes = {name: p.shape for name, p in wanted.items()}
        self.dtypes = {name: p.dtype for name, p in wanted.items()}
        # A parameter in the model -> what it is, or is a part of, and which part.
        place = {real: (name, i) for name, p in wanted.items() for i, real in enumerate(p.names)}
        self.parts: dict[str, Part] = {}
        self._number: dict[str, int] = {}  # which part of its parameter a tensor is
        self._whole: tuple[int, dict[str, Tensor]] = (0, {})
        naming = Names(model)
        for key in sorted(weights.tensors, key=dot_natural_key):
            role, base = self._role(key)
            real, pattern = naming.rename(base)
            if real not in place:
                # One converter may fill several parameters (text and vision experts); it goes by the first.
                continue
            name, number = place[real]
            if pattern is not None and (wanted[name].apart or wanted[name].flattened):
                raise CheckpointError(f"{weights[key]} is converted while loading, which {real} cannot be")
            self._number[key] = number
            part = self.parts.setdefault(name, Part())
            if pattern is not None:
                part.converter = naming.by_pattern[pattern]
            part.names.setdefault(role, {}).setdefault(pattern or "", []).append(key)
        self._share_converters(naming)
        present = {tuple(map(id, wanted[name].parameters)): name for name in self.parts}
        for name, parameter in wanted.items():
            objects = tuple(map(id, parameter.parameters))
            if name not in self.parts and objects in present:
                self.parts[name] = self.parts[present[objects]]  # tied, and stored once
        missing = [name for name in wanted if name not in self.parts]
        if missing:
            raise CheckpointError(
                f"nothing in {', '.join(str(f) for f in weights.files[:3])} is for {missing[0]}"
                + (f" and {len(missing) - 1} other expert parameters" if len(missing) > 1 else "")
            )
        for name, part in self.parts.items():
            self._check(name, part)

    def _role(self, key: str) -> tuple[str, str]:
        if self.form is not None:
            split = self.form.split(key)
            integer = self.weights[key].dtype in ("U8", "I8", "F8_E8M0")
            if split is not None and integer:
                return split
        return "values", key

    def _share_converters(self, naming: Names) -> None:
        """Parameters that a many-to-many converter fills beside the one its tensors are filed under."""
        for name, part in list(self.parts.items()):
            targets = getattr(part.converter, "target_patterns", [])
            for other in targets[1:]:
                twin = name.replace(literal(targets[0]), literal(other))
                if twin in self.shapes:
                    self.parts.setdefault(twin, part)

    def _check(self, name: str, part: Part) -> None:
        if self.wanted[name].apart:
            for role, patterns in part.names.items():
                patterns[""].sort(key=self._number.__getitem__)
                found = {self._number[key] for key in patterns[""]}
                for number, real in enumerate(self.wanted[name].names):
                    if number not in found:
                        raise CheckpointError(
                            f"nothing in {', '.join(str(f) for f in self.weights.files[:3])} is for {real}"
                            + ("" if role == "values" else f" (its {role})")
                        )
        if not part.quantized:
            for key in part.all():
                if self.weights[key].dtype not in _FLOATS:
                    raise CheckpointError(
                        f"{self.weights[key]}: expert weights of this dtype are not read; known: {', '.join(_FLOATS)}, "
                        "or MXFP4 with a quantization_config that says so"
                    )
            return
        for role, other in (("codes", "scales"), ("scales", "codes")):
            for pattern, keys in part.names.get(role, {}).items():
                twins = part.names.get(other, {}).get(pattern, [])
                if len(twins) != len(keys):
                    known = {self._role(k)[1] for k in twins}
                    alone = next(k for k in keys if self._role(k)[1] not in known)
                    raise CheckpointError(f"{self.weights[alone]} has no {other} beside it")
        if "values" in part.names:
            key = next(iter(part.names["values"].values()))[0]
            raise CheckpointError(f"{self.weights[key]} is unquantized, but other parts of {name} are in MXFP4")

    def quantized(self, name: str) -> bool:
        """Whether the checkpoint holds this parameter in MXFP4."""
        return self.parts[name].quantized

    def leave_unquantized(self, sites: Sequence[Site]) -> None:
        """In an MXFP4 checkpoint, sites whose weights are not in MXFP4 were left so by whoever made it, and stay."""
        for site in sites if self.form is not None else ():
            if site.structure is not None:
                names = {n for p in projections_of(site.structure.found.spec) for n in p.source.parameters}
                if not any(self.quantized(f"{site.name}.{n}") for n in names):
                    site.structure, site.outcome, site.reason = None, "skipped", "not in MXFP4 in the checkpoint"

    def bytes(self, name: str) -> int:
        """Bytes the checkpoint has for this parameter."""
        return sum(self.weights[key].bytes for key in self.parts[name].all())

    def where(self, name: str, expert: int | None = None) -> str:
        """File and name of the first of its tensors, for messages; of an ``expert`` with bad values, of that which has
        them."""
        part = self.parts[name]
        keys = part.all() if expert is None else self._of_expert(name, part, expert)
        for key in keys if expert is not None else ():
            values = self.weights.read(key)
            bad = values.view(torch.uint8) == 255 if part.quantized else ~values.isfinite()
            if bool(bad.any()):
                return str(self.weights[key])
        return str(self.weights[keys[0]])

    def _of_expert(self, name: str, part: Part, expert: int) -> list[str]:
        """The tensors with the values, or the scales, of one expert; those of all experts where they lie together."""
        found = part.names["scales" if part.quantized else "values"].values()
        count = len(self.wanted[name].names) if self.wanted[name].apart else self._count(name)
        return [key for keys in found for key in (keys[expert : expert + 1] if len(keys) == count > 1 else keys)]

    # float checkpoints

    def values(self, name: str, experts: slice) -> Tensor:
        """Experts of a parameter in its own layout and dtype, [e, ...]; on the CPU."""
        part, shape = self.parts[name], self.shapes[name]
        recipe = recipe_of(part.converter)
        if part.converter is None:
            out = self._read(name, part.names["values"][""], experts)
        elif recipe is None:
            out = self._convert_whole(name, part)[name][experts]
        else:
            out = self._assemble(part.names["values"], recipe, experts, shape, self._count(name))
        if tuple(out.shape) != (experts.stop - experts.start, *shape[1:]):
            raise CheckpointError(f"{self.where(name)}: {name} comes out as {list(out.shape)}, not {list(shape)}")
        return out.to(self.dtypes[name])

    def _read(self, name: str, keys: Sequence[str], experts: slice) -> Tensor:
        """Some experts of what no conversion makes: [e, ...], whatever the tensors are stacked like."""
        whole = self.wanted[name]
        if whole.apart:
            return self._stacked(keys[experts])
        if not whole.flattened:
            return self.weights.read(keys[0], experts)
        stored = self.weights[keys[0]].shape  # [E * n, ...]
        if not stored or stored[0] % whole.shape[0]:
            raise CheckpointError(f"{self.weights[keys[0]]} {list(stored)} is not made of {whole.shape[0]} experts")
        rows = stored[0] // whole.shape[0]
        out = self.weights.read(keys[0], slice(experts.start * rows, experts.stop * rows))
        return out.view(experts.stop - experts.start, rows, *stored[1:])

    def _assemble(
        self, names: Mapping[str, list[str]], recipe: Recipe, experts: slice, shape: tuple[int, ...], count: int
    ) -> Tensor:
        parts = []
        for pattern in recipe.patterns:
            if pattern in names:
                parts.append(self._stack(names[pattern], recipe, experts, count))
        for kind, numbers in recipe.steps:
            if kind == "cat":
                parts = [_cat(parts, numbers[0], names)]
            elif kind == "transpose" or tuple(parts[0].shape[1:]) != shape[1:]:
                parts = [p.transpose(*numbers) for p in parts]
        if len(parts) != 1:
            raise CheckpointError(f"{', '.join(names)}: {len(parts)} tensors for one parameter")
        return parts[0].contiguous()

    def _stack(self, keys: Sequence[str], recipe: Recipe, experts: slice, count: int) -> Tensor:
        if not recipe.merge:
            (key,) = keys
            return self.weights.read(key, experts)
        if len(keys) != count:
            raise CheckpointError(f"{self.weights[keys[0]]} is one of {len(keys)} experts; the model has {count}")
        return self._stacked(keys[experts])

    def _stacked(self, keys: Sequence[str]) -> Tensor:
        """One tensor per expert as [e, ...]."""
        pieces = [self.weights.read(key) for key in keys]
        for key, piece in zip(keys, pieces, strict=True):
            if piece.shape != pieces[0].shape:
                raise CheckpointError(f"{self.weights[key]} has another shape than expert {keys[0]!r}")
        return torch.stack(pieces)

    def _convert_whole(self, name: str, part: Part) -> dict[str, Tensor]:
        """A conversion that is not expert by expert, run as transformers does, all at once; the last is kept."""
        if self._whole[0] == id(part):
            return self._whole[1]
        converter = copy.deepcopy(part.converter)
        first = next(n for n, p in self.parts.items() if p is part)
        for pattern, keys in part.names["values"].items():
            for key in keys:
                converter.add_tensor(first, key, pattern, _Lazy(self.weights, key))
        try:
            result = converter.convert(first, model=self.model, config=getattr(self.model, "config", None))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.where(name)}: {name} cannot be converted: {error}") from error
        tensors = {n: t[0] if isinstance(t, list) else t for n, t in result.items()}
        if name not in tensors:
            raise CheckpointError(f"{self.where(name)}: the conversion gave {sorted(tensors)}, not {name}")
        self._whole = (id(part), tensors)
        return tensors

    def _count(self, name: str) -> int:
        """How many experts the model's parameter has, those that no forward multiplies included."""
        return int(self.wanted[name].parameters[0].shape[0])

    # MXFP4 checkpoints

    def codes(self, name: str, experts: slice, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Canonical (packed uint8 [e, n, ceil(k/2)], scales uint8 [e, n, ceil(k/32)]) of some experts, exact bits."""
        part = self.parts[name]
        packed = self._canonical(name, part, "codes", experts, (n, (k + 1) // 2))
        scales = self._canonical(name, part, "scales", experts, (n, -(-k // mx.BLOCK)))
        bad = (scales == 255).flatten(1).any(1)
        if bool(bad.any()):
            expert = experts.start + int(bad.nonzero()[0])
            raise CheckpointError(
                f"{self.where(name, expert)}: expert {expert} has scale bytes of 255 "
                "(NaN): the weights it was made from held NaN or Inf, or the file is corrupt"
            )
        return packed, scales

    def _first(self, part: Part, role: str) -> str:
        return str(self.weights[next(iter(part.names[role].values()))[0]])

    def _canonical(self, name: str, part: Part, role: str, experts: slice, last: tuple[int, int]) -> Tensor:
        names, count = part.names[role], self._count(name)
        if part.converter is None:
            pieces = [self._read(name, names[""], experts)]
        else:
            recipe = recipe_of(part.converter)
            if recipe is None:
                raise CheckpointError(f"{self._first(part, role)}: {name} is made by a conversion MXFP4 cannot follow")
            # Codes always lie [N, K/2]: transpositions are of the float parameter, concatenations along N.
            recipe.check_rows(name)
            pieces = [self._stack(names[p], recipe, experts, count) for p in recipe.patterns if p in names]
        if self.form is not None and role == "codes":
            pieces = [self.form.matrices(p) for p in pieces]
        out = pieces[0] if len(pieces) == 1 else _cat(pieces, 1, names)
        want = (experts.stop - experts.start, *last)
        if tuple(out.shape) != want or out.dtype.itemsize != 1:
            raise CheckpointError(
                f"{self._first(part, role)}: the {role} of {name} come out as {out.dtype} {list(out.shape)}; "
                f"uint8 {list(want)} was expected"
            )
        return out.view(torch.uint8)


@dataclass(frozen=True)
class _Lazy:
    """A tensor that is read when it is asked for; stands for a tensor in transformers' converters."""

    weights: Weights
    key: str

    def __call__(self) -> Tensor:
        return self.weights.read(self.key)


def _cat(parts: Sequence[Tensor], dim: int, names: Iterable[str]) -> Tensor:
    try:
        return torch.cat(list(parts), dim)
    except RuntimeError as error:
        raise CheckpointError(f"the tensors of {', '.join(names)} do not fit together: {error}") from error
