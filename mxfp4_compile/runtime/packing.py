"""Linear modules that read one input (q, k, v) as one product, in compiled decode layers.

Contract: what a layer computes is the same with and without, but for rounding; parameters keep their identity, names,
shapes and values; nothing is held twice.

::

    q.weight [4096, H] --+                                  q.weight = packed[:4096]   } views of one storage,
    k.weight  [512, H] --+-- pack -->  packed [5120, H]     k.weight = packed[4096:4608] } parameters as before
    v.weight  [512, H] --+                                  v.weight = packed[4608:]

    traced:  q(x) = linear(x, packed)[:4096], k(x) = linear(x, packed)[4096:4608], ...; SharePass: one product

Parameters become views because a copy beside them would be 6% of a model like Qwen3-30B-A3B. The compiled graph has the
packed weight as an input of its own and each module's result as a part of the whole product: the graph is right
whichever layer it is called for, and whether or not the pass found anything to share. Reading past the end of
``q.weight`` instead would be right only for layers whose weights happen to be neighbours, which no guard checks.

Not packed: modules that are more than an nn.Linear (adapters, quantized weights, parametrizations, hooks), weights of
which the storage is held by something else as well (a state dict in use, shared memory), and what would not be aligned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Set to 0, weights stay where they are.
PACK_LINEARS = "MXFP4_COMPILE_PACK_LINEARS"
_ALIGNMENT = 16  # bytes, of the part of each module


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

    def heard(module: Any, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
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
    """Make the parameters views of one storage each kind; None, or why nothing was changed.

    Waits for the device before the former storages are let go.
    """
    kinds = siblings.parameters()
    reason = next((r for r in (*map(_unpackable, siblings.linears), *map(_unmovable, kinds)) if r), None)
    if reason is not None:
        return reason
    apart = [kind for kind in kinds if not _neighbours(kind)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            whole = [torch.cat([p.detach() for p in kind]) for kind in apart]
    except torch.OutOfMemoryError:
        return "memory is short"
    former = [p.data for kind in apart for p in kind]
    for kind, packed in zip(apart, whole, strict=True):
        for parameter, part in zip(kind, packed.split([p.shape[0] for p in kind]), strict=True):
            parameter.data = part
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
    if not _neighbours(kind) and not all(_alone(p) for p in kind):
        return "a weight's storage is held by something else, too"
    return None


def _neighbours(kind: list[nn.Parameter]) -> bool:
    """Whether parameters lie one behind the other in one storage."""
    first = kind[0]
    offset = first.storage_offset()
    for p in kind:
        same = p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or p.storage_offset() != offset or not p.is_contiguous():
            return False
        offset += p.numel()
    return True


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


def _whole(kind: list[nn.Parameter]) -> Tensor:
    """The tensor of which neighbouring parameters are the parts, itself no view of one of them."""
    first = kind[0].detach()
    shape = (sum(p.shape[0] for p in kind), *first.shape[1:])
    made = torch.empty(0, dtype=first.dtype, device=first.device)
    return made.set_(first.untyped_storage(), first.storage_offset(), shape, first.stride())


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

    What lies apart (again) is left as it is. Nothing holds the packed storage after the block but the parameters.
    """
    changed: list[tuple[nn.Module, str, nn.Linear]] = []
    try:
        for siblings in groups:
            kinds = siblings.parameters()
            if any(_unpackable(m) for m in siblings.linears) or not all(_neighbours(kind) for kind in kinds):
                continue
            whole = [_whole(kind) for kind in kinds]
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


# the pass

_KEPT = ("empty", "new_empty", "bernoulli", "rand", "dropout")


def share(graph: fx.Graph) -> None:
    """Compute once what a graph computes twice, of the deterministic ops of aten that write to nothing."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _shareable(node.target):
            continue
        try:
            key = node.target, _frozen(node.args), _frozen(node.kwargs)
            first = known.setdefault(key, node)
        except TypeError:  # an argument that has no hash
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _shareable(target: Any) -> bool:
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "prims")
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not any(word in str(target) for word in _KEPT)
    )


def _frozen(value: Any) -> Any:
    """A value that can be a key; numbers of different types are different."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    hash(value)
    return type(value), value


def share_pass() -> Any:
    """``share`` as a pass of Inductor, behind what is configured in its place."""
    import torch._inductor.config as config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    configured: Any = config.joint_custom_post_pass
    before = tuple(configured) if isinstance(configured, (list, tuple)) else (configured,) if configured else ()

    class SharePass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for one in before:
                one(graph)
            share(graph)
            graph.lint()

        def uuid(self) -> Any:
            theirs = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in before]
            return None if None in theirs else f"mxfp4_compile.share:{_source_hash()}:{theirs}"

    return SharePass()


@lru_cache(maxsize=1)
def _source_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:24]
