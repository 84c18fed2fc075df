"""Capture of experts that are called in a data-dependent Python loop, and their collapse to stacked products.

Contract: like ``capture``: the module is read, never changed. The result is a functional graph in which each
projection of all experts is ONE node, so that ``match`` treats it like packed experts.

1. Trace with every expert in use: rows per expert are sizes that the trace does not know (at least two), a
   loop over the experts that were hit runs over all of them, counts are sizes. What this assumes (that an
   expert without tokens contributes nothing) is proven afterwards: ``match`` admits only heads and tails that
   are linear in the rows, and ``verify`` runs the original module, most of whose experts get no tokens.
2. Find each expert's products: a matrix that is expert e's share of the weights, times rows of unknown number.
3. Prove that the experts compute the same with different weights: every projection must exist once for each
   expert, in the experts' order, and what lies between the projections must be op for op the same graph.
4. Put one ``expert_products`` in place of the E products of a projection, on all experts' rows one after the
   other; each expert's part is taken out of it again (``rows_of_expert``).
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Hashable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from .capture import CallPattern, Captured, CaptureError, TensorInfo, free_dims, named_dims
from .discover import equal_children
from .evaluate import ancestors
from .idle import check_idle
from .sources import listed, stack

aten = torch.ops.aten


def expert_products(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """``rows[s] @ weight[experts[s]].T``: the meaning of a collapsed projection (rows [S, K], weight [E, N, K])."""
    return torch.einsum("sk,snk->sn", rows, weight[experts])


def expert_products_transposed(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """``rows[s] @ weight[experts[s]]`` (rows [S, K], weight [E, K, N])."""
    return torch.einsum("sk,skn->sn", rows, weight[experts])


def rows_of_expert(values: Tensor, experts: Tensor, expert: int) -> Tensor:
    """The rows of ``values`` [S, ...] that belong to one expert, in their order."""
    return values[experts == expert]


# 1. the trace


class _AllInUse(TorchFunctionMode):
    """Answers what only data can tell as if every expert had at least two rows.

    ``hit``: tensors that hold the number of an expert known from the loop, by id (kept alive).
    ``places``: elements of integer vectors of fixed length (one per expert); what compares one with a number
    asks whether an expert has rows. ``made``: integers made of others, so that the length of a slice between two
    sums of counts is the one count by which they differ. ``sizes``: values, as sizes that the trace does not know.
    What has been written to since (another version) is not what was remembered.
    """

    def __init__(self, without_last: bool) -> None:
        super().__init__()
        self.without_last = without_last
        self.hit: dict[int, tuple[Tensor, int]] = {}
        self.places: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.made: dict[int, tuple[list[int], Tensor, str, tuple[Any, ...]]] = {}
        self.sizes: dict[int, tuple[int, Tensor, Any]] = {}
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
                return count != 0 if func is Tensor.__bool__ else _COMPARED[func](count, *args[1:])
            if func is Tensor.numpy:
                return _Counts(self._counts(args[0]))
            if func is Tensor.tolist and args[0].dim() == 1 and not args[0].dtype.is_floating_point:
                return self._counts(args[0])
            if func is Tensor.__getitem__:
                return self._getitem(args[0], args[1])
            if func is Tensor.__setitem__ and isinstance(args[1], slice) and isinstance(args[2], Tensor):
                return self._setitem(*args)
            if func in (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes):
                sizes = args[1] if len(args) > 1 else kwargs.get("split_size", kwargs.get("split_size_or_sections"))
                dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
                if isinstance(sizes, (list, tuple)) and dim == 0 and any(map(_unknown, sizes)):
                    return self._split(args[0], sizes)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype in (torch.int32, torch.int64):
            self._make(func, args, result)
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
        known = self.slices.get((_expression(start), _expression(stop)))
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
        result = func(*args, **kwargs)
        rows = (result[0] if isinstance(result, tuple) else result).shape[0]
        torch._check(rows >= 2)
        return result

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
                end = begin + _expression(count)
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
        known = self._number(tensor)
        if known is not None:
            return self._know(result, known)
        return self._place(result, tensor, index) if isinstance(index, int) and _is_vector(tensor) else result


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
    Tensor.__eq__: operator.eq,
    Tensor.__ne__: operator.ne,
    Tensor.__lt__: operator.lt,
    Tensor.__le__: operator.le,
    Tensor.__gt__: operator.gt,
    Tensor.__ge__: operator.ge,
}
_OF_KNOWN: dict[Any, Any] = {
    **_COMPARED,
    Tensor.item: int,
    Tensor.__int__: int,
    Tensor.__index__: int,
    Tensor.tolist: lambda n: [n],
    Tensor.__format__: format,  # f"expert_{e}"
}
_ADDED = {Tensor.__add__, Tensor.__radd__, Tensor.add, torch.add}
_SAME_NUMBER = {Tensor.squeeze, Tensor.view, Tensor.reshape, Tensor.cpu, Tensor.to, Tensor.long, Tensor.int}


_TURNED = (aten.t.default, aten.transpose.int, aten.permute.default)


class _Caller(nn.Module):
    """Runs the module as if every expert had rows.

    A mask may have a place more than there are experts, for ids that are none. Where the loop would take such an
    expert's weights, which do not exist, the original fails with such ids, and the place counts as never hit.
    """

    def __init__(self, module: nn.Module, without_last: bool) -> None:
        super().__init__()
        self.module, self.without_last = module, without_last

    def forward(self, args: Any, kwargs: Any) -> Any:
        with _AllInUse(self.without_last):
            return self.module(*args, **kwargs)


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


def collapse(module: nn.Module, traced: Captured) -> Captured:
    """The loop over experts of a trace as stacked products; CaptureError with the reason where there is none."""
    return _Collapse(module, traced).run()


def trace(module: nn.Module, pattern: CallPattern) -> Captured:
    """Trace ``module`` as if every expert had tokens; CaptureError with the reason where it does not trace."""
    example = [leaf.zeros() if isinstance(leaf, TensorInfo) else leaf for leaf in pattern.leaves]
    args, kwargs = pattern.arrange(example)
    error: Exception | None = None
    without_last = False
    waiting = [named_dims, free_dims] if sum(map(bool, pattern.dynamic)) > 1 else [free_dims]
    while waiting:
        arg_shapes, kwarg_shapes = pattern.arrange(waiting[0](pattern))
        try:
            with torch.no_grad(), warnings.catch_warnings(), _without_hooks(module), _casts_of_nothing():
                warnings.simplefilter("ignore")
                program = torch.export.export(
                    _Caller(module, without_last),
                    (args, kwargs),
                    dynamic_shapes={"args": arg_shapes, "kwargs": kwarg_shapes},
                    strict=False,
                ).run_decompositions({})
            return _sorted(program, pattern)
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


def _expression(size: Any) -> Any:
    """A size as a number or formula that compares fast (printing sums of many sizes does not)."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


