"""Linear modules that read one input (q, k, v) as one product, in compiled decode layers.

Contract: what a layer computes is the same with and without, but for rounding; parameters keep their identity, names,
shapes and values; nothing is held twice.

::

    q.weight [4096, H] --+                                  q.weight: rows    0 to 4096 } in one block of memory, each
    k.weight  [512, H] --+-- pack -->  packed [5120, H]     k.weight: rows 4096 to 4608 } a storage of its own to
    v.weight  [512, H] --+                                  v.weight: rows 4608 to 5120 } whoever saves or copies it

    traced:  q(x) = linear(x, packed)[:4096], k(x) = linear(x, packed)[4096:4608], ...; then one product (graph_pass.py)

Parameters lie inside the packed weight because a copy beside them would be 6% of a model like Qwen3-30B-A3B. They are
no views of one storage: those who save models take such for tied weights, and refuse them or write only one of them.
The compiled graph has the packed weight as an input of its own and each module's result as a part of the whole product:
the graph is right whichever layer it is called for, and whether or not the pass found anything to share. Reading past
the end of ``q.weight`` instead would be right only for layers whose weights happen to be neighbours, which no guard
checks.

Not packed: modules that are more than an nn.Linear (adapters, quantized weights, parametrizations, hooks), weights of
which the storage is held by something else as well (a state dict in use, shared memory), and what would not be aligned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

# Set to 0, weights stay where they are.
PACK_LINEARS = "MXFP4_COMPILE_PACK_LINEARS"
_ALIGNMENT = 16  # bytes, of the part of each module

# The packed storage in which a parameter was put, held by nothing but its parts.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Siblings:
    """Linear modules that are given the same tensor, in the order of their calls.

    places: (parent, name in it, which of them), wherever a decoder layer has one.
    """

    linears: tuple[nn.Linear, ...]
    places: tuple[tuple[nn.Module, str, int], ...] = ()

    def parameters(self) -> list[list[nn.Parameter]]:
        """The weights, and the biases if there are any."""
        kinds: list[list[Any]] = [[m.weight for m in self.linears]]
        return kinds if self.linears[0].bias is None else [*kinds, [m.bias for m in self.linears]]


def find_siblings(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[Siblings]:
    """Linear modules in ``layers`` that are given the same tensor when ``run`` runs the model; each called once."""
    calls: list[tuple[nn.Linear, Tensor]] = []  # holds the inputs, so that no two of them have one id
    handles = []
    thread = threading.get_ident()

    def heard(module: Any, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and threading.get_ident() == thread:
            calls.append((module, args[0]))

    try:
        for layer in layers:
            handles += [m.register_forward_pre_hook(heard) for m in layer.modules() if type(m) is nn.Linear]
        run()
    finally:
        for handle in handles:
            handle.remove()
    times: dict[nn.Linear, int] = {}
    groups: dict[tuple[Any, ...], list[nn.Linear]] = {}
    for module, given in calls:
        times[module] = times.get(module, 0) + 1
        key = id(given), module.weight.dtype, module.weight.device, module.bias is None
        groups.setdefault(key, []).append(module)
    found = [tuple(m for m in group if times[m] == 1) for group in groups.values()]
    return [Siblings(group, _places(layers, group)) for group in found if len(group) > 1]


def _places(layers: Sequence[nn.Module], group: tuple[nn.Linear, ...]) -> tuple[tuple[nn.Module, str, int], ...]:
    index = {module: i for i, module in enumerate(group)}
    parents = dict.fromkeys(module for layer in layers for module in layer.modules())
    return tuple((p, n, index[m]) for p in parents for n, m in p._modules.items() if m in index)  # type: ignore[index]


def pack(siblings: Siblings) -> str | None:
    """Put the parameters of each kind into one block of memory; None, or why nothing was changed.

    Waits for the device before the former storages are let go.
    """
    kinds = siblings.parameters()
    reason = next((r for r in (*map(_unpackable, siblings.linears), *map(_unmovable, kinds)) if r), None)
    if reason is not None:
        return reason
    apart = [kind for kind in kinds if _block(kind) is None]
    try:
        with torch.inference_mode(False), torch.no_grad():
            whole = [torch.cat([p.detach() for p in kind]) for kind in apart]
    except torch.OutOfMemoryError:
        return "memory is short"
    former = [p.data for kind in apart for p in kind]
    for kind, packed in zip(apart, whole, strict=True):
        start = 0
        for parameter in kind:
            stop = start + parameter.numel() * parameter.element_size()
            part = packed.untyped_storage()[start:stop]  # a storage that keeps the packed one
            parameter.data = packed.new_empty(0).set_(part).view(parameter.shape)
            _packed[parameter] = StorageWeakRef(packed.untyped_storage())
            start = stop
    if former and former[0].is_cuda:
        torch.cuda.synchronize(former[0].device)
    return None


def _unpackable(linear: nn.Linear) -> str | None:
    if type(linear) is not nn.Linear or "forward" in linear.__dict__ or linear._forward_hooks:
        return "a module does more than a product"
    if linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return "a module has hooks"
    return None


def _unmovable(kind: list[nn.Parameter]) -> str | None:
    if any(type(p) is not nn.Parameter or type(p.data) is not Tensor or p.is_inference() for p in kind):
        return "a weight is no ordinary parameter"
    if len({id(p) for p in kind}) < len(kind):
        return "two modules have one weight"
    if not all(p.is_contiguous() and p.numel() for p in kind) or len({p.shape[1:] for p in kind}) > 1:
        return "a weight does not lie row by row"
    if any(p.numel() * p.element_size() % _ALIGNMENT for p in kind[:-1]):
        return "the parts would not be aligned"
    if _block(kind) is None and not all(_alone(p) for p in kind):
        return "a weight's storage is held by something else, too"
    return None


def _block(kind: list[nn.Parameter]) -> torch.UntypedStorage | None:
    """The packed storage of which parameters are the parts, one behind the other; None if they are not (any more)."""
    held = _packed.get(kind[0])
    storage = None if held is None else torch.UntypedStorage._new_with_weak_ptr(held.cdata)
    if storage is None:
        return None
    place = storage.data_ptr()
    for p in kind:
        if p.device != storage.device or p.data_ptr() != place or not p.is_contiguous():
            return None
        place += p.numel() * p.element_size()
    return storage if place == storage.data_ptr() + storage.nbytes() else None


def _alone(parameter: nn.Parameter) -> bool:
    """Whether nothing else holds a parameter's storage: what is written to one is then seen by no other."""
    holders = getattr(torch._C, "_storage_Use_Count", None)  # of torch's own CUDA graph trees
    storage = parameter.untyped_storage()
    if holders is None or (storage.is_shared() and not parameter.is_cuda):
        return False
    if storage.nbytes() != parameter.numel() * parameter.element_size():
        return False
    single = nn.Parameter(torch.empty(1), requires_grad=False)
    return bool(holders(storage._cdata) <= holders(single.untyped_storage()._cdata))


