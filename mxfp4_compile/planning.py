"""Plan a model's sites: which modules are mixtures of experts, what each of them computes, and which backend serves it.

Contract: the model is read and run, never changed; every site gets its structure, or its outcome and the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from .circumstances import StateChange, kept_state
from .ops.platforms import refusal_to_quantize
from .ops.selection import Choice, choose
from .ops.target import PLAIN, Request, Target
from .passes.alterations import parametrized
from .passes.build.rewrite import RewriteError, retained_names
from .passes.build.verify import Verification
from .passes.find.discover import Candidate, find_candidates, record_calls, traceable_experts
from .passes.find.foreign_hooks import adapter_on, offload_hook, unhooked
from .passes.match import FusedMatch, NoMatch, SplitMatch, match
from .passes.match.dense_routing import has_dense_products, variants
from .passes.match.forms import loop
from .passes.same import structure_key
from .passes.trace.collapse import collapse, routed
from .passes.trace.export import trace
from .passes.trace.failures import in_words
from .passes.trace.traced import CallPattern, Traced, TraceError, call_pattern
from .passes.trace.unroll import holds_list, unroll
from .passes.weights import members, projections_of, source_names, stack
from .processes import OneProcess, is_dtensor
from .report import Report, SiteReport
from .skipping import as_patterns, protects, unknown_patterns

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class OptimizeError(RuntimeError):
    """optimize() could not do what was asked. ``report`` says what happened to every module."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class Structure:
    """What sites of one distinct structure share: traced, matched and planned once."""

    pattern: CallPattern
    traced: Traced
    found: FusedMatch | SplitMatch
    choice: Choice
    retained: tuple[str, ...]
    request: Request = field(default_factory=Request)
    requested: str | None = None
    graphs: dict[tuple[int, ...], torch.fx.GraphModule] = field(default_factory=dict)
    spread: dict[tuple[int, ...], torch.fx.GraphModule] = field(default_factory=dict)  # with the sum over ranks
    verified: bool = False


@dataclass(frozen=True)
class Trial:
    """What building and verifying a site has shown, of which nothing else was kept.

    ``errors``: of each expert's weights, all projections one after the other; ``by_name``: their mean and maximum by
    parameter. ``sums``: of the bytes of each prepared tensor, which the same weights must give again. ``powers``: as in
    ``PreparedWeights.weight_powers``.
    """

    verification: Verification
    errors: torch.Tensor
    warnings: tuple[str, ...]
    by_name: dict[str, dict[str, float]]
    sums: tuple[int, ...]
    powers: torch.Tensor | None = None


@dataclass
class Site:
    """A candidate with its structure, or the reason why it has none.

    ``tied``: ids of its weights; sites with the same weights share their prepared ones. ``trial``: what trying it has
    shown, if it was tried.
    """

    candidate: Candidate
    structure: Structure | None = None
    tied: tuple[int, ...] = ()
    outcome: str = ""
    reason: str = ""
    trial: Trial | None = None

    @property
    def name(self) -> str:
        """The first path to the module."""
        return self.candidate.name


# what can be optimized


def check_model(model: nn.Module, candidates: list[Candidate], *, loaded: bool = True) -> None:
    """OptimizeError if the candidates' weights are such that they cannot be quantized; names the first.

    ``loaded``: False for a model on the meta device, whose checkpoint is still to be read.
    """
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if loaded and quantization is not None:
        method = getattr(quantization, "quant_method", None) or dict(quantization).get("quant_method")
        raise OptimizeError(f"this model is quantized already ({method}); optimize() takes bf16, fp16 or fp32 experts")
    paths = {module: name for name, module in model.named_modules()}
    for candidate in candidates:
        for name, parameter in candidate.weights.named_parameters():
            path = f"{paths[candidate.weights]}.{name}"
            if candidate.kind != "list":  # which lists are experts shows in their use
                check_whole(path, parameter)
            if loaded and parameter.device.type == "meta" and not offload_hook(model):
                raise OptimizeError(f"{path} is on the meta device: load the model's weights first")
            if parameter.is_floating_point() and parameter.dtype not in _WEIGHT_DTYPES:
                raise OptimizeError(
                    f"{path} is {parameter.dtype}: quantized already; optimize() takes bf16, fp16 or fp32 experts"
                )
        device = next((p.device for p in candidate.weights.parameters()), None)
        refusal = "" if device is None or not loaded else refusal_to_quantize(Target.of(device))
        if refusal:
            raise OptimizeError(refusal)
        sharding = _sharding(candidate.module)
        if sharding:
            raise OptimizeError(f"{candidate.name} {sharding}, which is not supported yet")
        if candidate.kind != "list":  # which lists are experts shows in their use
            check_wrapped(model, candidate, loaded=loaded)


