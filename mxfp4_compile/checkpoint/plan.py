"""Plan a model whose weights are not there yet: discover, capture and match on the meta device.

Contract: the model's parameters stay on the meta device and are the same objects afterwards. The forward that
shows how experts are called runs on fake tensors; a module is captured on a stand-in whose weights are
allocated and never written.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.target import Request
from ..passes.capture import Call, CallPattern, TensorInfo
from ..passes.discover import Candidate, DiscoveryError, experts_implementation, find_candidates, forward_runs
from ..passes.discover import record_calls as record_real_calls
from ..passes.experts import projections_of, source_names
from ..passes.sources import is_packed
from ..pipeline import Site, apply_skip, check_matches, check_model, match_all, skip_late, weight_ids
from ..report import Report

DeviceOf = Callable[[str], torch.device]
_PLAIN = Request()


def plan_sites(
    model: nn.Module,
    report: Report,
    *,
    requested: str | None,
    terms: Request = _PLAIN,
    skip: Sequence[str] = (),
    strict: bool = True,
    example_inputs: Any = None,
    device_of: DeviceOf = lambda _: torch.device("cpu"),
) -> list[Site]:
    """Every MoE-looking module of a model on the meta device, each with its structure or the reason why not.

    ``terms``: what every site asks of its backend; ``device_of``: where a module of that name will run.
    Raises OptimizeError as ``optimize`` does.
    """
    with _plain_defaults():
        return _plan(model, report, requested, terms, skip, strict, example_inputs, device_of)


@contextmanager
def _plain_defaults() -> Iterator[None]:
    """New tensors on the CPU in fp32, whatever transformers set as default around the making of a model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _plan(
    model: nn.Module,
    report: Report,
    requested: str | None,
    terms: Request,
    skip: Sequence[str],
    strict: bool,
    example_inputs: Any,
    device_of: DeviceOf,
) -> list[Site]:
    tie_experts(model)
    candidates = find_candidates(model)
    sites = apply_skip([Site(c) for c in candidates], skip, report)
    check_model(model, [s.candidate for s in sites if not s.outcome], loaded=False)

    def record(model: nn.Module, candidates: list[Candidate], inputs: Any) -> None:
        record_calls(model, candidates, inputs)
        for candidate in candidates:
            device = device_of(candidate.name)
            for one in (candidate, candidate.owner):
                if one is not None:
                    one.calls[:] = [_moved(call, device) for call in one.calls]

    with experts_implementation(model, "grouped_mm"):
        match_all(model, sites, example_inputs, requested, terms, record=record, stand_in=stand_in)
    skip_late(sites, skip, report)
    gc.collect()  # exported programs are cyclic garbage that keeps the stand-ins' weights alive
    for site in planned(sites):
        assert site.structure is not None
        apart = [n for n in source_names(projections_of(site.structure.found.spec)) if not is_packed(n)]
        if apart:
            site.structure, site.outcome = None, "unmatched"
            site.reason = f"{apart[0]} is not one packed [E, ., .] parameter; such experts are rewritten in memory only"
    check_matches(sites, report, strict)
    for site in sites:
        if site.structure is not None:
            site.tied = weight_ids(site)
    return sites


def tie_experts(model: nn.Module) -> None:
    """Make packed weights that the model ties one object, as they will be when it is loaded."""
    for name, source in tied_experts(model).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(source)


def tied_experts(model: nn.Module) -> dict[str, str]:
    """Name -> the name it is tied to, for packed weights."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {n: s for n, s in tied.items() if n in parameters and s in parameters and parameters[n].dim() == 3}


def planned(sites: Sequence[Site]) -> list[Site]:
    """The sites that are going to be rewritten."""
    return [s for s in sites if s.structure is not None]


def expert_parameters(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Name in the model -> parameter, for every weight and bias that the planned sites replace."""
    found: dict[str, Tensor] = {}
    for site in planned(sites):
        assert site.structure is not None
        for name in source_names(projections_of(site.structure.found.spec)):
            found[f"{site.name}.{name}"] = site.candidate.module.get_parameter(name)
    return found


def stand_in(module: nn.Module, pattern: CallPattern) -> nn.Module:
    """A copy of a meta module with allocated, unwritten weights on the device its calls come from."""
    device = pattern.tensors[0].device
    memo: dict[int, Any] = {}
    config = getattr(module, "config", None)
    if config is not None:
        memo[id(config)] = config  # which experts implementation it names is switched from outside
    with torch.no_grad():
        return copy.deepcopy(module, memo).to_empty(device=device)


def _moved(call: Call, device: torch.device) -> Call:
    def move(value: Any) -> Any:
        return replace(value, device=device) if isinstance(value, TensorInfo) else value

    return Call(tuple(map(move, call.args)), {name: move(value) for name, value in call.kwargs.items()})


def record_calls(model: nn.Module, candidates: list[Candidate], example_inputs: Any = None) -> None:
    """As discover.record_calls, on a model without weights.

    Fake tensors first: they cost nothing. Forwards that branch on values (a few families compute masks with
    nonzero) run on zeros instead, which take no memory either, but time.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = list(candidates)
    with _weights(model, _zeros):
        runs = forward_runs(model, _on_cpu(example_inputs))
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def fake(t: Tensor) -> Tensor:
            with mode:
                return torch.empty(t.shape, dtype=t.dtype)

        with _weights(model, fake), mode:
            record_real_calls(model, candidates, runs=runs)
    except DiscoveryError:
        candidates[:] = before
        for candidate in candidates:
            candidate.calls.clear()
        with _weights(model, _zeros):
            record_real_calls(model, candidates, runs=runs)


def _zeros(tensor: Tensor) -> Tensor:
    """A real tensor that takes no memory. Packed experts are never written instead: grouped_mm refuses stride 0."""
    if tensor.dim() == 3 and tensor.is_floating_point():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _on_cpu(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, inputs)


@contextmanager
def _weights(model: nn.Module, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every meta parameter and buffer replaced by what ``make`` gives for it; put back afterwards."""
    old: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Any] = {}
    try:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in list(store.items()):
                    if tensor is None or tensor.device.type != "meta":
                        continue
                    if id(tensor) not in made:
                        value = make(tensor)
                        made[id(tensor)] = (
                            nn.Parameter(value, requires_grad=False) if store is module._parameters else value
                        )
                    old.append((store, name, tensor))
                    store[name] = made[id(tensor)]
        yield
    finally:
        for store, name, tensor in old:
            store[name] = tensor
