"""Verify a site that holds its router and calls its experts in a loop: the whole block, eager against rewritten.

::

    hidden states --+--> original block, its experts on dequantized weights   --> theirs
                    +--> rewritten graph, the op done by experts in fp32      --> truth
                    +--> rewritten block                                      --> ours

Contract: as in ``verify``; no more than one expert's dequantized weights exist at a time where experts are modules of
a list. Where the block multiplies packed weights itself, one block's dequantized weights exist while it is verified.

1. A copy of the original block calls the original experts, each on its dequantized weights, made for that call.
2. Both run on the same hidden states: one token, a prime number, a batch, with tokens large enough that clamps are
   reached; and all tokens equal and of usual size, until each expert was without any. The router is the same on both
   sides and picks the experts.
3. The truth both are judged by is the rewritten graph with the op's result replaced: each pair's expert in fp32,
   by the original expert module, summed in fp32. Of a split site, whose graph has no such op, it is the original
   block with experts that work in fp32 (fp64 where that is their own dtype).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ... import mx
from ...ops import schema
from ..alterations import copied
from ..calls import TensorInfo
from ..evaluate import random_ids
from ..trace.failures import in_words
from ..weights import WeightPath, is_apart, members
from .module import MXFP4Experts
from .verify import Sums, Verification, VerificationError, tokens_of, within_range


def is_loop(site: MXFP4Experts) -> bool:
    """Whether a site's experts lie apart, as modules or as parameters, with the router inside the site."""
    return any(is_apart(name) for p in site.projections for name in p.source.parameters)


def _are_modules(site: MXFP4Experts, original: nn.Module) -> bool:
    """Whether each expert is one module with a forward, which holds all its weights."""
    paths = [WeightPath.parse(name) for p in site.projections for name in p.source.parameters]
    found = {(prefix, *keys) if rest else () for prefix, keys, rest in (p.parts(original) for p in paths if p.apart)}
    if len(found) != 1 or () in found or not all(p.apart for p in paths):
        return False
    prefix, *keys = found.pop()
    child = original.get_submodule(prefix).get_submodule(keys[0])
    return type(child).forward is not nn.Module.forward


def routes_itself(site: MXFP4Experts) -> bool:
    """Whether a site's router is in it: no argument holds ids."""
    return all(info.dtype.is_floating_point for info in site.plan.pattern.tensors)


def verify_loop(
    site: MXFP4Experts, original: nn.Module, seed: int = 0, sides: Sequence[tuple[int, ...]] = ()
) -> Verification:
    """Compare ``site`` with ``original``; VerificationError with both errors if they disagree.

    ``sides``: (batch, length) at which to compare them besides, on different and on equal tokens.
    """
    if not _are_modules(site, original):
        return _verified(site, _Packed(site, original), seed, sides)
    experts = _Experts(site, original)
    try:
        return _verified(site, experts, seed, sides)
    except VerificationError:
        if not experts.opened:
            raise
    # The block takes its experts' parts by itself, which ran on the original weights.
    return _verified(site, _Packed(site, original), seed, sides)