def check_whole(path: str, parameter: torch.Tensor) -> None:
    """OptimizeError if a weight of experts lies on several ranks in a way that is not served."""
    if is_dtensor(parameter):
        raise OptimizeError(
            f"{path} is a DTensor: these experts are split over ranks in a way that is not supported. Packed experts "
            "(one parameter for all) are, as transformers splits them; leave others whole on each rank, and split "
            "attention only"
        )


def check_wrapped(model: nn.Module, candidate: Candidate, *, loaded: bool = True) -> None:
    """OptimizeError if accelerate keeps an experts module's weights elsewhere, or PEFT adapts one of its modules."""
    hook = (offload_hook(candidate.module) or offload_hook(model)) if loaded else None
    for name, parameter in candidate.module.named_parameters():
        if parameter.device.type == "meta" and hook:
            raise OptimizeError(
                f"{candidate.name}.{name} is on the meta device: accelerate's {hook} keeps it on the CPU or disk and "
                "loads it for each call. Offloaded experts are not supported here: "
                "mxfp4_compile.load(path, device_map=...) quantizes them while it reads them, or load the model with "
                "a device_map that keeps the experts on a device"
            )
    adapted = adapter_on(model, candidate.name)
    if adapted:
        raise OptimizeError(
            f"{adapted}: the experts under an adapter cannot be rewritten. Call merge_and_unload() on the PEFT "
            "model and optimize what it returns, or optimize first and put the adapter on it then; adapters on "
            "attention may stay"
        )


# Attributes by which experts modules say that they hold a part of the experts, or more than one copy of some.
_SHARDED = (
    ("_is_expert_parallel", "is expert-parallel"),
    ("expert_map", "maps global experts to local ones (expert parallelism)"),
    ("_expert_map", "maps global experts to local ones (expert parallelism)"),
    ("enable_eplb", "balances redundant experts (EPLB)"),
    ("num_redundant_experts", "balances redundant experts (EPLB)"),
    ("logical_to_physical_map", "balances redundant experts (EPLB)"),
)


def _sharding(module: nn.Module) -> str:
    """How a module's experts are sharded or duplicated, "" if they are not."""
    for attribute, words in _SHARDED:
        value = getattr(module, attribute, None)
        if isinstance(value, torch.Tensor) or (isinstance(value, (bool, int)) and value):
            return words
    if (getattr(module, "ep_size", None) or 1) > 1 or (getattr(module, "tp_size", None) or 1) > 1:
        return "holds a shard of its experts (ep_size or tp_size above 1)"
    return ""


def apply_skip(
    model: nn.Module, sites: list[Site], skip: str | Sequence[str], report: Report, strict: bool
) -> list[Site]:
    """Mark the sites that ``skip`` protects; a pattern that names nothing is an OptimizeError if strict, else noted."""
    patterns = as_patterns(skip)
    unknown = unknown_patterns(model, patterns)
    if unknown and strict:
        raise OptimizeError("; ".join(unknown) + ". Nothing was changed.", report)
    report.notes += unknown
    for site in sites:
        for pattern in patterns:
            if protects(pattern, site.candidate):
                site.outcome, site.reason = "skipped", f"skip={pattern!r}"
    return sites


def skip_late(sites: list[Site], skip: str | Sequence[str], report: Report) -> None:
    """As ``apply_skip``, for what only a forward showed; a pattern that names modules, but no site, is noted."""
    for pattern in as_patterns(skip):
        for site in sites:
            found = site.structure.found if site.structure is not None else None
            sources = source_names(projections_of(found.spec)) if found is not None else ()
            if site.outcome != "skipped" and protects(pattern, site.candidate, sources):
                site.structure, site.outcome, site.reason = None, "skipped", f"skip={pattern!r}"
        skipped = [s for s in sites if s.outcome == "skipped"]
        named = any(s.reason == f"skip={pattern!r}" or protects(pattern, s.candidate, ()) for s in skipped)
        if not named and not any(repr(pattern) in note for note in report.notes):
            report.notes.append(f"skip pattern {pattern!r} names no MoE-looking module")


# discover, trace, match, plan


StandIn = Callable[[nn.Module, CallPattern], nn.Module]


