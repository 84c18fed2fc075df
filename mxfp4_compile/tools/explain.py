"""What ``optimize`` would do to a model, as data, found by the same steps; nothing is quantized or changed."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from .. import installing, mx, planning
from ..circumstances import exclusive, kept_state
from ..inspection import readable
from ..ops.registry import known_backends
from ..ops.selection import requested_backend, requirements
from ..ops.target import Target
from ..passes.build.prep import prep_program
from ..passes.build.rewrite import RewriteError, rewrite
from ..passes.build.verify import VerificationError
from ..passes.find.discover import experts_implementation, find_candidates, traceable_experts
from ..passes.match import FusedMatch
from ..passes.weights import Projection, projections_of, stack
from ..planning import Site, Structure
from ..report import Report
from ..spec import MoESpec, SplitSpec


@dataclass(frozen=True)
class WeightExplanation:
    """Where one projection's weight [E, N, K] comes from: parameters of the site and how they are stored."""

    slot: str
    shape: tuple[int, int, int]
    parameters: tuple[str, ...]
    stored: str
    dtype: str
    biases: tuple[str, ...]

    def __str__(self) -> str:
        joined = " and ".join(self.parameters) + (", one after the other" if len(self.parameters) > 1 else "")
        bias = f", biases {' and '.join(self.biases)}" if self.biases else ""
        return f"{self.slot} {list(self.shape)}: {joined}, {self.dtype}, stored {self.stored}{bias}"


@dataclass(frozen=True)
class Measured:
    """One module, quantized and verified: bytes of its weights then, and errors as in ``SiteReport``.

    ``failure``: why verification failed, or empty.
    """

    name: str
    bytes_after: int = 0
    weight_error_mean: float = 0.0
    weight_error_max: float = 0.0
    error: float = 0.0
    original_error: float = 0.0
    limit: float = 0.0
    failure: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteExplanation:
    """MoE modules of equal structure (``names``): what they are and what they would become.

    ``others``: each backend that would not be chosen, and why. ``prep``: for each projection the program
    from parameters to prepared weights; ``rewritten``: the graph that would take the module's place; both
    as Python code; ``captured``: the graph as it is, one node a line. ``bytes_before``: its expert weights now;
    ``measured``: what one of the modules came to where it was quantized for this (and dropped again).
    Where there is no match ``reason`` says why, and the rest is empty.
    """

    names: tuple[str, ...]
    module_class: str
    outcome: str
    reason: str = ""
    call: str = ""
    spec: str = ""
    words: tuple[str, ...] = ()
    weights: tuple[WeightExplanation, ...] = ()
    device: str = ""
    backend: str = ""
    layout: str = ""
    others: tuple[tuple[str, str], ...] = ()
    prep: tuple[tuple[str, str], ...] = ()
    rewritten: str = ""
    captured: str = ""
    bytes_before: int = 0
    measured: Measured | None = None


@dataclass(frozen=True)
class Explanation:
    """What ``optimize`` would do to a model. ``parameters`` and ``bytes``: of the whole model as it is."""

    model: str
    sites: tuple[SiteExplanation, ...]
    parameters: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@exclusive
def explain_model(model: nn.Module, name: str = "", example_inputs: Any = None, measure: bool = False) -> Explanation:
    """What ``optimize(model)`` would do, found by the same steps, without changing anything.

    ``measure``: also quantize and verify one module of each structure, and drop it again.
    Raises OptimizeError for a model without a mixture of experts or one that optimize() refuses, and
    DiscoveryError if its forward does not run.
    """
    sites = [planning.Site(candidate) for candidate in find_candidates(model)]
    planning.check_model(model, [site.candidate for site in sites])
    with kept_state(model), traceable_experts(model):
        planning.match_all(model, sites, example_inputs, requested_backend("auto"))
    if not any(site.structure is not None or site.outcome == "unmatched" for site in sites):
        planning.check_matches(sites, Report("", "", 0, False), strict=True)  # raises: nothing was found
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        around = site.candidate.owner  # which a reason may name, in each layer another
        reason = site.reason if around is None else site.reason.replace(around.name, "")
        key = id(site.structure) if site.structure else (site.outcome, reason, type(site.candidate.module))
        groups.setdefault(key, []).append(site)
    explained = tuple(_explain_group(group, model if measure else None) for group in groups.values())
    parameters = list(model.parameters())
    return Explanation(
        name or type(model).__name__,
        explained,
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
    )


