"""Probes: numbers of tokens and random values on which the regions of a graph are run.

::

    Chain  -->  Prober  -->  Probe (so many tokens, a value for every input)  -->  Case (its routing is known, too)

Contract: the graph is read, never changed. All random values of a match come from one generator with one seed, so
that a graph always gets the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from ..evaluate import Evaluator, random_ids
from ..graph import FLOATS, concrete, graph_symbols, is_float, is_integer, shape_of
from ..trace.traced import Traced
from .chain import Chain, Refused

# A few tokens, one, and so many on the same experts that counts leave a byte; a fourth probe hits every expert.
_FEW_TOKENS = (5, 1)
_MANY_TOKENS = 300
# Magnitudes of values and of weights tried together: what acts on small or on large values only shows.
SCALES = ((1.0, 1.0), (1e-3, 1e3), (1e4, 1e-2), (1e9, 1e5))
# fp64 runs of one formula in two spellings agree to about 1e-15 relative.
_TOLERANCE = 1e-9
# The places of these probes among ``Prober.probes``.
EVERY_EXPERT, SAME_EXPERTS = 2, 3


@dataclass(frozen=True)
class TokenSizes:
    """The free sizes of a graph: ``free``, of the tokens or of batch and length; ``counts``: products of the two."""

    free: tuple[Any, ...]
    counts: frozenset[Any]

    def of(self, tokens: int) -> dict[Any, int]:
        """Values that make ``tokens``: a batch of rows where there are two."""
        counts = dict.fromkeys(self.counts, tokens)
        if len(self.free) == 1:
            return {self.free[0]: tokens, **counts}
        batch = next(b for b in (2, 3, 5, 1) if tokens % b == 0) if tokens > 1 else 1
        return {self.free[0]: batch, self.free[1]: tokens // batch, **counts}

    def decide(self, node: fx.Node) -> bool:
        """Whether the node's shape follows from the number of tokens."""
        return all(free_symbols(d) <= {*self.free, *self.counts} for d in node.meta["val"].shape)


def token_sizes(traced: Traced) -> TokenSizes:
    """The free sizes of a graph, one or two besides those that are batch times length; raises Refused."""
    symbols = graph_symbols(traced.graph)
    counts = _token_counts(traced, symbols)
    free = tuple(s for s in symbols if s not in counts)
    if not 1 <= len(free) <= 2:
        raise Refused(f"the graph has {len(free)} free sizes, one or two (of the tokens) were expected")
    return TokenSizes(free, frozenset(counts))