def _verified(
    site: MXFP4Experts, experts: _Experts | _Packed, seed: int, sides: Sequence[tuple[int, ...]]
) -> Verification:
    generator = torch.Generator().manual_seed(seed)
    dtype = site.plan.weight_dtype
    ids_at = _ids_argument(site)
    eager = experts.block(dtype)
    exact = None
    if site.plan.params is None:
        exact = experts.block(torch.float64 if dtype == torch.float32 else torch.float32)
        if isinstance(experts, _Packed):
            exact = _Wide(exact)
    sums = Sums(site, dtype)
    used: set[int] = set()
    never_absent = set(range(site.projections[0].shape[0]))
    cases = 0
    alike = ((2, 7), True)
    many = [((1, sums.extra), False)] if sums.extra else []
    many += [((side[0], side[1]), equal) for side in sides for equal in (False, True)]
    with torch.no_grad():
        for sizes, equal in (
            ((1, 1), False), ((1, 13), False), ((5, 1), False), alike, ((3, 37), False), ((4, 64), False), *many,
            *[alike] * _ALIKE,
        ):  # fmt: skip
            if cases >= 6 + len(many) and not never_absent:
                break
            experts.used.clear()
            leaves = _inputs(site, sizes, equal, generator, ids_at)
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

            def placed(tensors: list[Tensor], leaves: list[Any] = leaves, places: list[int] = places) -> list[Any]:
                given = dict(zip(places, tensors, strict=True))
                return [given.get(i, leaf) for i, leaf in enumerate(leaves)]

            def call(tensors: list[Tensor]) -> Any:
                args, kwargs = site.plan.pattern.arrange(placed(tensors))
                return eager(*args, **kwargs)

            try:
                theirs, tensors = within_range(call, [leaves[i] for i in places], tokens_of(site, ids_at))
                leaves = placed(tensors)
                args, kwargs = site.plan.pattern.arrange(leaves)
            except Exception as error:
                if isinstance(experts, _Experts):
                    experts.opened = True  # perhaps for what it asks the experts for
                raise VerificationError(
                    f"the original block does not run on verification inputs: {in_words(error)}"
                ) from error
            if exact is None:
                truth = _Recorder(site, experts).truth(leaves)
            else:
                truth = exact(*args, **kwargs)
            ours = site(*args, **kwargs)
            used |= experts.used
            if equal:
                never_absent &= experts.used
            one = _compared(ours, theirs, truth)
            _check_original(one, dtype, f"{sizes[0]} x {sizes[1]} tokens")
            sums.add(one, sizes[0] * sizes[1], f"{sizes[0]} x {sizes[1]} tokens")
            cases += 1
    return sums.verification(cases, len(used))


# Calls on equal tokens that are tried until each expert was without tokens once: the trace assumed that all have some,
# and an expert that has none must contribute nothing. Large tokens would hide what it contributes.
_ALIKE = 16

# The truth shares the rewritten graph's idea of the block. An original that is farther from it than rounding
# explains does something else, and its distance must not widen what is allowed.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def _check_original(squared: Tensor, dtype: torch.dtype, what: str) -> None:
    error = float((squared[1] / squared[2].clamp_min(1e-300)).sqrt())
    if not error <= _ROUNDING[dtype]:
        raise VerificationError(
            f"{what}: the original block is {error:.3g} away from what its traced loop computes in fp32, more than "
            f"rounding to {dtype} explains: it does something that the trace did not see"
        )


def _compared(ours: Any, theirs: Any, truth: Any) -> Tensor:
    """Squared errors of ours, of theirs, and the squared norm, over all outputs."""
    total = torch.zeros(3, dtype=torch.float64)
    leaves = [torch.utils._pytree.tree_leaves(v) for v in (ours, theirs, truth)]
    for a, b, t in zip(*leaves, strict=True):
        if not isinstance(t, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"the rewritten block returns {a.dtype} {list(a.shape)}, the original {b.dtype} {list(b.shape)}"
            )
        if not t.is_floating_point():
            if not torch.equal(a, b):
                raise VerificationError("the rewritten block returns other integers than the original")
            continue
        a, b, t = a.double().cpu(), b.double().cpu(), t.double().cpu()
        finite = torch.isfinite(t)
        a, b, t = a[finite], b[finite], t[finite]
        total += torch.stack([(a - t).square().sum(), (b - t).square().sum(), t.square().sum()])
    return total


def _ids_argument(site: MXFP4Experts) -> int | None:
    """Which tensor argument holds the expert ids, if one does: where the router is not in the site."""
    graph = site.rewritten.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"][: len(site.plan.pattern.tensors)]
    for node in graph.nodes:
        if node.target == schema.moe:
            ids = node.args[1]
            while isinstance(ids, fx.Node) and ids.op == "call_function" and len(ids.all_input_nodes) == 1:
                ids = ids.all_input_nodes[0]
            return inputs.index(ids) if ids in inputs and not ids.meta["val"].is_floating_point() else None
    # A split list that is called with ids: nothing else about routing is an integer.
    integers = [i for i, info in enumerate(site.plan.pattern.tensors) if info.dtype in (torch.int32, torch.int64)]
    return integers[0] if len(integers) == 1 else None


