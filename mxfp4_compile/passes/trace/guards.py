"""Guards: what a trace has decided by the sizes of its inputs, and whether that holds for all sizes.

Contract: a trace is returned only if its guards say that it is right for every size that its arguments may have from 1
on, with the sizes at which verification must show it (``Traced.sides``); else TraceError says in words what the
module branches on.

1. trace at the recorded sizes and read every guard (``Condition``). No guard fails anywhere: done.
2. Trace again with computations on sizes kept in the graph (``Sizes``): ``max``, ``min`` and ``int`` of a size stay
   nodes, and a loop over pieces of the tokens is taken as one piece.
3. Trace once in each range of sizes for which no trace so far holds. The graphs must be the same, op for op: then what
   was branched on does not matter (a fast path, another way to cut into pieces).
4. Verification runs on both sides of every number of tokens at which a guard or a computation changes its answer. That
   a module which works on pieces computes each row by itself is known by that alone.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.printers import PythonPrinter

from ..calls import TensorInfo
from .traced import CallPattern, Traced, TraceError

LARGEST = 1 << 14
"""The largest number of tokens that verification runs; a module that changes beyond it is refused."""

_MOST_TRACES = 6
_MOST_SIDES = 16


# sizes of a call


@dataclass(frozen=True)
class Axes:
    """The sizes that a call may choose. ``of``: (leaf, dimension) -> the axes whose product that size is."""

    names: tuple[str, ...]
    recorded: tuple[int, ...]
    of: dict[tuple[int, int], tuple[int, ...]]

    def resized(self, pattern: CallPattern, sizes: Sequence[int]) -> CallPattern:
        """The pattern of a call of other sizes."""
        leaves = []
        for i, leaf in enumerate(pattern.leaves):
            if isinstance(leaf, TensorInfo):
                shape = [
                    math.prod(sizes[a] for a in self.of[i, d]) if (i, d) in self.of else n
                    for d, n in enumerate(leaf.shape)
                ]
                leaf = replace(leaf, shape=tuple(shape))
            leaves.append(leaf)
        return replace(pattern, leaves=tuple(leaves))


def axes_of(pattern: CallPattern) -> Axes:
    """The axes of a pattern: batch size and sequence length, or a number of tokens."""
    sized = [(i, leaf, sorted(pattern.dynamic[i])) for i, leaf in enumerate(pattern.leaves)]
    several = [(leaf, dims) for _, leaf, dims in sized if len(dims) > 1]
    if several:
        leaf, dims = several[0]
        names: tuple[str, ...] = ("batch size", "sequence length", *(f"size {d}" for d in dims[2:]))
        recorded = tuple(leaf.shape[d] for d in dims)
    else:
        numbers = list(dict.fromkeys(leaf.shape[d] for _, leaf, dims in sized for d in dims))
        names = ("number of tokens", *(f"size {n}" for n in numbers[1:]))
        recorded = tuple(numbers)
    of: dict[tuple[int, int], tuple[int, ...]] = {}
    everything = tuple(range(min(2, len(recorded))))
    for i, leaf, dims in sized:
        for place, d in enumerate(dims):
            size = leaf.shape[d]
            if len(dims) == len(recorded) and len(dims) > 1:
                of[i, d] = (place,)
            elif size in recorded:
                of[i, d] = (len(recorded) - 1 - recorded[::-1].index(size),)
            elif len(everything) == 2 and size == recorded[0] * recorded[1]:
                of[i, d] = everything
    return Axes(names, recorded, of)


# conditions on sizes


@dataclass(frozen=True)
class Condition:
    """A condition on the sizes of a call, as Python code of ``size0``, ``size1``, ..., one for each axis."""

    code: str
    axes: Axes = field(compare=False, repr=False)

    def function(self) -> Callable[..., Any]:
        """The condition as a function of the axes' sizes; TraceError if it cannot be told from them."""
        arguments = ", ".join(f"size{i}" for i in range(len(self.axes.names)))
        if "L[" in self.code:
            raise TraceError(f"it branches on something that its arguments' sizes do not tell: {self.code[:200]}")
        made = eval(f"lambda {arguments}: {self.code}", {"math": math, "torch": torch})  # export's own code

        def holds(*sizes: int) -> Any:
            try:
                return made(*sizes)
            except ZeroDivisionError:  # of a formula that divides by a part of a size, which is zero there
                return False

        return holds

    def line(self) -> tuple[str, list[tuple[int, ...]]]:
        """What it depends on, in words, and sizes from small to large along which it changes as that does."""
        holds, count = self.function(), len(self.axes.names)
        every = range(1, LARGEST + 2)
        if count == 1:
            return self.axes.names[0], [(n,) for n in every]
        rest = (2,) * (count - 2)
        numbers = [int(n) for n in re.findall(r"(?<![\w.])\d+", self.code)]
        samples = sorted({1, 2, 3, 4, 6, 12, 18, 60, 500, 1025, *(n + k for n in numbers[:8] for k in (0, 1) if n + k)})
        factors = [(n, d) for n in samples for d in (2, 3, 4, 5) if n % d == 0]
        of_product = all(holds(d, n // d, *rest) == holds(n // d, d, *rest) == holds(1, n, *rest) for n, d in factors)
        if of_product:
            return "number of tokens", [(1, n, *rest) for n in every]
        pairs = list(itertools.product(samples, repeat=2))
        if all(holds(b, t, *rest) == holds(b, 2, *rest) for b, t in pairs):
            return self.axes.names[0], [(n, 2, *rest) for n in every]
        if all(holds(b, t, *rest) == holds(2, t, *rest) for b, t in pairs):
            return self.axes.names[1], [(1, n, *rest) for n in every]
        return f"{self.axes.names[0]} and {self.axes.names[1]}", [(2, n, *rest) for n in every]

    def changes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Neighbouring sizes along ``line`` between which it changes its answer."""
        holds, (_, sizes) = self.function(), self.line()
        answers = [holds(*s) for s in sizes]
        return [(a, b) for a, b, x, y in zip(sizes, sizes[1:], answers, answers[1:], strict=False) if x != y]

    def __str__(self) -> str:
        what, changes = self.line()[0], self.changes()
        numbers = [math.prod(a) if what == "number of tokens" else max(a) for a, _ in changes]
        if len(changes) == 1:
            return f"the {what}: more than {numbers[0]}"
        if len(changes) == 2 and numbers[1] == numbers[0] + 1:
            return f"the {what}: exactly {numbers[1]}"
        return f"the {what}, by what it computes of it: {self.text(what)}"

    def text(self, what: str) -> str:
        """The code with the axes' names."""
        text = re.sub(r"torch\.sym_float\(([^()]*)\)", r"\1", self.code).replace("math.", "")
        if what == "number of tokens":
            text = re.sub(r"size0\*size1|size1\*size0|size0(?!\d)", "tokens", text)
        for i, name in enumerate(self.axes.names):
            text = text.replace(f"size{i}", name.split()[-1] if i else name.split()[0])
        return text[:200]


def _conditions(program: torch.export.ExportedProgram, pattern: CallPattern, axes: Axes) -> list[Condition]:
    """Every guard of an exported program."""

    def source(match: re.Match[str]) -> str:
        key = match.group(1) or match.group(2)
        leaf = int(key) if match.group(1) else pattern.positional + pattern.keywords.index(key)
        d = int(match.group(3))
        if (leaf, d) in axes.of:
            return "*".join(f"size{a}" for a in axes.of[leaf, d])
        return match.group(0) if d in pattern.dynamic[leaf] else str(pattern.leaves[leaf].shape[d])

    pattern_of_size = r"L\[(?:'args'\]\[(\d+)|'kwargs'\]\['([^']*)')\]\.size\(\)\[(\d+)\]"
    return [Condition(re.sub(pattern_of_size, source, code), axes) for code in program._guards_code]


# a trace that keeps computations on sizes


class Sizes(TorchFunctionMode):
    """Watches how a module uses the sizes and the memory layout of what it computes on.

    ``symbolic``: keep computations on sizes in the graph, and take a loop over pieces as one piece. ``turned``:
    answer questions for contiguity the other way round. ``asked``: questions about memory layouts. ``kinks``: what
    was compared of sizes, of which the graph holds both sides.
    """

    def __init__(self, symbolic: bool, turned: bool = False) -> None:
        super().__init__()
        self.symbolic, self.turned = symbolic, turned
        self.forget()

    def forget(self) -> None:
        """Nothing was asked yet: a trace begins."""
        self.asked: list[str] = []
        self.kinks: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LAYOUT and args and _varies(args[0]) and not _of_torch(sys._getframe(1)):
            name = getattr(func, "__name__", str(func))
            self.asked.append(name)
            answer = func(*args, **kwargs)
            return not answer if self.turned and name == "is_contiguous" else answer
        if self.symbolic and func in _CUTTING and args and isinstance(args[0], Tensor):
            whole = self._uncut(func, args, kwargs)
            if whole is not None:
                return (whole,)
        if self.symbolic and func in (Tensor.__getitem__, Tensor.__setitem__) and _is_piece(args[1]):
            rest = [slice(None) if _is_piece(i) else i for i in _listed(args[1])]
            return func(args[0], tuple(rest), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _uncut(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        tensor: Tensor = args[0]
        names = ("split_size", "split_size_or_sections", "chunks")
        pieces = args[1] if len(args) > 1 else next((kwargs[n] for n in names if n in kwargs), None)
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        if type(pieces) is not int or type(dim) is not int or not _backed(tensor.shape[dim]):
            return None
        size = _formula(tensor.shape[dim])
        largest = pieces if func in _SPLITTING else 1
        self.kinks += [size > largest * times for times in ((1, 2) if func in _SPLITTING else (pieces, 2 * pieces))]
        return tensor

    @contextlib.contextmanager
    def functions(self, module: nn.Module) -> Iterator[None]:
        """``max``, ``min``, ``int``, ``float`` and ``range`` of sizes in the module's own code, where ``symbolic``."""
        if not self.symbolic:
            yield
            return
        own = {"max": self._max, "min": self._min, "int": _Int, "float": _Float, "range": self._range}
        places = [
            vars(sys.modules[base.__module__])
            for base in dict.fromkeys(b for m in module.modules() for b in type(m).__mro__)
            if base.__module__ in sys.modules and base.__module__.partition(".")[0] not in ("torch", "builtins")
        ]
        changed = [(place, n) for place in {id(p): p for p in places}.values() for n in own if n not in place]
        try:
            for place, name in changed:
                place[name] = own[name]
            yield
        finally:
            for place, name in changed:
                del place[name]

    def _max(self, *args: Any, **kwargs: Any) -> Any:
        return self._extreme(builtins.max, torch.sym_max, args, kwargs)

    def _min(self, *args: Any, **kwargs: Any) -> Any:
        return self._extreme(builtins.min, torch.sym_min, args, kwargs)

    def _extreme(self, plain: Any, symbolic: Any, args: Any, kwargs: Any) -> Any:
        numbers = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
        if kwargs or not any(_is_symbolic(n) for n in numbers):
            return plain(*args, **kwargs)
        result = numbers[0]
        for other in numbers[1:]:
            if isinstance(other, _End) or isinstance(result, _End):  # the end of the only piece
                result = result if isinstance(result, _End) else other
                continue
            self.kinks.append(_formula(result) > _formula(other))
            result = symbolic(result, other)
        return result

    def _range(self, *args: Any) -> Any:
        start, stop, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
        if _backed(stop) and type(start) is int and start == 0 and type(step) is int and step > 1:
            self.kinks += [stop.node.expr > step * times for times in (1, 2)]
            return (_Begin(step),)
        return builtins.range(*args)


class _Begin(int):
    """Where the only piece begins: 0. ``begin + step`` is its end, whatever the size."""

    step: int

    def __new__(cls, step: int) -> _Begin:
        made = int.__new__(cls, 0)
        made.step = step
        return made

    def __add__(self, other: Any) -> Any:
        return _End(self.step) if type(other) is int and other == self.step else int(self) + other


class _End(int):
    """Where the only piece ends; only good for slices from its begin."""


class _OfNumber(type):
    """The type of stand-ins for ``int`` and ``float``."""

    plain: Any
    symbolic: Any

    def __call__(cls, *args: Any) -> Any:
        return cls.symbolic(args[0]) if len(args) == 1 and _is_symbolic(args[0]) else cls.plain(*args)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.plain)


class _Int(metaclass=_OfNumber):
    plain, symbolic = int, staticmethod(torch.sym_int)


class _Float(metaclass=_OfNumber):
    plain, symbolic = float, staticmethod(torch.sym_float)


_LAYOUT = {Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset, Tensor.data_ptr}
_SPLITTING = {torch.split, Tensor.split}
_CUTTING = {*_SPLITTING, torch.chunk, Tensor.chunk}


def _listed(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_piece(index: Any) -> bool:
    slices = [i for i in _listed(index) if isinstance(i, slice)]
    return any(isinstance(i.start, _Begin) and isinstance(i.stop, _End) for i in slices)


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat))


def _backed(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.hint is not None


def _varies(value: Any) -> bool:
    return isinstance(value, Tensor) and any(isinstance(n, torch.SymInt) for n in value.shape)


def _formula(value: Any) -> Any:
    return value.node.expr if _is_symbolic(value) else value


def _of_torch(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


# settling what a trace decided


@dataclass(frozen=True)
class Exported:
    """One trace: the program, and what was seen of sizes and layouts while it ran.

    ``finish`` makes its graph functional and sorts it, which takes longer than the trace did; the program that it
    returns beside that has the guards of both.
    """

    program: torch.export.ExportedProgram
    sizes: Sizes
    finish: Callable[[], tuple[Traced, torch.export.ExportedProgram]]

    @functools.cached_property
    def finished(self) -> tuple[Traced, torch.export.ExportedProgram]:
        """What ``finish`` returned."""
        return self.finish()

    @property
    def traced(self) -> Traced:
        """The functional graph; TraceError where it is none that can be served."""
        return self.finished[0]


Take = Callable[[CallPattern, Sizes], Exported]


def settle(take: Take, pattern: CallPattern) -> Traced:
    """The graph that ``take`` traces, if it is right for all sizes; TraceError with what it branches on if not."""
    axes = axes_of(pattern)
    first = take(pattern, Sizes(symbolic=False))
    _check_layout(take, pattern, first)
    # The graph of one that branches is thrown away as a rule: then it is not even made functional.
    if not _failing(_conditions(first.program, pattern, axes)):
        if not _branches(first, pattern, axes):
            return first.traced
    try:
        exported = take(pattern, Sizes(symbolic=True))
        exported.finished  # noqa: B018
    except TraceError:
        exported = Exported(first.program, Sizes(symbolic=False), lambda: first.finished)
    symbolic = exported.sizes.symbolic
    found, kinks = [_branches(exported, pattern, axes)], _kinks(exported, pattern, axes)
    graph = _spelled(exported.traced.graph)
    while (point := _uncovered(found, axes)) is not None:
        reason = _words(found[0])
        if len(found) == _MOST_TRACES or math.prod(point) > LARGEST:
            beyond = f" (verification tries up to {LARGEST} tokens)" if math.prod(point) > LARGEST else ""
            raise TraceError(f"it branches on {reason}{beyond}")
        resized = axes.resized(pattern, point)
        try:
            other = take(resized, Sizes(symbolic))
            other.finished  # noqa: B018
        except TraceError as error:
            raise TraceError(f"it branches on {reason}; with {_shown(point)}: {error}") from error
        if _spelled(other.traced.graph) != graph:
            raise TraceError(f"it branches on {reason}, and does something else with {_shown(point)}")
        found.append(_branches(other, resized, axes))
        kinks += _kinks(other, pattern, axes)
        if not all(c.function()(*point) for c in found[-1]):
            raise TraceError(f"it branches on {reason}")
    changing = list(dict.fromkeys([*itertools.chain(*found), *kinks])) or _branches(first, pattern, axes)
    sides = _sides(changing)
    if sides and math.prod(sides[-1]) > LARGEST:
        raise TraceError(f"it branches on {_words(changing)} (verification tries up to {LARGEST} tokens)")
    return replace(exported.traced, sides=tuple(sides), branches=_words(changing))


def _branches(exported: Exported, pattern: CallPattern, axes: Axes) -> list[Condition]:
    """The guards of a trace, with what its functional graph asks, that do not hold for all sizes."""
    return _failing(_conditions(exported.finished[1], pattern, axes))


def _failing(conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions that do not hold for all sizes."""
    return [c for c in dict.fromkeys(conditions) if not all(map(c.function(), *_columns(len(c.axes.names))))]


@functools.cache
def _points(count: int) -> list[tuple[int, ...]]:
    """Sizes of so many axes at which coverage is asked: all small ones along each axis, and some large ones."""
    every = [*range(1, LARGEST + 2), *(1 << n for n in range(15, 31)), 100_000, 1_000_003]
    if count == 1:
        return [(n,) for n in every]
    rest = (2,) * (count - 2)
    points = [(b, n, *rest) for b in (2, 1, 3) for n in every]
    return points + [(n, t, *rest) for t in (2, 1, 3) for n in every] + [(n, n, *rest) for n in every[:128]]


@functools.cache
def _columns(count: int) -> list[tuple[int, ...]]:
    return list(zip(*_points(count), strict=True))


def _uncovered(found: Sequence[Sequence[Condition]], axes: Axes) -> tuple[int, ...] | None:
    """The smallest sizes for which no trace holds; two or more of each axis, if there are such."""
    functions = [[c.function() for c in conditions] for conditions in found]
    missing = [p for p in _points(len(axes.names)) if not any(all(f(*p) for f in fs) for fs in functions)]
    # Export takes a size of one for a constant, and equal sizes for one size.
    return min(missing, key=lambda p: (min(p) < 2, len(set(p)) < len(p), math.prod(p)), default=None)


def _kinks(exported: Exported, pattern: CallPattern, axes: Axes) -> list[Condition]:
    """What was compared of sizes, as conditions; TraceError where it is of something else than the axes."""
    import sympy  # type: ignore[import-untyped]

    names: dict[Any, Any] = {}
    at = [(i, leaf) for i, leaf in enumerate(pattern.leaves) if isinstance(leaf, TensorInfo)]
    env = None
    for name, (i, _) in zip(exported.traced.inputs, at, strict=True):
        for d, size in enumerate(exported.traced.node(name).meta["val"].shape):
            if isinstance(size, torch.SymInt):
                env = size.node.shape_env
                if size.node.expr.is_symbol and (i, d) in axes.of:
                    factors = [sympy.Symbol(f"size{a}", integer=True, positive=True) for a in axes.of[i, d]]
                    names[size.node.expr] = math.prod(factors[1:], start=factors[0])
    made = []
    for kink in exported.sizes.kinks:
        formula = kink if env is None or not hasattr(kink, "xreplace") else env.replace(kink)
        if isinstance(formula, (bool, sympy.logic.boolalg.BooleanAtom)):
            continue
        if not formula.free_symbols <= names.keys():
            raise TraceError(f"it compares a size that its arguments do not tell: {formula}")
        made.append(Condition(PythonPrinter().doprint(formula.xreplace(names)), axes))
    return _failing(made)


def _sides(conditions: Sequence[Condition]) -> list[tuple[int, ...]]:
    """Sizes on both sides of where a condition changes, from few tokens to many, and one beyond."""
    found: dict[tuple[int, ...], None] = {}
    for condition in conditions:
        for a, b in condition.changes()[:3]:
            found.update(dict.fromkeys((a, b)))
    sides = sorted(found, key=math.prod)[:_MOST_SIDES]
    return [s if len(s) == 2 else (1, *s) for s in sides]


def _words(conditions: Sequence[Condition]) -> str:
    return " and ".join(dict.fromkeys(str(c) for c in conditions[:3]))


def _shown(point: tuple[int, ...]) -> str:
    return f"{math.prod(point)} tokens" + (f" ({' x '.join(map(str, point))})" if len(point) > 1 else "")


def _check_layout(take: Take, pattern: CallPattern, first: Exported) -> None:
    """TraceError if the module does something else with arguments that lie in memory in another way."""
    asked = set(first.sizes.asked)
    if not asked:
        return
    reason = f"it branches on the memory layout of what it computes on ({', '.join(sorted(asked))})"
    if asked != {"is_contiguous"}:
        raise TraceError(reason)
    try:
        other = take(pattern, Sizes(symbolic=False, turned=True))
        other.finished  # noqa: B018
    except TraceError as error:
        raise TraceError(f"{reason}: {error}") from error
    if _spelled(other.traced.graph) != _spelled(first.traced.graph):
        raise TraceError(reason)


_SAME = (torch.ops.aten.clone.default, torch.ops.aten.alias.default, torch.ops.aten.contiguous.default)


def _spelled(graph: fx.Graph) -> list[Any]:
    """A graph, op for op, without what changes no value, for comparison."""
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in used:
            used.update(node.all_input_nodes)
    numbers: dict[fx.Node, Any] = {}
    out: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            numbers[node] = node.target
            continue
        if node.op != "output" and node not in used:
            continue
        alone = node.target is torch.ops.aten.cat.default and len(node.args[0]) == 1  # type: ignore[arg-type]
        if alone or node.target in _SAME:
            numbers[node] = numbers[node.all_input_nodes[0]]
            continue
        numbers[node] = f"%{len(out)}"
        spelled = fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(numbers[n]))  # type: ignore[arg-type]
        out.append((node.op, str(node.target), repr(spelled)))
    return out


class _Name(str):
    __slots__ = ()


__all__ = ["LARGEST", "Axes", "Condition", "Exported", "Sizes", "axes_of", "settle"]
