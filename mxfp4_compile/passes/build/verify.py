"""Verify: the original module on dequantized weights against the rewritten one, by running both.

::

    tokens, ids, weights --+--> original on dequantized weights of a few experts, in its dtype --> theirs
                           +--> the same in fp32                                               --> truth
                           +--> rewritten module                                               --> ours
    |ours - truth| <= RATIO * |theirs - truth| + a little                 or VerificationError

Contract: neither module is changed; memory beyond the site's prepared weights is a few experts.

1. Take a few experts at a time: a copy of the ORIGINAL module gets their dequantized weights (its other
   experts do not exist in the copy; ids are drawn among the few), the rewritten one keeps all of its own.
2. Feed both the same tokens, over the edge cases of routing: one token, a prime number of tokens, an
   expert with none, all tokens on one set of experts; tokens large enough that clamps are reached.
3. Judge by distance from an fp32 run of the original: the rewritten module may be at most
   ``RATIO`` times as far from it as the original in its own dtype, plus a little for fp32 sums in
   another order.
Separately every expert's dequantized weights are compared with the original ones, since both sides of
the first check share them (``check_weights``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import mx
from ...ops import schema
from ...ops.registry import get_backend
from ..alterations import copied
from ..calls import TensorInfo
from ..evaluate import random_ids
from ..match import FusedMatch
from ..weights import members, stack
from .module import MXFP4Experts
from .state import BLUEPRINT

# The rewritten module's error over the original's, both against fp32. Kernels round less often than the
# original, so 1 is typical; a wrong rewrite is off by orders of magnitude.
RATIO = 1.5
# Relative error that sums taken in another order may add, per dtype the module works in.
SLACK = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}

# Memory for dequantized copies of experts; an eighth of the site where that is more.
_GROUP_BYTES = 12 << 20

# A weight matrix read along the wrong axis or in the wrong order is uncorrelated with the right one:
# relative squared error about 2. The worst any right layout can give is below 0.1 (every block clipped).
WRONG_LAYOUT = 0.25


@dataclass(frozen=True)
class Verification:
    """Outcome for one site: relative errors against an fp32 run of the original module.

    Where a backend quantizes activations of many tokens only, ``error`` is that of fewer, and ``quantized_error`` that
    of calls with ``quantized_from`` tokens or more.
    """

    error: float
    original_error: float
    cases: int
    experts: int
    limit: float
    quantized_from: int | None = None
    quantized_error: float | None = None


def reported(check: Verification | None) -> dict[str, Any]:
    """What a site's report says of its verification, by the names of ``SiteReport``; nothing if there was none."""
    if check is None:
        return {}
    names = ("error", "original_error", "quantized_from", "quantized_error")
    return {name: getattr(check, name) for name in names}


class VerificationError(RuntimeError):
    """A rewritten site that does not compute what the original does."""


def check_weights(errors: Tensor, scale_rule: str, weights: Sequence[str]) -> list[str]:
    """Messages about experts whose quantization error [E] is beyond twice the rule's usual one.

    Raises VerificationError where the error says that the weights were read in a wrong layout.
    """
    usual = 2 * max(mx.EXPECTED_RELATIVE_MSE[scale_rule])
    worst = float(errors.max()) if errors.numel() else 0.0
    name = ", ".join(weights)
    if not worst < WRONG_LAYOUT:  # NaN included
        expert = int(errors.nan_to_num(nan=float("inf")).argmax())
        raise VerificationError(
            f"{name}, expert {expert}: the dequantized weights have a relative squared error of {worst:.3g} against "
            "the original ones; no right layout gives more than 0.1"
        )
    beyond = (errors > usual).nonzero().flatten().tolist()
    if not beyond:
        return []
    shown = ", ".join(map(str, beyond[:8])) + (", ..." if len(beyond) > 8 else "")
    return [
        f"{name}: {len(beyond)} of {errors.numel()} experts ({shown}) lose more than usual: relative squared error up "
        f"to {worst:.4f}, twice the usual is {usual:.4f}"
    ]