def _inputs(
    site: MXFP4Experts, sizes: tuple[int, int], equal: bool, generator: torch.Generator, ids_at: int | None = None
) -> list[Any]:
    """Leaves of a call: dimensions that varied between calls get these sizes, one alone their product.

    ``ids_at``: the tensor argument that holds expert ids, which are drawn at random (``equal``: for one token).
    """
    recorded = sorted(
        {n for i, d in zip(site.plan.pattern.leaves, site.plan.pattern.dynamic, strict=True)
         if isinstance(i, TensorInfo) for n in (i.shape[k] for k in d)}
    )  # fmt: skip
    out: list[Any] = []
    tensors = 0
    for info, dynamic in zip(site.plan.pattern.leaves, site.plan.pattern.dynamic, strict=True):
        if not isinstance(info, TensorInfo):
            out.append(info)
            continue
        tensors += 1
        own = iter(sizes if len(dynamic) > 1 else (sizes[0] * sizes[1] if len(recorded) == 1 else sizes[-1],))
        shape = [next(own, 1) if k in dynamic else n for k, n in enumerate(info.shape)]
        if tensors - 1 == ids_at:
            drawn = random_ids(shape, site.projections[0].shape[0], generator)
            if equal:
                of_token = drawn.view(-1, shape[-1])
                of_token[:] = of_token[:1].clone()
            out.append(drawn.to(info.dtype).to(info.device))
            continue
        if not info.dtype.is_floating_point:
            out.append(torch.zeros(shape, dtype=info.dtype, device=info.device))
            continue
        values = torch.randn(shape, generator=generator)
        rows = values.view(-1, shape[-1])
        if equal:
            rows[:] = rows[:1].clone()
        else:
            rows[::3] *= 8  # some tokens large enough to reach the clamps
        out.append(values.to(info.dtype).to(info.device))
    return out


