"""Plan a model whose weights are not there yet: discover, trace and match on the meta device.

Contract: the model's parameters stay on the meta device and are the same objects afterwards. The forward that
shows how experts are called runs on fake tensors; a module is traced on a stand-in whose weights are
allocated and never written.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.target import Request
from ..passes.calls import Call, TensorInfo
from ..passes.find.discover import (
    Candidate,
    DiscoveryError,
    find_candidates,
    forward_runs,
    traceable_experts,
)
from ..passes.find.discover import record_calls as record_real_calls
from ..passes.trace.traced import CallPattern
from ..passes.weights import members, projections_of, source_names, stack
from ..planning import Site, apply_skip, check_matches, check_model, match_all, skip_late, weight_ids
from ..report import Report

DeviceOf = Callable[[str], torch.device]
_PLAIN = Request()


def plan_sites(
    model: nn.Module,
    report: Report,
    *,
    requested: str | None,
    request: Request = _PLAIN,
    skip: str | Sequence[str] = (),
    strict: bool = True,
    example_inputs: Any = None,
    device_of: DeviceOf = lambda _: torch.device("cpu"),
) -> list[Site]:
    """Every MoE-looking module of a model on the meta device, each with its structure or the reason why not.

    ``request``: what every site asks of its backend; ``device_of``: where a module of that name will run.
    Raises OptimizeError as ``optimize`` does.
    """
    with planning_modes(model):
        return _plan(model, report, requested, request, skip, strict, example_inputs, device_of)


@contextmanager
def planning_modes(model: nn.Module) -> Iterator[None]:
    """What a model on the meta device is planned in: plain defaults of torch, and as for inference."""
    with _plain_defaults(), _as_for_inference(model):
        yield


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


@contextmanager
def _as_for_inference(model: nn.Module) -> Iterator[None]:
    """In eval mode, and with what a forward casts for good (switch_transformers' routers) cast while planning."""
    modes = [(module, module.training) for module in model.modules()]
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, dtype in dtypes:
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def _plan(
    model: nn.Module,
    report: Report,
    requested: str | None,
    request: Request,
    skip: str | Sequence[str],
    strict: bool,
    example_inputs: Any,
    device_of: DeviceOf,
) -> list[Site]:
    tie_experts(model)
    candidates = find_candidates(model)
    sites = apply_skip(model, [Site(c) for c in candidates], skip, report, strict)
    check_model(model, [s.candidate for s in sites if not s.outcome], loaded=False)

    def record(model: nn.Module, candidates: list[Candidate], inputs: Any) -> None:
        record_calls(model, candidates, inputs)
        for candidate in candidates:
            device = device_of(candidate.name)
            for one in (candidate, candidate.owner):
                if one is not None:
                    one.calls[:] = [_moved(call, device) for call in one.calls]

    with traceable_experts(model):
        match_all(model, sites, example_inputs, requested, request, record=record, stand_in=stand_in)
    skip_late(sites, skip, report)
    gc.collect()  # exported programs are cyclic garbage that keeps the stand-ins' weights alive
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


@dataclass(frozen=True)
class ExpertParameter:
    """A weight or bias of a site's experts, of ``shape`` [E, ...], and the model's parameters behind it by name."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its values in the model."""
        return self.parameters[0].dtype

    @property
    def flattened(self) -> bool:
        """Whether one matrix [E * n, ...] holds the experts."""
        return len(self.names) == 1 and self.parameters[0].dim() < len(self.shape)

    @property
    def apart(self) -> bool:
        """Whether each expert has a parameter of its own."""
        return len(self.names) > 1


def expert_parameters(sites: Sequence[Site]) -> dict[str, ExpertParameter]:
    """Every weight and bias that the planned sites replace, by the site's name and the source's (passes.weights)."""
    found: dict[str, ExpertParameter] = {}
    for site in planned(sites):
        assert site.structure is not None
        module = site.candidate.module
        for name in source_names(projections_of(site.structure.found.spec)):
            inside = members(module, name)
            found[f"{site.name}.{name}"] = ExpertParameter(
                stack(module, name).shape,
                tuple(f"{site.name}.{member}" for member in inside),
                tuple(module.get_parameter(member) for member in inside),
            )
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
    """Every meta parameter and buffer replaced by what ``make`` gives for it; put back afterwards.

    What a forward has cast since is cast on the meta device too.
    """
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
            now = store[name]
            if now is not None and now.dtype != tensor.dtype:
                tensor.data = tensor.data.to(now.dtype)
            store[name] = tensor
