"""Capture of experts that are called in a data-dependent Python loop: a trace with every expert in use.

Contract: like ``capture``: the module is read, never changed.

Rows per expert are sizes that the trace does not know (at least two), a loop over the experts that were hit runs over
all of them, counts are sizes. ``collapse`` makes stacked products of the unrolled loop. What the trace assumes,
that an expert without tokens contributes nothing, is proven afterwards: by ``idle`` on the trace, by ``match``,
which admits only heads and tails that are linear in the rows, and by verification, which runs the original module with
each expert without tokens once.
"""

from __future__ import annotations

import itertools
import operator
import sys
import warnings
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from ..calls import TensorInfo
from ..weights import equal_children
from .capture import CallPattern, Captured, CaptureError, free_dims, named_dims
from .collapse import collapse, expression
from .guards import Sizes, Traced, quietly, settle

aten = torch.ops.aten


class _AllInUse(TorchFunctionMode):
    """Answers what only data can tell as if every expert had at least two rows.

    ``hit``: tensors that hold the number of an expert known from the loop, by id (kept alive).
    ``places``: elements of integer vectors of fixed length (one per expert); what compares one with a number
    asks whether an expert has rows. ``made``: integers made of others, so that the length of a slice between two
    sums of counts is the one count by which they differ. ``sizes``: values, as sizes that the trace does not know.
    ``masks``: where a mask is true, by the mask: computed once, so that a branch on whether there is any and all that
    takes rows by the mask share one size. ``asked``: numbers made of a mask that a branch may compare with zero.
    ``met``, ``first``: masks by how they were made, and the first mask that was made as a mask was.
    ``places_made``: what ``masks`` holds, in the order of the trace. ``taken``: the sizes on which the code has
    branched, which must turn out to be numbers of experts' rows (``collapse``).
    What has been written to since (another version) is not what was remembered.
    """

    def __init__(self, without_last: bool) -> None:
        super().__init__()
        self.without_last = without_last
        self.hit: dict[int, tuple[Tensor, int]] = {}
        self.places: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.made: dict[int, tuple[list[int], Tensor, str, tuple[Any, ...]]] = {}
        self.sizes: dict[int, tuple[int, Tensor, Any]] = {}
        self.masks: dict[int, tuple[int, Tensor, Tensor]] = {}
        self.asked: dict[int, tuple[list[int], Tensor, Tensor]] = {}
        self.taken: set[Any] = set()
        self.met: dict[Any, tuple[list[int], Tensor, list[Any]]] = {}
        self.first: dict[int, tuple[list[int], Tensor, Tensor]] = {}
        self.places_made: list[Tensor] = []
        self.sliced: Any = None
        # (begin, end) of an expert's rows, as formulas of the counts -> (count, where the rows begin, a tensor).
        self.slices: dict[tuple[Any, Any], tuple[Any, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor):
            number = self._number(args[0])
            if number is not None and func in _OF_KNOWN:
                return _OF_KNOWN[func](number, *args[1:])
            if number is not None and func in _SAME_NUMBER:
                return self._know(func(*args, **kwargs), number)
            if func in (torch.nonzero, Tensor.nonzero) or (func is torch.where and len(args) == 1):
                return self._nonzero(func, args, kwargs)
            if func in (Tensor.unbind, torch.unbind) and self._all_hit(args[0]):  # what iterating calls
                return tuple(self._know(args[0][e], e) for e in range(args[0].shape[0]))
            if func in (Tensor.unbind, torch.unbind) and _is_vector(args[0]):
                return tuple(self._place(part, args[0], i) for i, part in enumerate(func(*args, **kwargs)))
            if id(args[0]) in self.places and (func in _COMPARED or func is Tensor.__bool__):
                count = self._size(args[0])
                torch._check(count >= 2)
                return self.take(count != 0) if func is Tensor.__bool__ else _COMPARED[func](count, *args[1:])
            if id(args[0]) in self.asked and (func in _COMPARED or func in _AS_NUMBER):
                return self._answer(func, *args)
            if func in _ANY_OR_COUNT and len(args) == 1 and not kwargs and self._counts_trues(func, args[0]):
                result = func(*args)
                self.asked[id(result)] = (_versions(result, args[0]), result, args[0])
                return result
            if func is Tensor.numpy:
                return _Counts(self._counts(args[0]))
            if func is Tensor.tolist and args[0].dim() == 1 and not args[0].dtype.is_floating_point:
                return self._counts(args[0])
            if func is Tensor.__getitem__:
                return self._getitem(args[0], args[1])
            if func is Tensor.__setitem__ and isinstance(args[1], slice) and isinstance(args[2], Tensor):
                return self._setitem(*args)
            if func is Tensor.__setitem__ and isinstance(args[2], Tensor) and any(map(_unknown, args[2].shape)):
                return Tensor.__setitem__(args[0], self._by_places(args[1]), args[2])
            if func in (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes):
                sizes = args[1] if len(args) > 1 else kwargs.get("split_size", kwargs.get("split_size_or_sections"))
                dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
                if isinstance(sizes, (list, tuple)) and dim == 0 and any(map(_unknown, sizes)):
                    return self._split(args[0], sizes)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype in (torch.int32, torch.int64):
            self._make(func, args, result)
        if func in _CHOOSING and isinstance(result, Tensor):
            self._meet([func, *args, *sorted(kwargs), *(kwargs[name] for name in sorted(kwargs))], result)
        if func in (torch.cat, torch.concat) and self.sliced is not None and free_unbacked_symbols(result.shape[0]):
            # The slices make up what was sliced (else the probes in ``match`` find rows missing).
            torch._check(result.shape[0] == self.sliced)
            return result.index_select(0, torch.arange(self.sliced, device=result.device))
        return result

    def _number(self, tensor: Tensor) -> int | None:
        known = self.hit.get(id(tensor))
        return known[1] if known is not None and known[1] >= 0 else None

    def _know(self, tensor: Tensor, number: int) -> Tensor:
        self.hit[id(tensor)] = (tensor, number)
        return tensor

    def _all_hit(self, tensor: Tensor) -> bool:
        return self.hit.get(id(tensor), (None, 0))[1] == -1

    def _place(self, part: Tensor, vector: Tensor, index: int) -> Tensor:
        self.places[id(part)] = (part, vector, index)
        return part

    def _make(self, func: Any, args: Any, result: Tensor) -> None:
        """Remember how an integer or a vector of integers was made."""
        known = None
        if result.dim() == 0 and func in _ADDED and len(args) == 2:
            if any(isinstance(a, Tensor) and (id(a) in self.places or id(a) in self.made) for a in args):
                known = ("sum", args)
        elif not _is_vector(result):
            return
        elif func in (torch.cumsum, Tensor.cumsum) and _is_vector(args[0]):
            known = ("sums", args[:1])
        elif func in (torch.cat, torch.concat) and all(map(_is_vector, args[0])):
            known = ("joined", tuple(args[0]))
        elif func is torch.zeros:
            known = ("zeros", ())
        elif func in _SAME_NUMBER and args[0] is not result and _is_vector(args[0]):
            known = ("same", args[:1])
        if known is not None:
            self.made[id(result)] = (_versions(result, *known[1]), result, *known)

    def _origin(self, tensor: Tensor) -> tuple[str, tuple[Any, ...]]:
        """How an integer or a vector was made, if neither it nor what it was made of has been changed."""
        versions, _, kind, parts = self.made.get(id(tensor), ([], tensor, "", ()))
        return (kind, parts) if versions == _versions(tensor, *parts) else ("", ())

    def _size(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        version, _, size = self.sizes.get(id(tensor), (-1, tensor, None))
        if version != tensor._version:
            kind, parts = self._origin(tensor)
            if kind:
                size = sum(map(self._size, parts))
            elif id(tensor) in self.places:
                _, vector, index = self.places[id(tensor)]
                size = self._entries(vector)[index]
            else:
                size = tensor.item()
            self.sizes[id(tensor)] = (tensor._version, tensor, size)
        return size

    def _entries(self, vector: Tensor) -> list[Any]:
        """The values in a vector, as sizes."""
        version, _, entries = self.sizes.get(id(vector), (-1, vector, None))
        if version != vector._version:
            kind, parts = self._origin(vector)
            if kind == "sums":
                entries = list(itertools.accumulate(self._entries(parts[0])))
            elif kind in ("joined", "same"):
                entries = [e for part in parts for e in self._entries(part)]
            elif kind == "zeros":
                entries = [0] * int(vector.shape[0])
            else:
                entries = [Tensor.__getitem__(vector, e).item() for e in range(int(vector.shape[0]))]
            self.sizes[id(vector)] = (vector._version, vector, entries)
        return entries  # type: ignore[no-any-return]

    def _rows(self, tensor: Tensor, index: slice) -> Tensor | None:
        """The row numbers of a slice between sizes the trace does not know, so that their number is one it does."""
        if index.step is not None:
            return None
        start, stop = self._size(index.start), self._size(index.stop)
        if not _unknown(start) and not _unknown(stop):
            return None
        start, stop = 0 if start is None else start, tensor.shape[0] if stop is None else stop
        known = self.slices.get((expression(start), expression(stop)))
        if known is not None:
            # Sums of counts would be computed anew for every expert: quadratic in the number of experts.
            length, begin = known
            return torch.arange(length, device=tensor.device) + begin
        length = stop - start
        torch._check(length >= 2)
        torch._check(start >= 0)
        torch._check(stop <= tensor.shape[0])
        return torch.arange(length, device=tensor.device) + start  # type: ignore[call-overload, no-any-return]

    def _setitem(self, tensor: Tensor, index: slice, value: Tensor) -> None:
        rows = self._rows(tensor, index)
        if rows is None:
            Tensor.__setitem__(tensor, index, value)
        else:
            tensor.index_copy_(0, rows, value)

    def _nonzero(self, func: Any, args: Any, kwargs: Any) -> Any:
        mask = args[0]
        if mask.dim() == 1 and isinstance(mask.shape[0], int):
            # Of a fixed number of places: the experts that were hit. All of them are.
            places = mask.shape[0] - (1 if self.without_last else 0)
            numbers = self._know(torch.arange(places, device=mask.device), -1)
            if func is torch.where or kwargs.get("as_tuple"):
                return (numbers,)
            return self._know(numbers.unsqueeze(-1), -1)
        found = self._places(mask)
        return tuple(found.unbind(1)) if func is torch.where or kwargs.get("as_tuple") else found

    @staticmethod
    def _is_mask(tensor: Any) -> TypeGuard[Tensor]:
        """Whether only the routing knows where a tensor is true (one place per expert: every expert is hit)."""
        return isinstance(tensor, Tensor) and tensor.dtype == torch.bool and _varies(tensor)

    def _counts_trues(self, func: Any, tensor: Tensor) -> bool:
        """Whether a function is zero just where a tensor is: a sum of integers may be zero although they are not."""
        if func in (Tensor.sum, torch.sum):
            return self._is_mask(tensor)
        return not tensor.is_floating_point() and _varies(tensor)

    def _meet(self, made: list[Any], result: Tensor) -> None:
        """Remember how a mask was made: one that is made alike of the same, unchanged, is true at the same places."""
        parts = [self._as_first(part) if isinstance(part, Tensor) else part for part in made]
        if not all(isinstance(p, (Tensor, int, str)) or p is None for p in parts[1:]):
            return
        key = tuple((id(p), p._version) if isinstance(p, Tensor) else (type(p), p) for p in parts)
        # The tensors are kept alive, so that no other gets their ids.
        versions, first, _ = self.met.setdefault(key, (_versions(result), result, parts))
        if versions == _versions(first):
            self.first[id(result)] = (_versions(result, first), result, first)

    def _as_first(self, mask: Tensor) -> Tensor:
        versions, _, first = self.first.get(id(mask), ([], mask, mask))
        return first if versions == _versions(mask, first) else mask

    def _by_places(self, index: Any) -> Any:
        """Masks in an index as the places where they are true; any other index as it is."""
        if not isinstance(index, tuple):
            return tuple(self._places(index).unbind(1)) if self._is_mask(index) else index
        parts = [self._places(i).unbind(1) if self._is_mask(i) else (i,) for i in index]
        return tuple(itertools.chain(*parts))

    def _places(self, mask: Tensor) -> Tensor:
        """Where a mask is true, [rows, dimensions]."""
        mask = self._as_first(mask)
        version, _, places = self.masks.get(id(mask), (-1, mask, mask))
        if version != mask._version:
            places = torch.nonzero(mask)
            torch._check(places.shape[0] >= 2)
            self.places_made.append(places)
            self.masks[id(mask)] = (mask._version, mask, places)
        return places

    def _answer(self, func: Any, *args: Any) -> Any:
        """What a branch asks of the number of places where a mask is true: as if there were some."""
        versions, number, mask = self.asked[id(args[0])]
        if versions != _versions(number, mask):
            raise CaptureError("its loop over experts asks for the number of trues in a mask it has changed since")
        count: Any = self._places(mask).shape[0]
        if number.dtype == torch.bool:
            some = self.take(count != 0)
            return _COMPARED[func](some, *args[1:]) if func in _COMPARED else some
        if func in _COMPARED:
            return _COMPARED[func](count, *args[1:])
        return self.take(count != 0) if func is Tensor.__bool__ else count

    def take(self, condition: Any) -> bool:
        """Follow a branch as the sizes say, which are two at least; it must not tell one row from many."""
        if not isinstance(condition, torch.SymBool):
            return bool(condition)
        answer, symbols = bool(condition), free_unbacked_symbols(condition)
        if symbols:
            if condition.node.expr.subs(dict.fromkeys(symbols, 1)) != answer:
                raise CaptureError(
                    "its loop over experts branches on a number of rows, and not only on whether there are any: "
                    f"{condition.node.expr}"
                )
            self.taken |= symbols
        return answer

    def _counts(self, tensor: Tensor) -> list[Any]:
        known = self._number(tensor)
        if known is not None:
            return [known]
        counts = []
        for e in range(tensor.shape[0]):
            count = tensor[e].item()
            torch._check(count >= 2)
            counts.append(count)
        if counts and all(isinstance(c, torch.SymInt) for c in counts):
            begins: Tensor = tensor.cumsum(0) - tensor
            begin: Any = 0
            for e, count in enumerate(counts):
                end = begin + expression(count)
                self.slices[begin, end] = count, begins[e]
                begin = end
        return counts

    def _split(self, tensor: Tensor, sizes: Any) -> tuple[Tensor, ...]:
        """Parts of sizes the trace does not know, as slices between their sums."""
        parts, start = [], 0
        for size in sizes:
            parts.append(self._getitem(tensor, slice(start, start + size)))
            start = start + size
        return tuple(parts)

    def _getitem(self, tensor: Tensor, index: Any) -> Any:
        index = self._by_places(index)
        number = self._number(index) if isinstance(index, Tensor) else None
        if number is not None and isinstance(index, Tensor):
            return tensor[number] if index.dim() == 0 else tensor[number].unsqueeze(0)
        if isinstance(index, tuple):
            # Only where all that chooses comes first: a number between slices arranges the result differently.
            chosen = [isinstance(i, (Tensor, int, torch.SymInt)) and not isinstance(i, bool) for i in index]
            numbers = [self._number(i) if isinstance(i, Tensor) and i.dim() == 0 else None for i in index]
            if any(n is not None for n in numbers) and chosen == sorted(chosen, reverse=True):
                return tensor[tuple(i if n is None else n for i, n in zip(index, numbers, strict=True))]
        if isinstance(index, slice):
            rows = self._rows(tensor, index)
            if rows is not None:
                self.sliced = tensor.shape[0]
                return tensor.index_select(0, rows)
            if index == slice(None) and self._all_hit(tensor):
                return self._know(Tensor.__getitem__(tensor, index), -1)
        result = Tensor.__getitem__(tensor, index)
        if isinstance(index, int):
            self._meet([Tensor.__getitem__, tensor, index], result)
        known = self._number(tensor)
        if known is not None:
            return self._know(result, known)
        return self._place(result, tensor, index) if isinstance(index, int) and _is_vector(tensor) else result


def _varies(tensor: Tensor) -> bool:
    """Whether a tensor's shape is not all numbers that the trace knows."""
    return any(not isinstance(n, int) for n in tensor.shape)


def _unknown(size: Any) -> bool:
    """Whether a size is one that only the routing knows."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


class _Counts(list):  # type: ignore[type-arg]
    """What ``counts.numpy()`` is used as: a sequence of numbers."""

    def tolist(self) -> list[Any]:
        return list(self)

    def astype(self, dtype: Any) -> _Counts:
        return self


def _versions(*tensors: Any) -> list[int]:
    return [t._version for t in tensors if isinstance(t, Tensor)]


def _is_vector(tensor: Tensor) -> bool:
    """Whether a tensor is a vector of integers of a length that the trace knows."""
    return tensor.dim() == 1 and isinstance(tensor.shape[0], int) and tensor.dtype in (torch.int32, torch.int64)


_COMPARED: dict[Any, Any] = {
    getattr(Tensor, spelling): getattr(operator, name)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for spelling in (name, f"__{name}__")
}
_OF_KNOWN: dict[Any, Any] = {
    **_COMPARED,
    Tensor.item: int,
    Tensor.__int__: int,
    Tensor.__index__: int,
    Tensor.tolist: lambda n: [n],
    Tensor.__format__: format,  # f"expert_{e}"
}
_ANY_OR_COUNT = {Tensor.any, torch.any, Tensor.sum, torch.sum, Tensor.count_nonzero, torch.count_nonzero}
# What masks are made with: what they say depends on nothing but the arguments.
_CHOOSING = {Tensor.eq, Tensor.__eq__, torch.eq, Tensor.any, torch.any}
_AS_NUMBER = {Tensor.__bool__, Tensor.item, Tensor.__int__, Tensor.__index__}
_ADDED = {Tensor.__add__, Tensor.__radd__, Tensor.add, torch.add}
_SAME_NUMBER = {Tensor.squeeze, Tensor.view, Tensor.reshape, Tensor.cpu, Tensor.to, Tensor.long, Tensor.int}


class _Caller(nn.Module):
    """Runs the module as if every expert had rows.

    A mask may have a place more than there are experts, for ids that are none. Where the loop would take such an
    expert's weights, which do not exist, the original fails with such ids, and the place counts as never hit.
    """

    def __init__(self, module: nn.Module, without_last: bool, sizes: Sizes) -> None:
        super().__init__()
        self.module, self.without_last, self.sizes = module, without_last, sizes

    def forward(self, args: Any, kwargs: Any) -> Any:
        with (
            _AllInUse(self.without_last) as self.seen,
            _branches(self.seen),
            self.sizes,
            self.sizes.functions(self.module),
        ):
            return self.module(*args, **kwargs)


@contextmanager
def _branches(seen: _AllInUse) -> Any:
    """Branches on sizes that the trace does not know, in code that is not torch's own, are shown to ``seen``.

    That a size is two at least answers them, and no graph shows what was asked.
    """
    of_bool, of_int = torch.SymBool.__bool__, torch.SymInt.__bool__

    def truth(condition: torch.SymBool) -> bool:
        return of_bool(condition) if _torchs_own(sys._getframe(1)) else seen.take(condition)

    def not_zero(size: torch.SymInt) -> bool:
        return of_int(size) if _torchs_own(sys._getframe(1)) else seen.take(size != 0)

    torch.SymBool.__bool__, torch.SymInt.__bool__ = truth, not_zero  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.SymBool.__bool__, torch.SymInt.__bool__ = of_bool, of_int  # type: ignore[method-assign]


def _torchs_own(frame: Any) -> bool:
    """Whether a frame is torch's, or of these modules, which ask for themselves."""
    name = str(frame.f_globals.get("__name__", ""))
    return name in (__name__, Sizes.__module__) or name.partition(".")[0] in ("torch", "sympy")


@contextmanager
def _without_hooks(module: nn.Module) -> Any:
    """Hooks of recorders keep what they see; they see nothing while tracing."""
    saved = [(m, m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    try:
        for m, _, _ in saved:
            m._forward_hooks, m._forward_pre_hooks = type(m._forward_hooks)(), type(m._forward_pre_hooks)()
        yield
    finally:
        for m, after, before in saved:
            m._forward_hooks, m._forward_pre_hooks = after, before


def holds_list(module: nn.Module) -> bool:
    """Whether experts may be modules of a list in ``module`` (or ``module`` itself)."""
    return any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) and equal_children(m) for m in module.modules())


def capture_loop(module: nn.Module, pattern: CallPattern) -> Captured:
    """Trace ``module`` and collapse its loop over experts; CaptureError with the reason where that fails."""
    return collapse(module, trace(module, pattern))


def trace(module: nn.Module, pattern: CallPattern) -> Captured:
    """Trace ``module`` as if every expert had tokens; CaptureError with the reason where it does not trace."""
    return settle(lambda called, sizes: _traced(module, called, sizes), pattern)


def _traced(module: nn.Module, pattern: CallPattern, sizes: Sizes) -> Traced:
    example = [leaf.zeros() if isinstance(leaf, TensorInfo) else leaf for leaf in pattern.leaves]
    args, kwargs = pattern.arrange(example)
    error: Exception | None = None
    without_last = False
    waiting = [named_dims, free_dims] if sum(map(bool, pattern.dynamic)) > 1 else [free_dims]
    while waiting:
        arg_shapes, kwarg_shapes = pattern.arrange(waiting[0](pattern))
        try:
            with torch.no_grad(), warnings.catch_warnings(), _without_hooks(module), _casts_of_nothing(), quietly():
                warnings.simplefilter("ignore")
                sizes.forget()
                caller = _Caller(module, without_last, sizes)
                program = torch.export.export(
                    caller,
                    (args, kwargs),
                    dynamic_shapes={"args": arg_shapes, "kwargs": kwarg_shapes},
                    strict=False,
                ).run_decompositions({})
            captured = _sorted(program, pattern)
            _check_names(captured, caller.seen)
            captured.taken = frozenset(caller.seen.taken)
            return Traced(captured, program, sizes)
        except CaptureError:
            raise
        except IndexError as failure:
            error = error or failure
            if without_last:
                waiting.pop(0)
            without_last = True
        except Exception as failure:
            error = failure
            waiting.pop(0)
    lines = str(error).strip().splitlines()
    raise CaptureError(
        f"its loop over experts does not trace: {type(error).__name__}: {(lines or [''])[0][:300]}"
    ) from error


def _check_names(captured: Captured, seen: _AllInUse) -> None:
    """The sizes that were branched on are known by their names: these must mean in the graph what they did before."""
    made = [expression(places.shape[0]) for places in seen.places_made]
    found = [expression(n.meta["val"].shape[0]) for n in captured.graph.nodes if n.target == aten.nonzero.default]
    if seen.taken and [size for size in found if size in made] != made:
        raise CaptureError("it branches on whether a mask is true anywhere, and its graph has that mask no longer")


@contextmanager
def _casts_of_nothing() -> Any:
    """``module.to(dtype)`` in a forward hands back the module where it changes nothing: export cannot swap weights."""
    original = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        same = all(
            (dtype is None or not t.is_floating_point() or t.dtype == dtype) and (device is None or t.device == device)
            for t in tensors
        )
        return self if same else original(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


def _sorted(program: torch.export.ExportedProgram, pattern: CallPattern) -> Captured:
    signature = program.graph_signature
    for out in signature.output_specs:
        if out.kind != OutputKind.USER_OUTPUT or not isinstance(out.arg, TensorArgument):
            raise CaptureError(f"the module returns or changes something else than tensors ({out.kind.name.lower()})")
    captured = Captured(program.graph_module.graph, [], {}, {}, {}, pattern)
    spec = program.call_spec.out_spec
    captured.out_spec = None if spec is None or spec.is_leaf() else spec
    strip = len("module.")
    for entry in signature.input_specs:
        name = entry.arg.name
        target = entry.target or ""
        if entry.kind == InputKind.PARAMETER:
            captured.parameters[name] = target[strip:]
        elif entry.kind == InputKind.BUFFER:
            captured.buffers[name] = target[strip:]
        elif entry.kind == InputKind.CONSTANT_TENSOR:
            captured.constants[name] = program.constants[target]
        elif entry.kind == InputKind.USER_INPUT and isinstance(entry.arg, TensorArgument):
            captured.inputs.append(name)
        elif entry.kind == InputKind.USER_INPUT:
            node = captured.node(name)
            if node.users:
                raise CaptureError(f"the plain argument {name} is used symbolically")
            captured.graph.erase_node(node)
        else:
            raise CaptureError(f"the module takes an input of kind {entry.kind.name.lower()}")
    for node in reversed(list(captured.graph.nodes)):
        # What the trace assumed about sizes (every expert has rows) must not be asserted at run time.
        if node.target in (aten._assert_scalar.default, aten._assert_tensor_metadata.default) or "sym_constrain" in str(
            node.target
        ):
            captured.graph.erase_node(node)
    if len(captured.inputs) != len(pattern.tensors):
        raise CaptureError("the trace has another number of tensor inputs than the call")
    return captured


__all__ = ["capture_loop", "holds_list", "trace"]
