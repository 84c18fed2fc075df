"""Match: a captured graph -> MoESpec, SplitSpec, or a reason.

Contract: the graph is read, never changed (but for a gather of each pair's routing weight, where the graph
has those of all experts). Nothing is concluded from names (of modules, classes, or
ops) beyond the anchors, the expert GEMMs that ``forms`` finds. What lies between them is cut into three
regions, and each is compared, by running it in fp64 on random values, with what a mixture of experts
computes. Spelling therefore does not matter, and a region that merely looks right does not pass.

1. anchors: one down GEMM, and one or two up GEMMs that feed it;
2. head: find nodes x [T,H], ids [T,K] (and w [T,K]) such that the up GEMM's rows are x[token] (or
   x[token] * w[pair]) for exactly the pairs that ids names, whatever their order;
3. middle: the down GEMM's rows must be activation(up output + bias of the row's expert);
4. tail: find the node that equals sum over a token's pairs of w * (down output + bias);
5. what probes cannot prove is required of the graph: the tokens, ids and weights do not depend on the GEMMs,
   nor the tail on any but the last; nothing in head and tail branches on values or counts; no cast is narrower
   than the model's own rounding (for counts and ids: than fp32 or int32).
If 2 to 5 fail but the GEMMs are sound by themselves, the site is split: SplitSpec with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from ...spec import LinearSpec, MoEParams, MoESpec, SplitSpec, WeightSource
from ..evaluate import EvaluationError, Evaluator, random_ids
from ..graph import (
    ADDS,
    BRANCHES,
    CASTS,
    COUNTING,
    FLOATS,
    SELECTS,
    SHAPING,
    ancestors,
    concrete,
    descendants,
    graph_symbols,
    is_float,
    is_integer,
    op_name,
    read_by,
    reads_no_values,
    shape_of,
)
from ..trace.capture import Captured
from .activation import recognize
from .forms import ExpertGemm, find_gemms
from .rules import check_structure

# A few tokens, one, and so many on the same experts that counts leave a byte; a fourth probe hits every expert.
_PROBE_TOKENS = (5, 1)
_MANY_TOKENS = 300
_MIN_PROBES = 4096
# Magnitudes of values and of weights tried together: what acts on small or on large values only shows.
_SCALES = ((1.0, 1.0), (1e-3, 1e3), (1e4, 1e-2), (1e9, 1e5))
_TOLERANCE = 1e-9
_NARROW_INTEGERS = (torch.int8, torch.uint8, torch.int16)


@dataclass(frozen=True)
class FusedMatch:
    """A fused site: the spec, and the nodes where the op's inputs enter and its output leaves."""

    spec: MoESpec
    x: fx.Node
    topk_ids: fx.Node
    topk_weights: fx.Node
    output: fx.Node
    gemms: tuple[ExpertGemm, ...]
    sentinels: int = 0  # so many ids from E on name experts without weights
    scale: float = 1.0  # a constant factor of the whole output, which goes into the weights


@dataclass(frozen=True)
class SplitMatch:
    """A split site: each GEMM becomes a grouped_linear, everything else stays as it is."""

    spec: SplitSpec
    gemms: tuple[ExpertGemm, ...]


@dataclass(frozen=True)
class NoMatch:
    """Why a graph is no site. ``dense``: every token meets every expert, there is no routing in it."""

    reason: str
    dense: bool = False


class _Refused(Exception):
    """A hypothesis that does not hold, with the reason in words."""


def match(captured: Captured, fetch: Any = None) -> FusedMatch | SplitMatch | NoMatch:
    """Match one captured experts module.

    ``fetch(name) -> Tensor`` gives real values of small buffers and parameters that a region may read
    (never of GEMM weights); without it such a region is not fused.
    """
    gemms = find_gemms(captured)
    if not gemms:
        return _no_gemms(captured)
    problem = _weights_used_twice(gemms) or _weights_used_elsewhere(captured, gemms)
    if problem:
        return NoMatch(problem)
    try:
        return _Fused(captured, gemms).run()
    except (_Refused, EvaluationError) as refusal:
        reason = str(refusal)
    if any(g.form != "grouped_mm" and not _in_modules(g) for g in gemms):
        return NoMatch(f"not fused ({reason}), and only grouped_mm graphs and loops over modules can be split")
    return SplitMatch(_split_spec(gemms, reason), tuple(gemms))


def _in_modules(gemm: ExpertGemm) -> bool:
    """Whether a product is that of a loop over expert modules, whose rows lie one expert after the other."""
    return gemm.form == "loop" and "*" in gemm.weight.split(".")


def _no_gemms(captured: Captured) -> NoMatch:
    """Tell a dense product over all experts from something unknown."""
    chooses = {"sort", "topk", "index", "index_select", "gather", "nonzero", "embedding", "scatter", "where"}
    used = {
        str(n.target).split(".")[1]
        for n in captured.graph.nodes
        if n.op == "call_function" and str(n.target).startswith("aten.")
    }
    if not used & chooses and not any(is_integer(captured.node(name)) for name in captured.inputs):
        return NoMatch("dense: every expert serves every token, nothing is routed", dense=True)
    return NoMatch("no product of rows with the weights of their experts (grouped_mm, batched_mm, a loop)")


def _weights_used_twice(gemms: Sequence[ExpertGemm]) -> str | None:
    names = [g.weight for g in gemms]
    twice = sorted({n for n in names if names.count(n) > 1})
    return f"weight {twice[0]!r} serves two products" if twice else None


def _weights_used_elsewhere(captured: Captured, gemms: Sequence[ExpertGemm]) -> str | None:
    """A reason if a GEMM's weight also serves something that is no anchor."""
    weights = {g.weight for g in gemms}
    placeholders = {captured.node(p) for p, name in captured.parameters.items() if name in weights}
    known = set()
    for gemm in gemms:
        known.add(gemm.node)
    for placeholder in placeholders:
        stack = list(placeholder.users)
        while stack:
            node = stack.pop()
            if node in known:
                continue
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() == 3 and node.users and node.op == "call_function":
                stack.extend(node.users)
            elif not _only_sizes(node):
                return f"weight {captured.parameters[placeholder.name]!r} is also used by {node.target}"
    return None