def _one_in_the_other(a: nn.Module, b: nn.Module) -> bool:
    return any(a is part for part in b.modules()) or any(b is part for part in a.modules())


def match_all(
    model: nn.Module,
    sites: list[Site],
    example_inputs: Any,
    requested: str | None,
    request: Request = PLAIN,
    *,
    record: Callable[[nn.Module, list[Candidate], Any], None] = record_calls,
    stand_in: StandIn = lambda module, pattern: module,
) -> None:
    """Give each site its structure, or its outcome and the reason; drops lists that turn out to be no experts.

    ``request``: what every site asks of its backend besides what the site itself says. ``record`` and ``stand_in``
    are how a model without weights is run and traced.
    """
    waiting = [s for s in sites if not s.outcome]
    waiting_candidates = [s.candidate for s in waiting]
    candidates = list(waiting_candidates)
    record(model, candidates, example_inputs)
    kept = {id(c) for c in candidates}
    sites[:] = [s for s in sites if s.outcome or id(s.candidate) in kept]
    old = {id(c) for c in waiting_candidates}
    left = [s.candidate.module for s in sites if s.outcome == "skipped"]
    for candidate in candidates:
        if id(candidate) not in old and not any(_one_in_the_other(candidate.module, m) for m in left):
            # the forwards showed it
            sites.append(Site(candidate, outcome="unmatched" if candidate.refusal else "", reason=candidate.refusal))
    for site in sites:
        if not site.outcome and site.candidate.kind == "list" and site.candidate.calls:
            check_wrapped(model, site.candidate)
            for name, parameter in site.candidate.weights.named_parameters():
                check_whole(f"{site.name}.{name}", parameter)
    for site in sites:
        if not site.outcome:
            refuse_parametrized(model, site)
    Planner(requested, request, stand_in).match(sites)


def refuse_parametrized(model: nn.Module, site: Site) -> None:
    """A site whose weights are computed anew at each use has no match."""
    reason = parametrized(model, site.candidate.name)
    if reason:
        site.outcome, site.reason = "unmatched", reason


@dataclass
class Planner:
    """Gives sites their structures; equal modules that are called alike are traced and matched once.

    ``requested``, ``request``, ``stand_in``: as for ``match_all``. ``known``: what became of each structure;
    ``patterns``: how a module of a shape is called.
    """

    requested: str | None
    request: Request
    stand_in: StandIn
    known: dict[Any, Structure | NoMatch] = field(default_factory=dict)
    patterns: dict[Any, CallPattern] = field(default_factory=dict)

    def match(self, sites: list[Site]) -> None:
        """Give each site without an outcome its structure, or an outcome and the reason."""
        for site in sites:
            if not site.outcome:
                self._match_one(site, sites)
        # Modules that no forward reached are matched by the calls of an equal module, if there is one.
        for site in sites:
            if site.outcome == "unreached":
                pattern = self.patterns.get(_shape_key(site.candidate.module))
                if pattern is not None:
                    self._match_called(site, pattern)
                else:
                    site.outcome = "unmatched"
                    site.reason = "no forward with these inputs reached it (pass example_inputs)"

    def _match_one(self, site: Site, sites: list[Site]) -> None:
        if site.candidate.kind == "list" and not site.candidate.calls:
            site.outcome = "unmatched"
            site.reason = "a list of experts that the model itself calls; only modules within a model are replaced"
            return
        pattern = self._match_by_calls(site)
        if pattern is not None:
            self.patterns.setdefault(_shape_key(site.candidate.module), pattern)
        owner = site.candidate.owner
        if owner is not None and (site.outcome in ("unmatched", "dense") or _is_split_loop(site)):
            inside = f"{owner.name}."
            if not any(s is not site and s.name.startswith(inside) for s in sites):
                self._match_owner(site, owner)

    def _match_by_calls(self, site: Site) -> CallPattern | None:
        """Match a site by the calls that the forwards made; how it is called, if that is one pattern."""
        calls = site.candidate.calls
        if not calls:
            site.outcome = "unreached"
            return None
        try:
            pattern = call_pattern(calls[0], calls[-1])
        except TraceError as error:
            site.outcome, site.reason = "unmatched", str(error)
            return None
        self._match_called(site, pattern)
        return pattern

    def _match_owner(self, site: Site, owner: Candidate) -> None:
        """Match the module around a site that has no match by itself: what its experts lack, the router may show."""
        if not owner.calls:
            return
        block = Site(owner)
        self._match_by_calls(block)
        if site.structure is not None:
            if block.structure is not None and isinstance(block.structure.found, FusedMatch):
                site.candidate, site.structure = owner, block.structure
        elif block.structure is not None:
            site.candidate, site.structure, site.outcome, site.reason = owner, block.structure, "", ""
        elif block.reason != site.reason:
            site.reason += f"; together with what calls it ({owner.name}): {block.reason}"

    def _match_called(self, site: Site, pattern: CallPattern) -> None:
        module = site.candidate.module
        with unhooked(module):
            key = (structure_key(module), pattern)
            if key not in self.known:
                module = self.stand_in(module, pattern)
                self.known[key] = match_structure(module, pattern, self.requested, self.request)
        result = self.known[key]
        if isinstance(result, NoMatch):
            site.outcome = "dense" if result.dense or site.candidate.unrouted else "unmatched"
            site.reason = result.reason
            if site.candidate.unrouted and not result.dense:
                site.reason = "dense: no values chose which rows meet which part of its weights"
        else:
            site.structure, site.outcome, site.reason = result, "", ""


