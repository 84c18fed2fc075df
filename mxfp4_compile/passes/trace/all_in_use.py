"""What a loop over experts asks of data, answered as if every expert had rows.

Contract: a mode around a trace; nothing but the answers differs from the module's own code, and what an answer took
for granted is remembered (``branched_sizes``, ``places_made``, ``distinct``), so that ``unroll`` and ``collapse`` can
prove it or refuse.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any, NoReturn, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from .collapse import expression
from .traced import TraceError


class AllInUse(TorchFunctionMode):
    """Answers what only data can tell as if every expert had at least two rows.

    ``hit``: tensors that hold the number of an expert known from the loop, by id (kept alive).
    ``places``: elements of integer vectors of fixed length (one per expert); what compares one with a number
    asks whether an expert has rows. ``made``: integers made of others, so that the length of a slice between two
    sums of counts is the one count by which they differ. ``sizes``: values, as sizes that the trace does not know.
    ``masks``: where a mask is true, by the mask: computed once, so that a branch on whether there is any and all that
    takes rows by the mask share one size. ``asked``: numbers made of a mask that a branch may compare with zero.
    ``met``, ``first``: masks by how they were made, and the first mask that was made as a mask was.
    ``places_made``: what ``masks`` holds, in the order of the trace. ``branched_sizes``: those on which the code has
    branched, which must turn out to be numbers of experts' rows (``collapse``).
    ``flattened``: masks of one dimension by the mask of several that they are a view of. ``distinct``: integers whose
    distinct values the code goes through, which must be what chooses the experts' rows: ``compared`` has the experts
    that integers were compared with, ``same`` what is a view of what.
    ``columns``: K of a choice for each token of each sequence; ``flats``: [tokens, ...] views of [batch, length, ...];
    ``joined``: the places of masks of both, counted through them. ``choices``: among how many a token's experts were
    chosen, which says how many there are where the weights do not.
    What has been written to since (another version) is not what was remembered.
    """

    def __init__(self, without_last: bool, experts: int | None = None) -> None:
        """``experts``: how many the weights say there are, if they agree."""
        super().__init__()
        self.without_last, self.experts = without_last, experts
        self.flattened: dict[int, tuple[list[int], Tensor, Tensor]] = {}
        self.flats: dict[int, tuple[int, Tensor, Tensor]] = {}
        self.joined: dict[int, tuple[Tensor, Tensor]] = {}
        self.columns: Any = None
        self.choices: set[int] = set()
        self.distinct: list[Tensor] = []
        self.compared: dict[int, set[int]] = {}
        self.same: dict[int, tuple[Tensor, Tensor]] = {}
        self.hit: dict[int, tuple[Tensor, int]] = {}
        self.places: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.made: dict[int, tuple[list[int], Tensor, str, tuple[Any, ...]]] = {}
        self.sizes: dict[int, tuple[int, Tensor, Any]] = {}
        self.masks: dict[int, tuple[int, Tensor, Tensor]] = {}
        self.asked: dict[int, tuple[list[int], Tensor, Tensor]] = {}
        self.branched_sizes: set[Any] = set()
        self.met: dict[Any, tuple[list[int], Tensor, list[Any]]] = {}
        self.first: dict[int, tuple[list[int], Tensor, Tensor]] = {}
        self.places_made: list[Tensor] = []
        self.sliced: Any = None
        # (begin, end) of an expert's rows, as formulas of the counts -> (count, where the rows begin, a tensor).
        self.slices: dict[tuple[Any, Any], tuple[Any, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _AS_TENSOR and args and isinstance(args[0], _Rows):
            return args[0].tensor.clone()
        if args and isinstance(args[0], Tensor):
            if func in _CHOOSE_ALONG:
                self._choose(args[0], *args[_CHOOSE_ALONG[func] :], **kwargs)
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
            if func in (Tensor.bincount, torch.bincount):
                return self._bincount(*args, **kwargs)
            if func in (Tensor.unique, torch.unique, torch.functional.unique):
                return self._unique(*args, **kwargs)
            if func is Tensor.tolist and self._all_hit(args[0]):
                return list(range(int(args[0].shape[0])))
            if func in (Tensor.numpy, Tensor.tolist) and args[0].dim() == 1 and not args[0].dtype.is_floating_point:
                if _varies(args[0]):
                    return _Rows(args[0], self)
                counts = self._counts(args[0])
                return _Counts(counts) if func is Tensor.numpy else counts
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
        if func in _CHOICES and isinstance(result, tuple):
            if result[1].dim() == 3:
                self.columns = result[1].shape[-1]
            return type(result)(map(self._by_token, result))  # type: ignore[call-arg]
        if self._of_each_choice(func, args, result):
            return self._by_token(result)
        if isinstance(result, Tensor) and args and isinstance(args[0], Tensor):
            self._derive(func, args, result)
        if isinstance(result, Tensor) and result.dtype in (torch.int32, torch.int64):
            self._make(func, args, result)
        if func in _CHOOSING and isinstance(result, Tensor):
            self._meet([func, *args, *sorted(kwargs), *(kwargs[name] for name in sorted(kwargs))], result)
        if func in (torch.cat, torch.concat) and self.sliced is not None and free_unbacked_symbols(result.shape[0]):
            # The slices make up what was sliced (else the probes in ``match`` find rows missing).
            torch._check(result.shape[0] == self.sliced)
            return result.index_select(0, torch.arange(self.sliced, device=result.device))
        return result

    # spellings

    @staticmethod
    def _by_token(chosen: Tensor) -> Tensor:
        """[batch, length, K] by way of [tokens, K], which the graph then has: what is chosen for each token."""
        if chosen.dim() != 3:
            return chosen
        return chosen.reshape(-1, chosen.shape[-1]).view(chosen.shape)

    def _of_each_choice(self, func: Any, args: Any, result: Any) -> bool:
        """Whether a new tensor [batch, length, K] of floats may be the weights of what was chosen."""
        if not isinstance(result, Tensor) or result.dim() != 3 or not result.is_floating_point() or func in _VIEWS:
            return False
        known = isinstance(self.columns, int) and isinstance(result.shape[-1], int)
        return known and result.shape[-1] == self.columns and all(result is not a for a in args)

    def _read_rows(self, tensor: Tensor, index: Any) -> Tensor | None:
        """``tensor[mask, ...]`` of a mask over batch and length, read from the rows of all sequences together."""
        mask, *rest = index if isinstance(index, tuple) else (index,)
        if not self._is_mask(mask) or mask.dim() != 2 or isinstance(mask.shape[1], int) or tensor.dim() < 2:
            return None
        if any(isinstance(i, (Tensor, list)) for i in rest):
            return None
        version, _, flat = self.flats.get(id(tensor), (-1, tensor, tensor))
        if version != tensor._version:
            flat = tensor.flatten(0, 1)
            self.flats[id(tensor)] = (tensor._version, tensor, flat)
        return Tensor.__getitem__(flat, (self._joined_places(mask), *rest))

    def _derive(self, func: Any, args: Any, result: Tensor) -> None:
        """Remember views of masks and of ids, and which experts ids were compared with."""
        source = args[0]
        if func in _VIEWS and result is not source:
            if result.dtype == torch.bool and result.dim() == 1 < source.dim() and self._is_mask(source):
                mask = self._as_first(source)
                self.flattened[id(result)] = (_versions(result, mask), result, mask)
            if not result.is_floating_point():
                self.same[id(result)] = (result, source)
        if func in _EQUAL and len(args) == 2 and not source.is_floating_point():
            number = self._number(args[1]) if isinstance(args[1], Tensor) else args[1]
            if isinstance(number, int):
                self.compared.setdefault(id(self._source(source)), set()).add(number)

    def _source(self, tensor: Tensor) -> Tensor:
        """What a tensor is a view of."""
        while id(tensor) in self.same:
            tensor = self.same[id(tensor)][1]
        return tensor

    def _choose(self, scores: Tensor, dim: Any = -1, *_: Any, **__: Any) -> None:
        if isinstance(dim, int) and scores.is_floating_point() and scores.dim() > 1:
            size = scores.shape[dim]
            self.choices |= {size} if isinstance(size, int) else set()

    def _known_experts(self, what: str) -> int:
        """How many experts there are: what follows from it is proven later, as all that is assumed here."""
        if self.experts is None and not self.choices:
            raise TraceError(f"{what}, and neither its weights nor a choice say how many experts there are")
        return self.experts or max(self.choices)  # of groups there are fewer

    def _bincount(self, ids: Tensor, weights: Any = None, minlength: int = 0) -> Tensor:
        """Counts of all experts: without ``minlength`` those after the last that was hit are left out, with no rows."""
        if weights is not None or minlength > (self.experts or minlength):
            raise TraceError("it counts ids with weights, or more of them than there are experts")
        experts = minlength or self._known_experts("it counts ids")
        return F.one_hot(ids.long(), max(experts, self.experts or 0)).sum(0)

    def _unique(
        self, ids: Tensor, sorted: bool = True,  # noqa: ARG002  (they are sorted)
        return_inverse: bool = False, return_counts: bool = False,
        dim: int | None = None,
    ) -> Any:  # fmt: skip
        """The experts that were hit, which are all; ``check`` proves that they are those whose rows are taken."""
        if return_inverse or dim is not None or ids.is_floating_point():
            raise TraceError("it goes through distinct values of something else than expert ids")
        experts = self._known_experts("it goes through the distinct ids")
        self.distinct.append(self._source(ids))
        hit = self._know(torch.arange(experts, device=ids.device), -1)
        return (hit, F.one_hot(ids.reshape(-1).long(), experts).sum(0)) if return_counts else hit

    def check(self) -> None:
        """TraceError if distinct values that the code went through do not choose every expert's rows."""
        for ids in self.distinct:
            if not set(range(self._known_experts("it goes through distinct ids"))) <= self.compared.get(id(ids), set()):
                raise TraceError("it goes through the distinct values of integers that do not choose the experts' rows")

    def _flat_places(self, mask: Tensor) -> Tensor | None:
        """Where a mask is true that is a view of one of several dimensions: the same places, so as many."""
        versions, _, source = self.flattened.get(id(mask), ([], mask, mask))
        if source is mask or versions != _versions(mask, source):
            return None
        return self._joined_places(source).unsqueeze(1)

    def _joined_places(self, mask: Tensor) -> Tensor:
        """Where a mask is true, counted through all its dimensions; computed once, as the places are."""
        places = self._places(mask)
        known = self.joined.get(id(places))
        if known is None:
            flat = places[:, 0]
            for d in range(1, mask.dim()):
                flat = flat * mask.shape[d] + places[:, d]
            known = self.joined[id(places)] = (places, flat)
        return known[1]

    # numbers

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
        """Masks in an index as the places where they are true, lists of rows as tensors; any other index as it is."""
        if isinstance(index, _Rows):
            return index.tensor
        if isinstance(index, tuple):
            index = tuple(i.tensor if isinstance(i, _Rows) else i for i in index)
        if not isinstance(index, tuple):
            return tuple(self._places(index).unbind(1)) if self._is_mask(index) else index
        parts = [self._places(i).unbind(1) if self._is_mask(i) else (i,) for i in index]
        return tuple(itertools.chain(*parts))

    def _places(self, mask: Tensor) -> Tensor:
        """Where a mask is true, [rows, dimensions]."""
        flat = self._flat_places(mask)
        if flat is not None:
            return flat
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
            raise TraceError("its loop over experts asks for the number of trues in a mask it has changed since")
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
                raise TraceError(
                    "its loop over experts branches on a number of rows, and not only on whether there are any: "
                    f"{condition.node.expr}"
                )
            self.branched_sizes |= symbols
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
        rows = self._read_rows(tensor, index)
        if rows is not None:
            return rows
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

    def astype(self, dtype: Any) -> _Counts:  # noqa: ARG002  (as numpy's)
        return self

    def cumsum(self, axis: int | None = None) -> _Counts:  # noqa: ARG002  (as numpy's: there is one axis)
        return _Counts(itertools.accumulate(self))

    def sum(self) -> Any:
        return sum(self)

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return _Counts(part) if isinstance(index, slice) else part

    def __getattr__(self, name: str) -> NoReturn:
        raise TraceError(f"it asks counts that it took to numpy for {name}, which the trace cannot answer")


