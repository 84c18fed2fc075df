"""How transformers calls a checkpoint's tensors, and how its conversions put them together.

Contract: names only; nothing is read. What transformers would do to a tensor is said as transformers says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .files import CheckpointError


class Names:
    """transformers' renaming of one model's checkpoint tensors."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping: list[Any] = list(get_model_conversion_mapping(model))
        self.renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self.converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self.by_pattern = {p: c for c in self.converters for p in c.source_patterns}
        self.state = {**dict(model.named_parameters()), **model.state_dict()}
        self.prefix = getattr(model, "base_model_prefix", "")

    def rename(self, key: str) -> tuple[str, str | None]:
        """(name in the model, source pattern of the converter that matched or None)."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if renamed not in self.state and key in self.state:
            renamed, pattern = rename_source_key(key, [], [], self.prefix, self.state)
        return renamed, pattern


@dataclass(frozen=True)
class Recipe:
    """A converter that works expert by expert: stack or not, then steps ("cat" | "transpose" | "fit", dims)."""

    patterns: tuple[str, ...]
    merge: bool
    steps: tuple[tuple[str, tuple[int, ...]], ...]

    def check_rows(self, name: str) -> None:
        """CheckpointError if tensors are concatenated along K, where codes share bytes and scales."""
        rows = 1
        for kind, numbers in self.steps:
            if kind == "transpose":
                rows = 3 - rows
            elif kind == "cat" and numbers[0] % 3 != rows:
                raise CheckpointError(f"{name} is concatenated along K, which MXFP4 codes cannot be")


def recipe_of(converter: Any) -> Recipe | None:
    """The expert-wise form of a converter of transformers, or None if it is not known to have one."""
    if converter is None or len(converter.target_patterns) != 1:
        return None
    merge = False
    steps: list[tuple[str, tuple[int, ...]]] = []
    for index, operation in enumerate(converter.operations):
        kind = type(operation).__name__
        if kind == "MergeModulelist" and index == 0 and operation.dim == 0:
            merge = True
        elif kind == "Concatenate" and operation.dim % 3 in (1, 2):
            steps.append(("cat", (operation.dim % 3,)))
        elif kind == "Transpose" and {operation.dim0 % 3, operation.dim1 % 3} == {1, 2}:
            steps.append(("fit" if operation.check_dims else "transpose", (1, 2)))
        else:
            return None
    return Recipe(tuple(converter.source_patterns), merge, tuple(steps))


def converted_by_expert(converter: Any) -> bool:
    """Whether a tensor is taken as it is, or by a conversion that only stacks, concatenates and transposes."""
    return converter is None or recipe_of(converter) is not None


def literal(pattern: str) -> str:
    """The name that a pattern of transformers' conversions stands for."""
    return pattern.replace("\\", "")