def _is_split_loop(site: Site) -> bool:
    """Whether a site's loop over experts can only be split: with the router in view it may be one op."""
    found = None if site.structure is None else site.structure.found
    return isinstance(found, SplitMatch) and all(g.form == loop.NAME for g in found.gemms)


def _match_of(module: nn.Module, pattern: CallPattern) -> tuple[Traced, FusedMatch | SplitMatch | NoMatch]:
    """Match the module as it traces or, where its experts are called in a loop, as its loop does."""
    origin, traced, found = _traced_match(module, pattern)
    return replace(traced, sides=origin.sides, branches=origin.branches), found


def _traced_match(module: nn.Module, pattern: CallPattern) -> tuple[Traced, Traced, FusedMatch | SplitMatch | NoMatch]:
    """The trace, what became of it, and the match."""
    reason = ""
    if not holds_list(module):
        try:
            with kept_state(module):  # no traced value stays in an attribute
                traced = trace(module, pattern)
            found = match(traced)
            if not isinstance(found, NoMatch) or found.dense:
                return traced, traced, found
            reason = found.reason
        except TraceError as error:
            reason = str(error)
    before = f"{reason}; as a loop over experts: " if reason else ""
    try:
        with kept_state(module):  # no traced value stays in an attribute
            origin = traced = unroll(module, pattern)
    except TraceError as error:
        raise TraceError(f"{before}{error}") from error
    dense = has_dense_products(traced)
    split: SplitMatch | None = None
    try:
        traced = collapse(module, traced)
        found = match(traced)
        if isinstance(found, FusedMatch):
            return origin, traced, found
        if isinstance(found, SplitMatch):
            split = found
        else:
            reason = f"{before}{found.reason}"
    except TraceError as error:
        if not dense:
            raise TraceError(f"{before}{error}") from error
    refusals = []
    for variant in islice(variants(traced), _MAX_VARIANTS):
        found = match(variant)
        if isinstance(found, FusedMatch):
            return origin, variant, found
        refusals.append(found.reason if isinstance(found, NoMatch) else found.spec.reason)
    if split is not None:
        return origin, traced, split
    if not dense:
        return origin, traced, NoMatch(reason)
    lacks = "no routing matrix with zeros for the experts that a token is not routed to was found"
    every = "every expert is multiplied with every token"
    why = (refusals or [lacks])[0]
    every = why if why.startswith(every) else f"{every}; {why}"
    chosen = routed(traced.graph)
    return origin, traced, NoMatch(every if chosen else f"dense: {every}", not chosen)


# A block has a routing matrix or two (a mask and the weights).
_MAX_VARIANTS = 4


def match_structure(
    module: nn.Module, pattern: CallPattern, requested: str | None, request: Request = PLAIN
) -> Structure | NoMatch:
    """Capture, match and plan one module; NoMatch with the reason, or BackendUnavailable for ``requested``."""
    try:
        traced, found = _match_of(module, pattern)
        if isinstance(found, NoMatch):
            return found
        retained = retained_names(traced, found)
    except (TraceError, RewriteError) as error:
        return NoMatch(str(error))
    except Exception as error:  # nothing that one module brings about may end the rest
        return NoMatch(f"its trace or match failed: {in_words(error)}")
    params = found.spec.params if isinstance(found, FusedMatch) else None
    device = next(module.parameters()).device
    projections = projections_of(found.spec)
    shapes, biases = tuple(p.shape for p in projections), any(p.source.bias for p in projections)
    request = replace(request, params=params, shapes=shapes, biases=biases)
    choice = choose(params, device, requested, request)
    return Structure(pattern, traced, found, choice, retained, request, requested)