def _explain_group(group: list[Site], model: nn.Module | None) -> SiteExplanation:
    module, structure = group[0].candidate.module, group[0].structure
    names = tuple(name for site in group for name in site.candidate.names)
    if structure is None:
        return SiteExplanation(names, type(module).__name__, group[0].outcome, group[0].reason)
    spec, choice = structure.found.spec, structure.choice
    device = next(module.parameters()).device
    prep, counts = _prep_programs(structure, module)
    return SiteExplanation(
        names,
        type(module).__name__,
        "fused" if isinstance(structure.found, FusedMatch) else "split",
        "" if isinstance(structure.found, FusedMatch) else structure.found.spec.reason,
        str(structure.pattern),
        str(spec),
        _words(spec),
        tuple(_explain_weight(projection, module) for projection in _projections(structure)),
        str(device),
        choice.backend,
        choice.layout,
        _others(structure, device),
        prep,
        _rewritten(structure, counts),
        readable(structure.traced.graph),
        sum(
            weight.numel() * weight.element_size()
            for projection in _projections(structure)
            for weight in (stack(module, name) for name in projection.source.parameters)
        ),
        None if model is None else _measure(group[0], model),
    )


def _measure(site: Site, model: nn.Module) -> Measured:
    """Quantize and verify one site as ``optimize`` does; nothing is installed."""
    try:
        built, errors, messages = installing.build_site(site, mx.DEFAULT_SCALE_RULE, lambda _: None)
        with experts_implementation(model, "eager"):
            result = installing.verify_site(built, site)
    except (VerificationError, RewriteError) as error:
        return Measured(site.name, failure=str(error))
    return Measured(
        site.name,
        built.expert_bytes(),
        float(errors.mean()),
        float(errors.max()),
        result.error,
        result.original_error,
        result.limit,
        warnings=tuple(messages),
    )


def _projections(structure: Structure) -> tuple[Projection, ...]:
    return projections_of(structure.found.spec)


def _explain_weight(projection: Projection, module: nn.Module) -> WeightExplanation:
    source = projection.source
    return WeightExplanation(
        projection.slot,
        projection.shape,
        source.parameters,
        "[E, K, N]" if source.transposed else "[E, N, K]",
        _dtype(stack(module, source.parameters[0]).dtype),
        source.bias,
    )


def _words(spec: MoESpec | SplitSpec) -> tuple[str, ...]:
    """A spec as sentences."""
    if isinstance(spec, SplitSpec):
        return (
            f"{len(spec.linears)} products of tokens with their experts' weights become mxfp4::grouped_linear each",
            "everything between and around them stays as it is",
        )
    p = spec.params
    half = "first" if p.activated_half == 0 else "second"
    gates = {
        "none": "the up-projection has no gate",
        "halves": f"gate and up are the halves of the up-projection's rows; the {half} half is activated",
        "interleaved": f"gate and up take turns in the up-projection's rows; the {half} of each two is activated",
    }
    return (
        f"{p.num_experts} experts, {spec.top_k} for each token; hidden size {p.hidden}, intermediate {p.intermediate}",
        f"activation {p.activation}",
        gates[p.gate_layout],
        f"routing weights scale the experts' {'input' if p.weight_on_input else 'output'}",
        f"products are rounded to {_dtype(p.round_dtype)}, weighted and summed in {_dtype(p.accum_dtype)}",
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _others(structure: Structure, device: torch.device) -> tuple[tuple[str, str], ...]:
    """Each backend but the chosen one, and why it is not that."""
    chosen = structure.choice.backend
    why = "comes first" if requested_backend("auto") is None else "was asked for"
    reasons = []
    for name in known_backends():
        if name != chosen:
            unmet = [str(r) for r in requirements(name, structure.request, Target.of(device)) if not r.met]
            reasons.append((name, ", ".join(unmet) or f"would do, but {chosen} {why}"))
    return tuple(reasons)


def _prep_programs(structure: Structure, module: nn.Module) -> tuple[tuple[tuple[str, str], ...], dict[str, int]]:
    """The code of each projection's prep program, and how many tensors it prepares; no weight is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    params, choice = getattr(structure.found.spec, "params", None), structure.choice
    codes, counts = [], {}
    for projection in _projections(structure):
        program = prep_program(projection, params, mx.DEFAULT_SCALE_RULE, choice.backend, choice.layout)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        whole = [stack(module, name) for name in projection.source.parameters]
        with mode:  # experts that lie apart are not stacked for this
            weights = [torch.empty(w.shape, dtype=w.dtype, device=w.parts[0].device) for w in whole]
        _, _, prepared = FakeTensorProp(program, mode).propagate_dont_convert_inputs(*weights)
        counts[projection.slot] = len(prepared)
        codes.append((projection.slot, _code(program)))
    return tuple(codes), counts


def _rewritten(structure: Structure, counts: dict[str, int]) -> str:
    choice = structure.choice
    return _code(rewrite(structure.traced, structure.found, counts, choice.backend, choice.layout))


def _code(program: fx.GraphModule) -> str:
    """A graph's Python code without blank lines, comments on origins, and the releasing of names."""
    lines = program.print_readable(print_output=False).splitlines()
    kept = [re.sub(r";  [\w =]+ = None$", "", line.rstrip()) for line in lines]
    return "\n".join(line for line in kept if line.strip() and not line.strip().startswith("#"))