def _only_sizes(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), Tensor)


def _split_spec(gemms: Sequence[ExpertGemm], reason: str) -> SplitSpec:
    return SplitSpec(
        tuple(
            LinearSpec(
                g.shape[0],
                g.shape[1],
                g.shape[2],
                WeightSource((g.weight,), g.transposed),
                g.node.meta["val"].dtype,
            )
            for g in gemms
        ),
        reason,
    )


class _Fused:
    """The search for a fused match; each step narrows what the graph can be or raises _Refused."""

    def __init__(self, captured: Captured, gemms: Sequence[ExpertGemm]) -> None:
        self.captured = captured
        self.graph = captured.graph
        self.down = gemms[-1]
        self.ups = tuple(gemms[:-1])
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.generator = torch.Generator().manual_seed(1)

    def run(self) -> FusedMatch:
        self._check_chain()
        self.experts, n_down, k_down = self.down.shape
        self.hidden = self.ups[0].shape[2]
        self.up_rows = sum(g.shape[1] for g in self.ups)
        self.intermediate = k_down
        if n_down != self.hidden:
            raise _Refused(f"the experts' output width {n_down} is not their input width {self.hidden}")
        symbols = graph_symbols(self.graph)
        self.token_counts = self._token_counts(symbols)
        symbols = [s for s in symbols if s not in self.token_counts]
        if not 1 <= len(symbols) <= 2:
            raise _Refused(f"the graph has {len(symbols)} free sizes, one or two (of the tokens) were expected")
        self.symbols = symbols
        widths = [n.meta["val"].shape[1] for n in self.graph.nodes if is_integer(n) and n.meta["val"].dim() == 2]
        narrowest = min((k for k in widths if isinstance(k, int)), default=1)
        unit = self._tokens_per_size()
        every = math.ceil(max(11, math.ceil(self.experts / narrowest)) / unit)
        if len(symbols) == 2:
            every += every % 2
        self.probe_tokens = (*_PROBE_TOKENS, every, math.ceil(_MANY_TOKENS / unit))
        self.probes = [self._make_probe(t) for t in self.probe_tokens]
        ids, x, w, on_input = self._find_head()
        self.ids, self.x = ids, x
        self.up_bias_nodes = self._bias_nodes(self.down.rows, [g.node for g in self.ups], self.ups)
        recognized = self._find_middle(w if on_input else None)
        w, output, down_bias = self._find_tail(w, on_input)
        self._check_dependence(output, w, on_input)
        self._check_zeros(output, w, down_bias)
        round_dtype = self.down.node.meta["val"].dtype
        self._check_casts(output, w, round_dtype)
        output = self._extend(output)
        if output.meta["val"].dtype == torch.float32 != x.meta["val"].dtype and self._only_added_to(output):
            output = self._narrowed(output)
        if output.meta["val"].dtype != x.meta["val"].dtype:
            raise _Refused(f"the output is {output.meta['val'].dtype}, the tokens are {x.meta['val'].dtype}")
        spec = MoESpec(
            MoEParams(
                self.experts,
                self.hidden,
                self.intermediate,
                recognized.activation,
                recognized.gate_layout,
                recognized.activated_half,
                on_input,
                round_dtype,
                self._accum_dtype(w, round_dtype),
            ),
            WeightSource(
                tuple(g.weight for g in self.ups),
                self.ups[0].transposed,
                tuple(self.captured.parameters[b.name] for b in self.up_bias_nodes),
            ),
            WeightSource(
                (self.down.weight,),
                self.down.transposed,
                tuple(self.captured.parameters[b.name] for b in down_bias),
            ),
            self.top_k,
        )
        if self._by_expert(w):
            w = self._gathered(w)
        if output.meta["val"].dim() == 3:
            output = self._flattened(output)
        self._absorb(output, w)
        sentinels = self.captured.sentinels
        return FusedMatch(spec, x, ids, w, output, (*self.ups, self.down), sentinels, self.scale)

    # 1. anchors

    def _check_chain(self) -> None:
        if not 1 <= len(self.ups) <= 2:
            raise _Refused(f"{len(self.ups) + 1} expert GEMMs in one module, two or three were expected")
        feeds = ancestors([self.down.rows])
        if not all(g.node in feeds for g in self.ups):
            raise _Refused("the last expert GEMM does not take its rows from the others")
        first = self.ups[0]
        for up in self.ups:
            if up.node in ancestors([g.rows for g in self.ups]):
                raise _Refused("an up GEMM feeds another")
            if up.transposed != first.transposed or up.shape[0] != first.shape[0] or up.shape[2] != first.shape[2]:
                raise _Refused("the up GEMMs' weights are laid out differently")
        if self.down.shape[0] != first.shape[0]:
            raise _Refused("the projections have different numbers of experts")

    # probes

    def _sizes(self, tokens: int) -> dict[Any, int]:
        """Values of the free sizes that make ``tokens``: a batch of rows where there are two."""
        counts = dict.fromkeys(self.token_counts, tokens)
        if len(self.symbols) == 1:
            return {self.symbols[0]: tokens, **counts}
        batch = next(b for b in (2, 3, 5, 1) if tokens % b == 0) if tokens > 1 else 1
        return {self.symbols[0]: batch, self.symbols[1]: tokens // batch, **counts}

    def _token_counts(self, symbols: Sequence[Any]) -> set[Any]:
        """The free sizes that were batch times length in the recorded call. (The op refuses ids of another number.)"""
        recorded: dict[Any, int] = {}
        for name, info in zip(self.captured.inputs, self.captured.pattern.tensors, strict=True):
            for size, number in zip(self.captured.node(name).meta["val"].shape, info.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr in symbols:
                    recorded[size.node.expr] = number
        found = set()
        for name, info in zip(self.captured.inputs, self.captured.pattern.tensors, strict=True):
            shape = self.captured.node(name).meta["val"].shape
            varying = [s for s in symbols if any(s in free_symbols(d) for d in shape[:2])]
            if len(shape) == 3 and len(varying) == 2:
                tokens = math.prod(info.shape[:2])
                found |= {s for s, number in recorded.items() if number == tokens and s not in varying}
        return found if len(symbols) > 2 else set()

    def _tokens_per_size(self) -> int:
        """How many tokens a free size of one makes: more where a batch of sequences of one length was captured."""
        two = [n for n in self.graph.nodes if is_integer(n) and n.meta["val"].dim() == 2 and self._sized(n)]
        one = dict.fromkeys((*self.symbols, *self.token_counts), 1)
        rows = [shape_of(n, one)[0] for n in two if isinstance(n.meta["val"].shape[0], torch.SymInt)]
        return max(1, min(rows, default=1))

    def _sized(self, node: fx.Node) -> bool:
        """Whether the node's shape follows from the token count."""
        return all(free_symbols(d) <= {*self.symbols, *self.token_counts} for d in node.meta["val"].shape)

    def _make_probe(self, tokens: int) -> Evaluator:
        sizes = self._sizes(tokens)
        values: dict[fx.Node, Any] = {}
        weights = {g.weight for g in (*self.ups, self.down)}
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            if node.name in self.captured.constants:
                constant = self.captured.constants[node.name].cpu()
                values[node] = constant.double() if constant.dtype in FLOATS else constant
            elif node.name in self.captured.parameters and self.captured.parameters[node.name] in weights:
                # Only its sizes may be read: a GEMM is always overridden.
                values[node] = torch.zeros((), dtype=torch.float64).expand(value.shape)
            elif isinstance(value, Tensor) and node.name in self.captured.inputs:
                shape = shape_of(node, sizes)
                values[node] = self._random(shape) if is_float(node) else self._ids(shape)
            elif isinstance(value, torch.SymInt):
                values[node] = concrete(value, sizes)
        return Evaluator(values)

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), dtype=torch.float64, generator=self.generator)

    def _all_experts(self, shape: Sequence[int]) -> Tensor:
        """Ids that name every expert, if there are that many pairs, and none twice for one token."""
        order = torch.randperm(self.experts, generator=self.generator)
        return order[torch.arange(math.prod(shape)) % self.experts].reshape(tuple(shape))

    def _spread(self, shape: Sequence[int]) -> Tensor:
        """Random values of both signs and of magnitudes from 1e-3 to 1e9."""
        exponents = torch.rand(tuple(shape), dtype=torch.float64, generator=self.generator) * 12 - 3
        return self._random(shape) * 10**exponents

    def _ids(self, shape: Sequence[int]) -> Tensor:
        return random_ids(shape, self.experts, self.generator)

    # 2. head

    def _find_head(self) -> tuple[fx.Node, fx.Node, fx.Node | None, bool]:
        """ids, x, and w if it is applied to the input."""
        first = self.ups[0]
        region = ancestors([first.rows, first.selector])
        by_distance = sorted(region, key=lambda n: -self.order[n])
        two = [n for n in by_distance if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim() == 2]
        all_ids = [n for n in two if is_integer(n) and isinstance(n.meta["val"].shape[1], int) and self._sized(n)]
        floats = [n for n in two if is_float(n) and self._sized(n)]
        tokens = [n for n in floats if n.meta["val"].shape[1] == self.hidden and n is not first.rows]
        if len(all_ids) * len(tokens) > 256:
            raise _Refused("too many nodes could be the tokens or the expert ids")
        for ids in all_ids:
            for x in tokens:
                if self._head_holds(ids, x, None):
                    return ids, x, None, False
                for w in floats:
                    if w.meta["val"].shape == ids.meta["val"].shape and w is not x:
                        if self._head_holds(ids, x, w):
                            return ids, x, w, True
        raise _Refused("the up-projection's rows are not the tokens of the pairs that the expert ids name")

    def _head_holds(self, ids: fx.Node, x: fx.Node, w: fx.Node | None) -> bool:
        tables = []
        for index, (tokens, probe) in enumerate(zip(self.probe_tokens, self.probes, strict=True)):
            sizes = self._sizes(tokens)
            if shape_of(x, sizes)[0] != shape_of(ids, sizes)[0]:
                return False
            id_values = self._ids(shape_of(ids, sizes))
            if index == 2:
                id_values = self._all_experts(id_values.shape)
            elif index == 3:
                id_values = id_values[:1].expand_as(id_values).contiguous()  # all on the same experts
            x_values = self._spread(shape_of(x, sizes))
            overrides: dict[fx.Node, Any] = {ids: id_values, x: x_values}
            if w is not None:
                overrides[w] = self._spread(shape_of(w, sizes))
            wanted = [node for g in self.ups for node in (g.rows, g.selector)]
            try:
                values = probe.run(wanted, overrides)
            except EvaluationError:
                return False
            top_k = id_values.shape[1]
            pair_rows = x_values.repeat_interleave(top_k, 0)
            if w is not None:
                pair_rows = pair_rows * overrides[w].reshape(-1, 1)
            table = None
            for g, rows, selector in zip(self.ups, values[0::2], values[1::2], strict=True):
                found = _pair_of_row(
                    g.row_matrix(rows), g.experts_of(selector, len(pair_rows)), pair_rows, id_values.reshape(-1)
                )
                if found is None or (table is not None and not torch.equal(found, table)):
                    return False
                table = found
            assert table is not None
            tables.append((id_values, x_values, table))
        self.top_k = int(ids.meta["val"].shape[1])
        self.tables = tables
        return True

    def _check_dependence(self, output: fx.Node, w: fx.Node, on_input: bool) -> None:
        """Who may depend on whom, and that head and tail do not branch."""
        gemms = {self.down.node, *(g.node for g in self.ups)}
        cuts = {self.x, self.ids, w}
        if ancestors(cuts) & gemms:
            raise _Refused("the tokens, ids or routing weights depend on the experts' products")
        selectors = read_by([g.selector for g in (*self.ups, self.down)], stop=[self.ids])
        head = read_by([g.rows for g in self.ups], stop=[self.ids, self.x, *([w] if on_input else [])])
        middle = read_by([self.down.rows], stop=[self.ids, *(g.node for g in self.ups)])
        tail = read_by([output], stop=[self.ids, w, self.down.node])
        if tail & gemms:
            raise _Refused("the output depends on the up-projection beside the down-projection")
        for what, region in (
            ("the choice of experts", selectors),
            ("the up-projection's rows", head),
            ("the activation", middle),
            ("the output", tail),
        ):
            self._check_reads(what, region)
        names = {g.weight for g in (*self.ups, self.down)}
        reason = check_structure(
            self.captured,
            gemms,
            names,
            (self.x, self.ids, w),
            (selectors, head, middle, tail),
            self.top_k,
            self.experts,
        )
        if reason is not None:
            raise _Refused(reason)
        masked = self.captured.sentinels > 0
        for region in (selectors, head, tail):
            masked |= self._branches_by_id(region, cuts)
        if masked:
            self._check_sentinels(output, w, on_input)

    def _branches_by_id(self, region: set[fx.Node], cuts: set[fx.Node]) -> bool:
        """Whether a region leaves out ids; refuses if it branches on anything but ids."""
        masked = False
        counted = _counts(region)
        for node in region - cuts:
            # Ids that are none of these experts.
            masked |= op_name(node) == "one_hot" and node.meta["val"].shape[-1] > self.experts
            if op_name(node) in BRANCHES:
                if node in counted or not self._chooses_by_id(node, cuts, counted):
                    raise _Refused(f"{node.name} ({node.target}) branches outside the activation")
                # Comparing ids alone (one_hot, counting) provides for no others than the experts'.
                masked |= op_name(node) in SELECTS
        return masked

    def _chooses_by_id(self, node: fx.Node, cuts: set[fx.Node], counted: set[fx.Node]) -> bool:
        """Whether a branch follows from expert ids alone: probes that hit every expert see what it does."""
        if op_name(node) in ("masked_fill", "where"):
            condition = node.args[1 if op_name(node) == "masked_fill" else 0]
            if not isinstance(condition, fx.Node):
                return False
            node = condition
        for part in ancestors([node], stop=cuts):
            value = part.meta.get("val")
            if part in counted or (isinstance(value, Tensor) and value.is_floating_point()):
                return False
            numbers = [n for n in part.args if isinstance(n, (int, float)) and not isinstance(n, bool)]
            if op_name(part) in BRANCHES and any(not -1 <= n <= self.experts for n in numbers):
                return False
        return True

    def _check_sentinels(self, output: fx.Node, w: fx.Node, on_input: bool) -> None:
        """Ids that are no expert (>= E) must contribute nothing, as in the op, where a graph provides for them."""
        id_values, x_values, _ = (t.clone() for t in self.tables[0])
        others = id_values.view(-1)[::3]
        others[:] = self.experts + torch.arange(len(others)) % max(self.captured.sentinels, 1)
        weights = self._random(shape_of(w, self._sizes(self.probe_tokens[0])))
        given: dict[fx.Node, Any] = {self.ids: id_values, self.x: x_values, w: weights}
        first = self.ups[0]
        rows, selector = self.probes[0].run([first.rows, first.selector], given)
        experts = first.experts_of(selector, id_values.numel())
        pair_rows = x_values.repeat_interleave(self.top_k, 0)
        if on_input:
            pair_rows = pair_rows * weights.reshape(-1, 1)
        real_rows, real_pairs = experts < self.experts, id_values.reshape(-1) < self.experts
        found = _pair_of_row(
            first.row_matrix(rows)[real_rows],
            experts[real_rows],
            pair_rows[real_pairs],
            id_values.reshape(-1)[real_pairs],
        )
        if found is None:
            raise _Refused("the rows of ids that are no expert are not left out")
        y = self._random((len(experts), self.hidden))
        by_pair = torch.zeros((id_values.numel(), self.hidden), dtype=y.dtype)
        by_pair[real_pairs.nonzero().squeeze(1)[found]] = y[real_rows]
        if not on_input:
            by_pair = by_pair * (self._weights_of_pairs(w, weights, id_values) * self.scale).reshape(-1, 1)
        given[self.down.node] = self.down.as_output(y)
        for node in self._bias_nodes(output, [self.down.node, w], (self.down,)):
            given[node] = torch.zeros(node.meta["val"].shape, dtype=torch.float64)
        (out,) = self.probes[0].run([output], given)
        if not _close(by_pair.view(*id_values.shape, self.hidden).sum(1), out.reshape(-1, self.hidden)):
            raise _Refused("ids that are no expert contribute to the output")

    def _check_zeros(self, output: fx.Node, w: fx.Node, down_bias: tuple[fx.Node, ...]) -> None:
        """Where the original multiplies every token with every expert: other experts than the ids' do not count.

        Either their rows are zero, and so is what becomes of them, as products have no biases (a bias added later
        shows in the output); or the output is the same whatever they give.
        """
        dense, elsewhere = self.captured.dense, self.captured.elsewhere
        if not dense:
            return
        for probe, (id_values, x_values, _) in zip(self.probes, self.tables, strict=True):
            tokens, pairs = x_values.shape[0], id_values.numel()
            all_sizes = [self._sizes(t) for t in (*self.probe_tokens, self.last_tokens)]
            sizes = next(s for s in all_sizes if shape_of(self.x, s)[0] == tokens)
            given: dict[fx.Node, Any] = {self.ids: id_values, self.x: x_values, w: self._random(shape_of(w, sizes))}
            for g in (*self.ups, self.down):
                given[g.node] = g.as_output(self._random((pairs, g.shape[1])) * 4)
            for node in (*self.up_bias_nodes, *down_bias):
                given[node] = self._random(node.meta["val"].shape)
            chosen = torch.zeros(tokens, self.experts, dtype=torch.bool).scatter_(1, id_values, True).T
            if all(bool((rows[~chosen] == 0).all()) for rows in probe.run(dense, given)):
                continue
            for scale in (1.0, 1e6):
                other = {n: self._random((tokens, *n.meta["val"].shape[1:])) * scale for n in elsewhere}
                wanted = [output, self.down.rows]
                if not all(map(torch.equal, probe.run(wanted, given), probe.run(wanted, {**given, **other}))):
                    raise _Refused(
                        "every expert is multiplied with every token, and the rows of tokens that are not routed to "
                        "an expert are not proven to be zero, nor to count for nothing"
                    )

    def _check_reads(self, what: str, region: set[fx.Node]) -> None:
        """Refuse if a region reads the values, not just the sizes, of tokens or other float inputs."""
        for node in region:
            is_input = node.op == "placeholder" and node.name in self.captured.inputs and is_float(node)
            if (is_input or node is self.x) and any(
                user in region and not reads_no_values(user) for user in node.users
            ):
                raise _Refused(f"{what} also depends on {node.name}")

    # 3. middle

    def _bias_nodes(self, target: fx.Node, stop: Sequence[fx.Node], gemms: Sequence[ExpertGemm]) -> tuple[fx.Node, ...]:
        """The [E, N] parameters read between ``stop`` and ``target``, in the order of ``gemms``; or refuse."""
        where = "after the down-projection" if gemms[0] is self.down else "between the projections"
        region = ancestors([target], stop=[*stop, self.ids, self.x])
        read = [
            n
            for n in region
            if n.op == "placeholder" and n.name not in self.captured.inputs and n.name not in self.captured.constants
        ]
        weights = {g.weight for g in (*self.ups, self.down)}
        read = [n for n in read if self.captured.parameters.get(n.name) not in weights]
        for node in read:
            if node.name not in self.captured.parameters:
                raise _Refused(f"{self.captured.buffers.get(node.name, node.name)!r} is read {where}")
        if not read:
            return ()
        wanted = [(g.shape[0], g.shape[1]) for g in gemms]
        if sorted(tuple(n.meta["val"].shape) for n in read) != sorted(wanted):
            every = sorted(self.captured.parameters[n.name] for n in read)
            names = ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
            raise _Refused(f"{names} is read {where} and is not one bias per expert and row")
        if len(read) == 1:
            return tuple(read)
        # Two biases of separate gate and up projections: tell which is whose by what reaches it first.
        ordered = []
        for g in gemms:
            mine = [n for n in read if any(g.node in ancestors([u]) for u in _adders(n))]
            if len(mine) != 1:
                raise _Refused("it is not clear which bias belongs to which projection")
            ordered.append(mine[0])
        return tuple(ordered)

    def _middle(self, i: int, y: Tensor, bias: Tensor | None) -> Tensor:
        """The down GEMM's rows for up outputs ``y`` [S, N] and up bias [E, N], on probe ``i``."""
        id_values, x_values, _ = self.tables[i]
        given: dict[fx.Node, Any] = {self.ids: id_values, self.x: x_values}
        start = 0
        for g in self.ups:
            given[g.node] = g.as_output(y[:, start : start + g.shape[1]])
            start += g.shape[1]
        start = 0
        for node in self.up_bias_nodes:
            n = node.meta["val"].shape[1]
            given[node] = (
                torch.zeros(self.experts, n, dtype=torch.float64) if bias is None else bias[:, start : start + n]
            )
            start += n
        rows, selector = self.probes[i].run([self.down.rows, self.down.selector], given)
        pairs = id_values.reshape(-1)
        if not torch.equal(self.down.experts_of(selector, len(pairs)), pairs[self.tables[i][2]]):
            raise _Refused("the down-projection's rows belong to other experts than the up-projection's")
        return self.down.row_matrix(rows)

    def _find_middle(self, w: fx.Node | None) -> Any:
        gemms = (*self.ups, self.down)
        stop = [*(g.node for g in self.ups), *(g.selector for g in gemms), self.ids, self.x]
        region = ancestors([self.down.rows], stop=stop)
        constants = list(_constants(region, self.captured))
        # Enough tokens that all pairs of probe values find a place at once where the layer is narrow.
        tokens = max(6, math.ceil(_MIN_PROBES / (self.intermediate * self.top_k)))
        tokens += tokens % 2
        tables, probes = self.tables, self.probes
        probe = self._make_probe(tokens)
        self.last_tokens = tokens
        sizes = self._sizes(tokens)
        self.probes = [*probes, probe]
        id_values, x_values = self._ids(shape_of(self.ids, sizes)), self._random(shape_of(self.x, sizes))
        table = self._row_table(probe, id_values, x_values, w)
        self.tables = [*tables, (id_values, x_values, table)]
        last = len(self.tables) - 1
        rows = id_values.numel()
        found = recognize(lambda y: self._middle(last, y, None), rows, self.up_rows, self.intermediate, constants)
        if isinstance(found, str):
            raise _Refused(found)
        self._check_middle(found)
        return found

    def _row_table(self, probe: Evaluator, ids: Tensor, x: Tensor, w: fx.Node | None) -> Tensor:
        g = self.ups[0]
        given: dict[fx.Node, Any] = {self.ids: ids, self.x: x}
        pair_rows = x.repeat_interleave(self.top_k, 0)
        if w is not None:
            given[w] = self._random(ids.shape)
            pair_rows = pair_rows * given[w].reshape(-1, 1)
        rows, selector = probe.run([g.rows, g.selector], given)
        found = _pair_of_row(g.row_matrix(rows), g.experts_of(selector, len(pair_rows)), pair_rows, ids.reshape(-1))
        if found is None:
            raise _Refused("the order of rows depends on the number of tokens")
        return found

    def _check_middle(self, found: Any) -> None:
        """activation(y + bias of the expert) on fresh values, at every token count."""
        params = MoEParams(
            self.experts,
            self.hidden,
            self.intermediate,
            found.activation,
            found.gate_layout,
            found.activated_half,
            False,
            torch.float64,
            torch.float64,
        )
        for i, scale in [(i, 4.0) for i in range(len(self.tables))] + [(0, scale) for scale, _ in _SCALES]:
            id_values, _, table = self.tables[i]
            y = self._random((id_values.numel(), self.up_rows)) * scale
            bias = self._random((self.experts, self.up_rows)) * scale if self.up_bias_nodes else None
            out = self._middle(i, y, bias)
            if bias is not None:
                y = y + bias[id_values.reshape(-1)[table]]
            if not _close(params.activate(y), out, scale):
                raise _Refused("the region between the projections is more than a bias and an activation")

    # 4. tail

    def _find_tail(self, w: fx.Node | None, on_input: bool) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]:
        downstream = descendants([self.down.node]) - {self.down.node}
        outputs = [
            n
            for n in sorted(filter(is_float, downstream), key=lambda n: (n.meta["val"].dim(), self.order[n]))
            if n.meta["val"].dim()
            and self._sized(n)
            and n.meta["val"].shape[-1] == self.hidden
            and (_same_rows(n, self.x) if n.meta["val"].dim() == 2 else self._by_batch(n))
        ]
        for output in outputs:
            if not _covers(output, self.down.node, downstream):
                continue
            region = ancestors([output], stop=[self.down.node])
            candidates: list[fx.Node] = (
                [w]
                if on_input and w is not None
                else [
                    n
                    for n in sorted(filter(is_float, region), key=lambda n: (self._by_expert(n), -self.order[n]))
                    if self._sized(n)
                    and (n.meta["val"].shape == self.ids.meta["val"].shape or self._by_expert(n))
                ]
            )
            try:
                bias = self._bias_nodes(output, [self.down.node, *candidates], (self.down,))
            except _Refused as refusal:
                last = refusal
                continue
            for weight in candidates:
                self.scale = 1.0
                if self._tail_holds(output, weight, bias, on_input):
                    return weight, output, bias
                self.scale = 1.0 if on_input else self._factor(output, weight, bias)
                if self.scale != 1.0 and self._tail_holds(output, weight, bias, on_input):
                    return weight, output, bias
        if outputs and "last" in locals():
            raise last
        raise _Refused(
            "the output is not the sum of the experts' outputs (plus bias) times the routing weights: "
            "something else happens after the down-projection"
        )

    def _only_added_to(self, output: fx.Node) -> bool:
        """Whether the block only adds to the sum until it rounds it to the tokens' dtype.

        Anything else (a conversion to whole numbers, a threshold) may make more of one rounding.
        """
        x_dtype, waiting, seen = self.x.meta["val"].dtype, list(output.users), set()
        while waiting:
            node = waiting.pop()
            value = node.meta.get("val")
            if node in seen or not isinstance(value, Tensor) or node.op == "output":
                continue
            seen.add(node)
            if op_name(node) in CASTS and value.dtype == x_dtype:
                continue
            if op_name(node) not in ADDS or value.dtype != torch.float32:
                return False
            waiting.extend(node.users)
        return True

    def _narrowed(self, output: fx.Node) -> fx.Node:
        """A new node: a sum in fp32, to which the block adds more before it rounds, in the tokens' dtype.

        The op gives its sum in that dtype; one rounding more, which verification judges.
        """
        with self.graph.inserting_after(output):
            narrow = self.graph.call_function(torch.ops.aten._to_copy.default, (output,))
        with self.graph.inserting_after(narrow):
            wide = self.graph.call_function(torch.ops.aten._to_copy.default, (narrow,))
        for node, dtype in ((narrow, self.x.meta["val"].dtype), (wide, torch.float32)):
            node.kwargs = {"dtype": dtype}
            node.meta["val"] = output.meta["val"].new_empty(output.meta["val"].shape, dtype=dtype)
        output.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not narrow)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        return narrow

    def _by_batch(self, node: fx.Node) -> bool:
        """Whether a node may be [batch, length, H] with as many rows as there are tokens."""
        sizes = self._sizes(6)
        shape = shape_of(node, sizes)
        return len(shape) == 3 and node.meta["val"].shape[1] != 1 and shape[0] * shape[1] == shape_of(self.x, sizes)[0]

    def _flattened(self, output: fx.Node) -> fx.Node:
        """A new node [T, H] for an output [batch, length, H], which is made of it again for those who read it."""
        reshape, value = torch.ops.aten.reshape.default, output.meta["val"]
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        lead: list[Any] = []
        for size in value.shape[:2]:
            found = [
                (n, d)
                for n in map(self.captured.node, self.captured.inputs)
                for d, own in enumerate(n.meta["val"].shape)
                if str(own) == str(size)
            ]
            if isinstance(size, int) or not found:
                lead.append(size if isinstance(size, int) else -1)
                continue
            with self.graph.inserting_after(last):
                lead.append(self.graph.call_function(torch.ops.aten.sym_size.int, found[0]))
            lead[-1].meta["val"] = size
        if lead.count(-1) > 1:
            raise _Refused("the output's batch and length are no sizes of the inputs")
        with self.graph.inserting_after(output):
            flat = self.graph.call_function(reshape, (output, [-1, self.hidden]))
        with self.graph.inserting_after(flat):
            back = self.graph.call_function(reshape, (flat, [*lead, self.hidden]))
        flat.meta["val"] = value.new_empty((value.shape[0] * value.shape[1], self.hidden))
        back.meta["val"] = value
        output.replace_all_uses_with(back, delete_user_cb=lambda user: user is not flat)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        return flat

    def _by_expert(self, node: fx.Node) -> bool:
        """Whether a node may be routing weights of all experts [T, E], of which the ids choose some."""
        value = node.meta["val"]
        return bool(value.dim() == 2 and value.shape[1] == self.experts > self.top_k and _same_rows(node, self.ids))

    def _weights_of_pairs(self, w: fx.Node, values: Tensor, ids: Tensor) -> Tensor:
        """Each pair's routing weight [T, K], of ``values`` of ``w``."""
        return values.gather(1, ids.clamp(max=self.experts - 1)) if self._by_expert(w) else values

    def _gathered(self, w: fx.Node) -> fx.Node:
        """A new node: each pair's weight, of routing weights of all experts; ids past the last count for nothing."""
        last = max((n for n in (w, self.ids)), key=lambda n: self.order[n])
        if last.op == "placeholder":
            last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        made = []
        with self.graph.inserting_after(last):
            made.append(self.graph.call_function(torch.ops.aten.clamp.default, (self.ids, None, self.experts - 1)))
        with self.graph.inserting_after(made[0]):
            made.append(self.graph.call_function(torch.ops.aten.gather.default, (w, 1, made[0])))
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        made[0].meta["val"] = self.ids.meta["val"]
        made[1].meta["val"] = w.meta["val"].new_empty(self.ids.meta["val"].shape)
        return made[1]

    def _factor(self, output: fx.Node, w: fx.Node, bias: tuple[fx.Node, ...]) -> float:
        """The constant that the output may be of the weighted sum, 1.0 if there is none."""
        try:
            expected, out = self._tail(output, w, bias, False, 0, 1.0, 1.0)
        except EvaluationError:
            return 1.0
        norm = float(expected.square().sum())
        ratio = float((expected * out).sum()) / norm if expected.shape == out.shape and norm > 0 else 0.0
        return ratio if math.isfinite(ratio) and ratio != 0 else 1.0

    def _tail_holds(self, output: fx.Node, w: fx.Node, bias: tuple[fx.Node, ...], on_input: bool) -> bool:
        cases = [(i, 1.0, 1.0) for i in range(len(self.tables))] + [(0, *scales) for scales in _SCALES]
        for i, y_scale, w_scale in cases:
            try:
                expected, out = self._tail(output, w, bias, on_input, i, y_scale, w_scale)
            except EvaluationError:
                return False
            if not _close(expected, out, y_scale * (1.0 if on_input else w_scale)):
                return False
        return True

    def _tail(
        self,
        output: fx.Node,
        w: fx.Node,
        bias: tuple[fx.Node, ...],
        on_input: bool,
        i: int,
        y_scale: float,
        w_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """What the output should be on probe ``i``, and what it is."""
        id_values, x_values, table = self.tables[i]
        y = self._random((id_values.numel(), self.hidden)) * y_scale
        sizes = self._sizes((*self.probe_tokens, self.last_tokens)[i])
        weights = self._random(shape_of(w, sizes)) * w_scale
        given: dict[fx.Node, Any] = {
            self.ids: id_values,
            self.x: x_values,
            self.down.node: self.down.as_output(y),
            w: weights,
        }
        expected = y
        for node in bias:
            given[node] = self._random(node.meta["val"].shape) * y_scale
            expected = expected + given[node][id_values.reshape(-1)[table]]
        by_pair = torch.empty_like(expected)
        by_pair[table] = expected
        if not on_input:
            by_pair = by_pair * (self._weights_of_pairs(w, weights, id_values) * self.scale).reshape(-1, 1)
        (out,) = self.probes[i].run([output], given)
        return by_pair.view(*id_values.shape, self.hidden).sum(1), out.reshape(-1, self.hidden)

    def _absorb(self, output: fx.Node, w: fx.Node) -> None:
        """Put x * (the weights of ids from E on) in the place of a loop over experts that hand the token on.

        Such experts have no weights (longcat_flash). Their loop finds its rows by nonzero, whose size only the device
        knows: neither a CUDA graph nor a compiled one takes it. Where it cannot be proven to be this, it stays.
        """
        if self.captured.sentinels < 1 or w.meta["val"].shape != self.ids.meta["val"].shape:
            return
        later = descendants([output]) - {output}
        sums = [n for n in later if n is not output and is_float(n) and n.meta["val"].shape == output.meta["val"].shape]
        for final in sorted(sums, key=lambda n: -self.order[n]):
            if _covers(final, output, later) and self._hands_on(output, w, final):
                break
        else:
            return
        x, ids, dtype = self.x, self.ids, final.meta["val"].dtype
        aten = torch.ops.aten
        with self.graph.inserting_after(final):
            chosen = self.graph.call_function(aten.ge.Scalar, (ids, self.experts))
        chosen.meta["val"] = ids.meta["val"].new_empty(ids.meta["val"].shape, dtype=torch.bool)
        value, before = w.meta["val"], chosen

        def then(target: Any, args: Any, shape: Any, kind: torch.dtype, **kwargs: Any) -> fx.Node:
            nonlocal before
            with self.graph.inserting_after(before):
                before = self.graph.call_function(target, args, kwargs)
            before.meta["val"] = value.new_empty(shape, dtype=kind)
            return before

        kept = then(aten.mul.Tensor, (w, chosen), value.shape, value.dtype)
        total = then(aten.sum.dim_IntList, (kept, [1], True), (value.shape[0], 1), value.dtype)
        wide = torch.promote_types(value.dtype, x.meta["val"].dtype)
        part = then(aten.mul.Tensor, (x, total), x.meta["val"].shape, wide)
        if wide != dtype:
            part = then(aten._to_copy.default, (part,), x.meta["val"].shape, dtype, dtype=dtype)
        result = then(aten.add.Tensor, (output, part), x.meta["val"].shape, dtype)
        final.replace_all_uses_with(result)
        self.graph.eliminate_dead_code()

    def _hands_on(self, output: fx.Node, w: fx.Node, final: fx.Node) -> bool:
        """Whether ``final`` is ``output`` + x * (the weights of ids from E on), for all ids and token counts."""
        cuts = (self.x, self.ids, w, output)
        region = read_by([final], stop=cuts)
        try:
            self._branches_by_id(region, set(cuts))
        except _Refused:
            return False
        nothing: set[fx.Node] = set()
        names = {g.weight for g in (*self.ups, self.down)}
        regions = (nothing, nothing, nothing, region)
        if check_structure(self.captured, (), names, cuts, regions, self.top_k, self.experts) is not None:
            return False
        everyone = self.experts + self.captured.sentinels
        for tokens, probe in zip(self.probe_tokens, self.probes, strict=False):
            sizes = self._sizes(tokens)
            for lowest, scale in ((0, 1.0), (0, 1e3), (self.experts, 1.0), (0, 1e-3)):
                shape = shape_of(self.ids, sizes)
                ids = torch.randint(lowest, everyone, tuple(shape), generator=self.generator)
                given: dict[fx.Node, Any] = {
                    self.ids: ids,
                    self.x: self._random(shape_of(self.x, sizes)) * scale,
                    w: self._random(shape_of(w, sizes)),
                    output: self._random(shape_of(output, sizes)) * scale,
                }
                try:
                    (out,) = probe.run([final], given)
                except EvaluationError:
                    return False
                weight = (given[w] * (ids >= self.experts)).sum(1, keepdim=True)
                if not _close(given[output] + given[self.x] * weight, out, scale):
                    return False
        return True

    # 5. casts and dtypes

    def _check_casts(self, output: fx.Node, w: fx.Node, round_dtype: torch.dtype) -> None:
        rounding = torch.finfo(round_dtype)
        final = ancestors([output], stop=[self.x, self.ids, w])
        for node in final:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or node.op == "placeholder":
                continue
            operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            counts = bool(operands) and all(is_integer(n) for n in operands)
            if value.dtype in _NARROW_INTEGERS or (counts and value.dtype in (torch.bfloat16, torch.float16)):
                raise _Refused(f"{node.name} holds ids or counts in {value.dtype}")
            if not value.is_floating_point():
                continue
            info = torch.finfo(value.dtype)
            if info.eps > rounding.eps or info.max < rounding.max:
                raise _Refused(f"{node.name} rounds to {value.dtype}, narrower than {round_dtype}")

    def _extend(self, output: fx.Node) -> fx.Node:
        """Take in a closing cast to the tokens' dtype."""
        x_dtype = self.x.meta["val"].dtype
        while output.meta["val"].dtype != x_dtype and len(output.users) == 1:
            (user,) = output.users
            value = user.meta.get("val")
            if user.target not in (
                torch.ops.aten._to_copy.default,
                torch.ops.aten.to.dtype,
                torch.ops.prims.convert_element_type.default,
            ) or not isinstance(value, Tensor):
                break
            if value.dtype != x_dtype:
                break  # a detour through another dtype may round once more
            output = user
        return output

    def _accum_dtype(self, w: fx.Node, round_dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(w.meta["val"].dtype, round_dtype)


def _pair_of_row(rows: Tensor, experts: Tensor, pair_rows: Tensor, ids: Tensor) -> Tensor | None:
    """[S] pair of each row if rows and experts are exactly those of the pairs in some order, else None."""
    if rows.shape != pair_rows.shape:
        return None
    # One random number per row and expert stands for the whole row while pairing; the rows themselves decide.
    direction = torch.randn(rows.shape[1], dtype=rows.dtype, generator=torch.Generator().manual_seed(2))
    key_rows = rows @ direction + math.pi * experts.to(rows.dtype)
    key_pairs = pair_rows @ direction + math.pi * ids.to(rows.dtype)
    pair = torch.empty(len(key_rows), dtype=torch.int64)
    pair[key_rows.argsort()] = key_pairs.argsort()
    if not torch.equal(experts.to(ids.dtype), ids[pair]) or not _close(rows, pair_rows[pair]):
        return None
    return pair


def _close(a: Tensor, b: Tensor, scale: float = 1.0) -> bool:
    """Equal within the rounding of fp64, for values computed from ones of magnitude ``scale``."""
    if a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= _TOLERANCE * (scale + torch.maximum(a.abs(), b.abs()))).all())