def _shape_key(module: nn.Module) -> Any:
    return type(module), tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters())


def plan_model(
    model: nn.Module,
    report: Report,
    requested: str | None,
    skip: str | Sequence[str],
    strict: bool,
    example_inputs: Any,
    changes: list[StateChange],
    processes: OneProcess | None = None,
) -> list[Site]:
    """Every MoE-looking module with its structure, or the reason why it has none; the weights are finite.

    ``changes``: gets what the forwards set, which is put back before anything is traced.
    """

    processes = processes or OneProcess()

    def record(model: nn.Module, candidates: list[Candidate], inputs: Any) -> None:
        with kept_state(model) as seen, processes.forwards():
            record_calls(model, candidates, inputs)
        changes.extend(seen)

    sites = apply_skip(model, [Site(c) for c in find_candidates(model)], skip, report, strict)
    check_model(model, [s.candidate for s in sites if not s.outcome])
    activations: Any = report.activation_dtype
    request = Request(activation_dtype=activations, max_capture_size=report.max_capture_size)
    with traceable_experts(model):
        match_all(model, sites, example_inputs, requested, request, record=record)
    skip_late(sites, skip, report)
    check_model(model, [s.candidate for s in sites if s.candidate.kind == "block" and not s.outcome])
    gc.collect()  # exported programs are cyclic garbage that keeps the traced modules' weights alive
    check_matches(sites, report, strict)
    processes.planned(sites)
    todo = [s for s in sites if s.structure is not None]
    for site in todo:
        site.tied = weight_ids(site)
    scan_finite(todo)
    return sites


def check_matches(sites: list[Site], report: Report, strict: bool) -> None:
    """Under ``strict``: OptimizeError for MoE-looking modules without a match, and for a model without any."""
    unmatched = [s for s in sites if s.outcome == "unmatched"]
    matched = [s for s in sites if s.structure is not None]
    if not strict:
        return
    if unmatched:
        report.sites = [left_alone(s) for s in sites if s.structure is None]
        raise OptimizeError(
            f"{len(unmatched)} modules look like mixtures of experts but have no match: "
            + "; ".join(f"{s.name} [{type(s.candidate.module).__name__}]: {s.reason}" for s in unmatched[:8])
            + ". Nothing was changed. strict=False leaves them in their original precision; skip=[...] names them.",
            report,
        )
    if not matched and not any(s.outcome == "skipped" for s in sites):
        report.sites = [left_alone(s) for s in sites]
        found = "; ".join(f"{s.name}: {s.reason}" for s in sites)
        raise OptimizeError(
            "no mixture of experts was found. Looked for: modules with two or more floating 3-D parameters of equal "
            "first dimension, and lists of two or more equal children with two or more matrices each of which a "
            "forward uses a part" + (f". Found only: {found}" if found else "") + ". Nothing was changed.",
            report,
        )


def scan_finite(sites: list[Site]) -> None:
    seen: set[tuple[int, ...]] = set()
    for site in sites:
        assert site.structure is not None
        names = source_names(projections_of(site.structure.found.spec))
        for name in names:
            parameter = stack(site.candidate.module, name)
            key = tuple(id(site.candidate.module.get_parameter(n)) for n in members(site.candidate.module, name))
            if key in seen:
                continue
            seen.add(key)
            # One expert at a time, one synchronization a parameter; aminmax makes no copy and hands NaN on.
            extremes = [torch.stack(torch.aminmax(expert)) for expert in parameter]
            finite = torch.stack(extremes).isfinite().all(1)
            if not bool(finite.all()):
                expert = int((~finite).nonzero()[0])
                raise OptimizeError(f"{site.name}.{name} holds NaN or Inf in expert {expert}. Nothing was changed.")


def weight_ids(site: Site) -> tuple[int, ...]:
    """Identities of a site's weights: sites with equal ones share them."""
    assert site.structure is not None
    names = source_names(projections_of(site.structure.found.spec))
    return tuple(
        id(site.candidate.module.get_parameter(n)) for name in names for n in members(site.candidate.module, name)
    )


def left_alone(site: Site) -> SiteReport:
    """The report of a site that stays as it was."""
    return SiteReport(
        names=site.candidate.names,
        module_class=type(site.candidate.module).__name__,
        outcome=site.outcome,  # type: ignore[arg-type]
        reason=site.reason,
    )