def verify(
    site: MXFP4Experts, original: nn.Module, found: Any, seed: int = 0, sides: Sequence[tuple[int, ...]] = ()
) -> Verification:
    """Compare ``site`` with ``original`` (weights present or not: they are replaced by dequantized ones).

    ``sides``: (batch, length) whose products are numbers of tokens to compare them at besides.
    Raises VerificationError with both errors if they disagree.
    """
    generator = torch.Generator().manual_seed(seed)
    experts = site.projections[0].shape[0]
    ids_at, by_expert, top_k = _roles(site, found)
    others = found.sentinels if isinstance(found, FusedMatch) else 0
    groups = _groups(site, original)
    cases = checked = 0
    dtype = site.plan.weight_dtype
    sums = Sums(site, dtype)
    extra = [*dict.fromkeys([*([sums.extra] if sums.extra else []), *(math.prod(side) for side in sides)])]
    for start, stop in groups:
        narrow = slice(start, stop)
        try:
            outcome = _compare_group(site, original, narrow, ids_at, by_expert, top_k, others, generator, dtype, extra)
        except _NeedsAllExperts:
            everyone = slice(0, experts)
            outcome = _compare_group(
                site, original, everyone, ids_at, by_expert, top_k, others, generator, dtype, extra
            )
        for ours, theirs, truth in outcome:
            cases += 1
            delta = torch.tensor(
                [
                    float((ours.double() - truth).square().sum()),
                    float((theirs.double() - truth).square().sum()),
                    float(truth.square().sum()),
                ],
                dtype=torch.float64,
            )
            sums.add(delta, ours.shape[0], f"experts {start} to {stop - 1}, {ours.shape[0]} tokens")
        checked += stop - start
    return sums.verification(cases, checked)


class Sums:
    """Squared errors of a site's cases, judged one by one and together: apart where activations are quantized."""

    def __init__(self, site: MXFP4Experts, dtype: torch.dtype) -> None:
        backend, params = get_backend(site.backend), site.plan.params
        self.dtype = dtype
        # What the backend's own arithmetic adds, where it quantizes activations.
        self.slack = backend.slack(site.layout)
        self.quantized_from: int | None = None
        if self.slack and params is not None:
            ids = next(n for n in site.rewritten.graph.nodes if n.target == schema.moe).args[1]
            assert isinstance(ids, torch.fx.Node)
            device = site.plan.pattern.tensors[0].device
            self.quantized_from = backend.quantizes_from(site.layout, params, ids.meta["val"].shape[-1], device)
        self.plain = torch.zeros(3, dtype=torch.float64)
        self.quantized = torch.zeros(3, dtype=torch.float64)

    @property
    def extra(self) -> int:
        """A number of tokens to try besides: the smallest that is quantized, where few are not; else 0."""
        return self.quantized_from if self.quantized_from is not None and self.quantized_from > 1 else 0

    def add(self, squared: Tensor, tokens: int, what: str) -> None:
        """VerificationError if these errors of a call with so many tokens are too large."""
        quantized = self.quantized_from is not None and tokens >= self.quantized_from
        _judge(squared, self.dtype, what, self.slack if quantized else 0.0)
        (self.quantized if quantized else self.plain).add_(squared)

    def verification(self, cases: int, experts: int) -> Verification:
        """Of all that was added."""
        what = "all cases together"
        if not self.extra:
            slack = 0.0 if self.quantized_from is None else self.slack
            error, original_error, limit = _judge(self.plain + self.quantized, self.dtype, what, slack)
            return Verification(error, original_error, cases, experts, limit)
        error, original_error, limit = _judge(self.plain, self.dtype, what, 0.0)
        quantized_error = _judge(self.quantized, self.dtype, f"{what} of {self.extra} tokens", self.slack)[0]
        return Verification(error, original_error, cases, experts, limit, self.extra, quantized_error)


def _judge(squared: Tensor, dtype: torch.dtype, what: str, slack: float) -> tuple[float, float, float]:
    norm = float(squared[2]) ** 0.5
    if norm == 0:
        error, original_error = float(squared[0]) ** 0.5, float(squared[1]) ** 0.5
    else:
        error, original_error = float(squared[0]) ** 0.5 / norm, float(squared[1]) ** 0.5 / norm
    limit = RATIO * original_error + SLACK[dtype] + slack
    if not error <= limit or not math.isfinite(error):  # NaN fails, and so does an original that gives Inf
        raise VerificationError(
            f"{what}: relative error {error:.3g} against an fp32 run of the original, which itself is at "
            f"{original_error:.3g} in {dtype}; at most {limit:.3g} is allowed"
        )
    return error, original_error, limit


class _NeedsAllExperts(Exception):
    """The original module does not run with a part of its experts."""