class _Experts:
    """The original experts, one at a time, on dequantized weights."""

    def __init__(self, site: MXFP4Experts, original: nn.Module) -> None:
        self.site, self.original = site, original
        self.prefix, self.children, _ = WeightPath.parse(site.projections[0].source.parameters[0]).parts(original)
        self.opened = False
        self.biases = site.dequantized_biases()
        self.members = {n: members(original, n) for p in site.projections for n in p.source.bias}
        self.used: set[int] = set()

    def weights(self, expert: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """One expert's parameters, by their names within the expert."""
        out: dict[str, Tensor] = {}
        head = f"{self.prefix}." if self.prefix else ""
        for projection in self.site.projections:
            values = self.site.dequantized(projection, slice(expert, expert + 1), dtype)
            for name, value in values.items():  # named after the first expert
                out[name.removeprefix(f"{head}{self.children[0]}.")] = value
            for name in projection.source.bias:
                member = self.members[name][expert]
                out[member.removeprefix(f"{head}{self.children[expert]}.")] = self.biases[member].to(dtype)
        return out

    def run(self, expert: int, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        """One expert's forward."""
        child = self.original.get_submodule(self.prefix)._modules[self.children[expert]]
        assert child is not None
        self.used.add(expert)
        values = self.weights(expert, dtype)
        others = {n: p.to(dtype) for n, p in child.named_parameters() if n not in values and p.is_floating_point()}
        return torch.func.functional_call(child, {**others, **values}, args, kwargs)

    def block(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the block whose experts are made when they are called, and work in ``dtype``."""
        memo: dict[int, Any] = {id(p): p for p in self.original.parameters()}
        owner = self.original.get_submodule(self.prefix)
        for name in self.children:
            memo[id(owner._modules[name])] = owner._modules[name]
        block = copied(self.original, memo)
        owner = block.get_submodule(self.prefix)
        for expert, name in enumerate(self.children):
            child = owner._modules[name]
            assert child is not None
            owner._modules[name] = _Lazy(self, child, expert, dtype)
        return block


class _Packed:
    """Experts in packed weights that the block itself multiplies: its copy has all of them dequantized at once."""

    def __init__(self, site: MXFP4Experts, original: nn.Module) -> None:
        self.site, self.original = site, original
        self.params = site.plan.params
        self.biases = {p.slot: site.canonical_bias(p) for p in site.projections}
        self.used: set[int] = set()

    def run(self, expert: int, dtype: torch.dtype, x: Tensor) -> Tensor:
        """One expert as the spec describes it, without rounding in between."""
        assert self.params is not None
        self.used.add(expert)
        hidden = self.params.activate(self._project(0, expert, x.to(dtype)))
        return self._project(1, expert, hidden)

    def _project(self, index: int, expert: int, x: Tensor) -> Tensor:
        projection = self.site.projections[index]
        packed, scales = self.site.canonical(projection, slice(expert, expert + 1))
        y = x @ mx.dequantize(packed[0], scales[0], projection.shape[2], x.dtype).T
        bias = self.biases[projection.slot]
        return y if bias is None else y + bias[expert].to(x.dtype)

    def block(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the block with the dequantized weights."""
        memo: dict[int, Any] = {}
        for projection in self.site.projections:
            for name in (m for n in projection.source.parameters for m in members(self.original, n)):
                memo[id(self.original.get_parameter(name))] = self.original.get_parameter(name)
        block = copied(self.original, memo)
        for projection in self.site.projections:
            for name, value in self.site.dequantized(projection, dtype=dtype).items():
                owner, _, leaf = name.rpartition(".")
                block.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        return block


class _Wide(nn.Module):
    """A block whose experts' weights are wider than its values: their products are taken as wide, and rounded."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _WideProducts():
            return self.block(*args, **kwargs)


class _WideProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        floats = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        if func not in _PRODUCTS or len(floats) < 2:
            return func(*args, **kwargs)
        narrow, wide = sorted(floats, key=lambda dtype: dtype.itemsize)[:: len(floats) - 1]
        return func(*(a.to(wide) if isinstance(a, Tensor) else a for a in args), **kwargs).to(narrow)


_PRODUCTS = {
    torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm,
    Tensor.bmm, torch.addmm,
}  # fmt: skip


class _Lazy(nn.Module):
    """Stands for one expert; what else its block asks it for (the dtype of a weight) the expert answers."""

    def __init__(self, experts: _Experts, child: nn.Module, expert: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.run = lambda *args, **kwargs: experts.run(expert, dtype, *args, **kwargs)
        self.dtype = dtype
        self.__dict__["_of"] = (experts, child)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts, child = self.__dict__["_of"]
            value = getattr(child, name)
            experts.opened |= isinstance(value, (Tensor, nn.Module))
            return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = next(a.dtype for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point())
        if own == self.dtype:
            return self.run(*args, **kwargs)
        cast = lambda dtype, values: torch.utils._pytree.tree_map(
            lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values
        )
        given, named = cast(self.dtype, (args, kwargs))
        return cast(own, self.run(*given, **named))


class _Recorder(fx.Interpreter):
    """The rewritten graph with the op's result computed by the original experts in fp32."""

    def __init__(self, site: MXFP4Experts, experts: _Experts | _Packed) -> None:
        super().__init__(site.rewritten)
        self.site, self.experts = site, experts
        self.on_input = site.plan.params is not None and site.plan.params.weight_on_input

    def truth(self, leaves: list[Any]) -> Any:
        """What the block returns then."""
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return self.site._arranged(self.run(*inputs, *self.site.stored()))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target != schema.moe:
            return super().call_function(target, args, kwargs)
        x, ids, weights = args[:3]
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        known = ids[ids < self.site.projections[0].shape[0]]  # the others are no expert
        for expert in known.unique().tolist():
            token, column = torch.where(ids == expert)
            weight = weights[token, column, None].float()
            rows = x[token].float()
            if self.on_input:
                rows = self.experts.run(expert, torch.float32, rows * weight).float()
            else:
                rows = self.experts.run(expert, torch.float32, rows).float() * weight
            out.index_add_(0, token, rows)
        return out.to(x.dtype)


__all__ = ["is_loop", "routes_itself", "verify_loop"]