def _token_counts(traced: Traced, symbols: Sequence[Any]) -> set[Any]:
    """The free sizes that were batch times length in the recorded call. (The op refuses ids of another number.)"""
    recorded: dict[Any, int] = {}
    for name, info in zip(traced.inputs, traced.pattern.tensors, strict=True):
        for size, number in zip(traced.node(name).meta["val"].shape, info.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr in symbols:
                recorded[size.node.expr] = number
    found = set()
    for name, info in zip(traced.inputs, traced.pattern.tensors, strict=True):
        shape = traced.node(name).meta["val"].shape
        varying = [s for s in symbols if any(s in free_symbols(d) for d in shape[:2])]
        if len(shape) == 3 and len(varying) == 2:
            tokens = math.prod(info.shape[:2])
            found |= {s for s, number in recorded.items() if number == tokens and s not in varying}
    return found if len(symbols) > 2 else set()


@dataclass(frozen=True)
class Draw:
    """Random probe values in fp64, of one generator."""

    generator: torch.Generator
    experts: int

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal values."""
        return torch.randn(tuple(shape), dtype=torch.float64, generator=self.generator)

    def spread(self, shape: Sequence[int]) -> Tensor:
        """Values of both signs and of magnitudes from 1e-3 to 1e9."""
        exponents = torch.rand(tuple(shape), dtype=torch.float64, generator=self.generator) * 12 - 3
        return self.normal(shape) * 10**exponents

    def ids(self, shape: Sequence[int]) -> Tensor:
        """Expert ids, none twice for one token."""
        return random_ids(shape, self.experts, self.generator)

    def all_ids(self, shape: Sequence[int]) -> Tensor:
        """Ids that name every expert, if there are that many pairs, and none twice for one token."""
        order = torch.randperm(self.experts, generator=self.generator)
        return order[torch.arange(math.prod(shape)) % self.experts].reshape(tuple(shape))


@dataclass(frozen=True)
class Probe:
    """A graph with random values for all its inputs, at one number of tokens."""

    tokens: int
    sizes: Mapping[Any, int]
    evaluator: Evaluator

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The node's shape here."""
        return shape_of(node, self.sizes)

    def run(self, wanted: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
        """The values of ``wanted`` with those of ``given`` in force; EvaluationError if something cannot run."""
        return self.evaluator.run(wanted, given)


@dataclass(frozen=True)
class Case:
    """A probe whose routing is known: ids [T, K], x [T, H], and for each row of the up GEMMs its pair, [S]."""

    probe: Probe
    ids: Tensor
    x: Tensor
    pair_of_row: Tensor

    @property
    def expert_of_row(self) -> Tensor:
        """[S] expert of each row."""
        return self.ids.reshape(-1)[self.pair_of_row]

    def by_pair(self, rows: Tensor) -> Tensor:
        """Rows [S, N] in the order of pairs."""
        out = torch.empty_like(rows)
        out[self.pair_of_row] = rows
        return out


@dataclass(frozen=True)
class Prober:
    """Makes the probes of one chain."""

    chain: Chain
    sizes: TokenSizes
    draw: Draw

    def probe(self, tokens: int) -> Probe:
        """The graph at ``tokens`` tokens (a batch of them where a free size of one stands for more)."""
        traced, sizes = self.chain.traced, self.sizes.of(tokens)
        weights = self.chain.weights
        values: dict[fx.Node, Any] = {}
        for node in self.chain.graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            if node.name in traced.constants:
                constant = traced.constants[node.name].cpu()
                values[node] = constant.double() if constant.dtype in FLOATS else constant
            elif node.name in traced.parameters and traced.parameters[node.name] in weights:
                # Only its sizes may be read: a GEMM is always overridden.
                values[node] = torch.zeros((), dtype=torch.float64).expand(value.shape)
            elif isinstance(value, Tensor) and node.name in traced.inputs:
                shape = shape_of(node, sizes)
                values[node] = self.draw.normal(shape) if is_float(node) else self.draw.ids(shape)
            elif isinstance(value, torch.SymInt):
                values[node] = concrete(value, sizes)
        return Probe(tokens, sizes, Evaluator(values))

    def probes(self) -> tuple[Probe, ...]:
        """Few tokens, one, enough for every expert, and many."""
        integers = [n.meta["val"] for n in self.chain.graph.nodes if is_integer(n) and n.meta["val"].dim() == 2]
        narrowest = min((v.shape[1] for v in integers if isinstance(v.shape[1], int)), default=1)
        unit = self._tokens_per_size()
        every = math.ceil(max(11, math.ceil(self.chain.experts / narrowest)) / unit)
        if len(self.sizes.free) == 2:
            every += every % 2
        return tuple(map(self.probe, (*_FEW_TOKENS, every, math.ceil(_MANY_TOKENS / unit))))

    def _tokens_per_size(self) -> int:
        """How many tokens a free size of one makes: more where a batch of sequences of one length was traced."""
        two = [n for n in self.chain.graph.nodes if is_integer(n) and n.meta["val"].dim() == 2 and self.sizes.decide(n)]
        one = dict.fromkeys((*self.sizes.free, *self.sizes.counts), 1)
        rows = [shape_of(n, one)[0] for n in two if isinstance(n.meta["val"].shape[0], torch.SymInt)]
        return max(1, min(rows, default=1))


def prober_of(chain: Chain) -> Prober:
    """The prober of a chain; raises Refused where the free sizes are not those of the tokens."""
    draw = Draw(torch.Generator().manual_seed(1), chain.experts)
    return Prober(chain, token_sizes(chain.traced), draw)


def pair_of_row(rows: Tensor, experts: Tensor, pair_rows: Tensor, ids: Tensor) -> Tensor | None:
    """[S] pair of each row if rows and experts are exactly those of the pairs in some order, else None."""
    if rows.shape != pair_rows.shape:
        return None
    # One random number per row and expert stands for the whole row while pairing; the rows themselves decide.
    direction = torch.randn(rows.shape[1], dtype=rows.dtype, generator=torch.Generator().manual_seed(2))
    key_rows = rows @ direction + math.pi * experts.to(rows.dtype)
    key_pairs = pair_rows @ direction + math.pi * ids.to(rows.dtype)
    pair = torch.empty(len(key_rows), dtype=torch.int64)
    pair[key_rows.argsort()] = key_pairs.argsort()
    if not torch.equal(experts.to(ids.dtype), ids[pair]) or not close(rows, pair_rows[pair]):
        return None
    return pair


def close(a: Tensor, b: Tensor, scale: float = 1.0) -> bool:
    """Equal within the rounding of fp64, for values computed from ones of magnitude ``scale``."""
    if a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= _TOLERANCE * (scale + torch.maximum(a.abs(), b.abs()))).all())


__all__ = ["EVERY_EXPERT", "SAME_EXPERTS", "SCALES", "Case", "Probe", "Prober", "close", "pair_of_row", "prober_of"]
