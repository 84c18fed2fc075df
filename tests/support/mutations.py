"""Mutations of traced experts graphs, and a judge that knows nothing of the matcher.

A mutation edits a copy of a real traced graph. ``CHANGING`` ones compute another function than the
traced module did, ``PRESERVING`` ones the same function spelled in another way. What a mutated graph
means is decided by running it: ``execute`` is an executor of its own.
"""

from __future__ import annotations

import copy
import heapq
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from mxfp4_compile import mx
from mxfp4_compile.ops.arguments import Slot
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.passes.build.rewrite import rewrite
from mxfp4_compile.passes.find.discover import experts_implementation, find_candidates, record_calls
from mxfp4_compile.passes.graph import graph_symbols
from mxfp4_compile.passes.match import FusedMatch, SplitMatch
from mxfp4_compile.passes.match.forms import ExpertGemm, find_gemms
from mxfp4_compile.passes.trace.export import trace
from mxfp4_compile.passes.trace.traced import Traced, call_pattern
from mxfp4_compile.passes.weights import projections_of
from mxfp4_compile.tools.families import tiny_model

A = torch.ops.aten
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
_FLOATS = (f16, bf16, f32, f64)


# ---------------------------------------------------------------- where graphs come from


@dataclass(frozen=True)
class Source:
    """A tiny family's experts module, traced; ``state``: its parameters and buffers by name."""

    traced: Traced
    state: Mapping[str, Tensor]
    experts: int
    dtype: torch.dtype


@cache
def source(family: str, dtype: torch.dtype = f32, form: str = "grouped_mm", **overrides: Any) -> Source:
    model = tiny_model(family, dtype=dtype, layers=2, **overrides)
    candidates = find_candidates(model)
    record_calls(model, candidates)
    found = next(c for c in candidates if c.kind == "packed" and c.calls)
    with experts_implementation(model, form):
        traced = trace(found.module, call_pattern(found.calls[0], found.calls[-1]))
    # An edit's fake run must not tie the number of tokens to a value for all edits after it.
    next(n for n in traced.graph.nodes if n.op == "placeholder").meta["val"].fake_mode.shape_env.freeze()
    state = {n: t.detach() for n, t in (*found.module.named_parameters(), *found.module.named_buffers())}
    return Source(traced, state, max(t.shape[0] for t in state.values() if t.dim() == 3), dtype)


# ---------------------------------------------------------------- editing


class V:
    """A node with operators; every operation adds a node to the graph that is being edited."""

    def __init__(self, edit: Edit, node: fx.Node) -> None:
        self.edit, self.node = edit, node

    @property
    def val(self) -> Any:
        return self.node.meta["val"]

    def op(self, target: Any, *args: Any, **kwargs: Any) -> V:
        return self.edit.op(target, self, *args, **kwargs)

    def __add__(self, other: Any) -> V:
        return self.op(A.add.Tensor, other)

    def __sub__(self, other: Any) -> V:
        return self.op(A.sub.Tensor, other)

    def __mul__(self, other: Any) -> V:
        return self.op(A.mul.Tensor, other)

    def __truediv__(self, other: Any) -> V:
        return self.op(A.div.Tensor, other)

    def __neg__(self) -> V:
        return self.op(A.neg.default)

    def _compare(self, name: str, other: Any) -> V:
        packet = getattr(A, name)
        return self.op(packet.Tensor if isinstance(other, V) else packet.Scalar, other)

    def gt(self, other: Any) -> V:
        return self._compare("gt", other)

    def lt(self, other: Any) -> V:
        return self._compare("lt", other)

    def ge(self, other: Any) -> V:
        return self._compare("ge", other)

    def eq(self, other: Any) -> V:
        return self._compare("eq", other)

    def to(self, dtype: torch.dtype) -> V:
        return self.op(A._to_copy.default, dtype=dtype)

    def through(self, dtype: torch.dtype) -> V:
        return self.to(dtype).to(self.val.dtype)

    def abs(self) -> V:
        return self.op(A.abs.default)

    def sigmoid(self) -> V:
        return self.op(A.sigmoid.default)

    def view(self, *shape: Any) -> V:
        return self.op(A.view.default, list(shape))

    def unsqueeze(self, dim: int) -> V:
        return self.op(A.unsqueeze.default, dim)

    def squeeze(self, dim: int) -> V:
        return self.op(A.squeeze.dim, dim)

    def cols(self, start: int, end: int, step: int = 1) -> V:
        return self.op(A.slice.Tensor, -1, start, end, step)

    def select(self, dim: int, index: int) -> V:
        return self.op(A.select.int, dim, index)

    def sum(self, dims: list[int], keep: bool = False) -> V:
        return self.op(A.sum.dim_IntList, dims, keep)

    def mean(self, dims: list[int], keep: bool = False) -> V:
        return self.op(A.mean.dim, dims, keep)

    def index(self, rows: V) -> V:
        return self.op(A.index.Tensor, [rows])

    def item(self, i: int) -> V:
        return self.op(operator.getitem, i)

    def where(self, condition: V, other: V) -> V:
        """``other`` where the condition holds, else self."""
        return self.edit.op(A.where.self, condition, other, self)


class Edit:
    """A copy of a traced graph under change; ``done()`` puts it in order again."""

    def __init__(self, source: Source) -> None:
        traced = source.traced
        self.source = source
        self.graph: fx.Graph = copy.deepcopy(traced.graph)
        self.traced = replace(traced, graph=self.graph, constants=dict(traced.constants))
        self.mode = next(n for n in self.graph.nodes if n.op == "placeholder").meta["val"].fake_mode
        self.output = next(n for n in self.graph.nodes if n.op == "output")
        gemms: list[ExpertGemm] = find_gemms(self.traced)
        self.ups, self.down = gemms[:-1], gemms[-1]
        self.batched = self.down.form == "batched_mm"
        x, ids, w = (self.traced.node(n) for n in traced.inputs)
        self.x, self.ids, self.w = V(self, x), V(self, ids), V(self, w)
        self.E, (self.T, self.K) = source.experts, (self.w.val.shape[0], self.w.val.shape[1])
        self.H, self.I = self.down.shape[1], self.down.shape[2]

    # nodes by role

    def find(self, target: Any, n: int = 0) -> V:
        return V(self, [node for node in self.graph.nodes if node.target == target][n])

    def _matrix(self, node: fx.Node) -> V:
        while node.target == A.unsqueeze.default:
            node = node.args[0]
        return V(self, node)

    def _out(self, node: fx.Node) -> V:
        while self.batched and node.meta["val"].dim() == 3:
            (node,) = node.users
        return V(self, node)

    @property
    def rows(self) -> V:
        """[S, H] gathered tokens."""
        return self._matrix(self.ups[0].rows)

    @property
    def u(self) -> V:
        """[S, N] output of the up-projection, before its bias."""
        return self._out(self.ups[0].node)

    @property
    def h(self) -> V:
        """[S, I] input of the down-projection."""
        return self._matrix(self.down.rows)

    @property
    def y(self) -> V:
        """[S, H] output of the down-projection, before its bias."""
        return self._out(self.down.node)

    @property
    def out(self) -> V:
        return V(self, self.output.args[0][0])

    @property
    def pairs(self) -> V:
        """[T, K, H], summed over K."""
        return V(self, self.out.node.args[0])

    @property
    def weighted(self) -> V:
        """[S, H] experts' outputs times the routing weights, in the rows' order."""
        return [V(self, n) for n in self.graph.nodes if n.target == A.mul.Tensor][-1]

    @property
    def w_rows(self) -> V:
        """[S] routing weights in the rows' order."""
        return self._matrix(self.weighted.node.args[1])

    @property
    def perm(self) -> V:
        return next(V(self, n) for n in self.find(A.sort.default).node.users if n.args[1] == 1)

    @property
    def row_ids(self) -> V:
        """[S] expert of each row."""
        if self.batched:
            return V(self, self.down.selector)
        return next(V(self, n) for n in self.find(A.sort.default).node.users if n.args[1] == 0)

    @property
    def inverse(self) -> V:
        return self.find(A.index_put.default)

    @property
    def token(self) -> V:
        return self.find(A.floor_divide.default)

    @property
    def offs(self) -> V:
        return V(self, self.down.selector)

    @property
    def halves(self) -> tuple[V, V]:
        """First and second half (even and odd columns) of the up-projection's output."""
        slices = [V(self, n) for n in self.graph.nodes if n.target == A.slice.Tensor and n.args[1] == 1]
        if slices:
            return slices[0], slices[1]
        items = [n for n in self.graph.nodes if n.target == operator.getitem and n.args[0].target == A.split.Tensor]
        first = next(n for n in items if n.args[1] == 0 and n.users)
        second = next(n for n in items if n.args[1] == 1 and n.users)
        return V(self, first), V(self, second)

    def parameter(self, name: str) -> V:
        return V(self, self.traced.node(next(p for p, n in self.traced.parameters.items() if n == name)))

    # changes

    def op(self, target: Any, *args: Any, **kwargs: Any) -> V:
        unwrap = lambda t: torch.utils._pytree.tree_map(lambda a: a.node if isinstance(a, V) else a, t)
        with self.graph.inserting_before(self.output):
            node = self.graph.call_function(target, unwrap(args), unwrap(kwargs))
        self._propagate(node)
        return V(self, node)

    def new(self, target: Any, *args: Any, dtype: torch.dtype = f32) -> V:
        return self.op(target, *args, dtype=dtype, device=torch.device("cpu"), pin_memory=False)

    def arange(self, size: Any) -> V:
        return self.op(A.arange.default, size, device=torch.device("cpu"), pin_memory=False)

    def full(self, shape: list[Any], value: Any, dtype: torch.dtype = f32) -> V:
        return self.new(A.full.default, shape, value, dtype=dtype)

    def size(self, v: V, dim: int = 0) -> V:
        return v.op(A.sym_size.int, dim)

    def constant(self, value: Tensor) -> V:
        name = f"c_extra_{len(self.traced.constants)}"
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(value)
        self.traced.constants[node.name] = value
        return V(self, node)

    def swap(self, v: V, new: Callable[[V], V] | V) -> V:
        """Every use of ``v`` reads ``new`` instead (uses within ``new`` excepted)."""
        users = list(v.node.users)
        made = new if isinstance(new, V) else new(v)
        for user in users:
            if user is not made.node:
                user.replace_input_with(v.node, made.node)
        return made

    def at(self, user: V, v: V, new: Callable[[V], V] | V) -> None:
        """One user of ``v`` reads ``new`` instead."""
        made = new if isinstance(new, V) else new(v)
        user.node.replace_input_with(v.node, made.node)

    def arg(self, v: V, i: int, value: Any) -> None:
        v.node.update_arg(i, value.node if isinstance(value, V) else value)

    def kwarg(self, v: V, **values: Any) -> None:
        v.node.kwargs = {**v.node.kwargs, **values}

    def done(self, order: Callable[[int], float] = float) -> Traced:
        """Sorted (``order``: position -> priority), dead code dropped, values of all nodes propagated again."""
        nodes = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        rank = {n: (order(i), i) for i, n in enumerate(nodes)}
        waiting = {n: sum(a.op != "placeholder" for a in n.all_input_nodes) for n in nodes}
        ready = [(rank[n], n) for n in nodes if waiting[n] == 0]
        heapq.heapify(ready)
        while ready:
            _, node = heapq.heappop(ready)
            self.output.prepend(node)
            for user in node.users:
                if user in waiting:
                    waiting[user] -= 1
                    if waiting[user] == 0:
                        heapq.heappush(ready, (rank[user], user))
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._propagate(node)
        self.graph.lint()
        assert len(graph_symbols(self.graph)) == 1, "an op of this mutation ties the number of tokens to a value"
        return self.traced

    def _propagate(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)