class _Rows(list):  # type: ignore[type-arg]
    """What ``rows.tolist()`` is used as, of as many rows as an expert has: an index, or a tensor again."""

    def __init__(self, tensor: Tensor, seen: AllInUse) -> None:
        super().__init__()
        self.tensor, self.seen = tensor, seen

    def __bool__(self) -> bool:
        return self.seen.take(self.tensor.shape[0] != 0)

    def _unknown(self, *_: Any) -> NoReturn:
        raise TraceError("it uses a Python list of the rows of an expert as something else than an index")

    __len__ = __iter__ = __getitem__ = __add__ = __contains__ = __eq__ = _unknown  # type: ignore[assignment]


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
# What chooses experts by scores, and which of its arguments is the dimension.
_CHOOSE_ALONG = {
    Tensor.topk: 2, torch.topk: 2, Tensor.max: 1, torch.max: 1, Tensor.argmax: 1, torch.argmax: 1,
}  # fmt: skip
_ANY_OR_COUNT = {Tensor.any, torch.any, Tensor.sum, torch.sum, Tensor.count_nonzero, torch.count_nonzero}
_VIEWS = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.ravel, torch.ravel,
    Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.contiguous, Tensor.long, Tensor.int,
    Tensor.to, Tensor.cpu, Tensor.detach, Tensor.clone,
}  # fmt: skip
_EQUAL = {Tensor.eq, Tensor.__eq__, torch.eq}
_CHOICES = {Tensor.topk, torch.topk}
_AS_TENSOR = {torch.tensor, torch.as_tensor}
# What masks are made with: what they say depends on nothing but the arguments.
_CHOOSING = {Tensor.eq, Tensor.__eq__, torch.eq, Tensor.any, torch.any}
_AS_NUMBER = {Tensor.__bool__, Tensor.item, Tensor.__int__, Tensor.__index__}
_ADDED = {Tensor.__add__, Tensor.__radd__, Tensor.add, torch.add}
_SAME_NUMBER = {Tensor.squeeze, Tensor.view, Tensor.reshape, Tensor.cpu, Tensor.to, Tensor.long, Tensor.int}


__all__ = ["AllInUse"]