# 2. to 4. the collapse


class _Product:
    """One expert's product: node = rows @ weight(.T) (+ bias)."""

    def __init__(self, node: fx.Node, rows: fx.Node, bias: fx.Node | None, role: str, expert: int, flip: bool) -> None:
        self.node, self.rows, self.bias, self.role, self.expert, self.transposed = node, rows, bias, role, expert, flip


class _Collapse:
    def __init__(self, module: nn.Module, captured: Captured) -> None:
        self.module, self.captured, self.graph = module, captured, captured.graph
        self.lists = [
            (name, {child: i for i, child in enumerate(listed(m))})
            for name, m in module.named_modules()
            if isinstance(m, (nn.ModuleList, nn.ModuleDict)) and equal_children(m)
        ]

    def run(self) -> Captured:
        products: list[_Product] = []
        self.graph.eliminate_dead_code()
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            product = self._product(node)
            if product is not None:
                products.append(product)
        roles: dict[str, list[_Product]] = {}
        for product in products:
            roles.setdefault(product.role, []).append(product)
        if len(roles) < 2:
            raise CaptureError(
                "no two projections whose rows an index chooses: fewer than two matrices per expert are multiplied "
                "with rows whose number depends on the routing"
            )
        roles, self.sentinels = self._without_weights(roles)
        counts = {role: len(found) for role, found in roles.items()}
        for role, found in roles.items():
            self._check_role(role, found)
        if len(set(counts.values())) != 1:
            raise CaptureError(f"the projections exist for different numbers of experts: {counts}")
        self._check_same(roles)
        self._check_idle(roles)
        return self._rebuilt(roles)

    def _without_weights(self, roles: dict[str, list[_Product]]) -> tuple[dict[str, list[_Product]], int]:
        """How many experts past the last multiply nothing, although one of the projections has room for them.

        That projection's role then names the others alone. What becomes of the tokens of the rest is the matcher's.
        """
        sizes = {role: stack(self.module, role).shape[0] for role in roles}
        experts, everyone = min(sizes.values()), max(sizes.values())
        renamed: dict[str, list[_Product]] = {}
        for role, found in roles.items():
            plain = not set("*#@") & set(role)
            if sizes[role] > experts and plain and {p.expert for p in found} == set(range(experts)):
                role = f"{role}@{experts}"
                for product in found:
                    product.role = role
            renamed[role] = found
        return renamed, everyone - experts

    def _product(self, node: fx.Node) -> _Product | None:
        if node.op != "call_function":
            return None
        bias: Any = None
        if node.target == aten.linear.default:
            rows, weight = node.args[:2]
            bias = node.args[2] if len(node.args) > 2 else None
            flip = False
        elif node.target in (aten.mm.default, aten.matmul.default):
            rows, weight = node.args[:2]
            flip = True
        elif node.target == aten.addmm.default and not node.kwargs:
            bias, rows, weight = node.args[:3]
            flip = True
        else:
            return None
        value = rows.meta.get("val") if isinstance(rows, fx.Node) else None
        if not isinstance(rows, fx.Node) or not isinstance(value, Tensor) or value.dim() != 2:
            return None
        if not free_unbacked_symbols(value.shape[0]):
            return None
        while isinstance(weight, fx.Node) and weight.target in _TURNED:
            if weight.meta["val"].dim() != 2:
                break
            flip = not flip
            weight = weight.args[0]
        share = self._share(weight)
        if share is None:
            return None
        return _Product(node, rows, bias if isinstance(bias, fx.Node) else None, share[0], share[1], flip)

    def _share(self, node: Any) -> tuple[str, int] | None:
        """(stacked name, expert) of a node that is one expert's part of the weights."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "placeholder":
            name = self.captured.parameters.get(node.name)
            return None if name is None else self._member(name)
        while node.target in (aten.clone.default, aten.alias.default, aten.squeeze.dim, aten.detach.default):
            node = node.args[0]  # type: ignore[assignment]
        if node.target == aten.select.int:
            source, dim, expert = node.args
        elif node.target == operator.getitem and node.args[0].target in (  # type: ignore[union-attr]
            aten.unbind.int,
            aten.split.Tensor,
        ):
            source, dim, expert = node.args[0].args[0], 0, node.args[1]  # type: ignore[union-attr]
        else:
            return None
        if dim != 0 or not isinstance(expert, int) or not isinstance(source, fx.Node):
            return None
        value = source.meta["val"]
        expert = expert % value.shape[0] if node.target == aten.select.int else expert
        shape = tuple(value.shape)
        while source.op == "call_function" and source.target in (aten.view.default, aten.reshape.default):
            source = source.args[0]  # type: ignore[assignment]
        if source.op != "placeholder" or source.name not in self.captured.parameters:
            return None
        name = self.captured.parameters[source.name]
        stored = tuple(source.meta["val"].shape)
        if stored == shape:
            return name, expert
        if len(stored) == 2 and len(shape) == 3 and stored == (shape[0] * shape[1], shape[2]):
            return f"{name}#{shape[0]}", expert
        return None

    def _member(self, name: str) -> tuple[str, int] | None:
        for prefix, children in self.lists:
            head = f"{prefix}." if prefix else ""
            if not name.startswith(head):
                continue
            child, _, rest = name[len(head) :].partition(".")
            if child in children and rest:
                return f"{head}*.{rest}", children[child]
        return None

    # 3. the same computation with different weights

    def _check_role(self, role: str, found: list[_Product]) -> None:
        experts = stack(self.module, role).shape[0]
        numbers = sorted(p.expert for p in found)
        if numbers != list(range(experts)):
            missing = sorted(set(range(experts)) - set(numbers))
            what = f"expert {missing[0]} is in none" if missing else "an expert is in several"
            raise CaptureError(f"{role}: {experts} experts, but {len(found)} products in the loop ({what})")
        found.sort(key=lambda p: p.expert)
        if len({(p.transposed, p.bias is not None) for p in found}) != 1:
            raise CaptureError(f"{role}: the experts' products differ in layout or bias")

    def _check_same(self, roles: dict[str, list[_Product]]) -> None:
        """Everything from an expert's first products to its last must be the same graph for every expert."""
        experts = len(next(iter(roles.values())))
        nodes = {p.node: (role, p.expert) for role, found in roles.items() for p in found}
        reference: dict[str, Hashable] = {}
        for expert in range(experts):
            for role, found in roles.items():
                product = found[expert]
                form = (
                    self._form(product.rows, nodes, expert, {}),
                    self._form(product.bias, nodes, expert, {}),
                    len(product.node.users),
                )
                if reference.setdefault(role, form) != form:
                    others = self._owners(nodes)[product.rows] - {expert}
                    if others:
                        raise CaptureError(
                            f"the rows of expert {expert} before {role} come out of a tensor that holds the output of "
                            f"expert {min(others)}: the experts depend on their order"
                        )
                    raise CaptureError(
                        f"expert {expert} computes something else than expert 0 before {role}: "
                        "the experts are not the same function with different weights"
                    )

    def _check_idle(self, roles: dict[str, list[_Product]]) -> None:
        experts: dict[Any, int] = {}
        for found in roles.values():
            for p in found:
                for symbol in free_unbacked_symbols(p.rows.meta["val"].shape[0]):
                    experts.setdefault(symbol, p.expert)
        known = {n: self._share(n) for n in self.graph.nodes}
        check_idle(self.graph, experts, lambda n: None if known[n] is None else known[n][1])  # type: ignore[index]

    def _form(
        self, node: Any, products: dict[fx.Node, tuple[str, int]], expert: int, memo: dict[fx.Node, Hashable]
    ) -> Hashable:
        """A value that is equal for equal graphs from the products down to ``node``; ``rows`` where none is met."""
        if not isinstance(node, fx.Node):
            return repr(node)
        if node in memo:
            return memo[node]
        memo[node] = form = self._form_of(node, products, expert, memo)
        return form

    def _form_of(
        self, node: fx.Node, products: dict[fx.Node, tuple[str, int]], expert: int, memo: dict[fx.Node, Hashable]
    ) -> Hashable:
        if node in products:
            role, owner = products[node]
            return ("product", role, "own" if owner == expert else owner)
        if node in self._joined(products):
            return ("joined", node.name)
        if node.target == operator.getitem and node.args[0] in self._joined(products):
            return ("part", node.args[0].name, "own" if node.args[1] == expert else node.args[1])  # type: ignore[union-attr]
        if not self._reaches(node, products):
            share = self._share(node)
            if share is not None:
                return ("share", share[0], "own" if share[1] == expert else share[1])
            if node.op == "placeholder":
                return ("placeholder", node.name)
            return "outside"  # rows and routing: execution on probes tells what they are
        if node.target == aten.cat.default:
            parts: Any = node.args[0]
            if len(parts) == len({e for _, e in products.values()}) and len(parts) > 1:
                # All experts' rows together: the same to every expert if each part is the same to its own.
                forms = {self._form(part, products, e, {}) for e, part in enumerate(parts)}
                if len(forms) == 1:
                    return ("joined", *node.args[1:], *forms)
        flat, _ = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
        return (str(node.target), *(self._form(a, products, expert, memo) for a in flat))

    def _reaches(self, node: fx.Node, products: dict[fx.Node, tuple[str, int]]) -> bool:
        return bool(self._owners(products)[node])

    def _owners(self, products: dict[fx.Node, tuple[str, int]]) -> dict[fx.Node, frozenset[int]]:
        """The experts whose products each node depends on."""
        if not hasattr(self, "_owned"):
            owned: dict[fx.Node, frozenset[int]] = {}
            for n in self.graph.nodes:
                own = frozenset({products[n][1]} if n in products else ())
                owned[n] = own.union(*(owned[a] for a in n.all_input_nodes))
            self._owned = owned
        return self._owned

    def _joined(self, products: dict[fx.Node, tuple[str, int]]) -> set[fx.Node]:
        """Tensors of several experts' rows that several experts read: these are the same for all of them."""
        if not hasattr(self, "_read_by_several"):
            readers: dict[fx.Node, set[int]] = {}
            for product, (_, expert) in products.items():
                waiting = list(product.all_input_nodes)
                while waiting:
                    node = waiting.pop()
                    if len(self._owners(products)[node]) > 1 and expert not in readers.setdefault(node, set()):
                        readers[node].add(expert)
                        waiting.extend(node.all_input_nodes)
            self._read_by_several = {node for node, experts in readers.items() if len(experts) > 1}
        return self._read_by_several

    # 4. one node per projection

    def _rebuilt(self, roles: dict[str, list[_Product]]) -> Captured:
        old = self.captured
        graph = fx.Graph()
        new = Captured(graph, list(old.inputs), {}, dict(old.buffers), dict(old.constants), old.pattern, old.out_spec)
        new.sentinels = self.sentinels
        mapped: dict[fx.Node, fx.Node] = {}
        used = self._weights_used_elsewhere(roles)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                name = old.parameters.get(node.name)
                if name is not None and node not in used:
                    continue
                mapped[node] = graph.node_copy(node)
                if name is not None:
                    new.parameters[mapped[node].name] = name
        stacks: dict[str, fx.Node] = {}
        biases: dict[str, fx.Node] = {}
        for i, (role, found) in enumerate(roles.items()):
            stacks[role] = self._stack_placeholder(graph, new, f"stacked_{i}", role, found[0])
            if found[0].bias is not None:
                biases[role] = self._bias_placeholder(graph, new, f"stacked_bias_{i}", role, found)
        self._order(graph, mapped, roles, stacks, biases)
        graph.lint()
        return new

    def _weights_used_elsewhere(self, roles: dict[str, list[_Product]]) -> set[fx.Node]:
        """Placeholders of parameters that something beside the collapsed products reads."""
        products = {p.node: p for found in roles.values() for p in found}
        live: set[fx.Node] = set()
        waiting = [self.graph.output_node()]
        while waiting:
            node = waiting.pop()
            if node in live:
                continue
            live.add(node)
            waiting.extend([products[node].rows] if node in products else node.all_input_nodes)
        return {n for n in live if n.op == "placeholder"}

    def _stack_placeholder(self, graph: fx.Graph, new: Captured, label: str, role: str, first: _Product) -> fx.Node:
        source = stack(self.module, role)
        node = graph.placeholder(label)
        node.meta["val"] = torch.empty(source.shape, dtype=source.dtype, device="meta")
        new.parameters[node.name] = role
        return node

    def _bias_placeholder(
        self, graph: fx.Graph, new: Captured, label: str, role: str, found: list[_Product]
    ) -> fx.Node:
        shares = [self._share(p.bias) for p in found]
        names = {s[0] for s in shares if s is not None}
        if len(names) != 1 or [s[1] for s in shares if s is not None] != list(range(len(found))):
            raise CaptureError(f"{role}: the biases of its experts are not one bias per expert")
        node = graph.placeholder(label)
        source = stack(self.module, names.pop())
        node.meta["val"] = torch.empty(source.shape, dtype=source.dtype, device="meta")
        new.parameters[node.name] = self._share(found[0].bias)[0]  # type: ignore[index]
        return node

    def _order(
        self,
        graph: fx.Graph,
        mapped: dict[fx.Node, fx.Node],
        roles: dict[str, list[_Product]],
        stacks: dict[str, fx.Node],
        biases: dict[str, fx.Node],
    ) -> None:
        """Copy what the output needs in an order of dependence: all experts' rows come before the products."""
        products = {p.node: p for found in roles.values() for p in found}
        joined: dict[str, fx.Node] = {}

        def needs(node: fx.Node) -> Iterable[fx.Node]:
            return [p.rows for p in roles[products[node].role]] if node in products else node.all_input_nodes

        output = self.graph.output_node()
        waiting: list[tuple[fx.Node, bool]] = [(output, False)]
        open_: set[fx.Node] = set()
        while waiting:
            node, ready = waiting.pop()
            if node in mapped:
                continue
            if not ready:
                if node in open_:
                    raise CaptureError("an expert's rows depend on another expert's output")
                open_.add(node)
                waiting.append((node, True))
                waiting.extend((n, False) for n in reversed(list(needs(node))) if n not in mapped)
                continue
            open_.discard(node)
            if node in products:
                mapped[node] = self._collapsed(graph, mapped, products[node], roles, joined, stacks, biases)
            elif node.op == "output":
                graph.output(fx.node.map_arg(node.args[0], lambda n: mapped[n]))
            else:
                mapped[node] = self._copied(graph, node, mapped)

    def _copied(self, graph: fx.Graph, node: fx.Node, mapped: dict[fx.Node, fx.Node]) -> fx.Node:
        copy = graph.node_copy(node, lambda n: mapped[n])
        if node.target == aten.where.default:
            copy.target = aten.nonzero_numpy.default  # the same under a name that does not mean a choice
        return copy

    def _collapsed(
        self,
        graph: fx.Graph,
        mapped: dict[fx.Node, fx.Node],
        product: _Product,
        roles: dict[str, list[_Product]],
        joined: dict[str, fx.Node],
        stacks: dict[str, fx.Node],
        biases: dict[str, fx.Node],
    ) -> fx.Node:
        role, found = product.role, roles[product.role]
        value = product.node.meta["val"]
        if role not in joined:
            rows = graph.call_function(aten.cat.default, ([mapped[p.rows] for p in found], 0))
            first = found[0].rows.meta["val"]
            rows.meta["val"] = torch.empty((7, first.shape[1]), dtype=first.dtype, device="meta")
            if not joined:
                # The first projection's rows; that the others have as many of each expert shows on the probes.
                self.experts = self._experts_of_rows(graph, mapped, found)
            target = expert_products_transposed if product.transposed else expert_products
            node = graph.call_function(target, (rows, stacks[role], self.experts))
            node.meta["val"] = torch.empty((7, value.shape[1]), dtype=value.dtype, device="meta")
            joined[role] = node
        part = graph.call_function(rows_of_expert, (joined[role], self.experts, product.expert))
        part.meta["val"] = value
        if role not in biases:
            return part
        bias = graph.call_function(aten.select.int, (biases[role], 0, product.expert))
        bias.meta["val"] = torch.empty((value.shape[1],), dtype=value.dtype, device="meta")
        result = graph.call_function(aten.add.Tensor, (part, bias))
        result.meta["val"] = value
        return result

    def _count(self, graph: fx.Graph, mapped: dict[fx.Node, fx.Node], rows: fx.Node) -> fx.Node:
        """The number of ``rows``, from the integers that chose them (so that it depends on no values)."""
        size = _expression(rows.meta["val"].shape[0])
        for node in sorted(ancestors([rows]), key=lambda n: self.order[n]):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and _expression(value) == size and node in mapped:
                return mapped[node]
            if isinstance(value, Tensor) and value.dim() and not value.is_floating_point() and node in mapped:
                if _expression(value.shape[0]) == size:
                    count = graph.call_function(aten.sym_size.int, (mapped[node], 0))
                    count.meta["val"] = value.shape[0]
                    return count
        masked = any(
            isinstance(v, Tensor) and v.dtype == torch.bool for v in (n.meta.get("val") for n in rows.all_input_nodes)
        )
        what = "a mask of tokens" if masked else "something"
        raise CaptureError(f"what chooses an expert's rows is {what}, no index")

    def _experts_of_rows(self, graph: fx.Graph, mapped: dict[fx.Node, fx.Node], found: list[_Product]) -> fx.Node:
        """[S] expert of each row."""
        parts = []
        for p in found:
            count = self._count(graph, mapped, p.rows)
            parts.append(graph.call_function(aten.full.default, ([count], p.expert), {"dtype": torch.int64}))
            parts[-1].meta["val"] = torch.empty((7,), dtype=torch.int64, device="meta")
        experts = graph.call_function(aten.cat.default, (parts, 0))
        experts.meta["val"] = torch.empty((7,), dtype=torch.int64, device="meta")
        return experts


__all__ = [
    "capture_loop", "collapse", "expert_products", "expert_products_transposed", "holds_list", "rows_of_expert",
    "trace",
]  # fmt: skip