def _counts(region: set[fx.Node]) -> set[fx.Node]:
    """The nodes of a region that depend on a count made in it."""
    return descendants((n for n in region if op_name(n) in COUNTING and not is_float(n)), region)


def _constants(region: set[fx.Node], captured: Captured) -> Iterator[float]:
    """Every number written in a region's nodes, and the values of one-element constants it reads."""
    for node in region:
        if node.op == "placeholder":
            constant = captured.constants.get(node.name)
            if constant is not None and constant.numel() == 1:
                yield float(constant)
            continue
        if op_name(node) in SHAPING or is_integer(node) or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            continue  # sizes, positions and experts are no numbers of a formula, and every number costs probes
        for value in torch.utils._pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if abs(value) < (1e30 if isinstance(value, float) else 1e9):  # slice ends are no numbers of a formula
                    yield float(value)
                    if value:
                        yield 1 / float(value)


def _adders(node: fx.Node) -> list[fx.Node]:
    """The two-operand nodes that a bias reaches first."""
    found, stack = [], list(node.users)
    while stack:
        user = stack.pop()
        if len(user.all_input_nodes) >= 2 and str(user.target).startswith("aten.add"):
            found.append(user)
        else:
            stack.extend(user.users)
    return found


def _covers(output: fx.Node, down: fx.Node, downstream: set[fx.Node]) -> bool:
    """Whether everything that leaves the region after the down GEMM leaves through ``output``."""
    inside = ancestors([output]) & downstream
    if any(user not in inside and isinstance(user.meta.get("val"), Tensor) for user in down.users):
        return False  # a sum over some of the experts
    return all(user in inside for node in inside - {output} for user in node.users)


def _same_rows(a: fx.Node, b: fx.Node) -> bool:
    return bool(str(a.meta["val"].shape[0]) == str(b.meta["val"].shape[0]))