def _whole(kind: list[nn.Parameter]) -> Tensor | None:
    """The packed tensor of which parameters are the parts, or None."""
    storage, first = _block(kind), kind[0].detach()
    if storage is None:
        return None
    shape = (sum(p.shape[0] for p in kind), *first.shape[1:])
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage).view(shape)


class _Part(nn.Module):
    """Stands in for one of several siblings: part of their product.

    A module, as Dynamo tells modules apart by what they are and other objects by which one they are: one compilation
    serves all layers. It has the weights of the one that it stands in for, for whoever looks at them meanwhile.
    """

    def __init__(self, linear: nn.Linear, whole: list[Tensor], start: int, stop: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.whole, self.whole_bias = whole[0], whole[1] if len(whole) > 1 else None
        self.start, self.stop = start, stop
        self.training = linear.training

    def forward(self, hidden: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.linear(hidden, self.weight, self.bias)
        return F.linear(hidden, self.whole, self.whole_bias)[..., self.start : self.stop]


@contextmanager
def packed_forwards(groups: Iterable[Siblings]) -> Iterator[None]:
    """Inside the block siblings that ``pack`` packed are parts of one product where they are compiled.

    What lies apart (again) is left as it is. Nothing holds the packed memory after the block but the parameters.
    """
    changed: list[tuple[nn.Module, str, nn.Linear]] = []
    try:
        for siblings in groups:
            found = [_whole(kind) for kind in siblings.parameters()]
            whole = [tensor for tensor in found if tensor is not None]
            if any(_unpackable(m) for m in siblings.linears) or len(whole) < len(found):
                continue
            parts, start = [], 0
            for linear in siblings.linears:
                stop = start + linear.weight.shape[0]
                parts.append(_Part(linear, whole, start, stop))
                start = stop
            for parent, name, which in siblings.places:
                if parent._modules.get(name) is siblings.linears[which]:
                    changed.append((parent, name, siblings.linears[which]))
                    parent._modules[name] = parts[which]
        yield
    finally:
        for parent, name, linear in changed:
            parent._modules[name] = linear
