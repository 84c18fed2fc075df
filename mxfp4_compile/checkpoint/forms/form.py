"""What a form of MXFP4 checkpoints is: how it names its tensors, what its configuration says, what it can express.

Contract: a form is a stateless value. Codes and scales are the same bits in every form (OCP MX v1.0: E2M1 pairs, the
even index in the low nibble, E8M0 bytes); only names and shapes differ. What a form cannot express it refuses by name
(``CannotExpress``) before anything is written.

::

    reading   config.json -> declared_by, check -> split, check_tensor: which tensors are codes and scales
                                                -> matrices: codes as [..., N, ceil(K/2)]
    writing   weights of a model -> units: tensors by name, produced a few experts at a time
              config        -> declare: quantization_config and the note
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import mx
from ...passes.build.prep import groups_of
from ..files import CheckpointError, Entry, Stored, Unit

OWN = "mxfp4_compile"
GPT_OSS = "gpt_oss"
COMPRESSED_TENSORS = "compressed_tensors"
MXFP4 = "mxfp4"
QUARK = "quark"

# The key of config.json under which forms that others define keep what they have no place for.
NOTE = "mxfp4_compile"

# Some experts of one parameter in canonical form: slice -> (packed [e, n, ceil(k/2)], scales [e, n, ceil(k/32)]).
Codes = Callable[[slice], tuple[Tensor, Tensor]]


class CannotExpress(CheckpointError):
    """A model that a form has no words for. ``reason``: what of it, without the names of forms."""

    def __init__(self, reason: str, form: str, others: str = f"the form {OWN} can") -> None:
        super().__init__(f"{reason}: the {form} form cannot express it; {others}. Nothing was written.")
        self.reason = reason


@dataclass(frozen=True)
class ExpertWeight:
    """A weight to be written: its name, canonical shape [E, n, k], and its codes.

    ``members``: its parameters in the model, one for all experts or one for each; ``flattened``: one of [E * n, .].
    """

    name: str
    members: tuple[str, ...]
    flattened: bool
    experts: int
    n: int
    k: int
    transposed: bool
    codes: Codes
    facts: dict[str, Any]

    @property
    def code_bytes(self) -> int:
        """Bytes of a row of codes."""
        return (self.k + 1) // 2

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return -(-self.k // mx.BLOCK)


@dataclass(frozen=True)
class Linear:
    """One expert's linear layer in a checkpoint that has one per expert: its weight's name, and its rows of n."""

    name: str
    expert: int
    rows: slice


@dataclass(frozen=True)
class Form:
    """One form: it names an expert weight ``base`` as base + ``codes`` and base + ``scales``.

    ``stem`` is what the two suffixes replace: "" where they follow the parameter's name, ".weight" where the form has
    one linear layer per expert. ``written``: whether it can be written, not only read.
    """

    name: str
    codes: str
    scales: str
    stem: str = ""
    written: bool = True

    # reading

    def declared_by(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` says that the checkpoint is of this form."""
        raise NotImplementedError

    def check(self, config: Mapping[str, Any], where: str) -> list[str]:
        """Notes about what a ``quantization_config`` of this form asks for and does not get.

        Raises CheckpointError for what is no MXFP4, or a version that is not known.
        """
        return []

    def split(self, key: str) -> tuple[str, str] | None:
        """("codes" or "scales", base name) of a tensor's name, or None if it is neither."""
        # The longer suffix first: quark's codes end in what its scales only begin with.
        for role, suffix in sorted((("codes", self.codes), ("scales", self.scales)), key=lambda r: -len(r[1])):
            if key.endswith(suffix):
                return role, key[: -len(suffix)] + self.stem
        return None

    def check_tensor(self, stored: Stored) -> None:
        """CheckpointError for a tensor that no checkpoint of this form has."""

    def matrices(self, codes: Tensor) -> Tensor:
        """Codes as the form stores them -> [..., N, ceil(K/2)]."""
        return codes

    # writing

    def units(self, model: nn.Module, weights: list[ExpertWeight], biases: Iterable[str]) -> list[Unit]:
        """What is written for the experts' weights; ``biases``: names of the tensors with their biases.

        Raises CannotExpress, naming what the form has no words for.
        """
        raise NotImplementedError

    def quantization_config(self, note: Mapping[str, Any], ignore: list[str]) -> dict[str, Any]:
        """What config.json says. ``note``: of ours; ``ignore``: names of the linear layers that are not quantized."""
        raise NotImplementedError

    def declare(self, config: Any, note: Mapping[str, Any], ignore: list[str]) -> None:
        """Write form and note into a configuration of transformers."""
        config.quantization_config = self.quantization_config(note, ignore)
        setattr(config, NOTE, dict(note))


def check_columns(weights: Iterable[ExpertWeight], form: str) -> None:
    """CannotExpress for rows that are not made of whole blocks, which the forms of others need."""
    for weight in weights:
        if weight.k % mx.BLOCK:
            raise CannotExpress(f"{weight.name} has K = {weight.k}, no multiple of {mx.BLOCK}", form)


def stacked_unit(weight: ExpertWeight, codes: str, scales: str, last: tuple[int, ...]) -> Unit:
    """Two tensors for all experts of a weight, called ``codes`` and ``scales``; ``last``: the codes' shape of a row."""
    lead = (weight.experts * weight.n,) if weight.flattened else (weight.experts, weight.n)

    def produce() -> Iterator[tuple[str, Tensor]]:
        for some in groups_of(weight.experts, weight.n * weight.k * 2):
            packed, exponents = weight.codes(some)
            yield codes, packed.flatten(0, 1) if weight.flattened else packed
            yield scales, exponents.flatten(0, 1) if weight.flattened else exponents

    entries = (Entry(codes, torch.uint8, (*lead, *last)), Entry(scales, torch.uint8, (*lead, weight.blocks)))
    return Unit(entries, produce, weight.facts)


def linears_unit(weight: ExpertWeight, expert: int, linears: list[Linear], codes: str, scales: str) -> Unit:
    """One expert's layers, each under its name with the suffixes ``codes`` and ``scales``."""
    entries = []
    for linear in linears:
        rows = linear.rows.stop - linear.rows.start
        entries.append(Entry(linear.name + codes, torch.uint8, (rows, weight.code_bytes)))
        entries.append(Entry(linear.name + scales, torch.uint8, (rows, weight.blocks)))

    def produce() -> Iterator[tuple[str, Tensor]]:
        packed, exponents = weight.codes(slice(expert, expert + 1))
        for linear in linears:
            yield linear.name + codes, packed[0, linear.rows]
            yield linear.name + scales, exponents[0, linear.rows]

    return Unit(tuple(entries), produce, weight.facts)