# ---------------------------------------------------------------- judging


def execute(traced: Traced, state: Mapping[str, Tensor], inputs: Sequence[Tensor], wide: bool = False) -> Tensor:
    """Run a traced graph on real tensors; ``wide``: everything in fp64, casts between floats ignored."""
    names = {**traced.parameters, **traced.buffers}
    given = dict(zip(traced.inputs, inputs, strict=True))
    env: dict[fx.Node, Any] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _FLOATS:
            return value.to(f64)
        return f64 if isinstance(value, torch.dtype) and value in _FLOATS else value

    with torch.no_grad():
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                if node.name in given:
                    value = given[node.name]
                elif node.name in names:
                    value = state[names[node.name]]
                else:
                    value = traced.constants[node.name]
                env[node] = widen(value) if wide else value
            elif node.op == "output":
                return env[node.args[0][0]]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                if wide:
                    args, kwargs = torch.utils._pytree.tree_map(widen, (args, kwargs))
                if "grouped_mm" in str(node.target):
                    env[node] = _grouped(*args)
                else:
                    env[node] = node.target(*args, **kwargs)
    raise AssertionError("a graph without output")


def _grouped(rows: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    """rows [S, K] sorted by expert, stack [E, K, N], offsets [E] -> [S, N]; rows past the last offset are 0."""
    out = rows.new_zeros(rows.shape[0], stack.shape[2])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            wide = f64 if rows.dtype == f64 else f32
            out[start:end] = (rows[start:end].to(wide) @ stack[expert].to(wide)).to(rows.dtype)
            start = end
    return out


@dataclass(frozen=True)
class Call:
    """Tensors for one judged call; ``bias``: factor on all 2-D parameters (and constants of that size)."""

    tokens: int
    scale: float = 1.0
    bias: float = 1.0
    weight: float = 1.0
    routing: str = "random"


CALLS = (
    Call(1),
    Call(2, scale=3.0),
    Call(13),
    Call(13, scale=50.0, bias=20.0, weight=8.0),
    Call(9, routing="one"),
    Call(9, scale=2.0, routing="skip last"),
)


def call_inputs(source: Source, call: Call, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    first, _, last = source.traced.inputs
    hidden = source.traced.node(first).meta["val"].shape[1]
    top_k = source.traced.node(last).meta["val"].shape[1]
    x = torch.randn(call.tokens, hidden, generator=generator) * call.scale
    x = x * torch.linspace(0.5, 1.5, call.tokens).unsqueeze(1)
    usable = source.experts - 1 if call.routing == "skip last" else source.experts
    rows = 1 if call.routing == "one" else call.tokens
    ids = torch.rand(rows, usable, generator=generator).argsort(1)[:, :top_k].expand(call.tokens, top_k).contiguous()
    if call.routing == "all":  # every expert in its turn
        ids = torch.arange(call.tokens * top_k).view(call.tokens, top_k) % source.experts
    w = (torch.rand(call.tokens, top_k, generator=generator) + 0.05) * call.weight
    return [x.to(source.dtype), ids, w.to(source.dtype)]


def overall(a: Tensor, b: Tensor) -> float:
    """Relative distance as a whole; infinite where only one is."""
    a, b = a.double(), b.double()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    return float((a - b).nan_to_num(0, 0, 0).norm() / (b.nan_to_num(0, 0, 0).norm() + 1e-30))


def with_bias(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {n: t * factor if t.dim() == 2 else t for n, t in state.items()}


def distance(a: Tensor, b: Tensor) -> float:
    """Largest distance of two rows relative to that row of ``b`` (and a tenth of the largest row)."""
    a, b = a.double(), b.double()
    if a.shape != b.shape:
        return float("inf")
    if torch.equal(a.isfinite(), b.isfinite()):
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    norms = b.norm(dim=1)
    return float(((a - b).norm(dim=1) / (norms + 0.1 * norms.max() + 1e-30)).nan_to_num(nan=float("inf")).max())


def quantized(
    source: Source, found: FusedMatch | SplitMatch
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], dict[str, Tensor]]:
    """State with dequantized weights, weights by slot, and biases by slot, as optimize() would make them.

    Mutations of one source that use its weights alike share them.
    """
    key = id(source), repr(projections_of(found.spec))  # sources are kept for good
    if key not in _quantized:
        _quantized[key] = _quantize(source, found)
    return _quantized[key]


_quantized: dict[tuple[int, str], tuple[dict[str, Tensor], dict[str, list[Tensor]], dict[str, Tensor]]] = {}


def _quantize(
    source: Source, found: FusedMatch | SplitMatch
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], dict[str, Tensor]]:
    state = dict(source.state)
    weights, biases = {}, {}
    for projection in projections_of(found.spec):
        names, transposed = projection.source.parameters, projection.source.transposed
        parts = [source.state[n].transpose(1, 2) if transposed else source.state[n] for n in names]
        packed, scales = mx.quantize(torch.cat(parts, 1), "mse")
        assert (parts[0].shape[0], packed.shape[1], parts[0].shape[2]) == projection.shape
        deq = mx.dequantize(packed, scales, projection.shape[2], source.dtype)
        for name, part in zip(names, deq.split([p.shape[1] for p in parts], 1), strict=True):
            back = part.transpose(1, 2) if transposed else part
            if state[name] is not source.state[name]:
                assert torch.equal(state[name], back), f"{name} is quantized twice, along different dimensions"
            state[name] = back.contiguous()
        weights[projection.slot] = [packed, scales]
        if projection.source.bias:
            biases[projection.slot] = torch.cat([source.state[n] for n in projection.source.bias], 1)
    return state, weights, biases


def run_rewritten(
    traced: Traced,
    found: FusedMatch | SplitMatch,
    backend: str,
    state: Mapping[str, Tensor],
    weights: Mapping[str, list[Tensor]],
    biases: Mapping[str, Tensor],
) -> Callable[[Sequence[Tensor], float], Tensor]:
    """The rewritten graph as a function of the call's tensors and the factor on biases."""
    params = found.spec.params if isinstance(found, FusedMatch) else None
    prepared = {}
    for projection in projections_of(found.spec):
        packed, scales = weights[projection.slot]
        prepared[projection.slot] = get_backend(backend).prepare(
            packed, scales, Slot(projection.role, params, "canonical"), k=projection.shape[2]
        )
    module = rewrite(traced, found, {s: len(t) for s, t in prepared.items()}, backend, "canonical")
    names = {**traced.parameters, **traced.buffers}

    def run(inputs: Sequence[Tensor], factor: float) -> Tensor:
        given: dict[str, Tensor] = dict(zip(traced.inputs, inputs, strict=True))
        for slot, tensors in prepared.items():
            given |= {f"{slot}_{i}": t for i, t in enumerate(tensors)}
        for p in projections_of(found.spec):
            if p.slot in biases:
                given[f"{p.slot}_bias"] = get_backend(backend).prepare_bias(
                    biases[p.slot] * factor, Slot(p.role, params, "canonical")
                )
        kept = with_bias(state, factor)
        given |= {p: kept[n] for p, n in names.items()}
        order = [n.target for n in module.graph.nodes if n.op == "placeholder"]
        with torch.no_grad():
            return module(*[given[name] for name in order])

    return run


# ---------------------------------------------------------------- catalogue


@dataclass(frozen=True)
class Mutation:
    """``make(edit)`` changes the graph; ``calls``: judged besides the usual ones.

    ``narrows``: rounds in a way that ``execute(wide=True)`` does not show, so that a bf16 graph is judged by
    its own eager run. ``order``: see Edit.done. ``random``: the eager run differs from time to time.
    """

    name: str
    make: Callable[[Edit], Any]
    family: str
    dtype: torch.dtype = f32
    form: str = "grouped_mm"
    overrides: tuple[tuple[str, Any], ...] = ()
    calls: tuple[Call, ...] = ()
    narrows: bool = False
    random: bool = False
    order: Callable[[int], float] = float

    @property
    def source(self) -> Source:
        return source(self.family, self.dtype, self.form, **dict(self.overrides))

    @property
    def id(self) -> str:
        marks = [self.family, *(["bf16"] if self.dtype == bf16 else []), *(["bmm"] if "b" in self.form[0] else [])]
        return f"{self.name}-{'-'.join(marks)}"

    def mutate(self) -> Traced:
        edit = Edit(self.source)
        self.make(edit)
        return edit.done(self.order)


CHANGING: list[Mutation] = []
PRESERVING: list[Mutation] = []
QWEN, GPT, PRIVACY, NEMOTRON, DEEPSEEK, GEMMA = (
    "qwen3_moe",
    "gpt_oss",
    "openai_privacy_filter",
    "nemotron_h",
    "deepseek_v4",
    "gemma4",
)
ARIA, MIXTRAL, MINIMAX = "aria", "mixtral", "minimax_m3_vl"
Make = Callable[[Edit], Any]


def _register(
    catalogue: list[Mutation], families: str | tuple[str, ...], on: tuple[str, ...], **kw: Any
) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        for family in (families,) if isinstance(families, str) else families:
            for where in on:
                form = "batched_mm" if "bmm" in where else "grouped_mm"
                dtype = bf16 if "bf16" in where else f32
                catalogue.append(Mutation(make.__name__, make, family, dtype, form, **kw))
        return make

    return add


def changing(families: str | tuple[str, ...] = QWEN, *on: str, **kw: Any) -> Callable[[Make], Make]:
    return _register(CHANGING, families, on or ("f32",), **kw)


def preserving(families: str | tuple[str, ...] = QWEN, *on: str, **kw: Any) -> Callable[[Make], Make]:
    return _register(PRESERVING, families, on or ("f32",), **kw)


BIG = (Call(13, scale=3e3, weight=3.0),)
HUGE = (Call(13, scale=1e6, weight=2.0),)
MANY = (Call(300), Call(300, routing="one"))


# -------- the activation


@changing((QWEN, GPT, GEMMA, PRIVACY, ARIA))
def swapped_gate_and_up(e: Edit) -> None:
    first, second = e.halves
    if first.node.target == operator.getitem:
        e.arg(first, 1, 1)
        e.arg(second, 1, 0)
    else:
        e.arg(first, 2, 1)
        e.arg(second, 2, 0)


@changing((QWEN, MINIMAX))
def halves_become_interleaved(e: Edit) -> None:
    first, second = e.halves
    u = V(e, first.node.args[0].args[0])
    e.swap(first, u.cols(0, 2**63 - 1, 2))
    e.swap(second, u.cols(1, 2**63 - 1, 2))


@changing(GPT)
def interleaved_becomes_halves(e: Edit) -> None:
    first, second = e.halves
    u = V(e, first.node.args[0])
    e.swap(first, u.cols(0, e.I))
    e.swap(second, u.cols(e.I, 2 * e.I))


@changing((GPT, MINIMAX), "f32", "bmm")
def alpha_1_703(e: Edit) -> None:
    e.arg(V(e, e.find(A.sigmoid.default).node.args[0]), 1, 1.703)


@changing((GPT, DEEPSEEK), calls=BIG)
def both_limits_7_5(e: Edit) -> None:
    e.arg(e.find(A.clamp.default, 0), 2, 7.5)
    e.arg(e.find(A.clamp.default, 1), 1, -7.5)
    e.arg(e.find(A.clamp.default, 1), 2, 7.5)


@changing((GPT, PRIVACY), calls=BIG)
def gate_limit_7_5(e: Edit) -> None:
    e.arg(e.find(A.clamp.default, 0), 2, 7.5)


@changing((GPT, DEEPSEEK), calls=BIG)
def asymmetric_up_limits(e: Edit) -> None:
    e.arg(e.find(A.clamp.default, 1), 1, -6.5)


@changing(DEEPSEEK, calls=BIG)
def gate_limit_from_below_too(e: Edit) -> None:
    e.arg(e.find(A.clamp.default, 0), 1, -1.0)


@changing((GPT, MINIMAX), calls=BIG)
def no_clamp_of_the_gate(e: Edit) -> None:
    node = e.find(A.clamp.default, 0)
    e.swap(node, V(e, node.node.args[0]))


@changing(GPT, calls=BIG)
def no_clamp_of_the_up_half(e: Edit) -> None:
    node = e.find(A.clamp.default, 1)
    e.swap(node, V(e, node.node.args[0]))


@changing(DEEPSEEK, calls=BIG)
def clamp_after_silu(e: Edit) -> None:
    node = e.find(A.clamp.default, 0)
    e.swap(node, V(e, node.node.args[0]))
    e.swap(e.find(A.silu.default), lambda v: v.op(A.clamp.default, -0.1, 10.0))


@changing((GPT, MINIMAX))
def beta_0_99(e: Edit) -> None:
    up = e.find(A.clamp.default, 1)
    e.arg(next(V(e, n) for n in up.node.users), 1, 0.99)


@changing(GPT)
def beta_on_the_gate_too(e: Edit) -> None:
    e.swap(e.find(A.sigmoid.default), lambda v: v + 1)


@changing(GPT)
def sigmoid_scaled(e: Edit) -> None:
    e.swap(e.find(A.sigmoid.default), lambda v: v * 1.01)


@changing(QWEN, "f32", "bf16", "bmm")
def gelu_for_silu(e: Edit) -> None:
    e.swap(e.find(A.silu.default), lambda v: V(e, v.node.args[0]).op(A.gelu.default))


@changing(GEMMA, "f32", "bmm")
def erf_gelu_for_tanh_gelu(e: Edit) -> None:
    e.kwarg(e.find(A.gelu.default), approximate="none")


@changing(GEMMA)
def quick_gelu_for_tanh_gelu(e: Edit) -> None:
    def quick(v: V) -> V:
        g = V(e, v.node.args[0])
        return g * (g * 1.702).sigmoid()

    e.swap(e.find(A.gelu.default), quick)


@changing(QWEN)
def hardswish_for_silu(e: Edit) -> None:
    e.swap(e.find(A.silu.default), lambda v: V(e, v.node.args[0]).op(A.hardswish.default))


@changing(QWEN)
def mish_for_silu(e: Edit) -> None:
    e.swap(e.find(A.silu.default), lambda v: V(e, v.node.args[0]).op(A.mish.default))


@changing(QWEN)
def relu_for_silu(e: Edit) -> None:
    e.swap(e.find(A.silu.default), lambda v: V(e, v.node.args[0]).op(A.relu.default))


@changing(QWEN)
def gate_used_twice(e: Edit) -> None:
    e.arg(e.halves[1], 1, 0)


@changing(QWEN)
def no_activation(e: Edit) -> None:
    e.swap(e.find(A.silu.default), lambda v: V(e, v.node.args[0]))


@changing(QWEN)
def both_halves_activated(e: Edit) -> None:
    e.swap(e.halves[1], lambda v: v.op(A.silu.default))


@changing(QWEN)
def sum_of_halves_for_product(e: Edit) -> None:
    e.swap(e.h, lambda v: e.find(A.silu.default) + e.halves[1])


@changing(NEMOTRON, "f32", "bmm")
def relu_for_relu2(e: Edit) -> None:
    e.swap(e.find(A.square.default), lambda v: V(e, v.node.args[0]))


@changing(NEMOTRON)
def cube_for_square(e: Edit) -> None:
    e.swap(e.find(A.square.default), lambda v: V(e, v.node.args[0]).op(A.pow.Tensor_Scalar, 3))


@changing(NEMOTRON)
def square_without_relu(e: Edit) -> None:
    e.swap(e.find(A.relu.default), lambda v: V(e, v.node.args[0]))


@changing(NEMOTRON)
def leaky_relu2(e: Edit) -> None:
    e.swap(e.find(A.relu.default), lambda v: V(e, v.node.args[0]).op(A.leaky_relu.default))


@changing(NEMOTRON, calls=BIG)
def relu6_squared(e: Edit) -> None:
    e.swap(e.find(A.relu.default), lambda v: V(e, v.node.args[0]).op(A.hardtanh.default, 0, 6))


@changing(NEMOTRON)
def shifted_relu2(e: Edit) -> None:
    e.swap(e.find(A.relu.default), lambda v: (V(e, v.node.args[0]) - 0.01).op(A.relu.default))


# -------- between the activation and the projections


@changing((QWEN, GPT, NEMOTRON), "f32", "bmm")
def h_scaled(e: Edit) -> None:
    e.swap(e.h, lambda v: v * 1.001)


@changing((QWEN, MIXTRAL))
def h_plus_a_constant(e: Edit) -> None:
    e.swap(e.h, lambda v: v + 1e-3)


@changing(QWEN)
def h_absolute(e: Edit) -> None:
    e.swap(e.h, V.abs)


@changing((QWEN, ARIA))
def h_columns_rolled(e: Edit) -> None:
    e.swap(e.h, lambda v: v.op(A.roll.default, [1], [1]))


@changing(QWEN)
def h_columns_flipped(e: Edit) -> None:
    e.swap(e.h, lambda v: v.op(A.flip.default, [1]))


@changing(QWEN)
def h_columns_sorted(e: Edit) -> None:
    e.swap(e.h, lambda v: v.op(A.sort.default, 1, True).item(0))


@changing((QWEN, NEMOTRON), "f32", "bf16", "bmm")
def h_rms_norm(e: Edit) -> None:
    e.swap(e.h, lambda v: v * ((v * v).mean([-1], True) + 1e-6).op(A.rsqrt.default))


@changing(QWEN)
def h_softmax(e: Edit) -> None:
    e.swap(e.h, lambda v: v.op(A._softmax.default, -1, False))


@changing(QWEN)
def h_minus_mean_over_rows(e: Edit) -> None:
    e.swap(e.h, lambda v: v - v.mean([0], True))


@changing(QWEN)
def h_times_number_of_tokens(e: Edit) -> None:
    e.swap(e.h, lambda v: v * e.size(e.x))


@changing((QWEN, NEMOTRON), calls=BIG)
def h_beyond_5_doubled(e: Edit) -> None:
    e.swap(e.h, lambda v: v.where(v.abs().gt(5.0), v * 2))


@changing((QWEN, MIXTRAL), calls=HUGE)
def h_beyond_1000_doubled(e: Edit) -> None:
    e.swap(e.h, lambda v: v.where(v.abs().gt(1e3), v * 2))


@changing((NEMOTRON, QWEN), calls=HUGE)
def u_beyond_20000_clamped(e: Edit) -> None:
    e.swap(e.u, lambda v: v.op(A.clamp.default, -2e4, 2e4))


@changing((QWEN,), calls=HUGE)
def h_clamped_to_fp16_range(e: Edit) -> None:
    e.swap(e.h, lambda v: v.op(A.clamp.default, -65504.0, 65504.0))


@changing((NEMOTRON,), calls=HUGE)
def u_beyond_a_product_of_constants_clamped(e: Edit) -> None:
    e.swap(e.u, lambda v: (v / 1000.0).op(A.clamp.default, -300.0, 300.0) * 1000.0)


@changing(QWEN)
def u_in_a_window_dropped(e: Edit) -> None:
    e.swap(e.u, lambda v: v.where((v - 0.375).abs().lt(0.02), v * 0))


@changing((QWEN, NEMOTRON), "f32", "bmm")
def h_of_expert_0_scaled(e: Edit) -> None:
    e.swap(e.h, lambda v: v * (e.row_ids.eq(0).to(f32) * 0.01 + 1).unsqueeze(1))


@changing((QWEN, GPT))
def h_of_the_last_expert_scaled(e: Edit) -> None:
    e.swap(e.h, lambda v: v * (e.row_ids.eq(e.E - 1).to(f32) * 0.01 + 1).unsqueeze(1))


@changing(QWEN, overrides=(("num_experts", 512),), calls=(Call(256, routing="all"),))
def h_of_one_expert_in_512_scaled(e: Edit) -> None:
    e.swap(e.h, lambda v: v * (e.row_ids.eq(100).to(f32) * 0.01 + 1).unsqueeze(1))


@changing(QWEN)
def h_scaled_by_expert(e: Edit) -> None:
    e.swap(e.h, lambda v: v * (e.row_ids.to(f32) * 0.01 + 1).unsqueeze(1))


@changing(QWEN)
def h_of_row_0_scaled(e: Edit) -> None:
    e.swap(e.h, lambda v: v * (e.arange(e.size(v)).eq(0).to(f32) * 0.5 + 1).unsqueeze(1))


@changing((QWEN, NEMOTRON), calls=(Call(64),))
def h_truncated_to_int(e: Edit) -> None:
    e.swap(e.h, lambda v: (v * 64.0).through(torch.int32) / 64.0)


@changing((QWEN, GPT))
def h_through_bf16(e: Edit) -> None:
    e.swap(e.h, lambda v: v.through(bf16))


@changing((QWEN, NEMOTRON), "f32", "bmm")
def h_through_fp16(e: Edit) -> None:
    e.swap(e.h, lambda v: v.through(f16))


@changing(QWEN, "bf16", calls=HUGE, narrows=True)
def h_through_fp16_in_bf16(e: Edit) -> None:
    e.swap(e.h, lambda v: v.through(f16))


@changing((QWEN, GPT), "bf16")
def h_through_fp8(e: Edit) -> None:
    e.swap(e.h, lambda v: v.op(A.clamp.default, -448.0, 448.0).through(torch.float8_e4m3fn))


@changing((QWEN, GPT), "bf16")
def u_through_fp8(e: Edit) -> None:
    e.swap(e.u, lambda v: v.through(torch.float8_e5m2))


@changing(QWEN, random=True)
def h_dropped_out(e: Edit) -> None:
    e.swap(e.h, lambda v: v.op(A.native_dropout.default, 0.5, True).item(0))


@changing(QWEN, random=True)
def h_with_noise(e: Edit) -> None:
    e.swap(e.h, lambda v: v + v.op(A.rand_like.default))


@changing(QWEN)
def tokens_added_to_h(e: Edit) -> None:
    e.swap(e.h, lambda v: v + e.rows.cols(0, e.I))


@changing(QWEN, calls=BIG)
def h_looks_at_large_tokens(e: Edit) -> None:
    e.swap(e.h, lambda v: v * (e.x.abs().op(A.amax.default).gt(20.0).to(f32) + 1))


@changing(QWEN, calls=(Call(13, weight=30.0),))
def h_looks_at_large_weights(e: Edit) -> None:
    e.swap(e.h, lambda v: v * (e.w.abs().op(A.amax.default).gt(20.0).to(f32) + 1))


@changing(QWEN)
def h_weighted_as_well(e: Edit) -> None:
    e.swap(e.h, lambda v: v * e.w_rows.unsqueeze(1))


@changing(QWEN)
def h_scaled_by_a_constant_tensor(e: Edit) -> None:
    e.swap(e.h, lambda v: v * e.constant(torch.linspace(0.99, 1.01, e.I)))


@changing(QWEN)
def h_transposed_twice_wrongly(e: Edit) -> None:
    e.swap(e.h, lambda v: v.op(A.t.default).op(A.clone.default, memory_format=torch.contiguous_format).view(-1, e.I))


# -------- biases


@changing((GPT, PRIVACY), "f32", "bmm")
def up_bias_twice(e: Edit) -> None:
    add = next(V(e, n) for n in e.u.node.users)
    bias = V(e, add.node.args[1])
    e.swap(add, lambda v: v + bias)


@changing((GPT, PRIVACY))
def down_bias_halved(e: Edit) -> None:
    e.swap(e.parameter("down_proj_bias"), lambda v: v * 0.5)


@changing((GPT, PRIVACY))
def up_bias_of_the_next_expert(e: Edit) -> None:
    e.swap(e.parameter("gate_up_proj_bias"), lambda v: v.op(A.roll.default, [1], [0]))


@changing(GPT)
def up_bias_columns_rolled(e: Edit) -> None:
    e.swap(e.parameter("gate_up_proj_bias"), lambda v: v.op(A.roll.default, [2], [1]))


@changing(GPT)
def down_bias_from_the_up_bias(e: Edit) -> None:
    e.swap(e.parameter("down_proj_bias"), e.parameter("gate_up_proj_bias").cols(0, e.H))


@changing(PRIVACY)
def up_bias_after_the_activation(e: Edit) -> None:
    add = next(V(e, n) for n in e.u.node.users)
    bias = V(e, add.node.args[1])
    e.swap(add, e.u)
    e.swap(e.h, lambda v: v + bias.cols(0, e.I))


@changing((GPT, PRIVACY))
def down_bias_after_the_weighting(e: Edit) -> None:
    add = next(V(e, n) for n in e.y.node.users)
    bias = V(e, add.node.args[1])
    weighted = e.weighted
    e.swap(add, e.y)
    e.swap(weighted, lambda v: v + bias)


@changing(GPT)
def no_up_bias(e: Edit) -> None:
    e.swap(next(V(e, n) for n in e.u.node.users), e.u)


@changing(GPT, "f32", "bmm")
def no_down_bias(e: Edit) -> None:
    e.swap(next(V(e, n) for n in e.y.node.users), e.y)


@changing(GPT)
def bias_rows_in_another_order(e: Edit) -> None:
    bias = V(e, next(V(e, n) for n in e.u.node.users).node.args[1])
    e.arg(bias, 1, [e.ids.view(-1).node])


@changing(GPT, calls=(Call(13, bias=100.0),))
def up_bias_clamped_to_20(e: Edit) -> None:
    e.swap(e.parameter("gate_up_proj_bias"), lambda v: v.op(A.clamp.default, -20.0, 20.0))


@changing(GPT, calls=(Call(13, bias=100.0),))
def down_bias_clamped_to_20(e: Edit) -> None:
    e.swap(e.parameter("down_proj_bias"), lambda v: v.op(A.clamp.default, -20.0, 20.0))


@changing(GPT)
def down_bias_but_for_expert_0(e: Edit) -> None:
    bias = V(e, next(V(e, n) for n in e.y.node.users).node.args[1])
    e.swap(bias, lambda v: v * e.row_ids.gt(0).to(f32).unsqueeze(1))


@changing(GPT)
def down_bias_through_bf16(e: Edit) -> None:
    e.swap(e.parameter("down_proj_bias"), lambda v: v.through(bf16))


# -------- expert weights


@changing(NEMOTRON, overrides=(("moe_intermediate_size", 64),))
def up_weight_used_twice(e: Edit) -> None:
    weight = next(V(e, n) for n in e.parameter("up_proj").node.users)
    e.arg(V(e, e.down.node), 1, weight)


@changing(NEMOTRON, overrides=(("moe_intermediate_size", 64),))
def up_weight_used_twice_once_transposed(e: Edit) -> None:
    e.arg(V(e, e.down.node), 1, e.parameter("up_proj"))


@changing(QWEN)
def up_weight_read_transposed(e: Edit) -> None:
    e.arg(V(e, e.ups[0].node), 1, e.parameter("gate_up_proj"))


@changing((QWEN, ARIA))
def up_weight_of_the_next_expert(e: Edit) -> None:
    e.swap(e.parameter("gate_up_proj"), lambda v: v.op(A.roll.default, [1], [0]))


@changing(QWEN, "f32", "bmm")
def down_weight_scaled(e: Edit) -> None:
    e.swap(e.parameter("down_proj"), lambda v: v * 1.001)


@changing(QWEN)
def up_weight_through_bf16(e: Edit) -> None:
    e.swap(e.parameter("gate_up_proj"), lambda v: v.through(bf16))


@changing(QWEN)
def down_weight_also_added_to_the_output(e: Edit) -> None:
    weight = e.parameter("down_proj")
    e.swap(e.out, lambda v: v + weight.mean([0, 2]))


@changing(QWEN)
def up_weight_norm_scales_the_output(e: Edit) -> None:
    weight = e.parameter("gate_up_proj")
    e.swap(e.out, lambda v: v * (weight * weight).mean([0, 1, 2]))


# -------- routing


@changing(QWEN)
def offsets_of_another_histogram(e: Edit) -> None:
    e.swap(e.find(A.histc.default), lambda v: v.op(A.flip.default, [0]))


@changing(QWEN)
def offsets_rolled(e: Edit) -> None:
    e.swap(e.find(A.histc.default), lambda v: v.op(A.roll.default, [1], [0]))


@changing(QWEN)
def offsets_less_one(e: Edit) -> None:
    e.swap(e.offs, lambda v: (v - 1).op(A.clamp.default, 0))


@changing(QWEN)
def other_offsets_for_the_down_projection(e: Edit) -> None:
    flipped = e.find(A.histc.default).op(A.flip.default, [0]).op(A.cumsum.default, 0, dtype=torch.int32)
    e.arg(V(e, e.down.node), 2, flipped)


@changing(QWEN, calls=MANY)
def offsets_in_uint8(e: Edit) -> None:
    e.kwarg(e.offs, dtype=torch.uint8)
    e.swap(e.offs, lambda v: v.to(torch.int32))


@changing(QWEN, calls=(Call(301, routing="one"),), narrows=True)
def histogram_in_bf16(e: Edit) -> None:
    e.swap(e.find(A.histc.default), lambda v: v.through(bf16))


@changing(QWEN, "f32", "bf16", calls=MANY, narrows=True)
def token_through_bf16(e: Edit) -> None:
    size = e.full([], e.size(e.x), dtype=torch.int64)
    half = e.perm.to(bf16).op(A.div.Tensor, 2).op(A.floor.default).to(torch.int64)
    e.swap(e.token, half.op(A.remainder.Tensor, size))


@changing((QWEN, GPT))
def token_is_pair_modulo_k(e: Edit) -> None:
    size = e.full([], e.size(e.x), dtype=torch.int64)
    e.swap(e.token, e.perm.op(A.remainder.Scalar, e.K).op(A.remainder.Tensor, size))


@changing(QWEN)
def token_is_pair_over_k_plus_1(e: Edit) -> None:
    e.arg(e.token, 1, e.K + 1)


@changing(QWEN)
def token_counted_from_the_end(e: Edit) -> None:
    e.swap(e.token, lambda v: v.op(A.rsub.Scalar, 0) + (e.size(e.x).op(operator.sub, 1)))


@changing(QWEN)
def inverse_permutation_dropped(e: Edit) -> None:
    e.swap(V(e, e.pairs.node.args[0]), e.weighted)


@changing((QWEN, GPT))
def permutation_for_its_inverse(e: Edit) -> None:
    e.swap(e.inverse, e.perm)


@changing(QWEN, "f32", "bf16")
def weights_not_permuted(e: Edit) -> None:
    e.swap(e.w_rows, e.w.view(-1))


@changing(QWEN)
def weights_permuted_by_the_inverse(e: Edit) -> None:
    e.swap(e.w_rows, e.w.view(-1).index(e.inverse))


@changing(QWEN)
def ids_of_the_next_expert_for_the_weights_only(e: Edit) -> None:
    ids = V(e, e.find(A._to_copy.default).node.args[0])
    e.at(e.find(A._to_copy.default), ids, lambda v: (v + 1).op(A.remainder.Scalar, e.E))


@changing((QWEN, MIXTRAL), "f32", "bmm")
def next_expert(e: Edit) -> None:
    e.swap(e.ids, lambda v: (v + 1).op(A.remainder.Scalar, e.E))


@changing(QWEN, "f32", "bmm")
def last_expert_never_used(e: Edit) -> None:
    e.swap(e.ids, lambda v: v.op(A.clamp.default, None, e.E - 2))


@changing(GPT, "bmm")
def other_ids_for_the_down_projection(e: Edit) -> None:
    gather = next(V(e, n) for n in e.parameter("down_proj").node.users)
    e.arg(gather, 1, [e.ids.op(A.flip.default, [1]).view(-1).node])


@changing(QWEN, calls=(Call(300), Call(300, routing="one")))
def capacity_of_70_pairs_an_expert(e: Edit) -> None:
    weighted = e.weighted
    before = e.offs.op(A.roll.default, [1], [0]) * e.arange(e.E).gt(0).to(torch.int32)
    place = e.arange(e.size(e.row_ids)) - before.index(e.row_ids)
    kept = place.lt(70).to(f32).unsqueeze(1)
    e.swap(V(e, e.pairs.node.args[0]), (weighted * kept).index(e.inverse))


@changing(QWEN, calls=(Call(300),))
def tokens_from_100_on_scaled(e: Edit) -> None:
    e.swap(e.pairs, lambda v: v * (e.arange(e.size(e.x)).ge(100).to(f32) + 1).view(-1, 1, 1))


@changing(QWEN)
def a_single_token_scaled(e: Edit) -> None:
    size = e.size(e.x)
    e.swap(e.pairs, lambda v: v * (e.full([], size).lt(2.0).to(f32) + 1))


# -------- tokens and their rows


@changing((QWEN, GPT), "f32", "bmm")
def rows_scaled(e: Edit) -> None:
    e.swap(e.rows, lambda v: v * 1.001)


@changing(QWEN)
def rows_plus_a_constant(e: Edit) -> None:
    e.swap(e.rows, lambda v: v + 0.01)


@changing(QWEN)
def rows_columns_flipped(e: Edit) -> None:
    e.swap(e.rows, lambda v: v.op(A.flip.default, [1]))


@changing(QWEN)
def rows_layer_norm(e: Edit) -> None:
    e.swap(e.rows, lambda v: v.op(A.native_layer_norm.default, [e.H], None, None, 1e-5).item(0))


@changing((QWEN, GPT), "f32", "bmm", calls=BIG)
def rows_beyond_5_doubled(e: Edit) -> None:
    e.swap(e.rows, lambda v: v.where(v.abs().gt(5.0), v * 2))


@changing((QWEN, NEMOTRON), calls=BIG)
def rows_clamped_to_20(e: Edit) -> None:
    e.swap(e.rows, lambda v: v.op(A.clamp.default, -20.0, 20.0))


@changing(QWEN, calls=HUGE)
def rows_clamped_to_fp16_range(e: Edit) -> None:
    e.swap(e.rows, lambda v: v.op(A.clamp.default, -65504.0, 65504.0))


@changing(QWEN, "f32", "bf16")
def rows_through_fp8(e: Edit) -> None:
    e.swap(e.rows, lambda v: v.through(torch.float8_e4m3fn))


@changing(QWEN)
def tokens_flipped_before(e: Edit) -> None:
    e.swap(e.x, lambda v: v.op(A.flip.default, [0]))


@changing((QWEN, GPT), "f32", "bmm")
def tokens_normed_before(e: Edit) -> None:
    e.swap(e.x, lambda v: v * ((v * v).mean([-1], True) + 1e-6).op(A.rsqrt.default))


@changing(QWEN)
def rows_of_expert_0_scaled(e: Edit) -> None:
    e.swap(e.rows, lambda v: v * (e.row_ids.eq(0).to(f32) * 0.5 + 1).unsqueeze(1))


@changing(QWEN, "f32", "bmm")
def weights_on_the_input(e: Edit) -> None:
    w, y, weighted = e.w_rows, e.y, e.weighted
    e.swap(weighted, y)
    e.swap(e.rows, lambda v: v * w.unsqueeze(1))


@changing(QWEN)
def weights_on_the_input_as_well(e: Edit) -> None:
    w = e.w_rows
    e.swap(e.rows, lambda v: v * w.unsqueeze(1))


# -------- routing weights


@changing((QWEN, GPT), "f32", "bf16", "bmm")
def weights_scaled(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v * 1.1)


@changing((QWEN, MINIMAX))
def weights_squared(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v * v)


@changing(QWEN)
def weights_normed_inside(e: Edit) -> None:
    e.swap(e.w, lambda v: v / v.sum([-1], True))


@changing(QWEN, "f32", "bmm")
def weights_softmaxed(e: Edit) -> None:
    e.swap(e.w, lambda v: v.op(A._softmax.default, -1, False))


@changing(QWEN)
def weights_sigmoid(e: Edit) -> None:
    e.swap(e.w_rows, V.sigmoid)


@changing(QWEN)
def weights_flipped(e: Edit) -> None:
    e.swap(e.w, lambda v: v.op(A.flip.default, [1]))


@changing(QWEN)
def weights_dropped(e: Edit) -> None:
    e.swap(e.weighted, e.y)


@changing((QWEN, GPT))
def weights_applied_twice(e: Edit) -> None:
    w = e.w_rows
    e.swap(e.weighted, lambda v: v * w.unsqueeze(1))


@changing((QWEN, GPT), calls=(Call(13, weight=30.0),))
def weights_clamped_to_6(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v.op(A.clamp.default, None, 6.0))


@changing(QWEN, "f32", narrows=True)
def weights_through_bf16(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v.through(bf16))


@changing(QWEN)
def weights_truncated_to_int(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: (v * 8.0).through(torch.int64) / 8.0)


@changing(QWEN)
def weights_scaled_by_the_expert(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v * (e.row_ids.to(f32) * 0.01 + 1))


@changing(QWEN, overrides=(("num_experts", 512),), calls=(Call(256, routing="all"),))
def weights_of_one_expert_in_512_scaled(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v * (e.row_ids.eq(300).to(f32) + 1))


@changing(QWEN)
def weights_scaled_by_the_expert_outputs(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v * e.y.mean([-1]).sigmoid())


@changing(QWEN, "f32", "bmm")
def weights_scaled_by_the_up_outputs(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v * (e.u.mean([-1]) + 1))


# -------- the experts' outputs and their sum


@changing((QWEN, GPT, ARIA), "f32", "bmm")
def y_scaled(e: Edit) -> None:
    e.swap(e.y, lambda v: v * 1.001)


@changing((QWEN, GPT))
def y_plus_a_constant(e: Edit) -> None:
    e.swap(e.y, lambda v: v + 1e-3)


@changing((QWEN, GPT), "f32", "bmm", calls=BIG)
def y_clamped_to_20(e: Edit) -> None:
    e.swap(e.y, lambda v: v.op(A.clamp.default, -20.0, 20.0))


@changing(QWEN, calls=HUGE)
def y_clamped_to_fp16_range(e: Edit) -> None:
    e.swap(e.y, lambda v: v.op(A.clamp.default, -65504.0, 65504.0))


@changing((QWEN, MIXTRAL), calls=HUGE)
def y_beyond_1000_doubled(e: Edit) -> None:
    e.swap(e.y, lambda v: v.where(v.abs().gt(1e3), v * 2))


@changing(QWEN)
def y_in_a_window_dropped(e: Edit) -> None:
    e.swap(e.y, lambda v: v.where((v - 0.125).abs().lt(0.004), v * 0))


@changing((QWEN, GPT), "f32", "bf16", "bmm")
def y_rms_norm(e: Edit) -> None:
    e.swap(e.y, lambda v: v * ((v * v).mean([-1], True) + 1e-6).op(A.rsqrt.default))


@changing(QWEN)
def y_tanh(e: Edit) -> None:
    e.swap(e.y, lambda v: v.op(A.tanh.default))


@changing(QWEN)
def y_columns_rolled(e: Edit) -> None:
    e.swap(e.y, lambda v: v.op(A.roll.default, [1], [1]))


@changing((QWEN, NEMOTRON), "f32", "bmm")
def residual_added_to_y(e: Edit) -> None:
    e.swap(e.y, lambda v: v + e.rows)


@changing((QWEN, MIXTRAL), "f32", "bmm")
def up_outputs_added_to_y(e: Edit) -> None:
    e.swap(e.y, lambda v: v + e.u.cols(0, e.H))


@changing(NEMOTRON, "f32", "bmm")
def up_outputs_scale_y(e: Edit) -> None:
    e.swap(e.y, lambda v: v * (e.u.op(A.tanh.default).mean([1], True) + 1))


@changing(QWEN, "f32", "bmm")
def h_added_to_y(e: Edit) -> None:
    e.swap(e.y, lambda v: v + e.op(A.cat.default, [e.h, e.h * 0.5], 1))


@changing(QWEN, "f32", "bmm")
def y_of_expert_0_dropped(e: Edit) -> None:
    e.swap(e.y, lambda v: v * e.row_ids.gt(0).to(f32).unsqueeze(1))


@changing(QWEN, overrides=(("num_experts", 512),), calls=(Call(256, routing="all"),))
def y_of_one_expert_in_512_dropped(e: Edit) -> None:
    hit = e.row_ids.eq(200).to(f32)
    e.swap(e.y, lambda v: v - v * hit.unsqueeze(1))


@changing(QWEN, "bf16")
def y_through_fp8(e: Edit) -> None:
    e.swap(e.y, lambda v: v.through(torch.float8_e5m2))


@changing(QWEN)
def y_truncated_to_int(e: Edit) -> None:
    e.swap(e.y, lambda v: (v * 16.0).through(torch.int32) / 16.0)


@changing(QWEN, random=True)
def y_dropped_out(e: Edit) -> None:
    e.swap(e.y, lambda v: v.op(A.native_dropout.default, 0.5, True).item(0))


@changing(QWEN, calls=BIG)
def weighted_beyond_50_clamped(e: Edit) -> None:
    e.swap(e.weighted, lambda v: v.op(A.clamp.default, -50.0, 50.0))


@changing((QWEN, GPT), "f32", "bmm")
def mean_over_experts(e: Edit) -> None:
    e.swap(e.out, e.pairs.mean([1]))


@changing(QWEN)
def largest_over_experts(e: Edit) -> None:
    e.swap(e.out, e.pairs.op(A.amax.default, [1]))


@changing(QWEN, "f32", "bmm")
def first_expert_only(e: Edit) -> None:
    e.swap(e.out, e.pairs.select(1, 0))


@changing(QWEN)
def second_expert_subtracted(e: Edit) -> None:
    e.swap(e.out, e.pairs.select(1, 0) - e.pairs.select(1, 1))


@changing(QWEN)
def sum_over_neighbouring_tokens(e: Edit) -> None:
    flat = V(e, e.pairs.node.args[0])
    e.swap(e.pairs, flat.view(e.K, -1, e.H).op(A.transpose.int, 0, 1))


@changing((QWEN, GPT), "f32", "bf16", "bmm")
def output_scaled(e: Edit) -> None:
    e.swap(e.out, lambda v: v * 1.1)


@changing(QWEN)
def output_plus_a_constant(e: Edit) -> None:
    e.swap(e.out, lambda v: v + 0.01)


@changing((QWEN, GPT, ARIA), "f32", "bmm")
def residual_added_to_the_output(e: Edit) -> None:
    e.swap(e.out, lambda v: v + e.x)


@changing((QWEN,), "f32", "bmm", calls=BIG)
def output_clamped_to_20(e: Edit) -> None:
    e.swap(e.out, lambda v: v.op(A.clamp.default, -20.0, 20.0))


@changing(QWEN)
def output_tokens_flipped(e: Edit) -> None:
    e.swap(e.out, lambda v: v.op(A.flip.default, [0]))


@changing(QWEN)
def output_columns_rolled(e: Edit) -> None:
    e.swap(e.out, lambda v: v.op(A.roll.default, [1], [1]))


@changing((QWEN, GPT))
def output_of_token_0_scaled(e: Edit) -> None:
    e.swap(e.pairs, lambda v: v * (e.arange(e.size(e.x)).eq(0).to(f32) + 1).view(-1, 1, 1))


@changing(QWEN)
def output_times_number_of_tokens(e: Edit) -> None:
    e.swap(e.pairs, lambda v: v * e.size(e.x))


@changing(QWEN, "f32", "bf16")
def output_through_fp8(e: Edit) -> None:
    e.swap(e.out, lambda v: v.through(torch.float8_e5m2))


def _wide_sum(e: Edit, last: Callable[[V], V]) -> None:
    """Weighting and sum in fp32, as many bf16 models do, then ``last`` back to the tokens' dtype."""
    e.swap(e.out, last(e.pairs.to(f32).sum([1])))


@changing((QWEN, GPT), "bf16")
def wide_output_through_fp8(e: Edit) -> None:
    _wide_sum(e, lambda v: v.to(torch.float8_e5m2).to(bf16))


@changing(QWEN, "bf16")
def wide_output_through_int(e: Edit) -> None:
    _wide_sum(e, lambda v: v.to(torch.int32).to(bf16))


@changing(QWEN, "bf16", narrows=True, calls=HUGE)
def wide_output_through_fp16(e: Edit) -> None:
    _wide_sum(e, lambda v: v.to(f16).to(bf16))


@changing(QWEN, "f32", narrows=True)
def sum_in_bf16(e: Edit) -> None:
    e.swap(e.out, e.pairs.to(bf16).sum([1]).to(f32))


@changing(QWEN, "f32", narrows=True)
def up_projection_in_bf16(e: Edit) -> None:
    e.swap(e.u, lambda v: v.through(bf16))


# -------- what probes of a few tokens, experts and magnitudes do not reach


LONG = (Call(600), Call(1100), Call(1100, routing="one"))
MANY_EXPERTS = (("num_experts", 512),)


@changing((QWEN, GPT), "f32", "bmm", calls=LONG)
def tokens_from_1000_on_scaled_by_division(e: Edit) -> None:
    block = e.arange(e.size(e.x)).op(A.floor_divide.default, 1000).to(f32)
    e.swap(e.pairs, lambda v: v * (block + 1).view(-1, 1, 1))


@changing(QWEN, calls=LONG)
def scaled_from_1000_tokens_on(e: Edit) -> None:
    many = e.size(e.x).op(operator.floordiv, 1000)
    e.swap(e.pairs, lambda v: v * many.op(operator.add, 1))


@changing(QWEN, calls=LONG)
def token_wraps_at_1000(e: Edit) -> None:
    e.swap(e.token, lambda v: v.op(A.remainder.Scalar, 1000))


@changing(QWEN, calls=LONG)
def only_the_first_1000_pairs_summed(e: Edit) -> None:
    some, of = e.weighted.op(A.slice.Tensor, 0, 0, 1000), e.token.op(A.slice.Tensor, 0, 0, 1000)
    e.swap(e.out, e.x.op(A.zeros_like.default).op(A.index_add.default, 0, of, some))


@changing((QWEN, NEMOTRON), "f32", "bmm", calls=LONG)
def h_of_rows_from_1000_on_scaled(e: Edit) -> None:
    e.swap(e.h, lambda v: v * (e.arange(e.size(v)).ge(1000).to(f32) + 1).unsqueeze(1))


@changing(QWEN, calls=LONG)
def h_beyond_a_capacity_of_400_dropped(e: Edit) -> None:
    before = e.offs.op(A.roll.default, [1], [0]) * e.arange(e.E).gt(0).to(torch.int32)
    place = e.arange(e.size(e.row_ids)) - before.index(e.row_ids)
    e.swap(e.h, lambda v: v * place.lt(400).to(f32).unsqueeze(1))


@changing(QWEN, calls=LONG)
def rows_from_1000_on_scaled_by_division(e: Edit) -> None:
    block = e.arange(e.size(e.perm)).op(A.floor_divide.default, 1000).to(f32)
    e.swap(e.rows, lambda v: v * (block + 1).unsqueeze(1))


@changing((QWEN, GPT), "f32", "bmm")
def two_tokens_scaled(e: Edit) -> None:
    two = e.full([], e.size(e.x), dtype=torch.int64).eq(2)
    e.swap(e.pairs, lambda v: v * (two.to(f32) + 1))


@changing(QWEN, "f32", "bmm")
def h_of_two_tokens_scaled(e: Edit) -> None:
    two = e.full([], e.size(e.x), dtype=torch.int64).eq(2)
    e.swap(e.h, lambda v: v * (two.to(f32) + 1))


@changing(QWEN, calls=(Call(3),))
def three_tokens_scaled_without_a_comparison(e: Edit) -> None:
    off = e.full([], e.size(e.x).op(operator.sub, 3), dtype=torch.int64)
    e.swap(e.pairs, lambda v: v * (off * off + 1).to(f32).op(A.reciprocal.default).op(A.floor.default))


def _pair(e: Edit, ids: V, a: int, b: int) -> V:
    """[T] whether a token's first expert is a and its second b."""
    return ids.select(1, 0).eq(a).op(A.bitwise_and.Tensor, ids.select(1, 1).eq(b))


@changing(QWEN, overrides=MANY_EXPERTS, calls=(Call(256, routing="all"),))
def two_experts_together_scaled(e: Edit) -> None:
    e.swap(e.pairs, lambda v: v * (_pair(e, e.ids, 6, 7).to(f32) + 1).view(-1, 1, 1))


@changing(QWEN, overrides=MANY_EXPERTS, calls=(Call(256, routing="all"),))
def two_experts_together_scaled_without_a_comparison(e: Edit) -> None:
    first, second = e.ids.select(1, 0) - 6, e.ids.select(1, 1) - 7
    far = (first * first + second * second).to(f32) * 1e30 + 1
    e.swap(e.pairs, lambda v: v * (far.op(A.reciprocal.default) + 1).view(-1, 1, 1))


@changing(QWEN, overrides=MANY_EXPERTS, calls=(Call(256, routing="all"),))
def ids_before_their_shift_scale_the_output(e: Edit) -> None:
    hit = _pair(e, e.ids, 6, 7)
    e.swap(e.pairs, lambda v: v * (hit.to(f32) + 1).view(-1, 1, 1))
    users = [n for n in e.ids.node.users if n.target == A.view.default]
    shifted = (e.ids + 1).op(A.remainder.Scalar, e.E)
    for user in users:
        user.replace_input_with(e.ids.node, shifted.node)


@changing(QWEN, overrides=MANY_EXPERTS, calls=(Call(256, routing="all", scale=1e5),))
def u_of_one_expert_beyond_1000_doubled(e: Edit) -> None:
    hit = e.row_ids.eq(100).unsqueeze(1)
    e.swap(e.u, lambda v: v.where(v.abs().gt(1e3).op(A.bitwise_and.Tensor, hit), v * 2))


@changing(QWEN, "bf16", calls=MANY, narrows=True)
def token_through_fp32_and_bf16(e: Edit) -> None:
    size = e.full([], e.size(e.x), dtype=torch.int64)
    half = (e.perm.to(f32).to(bf16) / 2).to(torch.int64)
    e.swap(e.token, half.op(A.remainder.Tensor, size))


@changing(QWEN, "bf16", calls=(Call(301),), narrows=True)
def token_by_a_table_in_bf16(e: Edit) -> None:
    table = e.op(A.arange.default, e.size(e.x), dtype=bf16, device=torch.device("cpu"), pin_memory=False)
    table = table.op(A.repeat_interleave.self_int, e.K, 0)
    e.swap(e.token, table.index(e.perm).to(torch.int64))


@changing(QWEN, "bf16", calls=(Call(301, routing="one"), Call(301)), narrows=True)
def counts_in_bf16(e: Edit) -> None:
    e.swap(e.find(A.histc.default), lambda v: v.to(bf16))


@changing((QWEN, NEMOTRON), "bmm")
def h_scaled_by_the_up_weight(e: Edit) -> None:
    gathered = V(e, e.ups[0].node.args[0])
    rows = V(e, e.down.rows)
    e.swap(rows, lambda v: v * (gathered.mean([1, 2], True) + 1))


def _hat(v: V) -> V:
    """About 1 from 20 to 21, 0 elsewhere."""
    return ((v - 20.0) * 6000.0).op(A.hardsigmoid.default) - ((v - 21.0) * 6000.0).op(A.hardsigmoid.default)


@changing(QWEN, "f32", "bmm", calls=(Call(64, scale=20.0),))
def y_in_a_window_scaled_without_a_comparison(e: Edit) -> None:
    e.swap(e.y, lambda v: v + _hat(v) * 50.0)


@changing(QWEN, calls=BIG)
def rows_in_a_window_shifted_without_a_comparison(e: Edit) -> None:
    e.swap(e.rows, lambda v: v + _hat(v) * 50.0)


@changing(QWEN, "f32", "bmm", calls=(Call(64, weight=1e-3),))
def small_weights_dropped(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: v.op(A.hardshrink.default, 1e-4))


@changing(QWEN, "f32", calls=(Call(64, scale=1e-3),))
def small_tokens_dropped(e: Edit) -> None:
    e.swap(e.rows, lambda v: v.op(A.hardshrink.default, 1e-4))


@changing(QWEN, "f32", calls=(Call(64, scale=1e-3),))
def small_outputs_dropped(e: Edit) -> None:
    e.swap(e.y, lambda v: v.op(A.hardshrink.default, 1e-4))


@changing((QWEN, GPT), calls=BIG)
def y_limited_by_max(e: Edit) -> None:
    e.swap(e.y, lambda v: v.op(A.max.other, e.full([], -20.0)).op(A.min.other, e.full([], 20.0)))


@changing(QWEN, calls=BIG)
def y_soft_capped(e: Edit) -> None:
    e.swap(e.y, lambda v: (v / 1e5).op(A.tanh.default) * 1e5)


@changing(QWEN, calls=BIG)
def weights_soft_capped(e: Edit) -> None:
    e.swap(e.w_rows, lambda v: (v / 300.0).op(A.tanh.default) * 300.0)


@changing(QWEN, calls=BIG)
def u_in_a_window_of_another_unit_dropped(e: Edit) -> None:
    e.swap(e.u, lambda v: v.where((v / 16.0 - 3.0).abs().lt(0.2), v * 0))


# ================================================================ the same function, spelled in another way


def _shuffled(seed: int) -> Callable[[int], float]:
    values = torch.rand(4096, generator=torch.Generator().manual_seed(seed)).tolist()
    return lambda i: values[i]


def _nothing(e: Edit) -> None:
    pass


for _seed, _family, _form in (
    (1, GPT, "grouped_mm"),
    (2, QWEN, "grouped_mm"),
    (3, PRIVACY, "grouped_mm"),
    (4, QWEN, "batched_mm"),
    (5, GPT, "batched_mm"),
):
    PRESERVING.append(Mutation(f"nodes_shuffled_{_seed}", _nothing, _family, form=_form, order=_shuffled(_seed)))
PRESERVING.append(Mutation("nodes_in_reverse", _nothing, GPT, order=lambda i: -i))
PRESERVING.append(Mutation("nodes_in_reverse", _nothing, QWEN, bf16, order=lambda i: -i))


def _act(e: Edit, spelled: Callable[[V], V]) -> None:
    """The activation's node replaced by ``spelled`` of its input."""
    targets = (A.silu.default, A.gelu.default, A.sigmoid.default)
    node = next(n for n in e.graph.nodes if n.target in targets)
    e.swap(V(e, node), lambda v: spelled(V(e, v.node.args[0])))


@preserving((QWEN, DEEPSEEK), "f32", "bf16", "bmm")
def silu_as_x_sigmoid(e: Edit) -> None:
    _act(e, lambda x: x * x.sigmoid())


@preserving((QWEN, ARIA))
def silu_as_x_over_1_plus_exp(e: Edit) -> None:
    _act(e, lambda x: x / ((-x).op(A.exp.default) + 1))


@preserving(QWEN)
def silu_by_tanh(e: Edit) -> None:
    _act(e, lambda x: x * 0.5 * ((x * 0.5).op(A.tanh.default) + 1))


@preserving(GPT, "f32", "bf16")
def sigmoid_as_reciprocal(e: Edit) -> None:
    _act(e, lambda x: ((-x).op(A.exp.default) + 1).op(A.reciprocal.default))


@preserving((QWEN, GPT, GEMMA), "f32", "bmm")
def products_the_other_way_round(e: Edit) -> None:
    for node in list(e.graph.nodes):
        if node.target == A.mul.Tensor and isinstance(node.args[1], fx.Node):
            node.args = node.args[::-1]


@preserving((GPT, DEEPSEEK), "f32", "bf16")
def clamps_as_minimum_and_maximum(e: Edit) -> None:
    limit = e.find(A.clamp.default).node.args[2]
    high, low = e.full([], limit, dtype=e.source.dtype), e.full([], -limit, dtype=e.source.dtype)
    e.swap(e.find(A.clamp.default, 0), lambda v: V(e, v.node.args[0]).op(A.minimum.default, high))
    e.swap(
        e.find(A.clamp.default, 1),
        lambda v: V(e, v.node.args[0]).op(A.minimum.default, high).op(A.maximum.default, low),
    )


@preserving((GPT, MINIMAX), "f32", "bmm")
def clamps_as_clamp_min_and_clamp_max(e: Edit) -> None:
    e.swap(e.find(A.clamp.default, 0), lambda v: V(e, v.node.args[0]).op(A.clamp_max.default, 7.0))
    up = e.find(A.clamp.default, 1)
    e.swap(up, lambda v: V(e, v.node.args[0]).op(A.clamp_min.default, -7.0).op(A.clamp_max.default, 7.0))


@preserving(GPT)
def clamps_as_where(e: Edit) -> None:
    limit = e.full([], 7.0)
    gate = V(e, e.find(A.clamp.default, 0).node.args[0])
    e.swap(e.find(A.clamp.default, 0), gate.where(gate.gt(7.0), limit))
    up = V(e, e.find(A.clamp.default, 1).node.args[0])
    e.swap(e.find(A.clamp.default, 1), up.where(up.gt(7.0), limit).where(up.lt(-7.0), -limit))


@preserving((GPT, MINIMAX))
def up_plus_1_multiplied_out(e: Edit) -> None:
    up = e.find(A.clamp.default, 1)
    glu = V(e, next(n for n in e.h.node.args if n.target == A.mul.Tensor))
    e.swap(e.h, lambda v: up * glu + glu)


@preserving(GPT)
def alpha_folded_into_exp(e: Edit) -> None:
    gate = e.find(A.clamp.default, 0)
    e.swap(e.find(A.sigmoid.default), ((gate * -1.702).op(A.exp.default) + 1).op(A.reciprocal.default))


@preserving((QWEN, NEMOTRON, MIXTRAL, MINIMAX), "f32", "bmm")
def transpose_as_permute(e: Edit) -> None:
    for node in list(e.graph.nodes):
        if node.target == A.transpose.int and node.args[0].op == "placeholder":
            e.swap(V(e, node), lambda v: V(e, v.node.args[0]).op(A.permute.default, [0, 2, 1]))


@preserving((QWEN, GPT), "f32", "bmm")
def weights_transposed_three_times(e: Edit) -> None:
    for gemm in (*e.ups, e.down):
        weight = e.parameter(gemm.weight)
        e.swap(weight, lambda v: v.op(A.transpose.int, 1, 2).op(A.transpose.int, -1, -2))


@preserving((QWEN, GPT), "f32", "bf16")
def weights_copied(e: Edit) -> None:
    for gemm in (*e.ups, e.down):
        weight = e.parameter(gemm.weight)
        e.swap(weight, lambda v: v.op(A.clone.default, memory_format=torch.contiguous_format).op(A.alias.default))


@preserving((QWEN, GPT), "f32", "bmm")
def views_and_views_back(e: Edit) -> None:
    for v in (e.h, e.y):
        n = v.val.shape[1]
        e.swap(v, lambda v, n=n: v.view(-1).view(-1, n // 4, 4).view(-1, n))


@preserving((QWEN, GPT), "f32", "bmm")
def unsqueezed_and_squeezed(e: Edit) -> None:
    for v in (e.rows, e.u, e.h, e.y, e.out):
        e.swap(v, lambda v: v.unsqueeze(1).squeeze(1))


@preserving((QWEN, PRIVACY))
def transposed_and_back(e: Edit) -> None:
    e.swap(e.u, lambda v: v.op(A.t.default).op(A.clone.default).op(A.t.default))


@preserving((QWEN, GPT), "f32", "bf16", "bmm")
def everything_cloned(e: Edit) -> None:
    for v in (e.rows, e.u, e.h, e.y, e.w_rows, e.out):
        e.swap(v, lambda v: v.op(A.clone.default).op(A.alias.default))


@preserving((QWEN, GPT, GEMMA), "bf16")
def activation_in_fp32(e: Edit) -> None:
    e.swap(e.u, lambda v: v.to(f32))
    e.swap(e.h, lambda v: v.to(bf16))


@preserving((QWEN, GPT))
def activation_in_fp64(e: Edit) -> None:
    e.swap(e.u, lambda v: v.to(f64))
    e.swap(e.h, lambda v: v.to(f32))


@preserving((QWEN, GPT), "bf16")
def weighting_and_sum_in_fp32(e: Edit) -> None:
    e.swap(e.y, lambda v: v.to(f32))
    e.swap(e.w_rows, lambda v: v.to(f32))
    e.swap(e.out, lambda v: v.to(bf16))


@preserving((QWEN, DEEPSEEK), "bf16")
def sum_in_fp32(e: Edit) -> None:
    _wide_sum(e, lambda v: v.to(bf16))


@preserving(QWEN, "bf16")
def widened_and_narrowed_at_every_stage(e: Edit) -> None:
    for v in (e.rows, e.u, e.h, e.y, e.w_rows, e.out):
        e.swap(v, lambda v: v.through(f32))


@preserving((QWEN, ARIA, DEEPSEEK), "f32", "bmm")
def slices_for_split(e: Edit) -> None:
    first, second = e.halves
    u = V(e, first.node.args[0].args[0])
    e.swap(first, u.cols(0, e.I))
    e.swap(second, u.cols(e.I, 2 * e.I))


@preserving(QWEN)
def narrow_for_split(e: Edit) -> None:
    first, second = e.halves
    u = V(e, first.node.args[0].args[0])
    e.swap(first, u.op(A.narrow.default, 1, 0, e.I))
    e.swap(second, u.op(A.narrow.default, 1, e.I, e.I))


@preserving(QWEN)
def view_and_unbind_for_split(e: Edit) -> None:
    first, second = e.halves
    both = V(e, first.node.args[0].args[0]).view(-1, 2, e.I).op(A.unbind.int, 1)
    e.swap(first, both.item(0))
    e.swap(second, both.item(1))


@preserving(QWEN)
def halves_by_index_select(e: Edit) -> None:
    first, second = e.halves
    u = V(e, first.node.args[0].args[0])
    e.swap(first, u.op(A.index_select.default, 1, e.arange(e.I)))
    e.swap(second, u.op(A.index_select.default, 1, e.arange(e.I) + e.I))


@preserving(GPT, "f32", "bf16", "bmm")
def interleaving_by_view_and_select(e: Edit) -> None:
    first, second = e.halves
    pairs = V(e, next(n for n in e.u.node.users)).view(-1, e.I, 2)
    e.swap(first, pairs.select(2, 0))
    e.swap(second, pairs.select(2, 1))


@preserving((QWEN, GPT))
def index_select_for_index(e: Edit) -> None:
    for node in list(e.graph.nodes):
        if node.target == A.index.Tensor:
            source, (rows,) = node.args
            e.swap(V(e, node), V(e, source).op(A.index_select.default, 0, V(e, rows)))


@preserving((QWEN, GPT), "bmm")
def weights_by_index_select(e: Edit) -> None:
    for node in list(e.graph.nodes):
        if node.target == A.index.Tensor:
            source, (rows,) = node.args
            e.swap(V(e, node), V(e, source).op(A.index_select.default, 0, V(e, rows)))


@preserving(GPT)
def biases_by_embedding(e: Edit) -> None:
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        bias = e.parameter(name)
        gathered = next(V(e, n) for n in bias.node.users)
        e.swap(gathered, bias.op(A.embedding.default, e.row_ids))


@preserving(PRIVACY)
def biases_by_one_hot(e: Edit) -> None:
    hot = e.row_ids.unsqueeze(1).eq(e.arange(e.E)).to(f32)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        bias = e.parameter(name)
        gathered = next(V(e, n) for n in bias.node.users)
        e.swap(gathered, hot.op(A.mm.default, bias))


@preserving((GPT, PRIVACY), "f32", "bmm")
def bias_added_from_the_left(e: Edit) -> None:
    for v in (e.u, e.y):
        (add,) = v.node.users
        add.args = add.args[::-1]


@preserving(GEMMA, "f32", "bmm")
def gelu_tanh_spelled_out(e: Edit) -> None:
    def spelled(x: V) -> V:
        inner = (x + x.op(A.pow.Tensor_Scalar, 3) * 0.044715) * 0.7978845608028654
        return x * 0.5 * (inner.op(A.tanh.default) + 1)

    _act(e, spelled)


@preserving(GEMMA, overrides=(("hidden_activation", "gelu"),))
def gelu_spelled_out(e: Edit) -> None:
    _act(e, lambda x: x * 0.5 * ((x * 0.7071067811865476).op(A.erf.default) + 1))


@preserving((QWEN, GPT, NEMOTRON))
def zero_added_and_times_one(e: Edit) -> None:
    for v in (e.rows, e.u, e.h, e.y, e.out):
        e.swap(v, lambda v: (v + 0.0) * 1.0)


@preserving(QWEN)
def negated_twice(e: Edit) -> None:
    for v in (e.u, e.y):
        e.swap(v, lambda v: (v * -1.0) * -1.0)


@preserving(QWEN)
def scaled_and_scaled_back(e: Edit) -> None:
    e.swap(e.u, lambda v: v * 4.0)
    e.swap(V(e, e.find(A.split.Tensor).node.args[0]), lambda v: v * 0.25)


@preserving((QWEN, GPT), "f32", "bmm")
def ids_and_weights_by_flatten(e: Edit) -> None:
    for v in (e.ids, e.w):
        flat = next(V(e, n) for n in v.node.users if n.target == A.view.default)
        e.swap(flat, v.op(A.clone.default).view(1, -1).squeeze(0))


@preserving(QWEN, "f32", "bf16")
def offsets_by_searchsorted(e: Edit) -> None:
    found = e.row_ids.op(A.searchsorted.Tensor, e.arange(e.E), right=True)
    e.swap(e.offs, found.to(torch.int32))


@preserving(QWEN)
def offsets_by_one_hot(e: Edit) -> None:
    hot = e.ids.view(-1, 1).eq(e.arange(e.E)).to(torch.int64)
    e.swap(e.offs, hot.sum([0]).op(A.cumsum.default, 0).to(torch.int32))


@preserving(QWEN)
def offsets_by_comparison(e: Edit) -> None:
    hot = e.row_ids.unsqueeze(1).op(A.le.Tensor, e.arange(e.E)).to(torch.int64)
    e.swap(e.offs, hot.sum([0]).to(torch.int32))


@preserving(QWEN)
def offsets_by_scatter_add(e: Edit) -> None:
    zeros = e.full([e.E], 0, dtype=torch.int64)
    flat = e.ids.view(-1)
    counts = zeros.op(A.scatter_add.default, 0, flat, flat.op(A.ones_like.default))
    e.swap(e.offs, counts.op(A.cumsum.default, 0, dtype=torch.int32))


@preserving(QWEN)
def offsets_twice(e: Edit) -> None:
    again = e.find(A.histc.default).op(A.cumsum.default, 0, dtype=torch.int32)
    e.arg(V(e, e.down.node), 2, again)


@preserving(QWEN)
def sort_as_argsort_and_gather(e: Edit) -> None:
    flat, perm, ids = V(e, e.find(A.sort.default).node.args[0]), e.perm, e.row_ids
    order = flat.op(A.sort.stable, stable=True, dim=0).item(1)
    e.swap(ids, flat.op(A.gather.default, 0, order))
    e.swap(perm, order)


@preserving(NEMOTRON, "f32", "bf16", "bmm")
def relu2_as_relu_times_relu(e: Edit) -> None:
    relu = e.find(A.relu.default)
    e.swap(e.find(A.square.default), relu * relu)


@preserving(NEMOTRON)
def relu2_as_clamp_and_pow(e: Edit) -> None:
    e.swap(e.find(A.square.default), e.u.op(A.clamp.default, 0).op(A.pow.Tensor_Scalar, 2))


@preserving(NEMOTRON)
def relu2_as_a_mask(e: Edit) -> None:
    e.swap(e.find(A.square.default), e.u * e.u * e.u.gt(0).to(f32))


@preserving((QWEN, GPT))
def inverse_as_argsort(e: Edit) -> None:
    e.swap(e.inverse, e.perm.op(A.sort.default).item(1))


@preserving(QWEN)
def inverse_by_scatter(e: Edit) -> None:
    zeros = e.perm.op(A.zeros_like.default)
    e.swap(e.inverse, zeros.op(A.scatter.src, 0, e.perm, e.arange(e.size(e.perm))))


@preserving((QWEN, GPT, ARIA), "f32", "bmm")
def sum_as_two_additions(e: Edit) -> None:
    e.swap(e.out, e.pairs.select(1, 0) + e.pairs.select(1, 1))


@preserving((QWEN, GPT), "f32", "bmm")
def sum_as_product_with_ones(e: Edit) -> None:
    ones = e.full([1, 1, e.K], 1.0).op(A.expand.default, [e.size(e.x), 1, e.K])
    e.swap(e.out, ones.op(A.bmm.default, e.pairs).squeeze(1))


@preserving((QWEN, GPT))
def weighted_sum_as_bmm(e: Edit) -> None:
    last = e.weighted.node.args[0]  # y, with its bias if there is one
    by_pair = V(e, last).index(e.inverse).view(-1, e.K, e.H)
    e.swap(e.out, e.w.unsqueeze(1).op(A.bmm.default, by_pair).squeeze(1))


@preserving(QWEN, "bmm")
def weights_after_the_view(e: Edit) -> None:
    e.swap(e.out, (e.y.view(-1, e.K, e.H) * e.w.unsqueeze(2)).sum([1]))


@preserving((QWEN, GPT), "f32", "bf16")
def sum_as_index_add(e: Edit) -> None:
    e.swap(e.out, e.x.op(A.zeros_like.default).op(A.index_add.default, 0, e.token, e.weighted))


@preserving(QWEN)
def sum_as_scatter_add(e: Edit) -> None:
    index = e.token.unsqueeze(1).op(A.expand.default, [-1, e.H])
    e.swap(e.out, e.x.op(A.zeros_like.default).op(A.scatter_add.default, 0, index, e.weighted))


@preserving(QWEN)
def sum_as_index_put(e: Edit) -> None:
    e.swap(e.out, e.x.op(A.zeros_like.default).op(A.index_put.default, [e.token], e.weighted, True))


@preserving((QWEN, GPT), "f32", "bmm")
def weights_expanded(e: Edit) -> None:
    column = V(e, e.weighted.node.args[1])
    e.swap(column, lambda v: v.op(A.expand.default, [-1, e.H]))


@preserving(QWEN)
def token_by_shift(e: Edit) -> None:
    e.swap(e.token, e.perm.op(A.__rshift__.Scalar, 1))


@preserving(QWEN)
def token_by_rounded_division(e: Edit) -> None:
    e.swap(e.token, e.perm.op(A.div.Tensor_mode, e.K, rounding_mode="floor"))


@preserving((QWEN, GPT))
def token_by_table(e: Edit) -> None:
    table = e.arange(e.size(e.x)).op(A.repeat_interleave.self_int, e.K, 0)
    e.swap(e.token, table.index(e.perm))


@preserving(QWEN)
def rows_by_repeat_and_permutation(e: Edit) -> None:
    e.swap(e.rows, e.x.op(A.repeat_interleave.self_int, e.K, 0).index(e.perm))


@preserving(QWEN, "bmm")
def rows_by_expand(e: Edit) -> None:
    tall = e.x.unsqueeze(1).op(A.expand.default, [-1, e.K, -1]).op(A.clone.default)
    e.swap(e.rows, tall.view(-1, e.H))


@preserving((QWEN, MIXTRAL))
def halves_joined_and_split_again(e: Edit) -> None:
    joined = e.op(A.cat.default, [e.find(A.silu.default), e.halves[1]], 1)
    e.swap(e.h, joined.cols(0, e.I) * joined.cols(e.I, 2 * e.I))


@preserving(QWEN)
def zeros_for_empty(e: Edit) -> None:
    e.swap(e.find(A.empty_like.default), e.perm.op(A.zeros_like.default))


@preserving((QWEN, GPT), "f32", "bf16")
def weights_computed_inside(e: Edit) -> None:
    """Another function of the arguments before the experts, none of the experts' business: then undone."""
    e.swap(e.w, lambda v: (v * 2.0) / 2.0)


@preserving(QWEN)
def masks_that_keep_everything(e: Edit) -> None:
    zero = e.full([], 0.0)
    keep = e.row_ids.ge(e.E).unsqueeze(1)
    e.swap(e.weighted, lambda v: v.where(keep, zero))