def _roles(site: MXFP4Experts, found: Any) -> tuple[int, int | None, int]:
    """Indices (among the tensor arguments) of the expert ids and of routing weights of all experts, and K."""
    infos = site.plan.pattern.tensors
    integer = [i for i, info in enumerate(infos) if not info.dtype.is_floating_point and info.dtype != torch.bool]
    if len(integer) != 1:
        raise VerificationError(f"{len(integer)} integer arguments, one with the expert ids was expected")
    index = integer[0]
    top_k = found.spec.top_k if isinstance(found, FusedMatch) else int(infos[index].shape[-1])
    inputs = [n for n in site.rewritten.graph.nodes if n.op == "placeholder"][: len(infos)]
    by_expert = None
    for node in site.rewritten.graph.nodes:
        if node.target == schema.moe and node.args[2].target == torch.ops.aten.gather.default:
            by_expert = next((i for i, n in enumerate(inputs) if n is node.args[2].args[0]), None)
    return index, by_expert, top_k


def _groups(site: MXFP4Experts, original: nn.Module) -> list[tuple[int, int]]:
    """Ranges of experts to check: all where they fit, else the first, a middle and the last few."""
    experts = site.projections[0].shape[0]
    weights = sum(stack(original, n).numel() for p in site.projections for n in p.source.parameters)
    # Two copies exist at a time, in the site's dtype and in fp32.
    per_expert = weights // experts * (site.plan.weight_dtype.itemsize + 4)
    budget = max(_GROUP_BYTES, weights * site.plan.weight_dtype.itemsize // 8)
    size = max(2, min(experts, budget // max(per_expert, 1)))
    if experts <= size:
        return [(0, experts)]
    middle = (experts - size) // 2
    return sorted({(0, size), (middle, middle + size), (experts - size, experts)})


def _compare_group(
    site: MXFP4Experts,
    original: nn.Module,
    narrow: slice,
    ids_at: int,
    by_expert: int | None,
    top_k: int,
    others: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    extra: Sequence[int],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    whole = narrow.stop - narrow.start == site.projections[0].shape[0]
    own = _with_weights(site, original, narrow, dtype)
    exact = _with_weights(site, original, narrow, torch.float32 if dtype.itemsize < 8 else dtype)
    tokens_at = tokens_of(site, ids_at) - {by_expert}
    out = []
    with torch.no_grad():
        for tokens, pattern in _routings(narrow.stop - narrow.start, top_k, others, extra):
            inputs = _inputs(site, tokens, ids_at, narrow.stop - narrow.start, pattern, generator)
            real = torch.ones_like(inputs[ids_at], dtype=torch.bool)
            if pattern == "without weights":  # some ids of experts past the last one that has weights
                real = (torch.rand(real.shape, generator=generator) > 0.4).to(real.device)
                drawn = torch.randint(others, real.shape, generator=generator).to(inputs[ids_at])
                last = site.projections[0].shape[0]
                inputs[ids_at] = torch.where(real, inputs[ids_at], last + drawn)
            try:
                theirs, inputs = within_range(lambda tensors: _call(own, site, tensors), inputs, tokens_at)
                truth = _call(exact, site, [t.float() if t.is_floating_point() else t for t in inputs])
            except Exception as error:
                if not whole:
                    raise _NeedsAllExperts from error
                raise VerificationError(f"the original module does not run on verification inputs: {error}") from error
            shifted = list(inputs)
            shifted[ids_at] = torch.where(real, inputs[ids_at] + narrow.start, inputs[ids_at])
            if by_expert is not None:
                shifted[by_expert] = inputs[by_expert].roll(narrow.start, 1)
            ours = _call(site, site, shifted)
            out.append((ours.cpu(), theirs.cpu(), truth.cpu().double()))
    return out


def tokens_of(site: MXFP4Experts, ids_at: int | None) -> set[int | None]:
    """Which of a call's tensors are tokens: floating, and not one weight for each expert id."""
    infos = site.plan.pattern.tensors
    ids = None if ids_at is None else infos[ids_at].shape
    return {
        i
        for i, info in enumerate(infos)
        if info.dtype.is_floating_point and not (ids is not None and len(info.shape) == 2 and info.shape[1] == ids[-1])
    }


def within_range(
    call: Callable[[list[Tensor]], Any], tensors: list[Tensor], tokens_at: Collection[int | None]
) -> tuple[Any, list[Tensor]]:
    """What the original returns, and for which tensors: its tokens are shrunk by powers of 4 until nothing overflows.

    A model that was scaled to fit its dtype (fp16) overflows on tokens of usual size without being wrong. If tokens of
    any size overflow, the result is that of the original ones.
    """
    first = result = call(tensors)
    shrunk = tensors
    for step in range(_SHRINKS):
        if all(bool(t.isfinite().all()) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)):
            return result, shrunk
        shrunk = [t * 4.0 ** -(step + 1) if i in tokens_at else t for i, t in enumerate(tensors)]
        result = call(shrunk)
    return first, tensors


# Down to 2^-24 of the usual size: the range of fp16.
_SHRINKS = 12


def _with_weights(site: MXFP4Experts, original: nn.Module, narrow: slice, dtype: torch.dtype) -> nn.Module:
    """A copy of the original module with the dequantized weights of some experts, in ``dtype``."""
    released = {n for p in site.projections for n in (*p.source.parameters, *p.source.bias)}
    memo: dict[int, Any] = {}
    for name in (m for n in released for m in members(original, n)):  # do not copy what is replaced
        parameter = original.get_parameter(name)
        memo[id(parameter)] = parameter
    module = copied(original, memo)
    values: dict[str, Tensor] = {}
    for projection in site.projections:
        values.update(site.dequantized(projection, narrow, dtype))
    for name, bias in site.dequantized_biases().items():
        values[name] = bias[narrow].to(dtype)
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for child in module.modules():
        for leaf, kept in child._parameters.items():
            if kept is not None and kept.is_floating_point() and kept.dtype != dtype:
                child._parameters[leaf] = nn.Parameter(kept.to(dtype), requires_grad=False)
    return module


def _routings(experts: int, top_k: int, others: int, extra: Sequence[int]) -> Iterator[tuple[int, str]]:
    yield 1, "random"
    yield 13, "random"
    yield 7, "one"
    if experts > top_k:
        yield 11, "skip last"
    if others:
        yield 17, "without weights"
    for tokens in extra:
        yield tokens, "random"
        yield tokens, "one"


def _inputs(
    site: MXFP4Experts, tokens: int, ids_at: int, experts: int, pattern: str, generator: torch.Generator
) -> list[Tensor]:
    """Tensor arguments of a call with ``tokens`` tokens, ids among the experts of one group."""
    plan = site.plan
    infos = plan.pattern.tensors
    recorded = infos[ids_at].shape[0]
    out: list[Tensor] = []
    for index, info in enumerate(infos):
        shape = tuple(tokens if n == recorded and d == 0 else n for d, n in enumerate(info.shape))
        if len(shape) == 3 and info.shape[0] * info.shape[1] == recorded != info.shape[0]:
            shape = (1, tokens, shape[2])  # batch and length apart
        if index == ids_at:
            out.append(_ids(shape, experts, pattern, generator).to(info.dtype).to(info.device))
        elif info.dtype.is_floating_point and len(shape) == 2 and shape[1] == infos[ids_at].shape[-1]:
            weights = torch.rand(shape, generator=generator) + 0.05
            out.append((weights / weights.sum(-1, keepdim=True)).to(info.dtype).to(info.device))
        elif info.dtype.is_floating_point:
            values = torch.randn(shape, generator=generator)
            values[::3] *= 8  # some tokens large enough to reach the clamps
            out.append(values.to(info.dtype).to(info.device))
        else:
            out.append(torch.zeros(shape, dtype=info.dtype, device=info.device))
    return out


def _ids(shape: tuple[int, ...], experts: int, pattern: str, generator: torch.Generator) -> Tensor:
    tokens, top_k = shape[0], shape[-1]
    usable = experts - 1 if pattern == "skip last" and experts > top_k else experts
    if pattern == "one":
        return random_ids((1, top_k), usable, generator).expand(tokens, top_k).reshape(shape).contiguous()
    return random_ids(shape, usable, generator)


def _call(module: nn.Module, site: MXFP4Experts, tensors: Sequence[Tensor]) -> Tensor:
    remaining = iter(tensors)
    leaves = [next(remaining) if isinstance(leaf, TensorInfo) else leaf for leaf in site.plan.pattern.leaves]
    args, kwargs = site.plan.pattern.arrange(leaves)
    result = module(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result


__all__ = ["BLUEPRINT", "Verification", "VerificationError", "check_weights", "reported", "verify"]
