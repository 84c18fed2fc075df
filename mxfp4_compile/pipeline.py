"""optimize() and restore(), readable top to bottom.

Order: everything that can fail for reasons of the model (discover, capture, match, plan, the scan for
NaN and Inf, verification of each distinct structure) is finished for ALL sites before the first weight
is released. Until then a failure leaves the model untouched.
"""

from __future__ import annotations

import copy
import fnmatch
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from . import mx
from .ops import schema as _schema  # noqa: F401  (registers torch.ops.mxfp4)
from .ops.backend import BackendError
from .ops.selection import BackendUnavailable, Choice, choose, requested_backend
from .ops.target import ACTIVATION_DTYPES, PLAIN, Request
from .passes.capture import CallPattern, Captured, CaptureError, call_pattern, capture
from .passes.collapse import collapse
from .passes.discover import (
    Candidate,
    experts_implementation,
    find_candidates,
    record_calls,
)
from .passes.experts import (
    MXFP4Experts,
    SitePlan,
    dtype_message,
    mxfp4_sites,
    projections_of,
    release,
    source_names,
)
from .passes.forms import loop
from .passes.loops import holds_list, trace
from .passes.match import FusedMatch, NoMatch, SplitMatch, match
from .passes.observe import observe
from .passes.prep import ExpertReader, codes_program, prep_program, prepare_bias, run_prep
from .passes.rewrite import RewriteError, retained_names, rewrite
from .passes.routing import has_dense_products, variants
from .passes.sources import Stack, members, stack
from .passes.verify import Verification, VerificationError, check_weights, verify
from .passes.verify_loop import is_loop, routes_itself, verify_loop
from .passes.wrapped import adapter_on, carry_hooks, offload_hook, unhooked
from .report import Report, SiteReport
from .runtime import attach, detach

GUARD = "mxfp4_guard"
REPORT = "mxfp4_report"
DEFAULT_CAPTURE_SIZE = 512
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class OptimizeError(RuntimeError):
    """optimize() could not do what was asked. ``report`` says what happened to every module."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class Structure:
    """What sites of one distinct structure share: captured, matched and planned once."""

    pattern: CallPattern
    captured: Captured
    found: FusedMatch | SplitMatch
    choice: Choice
    retained: tuple[str, ...]
    request: Request = field(default_factory=Request)
    requested: str | None = None
    graphs: dict[tuple[int, ...], torch.fx.GraphModule] = field(default_factory=dict)
    verified: bool = False


@dataclass
class Site:
    """A candidate with its structure, or the reason why it has none.

    ``tied``: ids of its weights; sites with the same weights share their prepared ones.
    """

    candidate: Candidate
    structure: Structure | None = None
    tied: tuple[int, ...] = ()
    outcome: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """The first path to the module."""
        return self.candidate.name


def optimize(
    model: nn.Module,
    *,
    backend: str = "auto",
    activation_dtype: str = "bf16",
    max_capture_size: int = DEFAULT_CAPTURE_SIZE,
    scale_rule: str = mx.DEFAULT_SCALE_RULE,
    skip: Sequence[str] = (),
    strict: bool = True,
    verify: bool = True,
    example_inputs: Any = None,
    progress: bool | None = None,
) -> Any:
    """Make a model's mixture-of-experts weights MXFP4, in place, and return the model.

    Every experts module (packed weights [E, N, K] or [E, K, N] in bf16, fp16 or fp32) is captured as a
    graph, matched, quantized, rewritten to one fused op (or to grouped projections around a middle no
    kernel knows), verified against the original, and replaced. ``model.mxfp4_report`` says what happened.

    backend: "auto", or a name that must then serve every site. activation_dtype: "bf16" (the model's own
    dtype) or "mxfp8" (backends that quantize activations only). max_capture_size: largest batch that ``generate``
    decodes with CUDA graphs, 0 for none. scale_rule: one of mx.SCALE_RULES. skip: module-name patterns
    (fnmatch) to leave alone. strict: raise when nothing is found or something MoE-looking has no match.
    verify: check each site numerically. example_inputs: dict or tuple for one forward, where token ids alone
    will not do. progress: None shows a bar on a terminal only.

    Raises TypeError or ValueError for bad arguments, OptimizeError (with ``.report``) otherwise. The model
    is untouched if it raises before the first site is installed; a site that fails verification later
    stays as it was, and the error lists which sites changed.
    """
    started = time.perf_counter()
    requested = _check_arguments(model, backend, activation_dtype, max_capture_size, scale_rule)
    if mxfp4_sites(model):
        print("mxfp4_compile: this model is optimized already; nothing to do", file=sys.stderr)
        return model
    report = Report(scale_rule, activation_dtype, max_capture_size, verify, versions=versions_used())

    candidates = find_candidates(model)
    sites = apply_skip([Site(c) for c in candidates], skip, report)
    check_model(model, [s.candidate for s in sites if not s.outcome])
    terms = Request(activation_dtype=activation_dtype, max_capture_size=max_capture_size)  # type: ignore[arg-type]
    with experts_implementation(model, "grouped_mm"):
        match_all(model, sites, example_inputs, requested, terms)
    skip_late(sites, skip, report)
    check_model(model, [s.candidate for s in sites if s.candidate.kind == "block" and not s.outcome])
    gc.collect()  # exported programs are cyclic garbage that keeps the captured modules' weights alive
    check_matches(sites, report, strict)
    todo = [s for s in sites if s.structure is not None]
    for site in todo:
        site.tied = weight_ids(site)
    _scan_finite(todo)

    with progress_bar(todo, progress) as advance:
        if verify:
            verify_structures(todo, scale_rule, model)
        report.notes += dict.fromkeys(n for s in todo if s.structure is not None for n in s.structure.choice.notes)
        prepared: dict[tuple[int, ...], MXFP4Experts] = {}
        waiting = Counter(s.candidate.weights for s in todo)  # blocks may share one list of experts
        try:
            for site in sites:
                if site.structure is None:
                    report.sites.append(left_alone(site))
                else:
                    report.notes += silenced_hooks(site)
                    waiting[site.candidate.weights] -= 1
                    last = not waiting[site.candidate.weights]
                    report.sites.append(install_site(model, site, scale_rule, verify, advance, prepared, last=last))
        finally:
            # Also where memory runs out half-way: what was changed so far is told and guarded.
            report.seconds = time.perf_counter() - started
            if report.rewritten:
                put_guard(model)
                attach(model, max_capture_size, report)
                model.mxfp4_report = report  # type: ignore[assignment]
    model.mxfp4_report = report  # type: ignore[assignment]
    if report.rewritten:
        from .passes import lower  # imports Inductor, which takes seconds: not before it is needed

        lower.install(model)
    failures = [s for s in report.sites if s.outcome == "failed"]
    if failures and strict:
        changed = [n for s in report.rewritten for n in s.names]
        raise OptimizeError(
            "these sites failed verification and stay in their original precision: "
            + "; ".join(f"{s.names[0]} ({s.reason})" for s in failures)
            + f". Changed to MXFP4: {', '.join(changed) or 'none'}. The model remains usable.",
            report,
        )
    return model


# 1. arguments and model


def _check_arguments(
    model: Any, backend: str, activation_dtype: str, max_capture_size: int, scale_rule: str
) -> str | None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize() takes a torch.nn.Module, got {type(model).__name__}")
    mx.check_scale_rule(scale_rule)
    if activation_dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"activation_dtype {activation_dtype!r} is not known; known: {', '.join(ACTIVATION_DTYPES)}")
    if not isinstance(max_capture_size, int) or max_capture_size < 0:
        raise ValueError(f"max_capture_size must be an int >= 0, got {max_capture_size!r}")
    requested = requested_backend(backend)
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or model._compiled_call_impl is not None:
        raise OptimizeError("this model is compiled already: optimize() it first, then torch.compile it")
    if model.training:
        raise OptimizeError("this model is in training mode; MXFP4 is for inference: call model.eval() first")
    return requested


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
            if _is_dtensor(parameter):
                raise OptimizeError(f"{path} is a DTensor: tensor- or expert-parallel experts are not supported yet")
            if loaded and parameter.device.type == "meta" and not offload_hook(model):
                raise OptimizeError(f"{path} is on the meta device: load the model's weights first")
            if parameter.is_floating_point() and parameter.dtype not in _WEIGHT_DTYPES:
                raise OptimizeError(
                    f"{path} is {parameter.dtype}: quantized already; optimize() takes bf16, fp16 or fp32 experts"
                )
        sharding = _sharding(candidate.module)
        if sharding:
            raise OptimizeError(f"{candidate.name} {sharding}, which is not supported yet")
        if candidate.kind != "list":  # which lists are experts shows in their use
            check_wrapped(model, candidate, loaded=loaded)
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise OptimizeError("this model is tensor-parallel (tp_plan), which is not supported yet")


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
            f"{adapted}: adapters on experts are not supported. Call merge_and_unload() on the PEFT model and optimize "
            "what it returns; adapters on attention may stay"
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


def _is_dtensor(parameter: torch.Tensor) -> bool:
    return type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor"


def apply_skip(sites: list[Site], skip: Sequence[str], report: Report) -> list[Site]:
    """Mark the sites that ``skip`` names; a pattern that names none is noted."""
    for pattern in skip:
        hit = [s for s in sites if any(fnmatch.fnmatch(n, pattern) for n in s.candidate.names)]
        if not hit:
            report.notes.append(_names_none(pattern))
        for site in hit:
            site.outcome, site.reason = "skipped", f"skip={pattern!r}"
    return sites


def skip_late(sites: list[Site], skip: Sequence[str], report: Report) -> None:
    """As ``apply_skip``, for the sites that only a forward showed."""
    for pattern in skip:
        for site in sites:
            if site.candidate.kind == "block" and any(fnmatch.fnmatch(n, pattern) for n in site.candidate.names):
                site.structure, site.outcome, site.reason = None, "skipped", f"skip={pattern!r}"
                report.notes[:] = [n for n in report.notes if n != _names_none(pattern)]


def _names_none(pattern: str) -> str:
    return f"skip pattern {pattern!r} names no MoE-looking module"


# 2. discover, capture, match, plan


StandIn = Callable[[nn.Module, CallPattern], nn.Module]


def match_all(
    model: nn.Module,
    sites: list[Site],
    example_inputs: Any,
    requested: str | None,
    terms: Request = PLAIN,
    *,
    record: Callable[[nn.Module, list[Candidate], Any], None] = record_calls,
    stand_in: StandIn = lambda module, pattern: module,
) -> None:
    """Give each site its structure, or its outcome and the reason; drops lists that turn out to be no experts.

    ``terms``: what every site asks of its backend besides what the site itself says. ``record`` and ``stand_in``
    are how a model without weights is run and captured.
    """
    waiting = [s for s in sites if not s.outcome]
    waiting_candidates = [s.candidate for s in waiting]
    candidates = list(waiting_candidates)
    record(model, candidates, example_inputs)
    kept = {id(c) for c in candidates}
    sites[:] = [s for s in sites if s.outcome or id(s.candidate) in kept]
    old = {id(c) for c in waiting_candidates}
    for candidate in candidates:
        if id(candidate) not in old:  # the forwards showed it
            sites.append(Site(candidate, outcome="unmatched" if candidate.refusal else "", reason=candidate.refusal))
    for site in sites:
        if not site.outcome and site.candidate.kind == "list" and site.candidate.calls:
            check_wrapped(model, site.candidate)
    known: dict[Any, Structure | NoMatch] = {}
    patterns: dict[Any, CallPattern] = {}
    for site in sites:
        if site.outcome:
            continue
        if site.candidate.kind == "list" and not site.candidate.calls:
            site.outcome = "unmatched"
            site.reason = "a list of experts that the model itself calls; only modules within a model are replaced"
            continue
        _match_site(site, known, patterns, requested, terms, stand_in)
        if (site.outcome in ("unmatched", "dense") or _is_split_loop(site)) and site.candidate.owner is not None:
            inside = f"{site.candidate.owner.name}."
            if not any(s is not site and s.name.startswith(inside) for s in sites):
                _match_owner(site, site.candidate.owner, known, requested, terms, stand_in)
    # Modules that no forward reached are matched by the calls of an equal module, if there is one.
    for site in sites:
        if site.outcome == "unreached":
            shape = _shape_key(site.candidate.module)
            if shape in patterns:
                _match_pattern(site, patterns[shape], known, requested, terms, stand_in)
            else:
                site.outcome, site.reason = "unmatched", "no forward with these inputs reached it (pass example_inputs)"


def _match_site(
    site: Site,
    known: dict[Any, Structure | NoMatch],
    patterns: dict[Any, CallPattern],
    requested: str | None,
    terms: Request,
    stand_in: StandIn,
) -> None:
    calls = site.candidate.calls
    if not calls:
        site.outcome = "unreached"
        return
    try:
        pattern = call_pattern(calls[0], calls[-1])
    except CaptureError as error:
        site.outcome, site.reason = "unmatched", str(error)
        return
    patterns.setdefault(_shape_key(site.candidate.module), pattern)
    _match_pattern(site, pattern, known, requested, terms, stand_in)


def _is_split_loop(site: Site) -> bool:
    """Whether a site's loop over experts can only be split: with the router in view it may be one op."""
    found = None if site.structure is None else site.structure.found
    return isinstance(found, SplitMatch) and all(g.form == loop.NAME for g in found.gemms)


def _match_owner(
    site: Site,
    owner: Candidate,
    known: dict[Any, Structure | NoMatch],
    requested: str | None,
    terms: Request,
    stand_in: StandIn,
) -> None:
    """Match the module around a site that has no match by itself: what its experts lack, the router may show."""
    if not owner.calls:
        return
    block = Site(owner)
    _match_site(block, known, {}, requested, terms, stand_in)
    if site.structure is not None:
        if block.structure is not None and isinstance(block.structure.found, FusedMatch):
            site.candidate, site.structure = owner, block.structure
    elif block.structure is not None:
        site.candidate, site.structure, site.outcome, site.reason = owner, block.structure, "", ""
    elif block.reason != site.reason:
        site.reason += f"; together with what calls it ({owner.name}): {block.reason}"


def _match_pattern(
    site: Site,
    pattern: CallPattern,
    known: dict[Any, Structure | NoMatch],
    requested: str | None,
    terms: Request,
    stand_in: StandIn,
) -> None:
    module = site.candidate.module
    key = (structure_key(module), pattern)
    if key not in known:
        with unhooked(module):
            known[key] = match_structure(stand_in(module, pattern), pattern, requested, terms)
    result = known[key]
    if isinstance(result, NoMatch):
        site.outcome = "dense" if result.dense else "unmatched"
        site.reason = result.reason
    else:
        site.structure, site.outcome, site.reason = result, "", ""


def _captured_match(module: nn.Module, pattern: CallPattern) -> tuple[Captured, FusedMatch | SplitMatch | NoMatch]:
    """Match the module as it traces or, where its experts are called in a loop, as its loop does."""
    reason = ""
    if not holds_list(module):
        try:
            captured = capture(module, pattern)
            found = match(captured)
            if not isinstance(found, NoMatch) or found.dense:
                return captured, found
            reason = found.reason
        except CaptureError as error:
            reason = str(error)
    before = f"{reason}; as a loop over experts: " if reason else ""
    try:
        captured = trace(module, pattern)
    except CaptureError as error:
        raise CaptureError(f"{before}{error}") from error
    dense = has_dense_products(captured)
    split: SplitMatch | None = None
    try:
        captured = collapse(module, captured)
        found = match(captured)
        if isinstance(found, FusedMatch):
            return captured, found
        if isinstance(found, SplitMatch):
            split = found
        else:
            reason = f"{before}{found.reason}"
    except CaptureError as error:
        if not dense:
            raise CaptureError(f"{before}{error}") from error
    refusals = []
    for variant in islice(variants(captured), _MAX_VARIANTS):
        found = match(variant)
        if isinstance(found, FusedMatch):
            return variant, found
        refusals += [found.reason] if isinstance(found, NoMatch) else []
    if split is not None:
        return captured, split
    if not dense:
        return captured, NoMatch(reason)
    lacks = "no routing matrix with zeros for the experts that a token is not routed to was found"
    return captured, NoMatch(f"dense: every expert is multiplied with every token; {(refusals or [lacks])[0]}", True)


# A block has a routing matrix or two (a mask and the weights).
_MAX_VARIANTS = 4


def match_structure(
    module: nn.Module, pattern: CallPattern, requested: str | None, terms: Request = PLAIN
) -> Structure | NoMatch:
    """Capture, match and plan one module; NoMatch with the reason, or BackendUnavailable for ``requested``."""
    try:
        captured, found = _captured_match(module, pattern)
        if isinstance(found, NoMatch):
            return found
        retained = retained_names(captured, found)
    except (CaptureError, RewriteError) as error:
        return NoMatch(str(error))
    params = found.spec.params if isinstance(found, FusedMatch) else None
    device = next(module.parameters()).device
    projections = projections_of(found.spec)
    shapes, biases = tuple(p.shape for p in projections), any(p.source.bias for p in projections)
    request = replace(terms, params=params, shapes=shapes, biases=biases)
    choice = choose(params, device, requested, request)
    return Structure(pattern, captured, found, choice, retained, request, requested)


def structure_key(module: nn.Module) -> Any:
    """Two modules with equal keys trace to the same graph: class, code, parameters, plain attributes."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        plain: list[tuple[str, Any]] = []
        for attribute, value in sorted(vars(child).items()):
            if isinstance(value, (bool, int, float, str, type(None), torch.dtype, tuple)):
                plain.append((attribute, repr(value)))
            elif attribute not in _OWN_STATE:
                plain.append((attribute, id(value) if attribute == "config" else repr(type(value))))
        tensors = [
            (n, tuple(t.shape), t.dtype, t.device, t.stride())
            for n, t in (*child._parameters.items(), *child._buffers.items())
            if t is not None
        ]
        parts.append((name, type(child), tuple(plain), tuple(tensors)))
    return tuple(parts)


_OWN_STATE = frozenset(vars(nn.Module()))


def _shape_key(module: nn.Module) -> Any:
    return type(module), tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters())


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


def _scan_finite(sites: list[Site]) -> None:
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


# 3. prepare, verify, install


def build_site(
    site: Site, scale_rule: str, advance: Callable[[int], None], reader: ExpertReader | None = None
) -> tuple[MXFP4Experts, torch.Tensor, list[str]]:
    """Quantize and prepare a site's weights; the module that would take its place, errors, warnings."""
    structure = site.structure
    assert structure is not None
    module, choice, spec = site.candidate.module, structure.choice, structure.found.spec
    params = structure.found.spec.params if isinstance(structure.found, FusedMatch) else None
    dtype = stack(module, projections_of(spec)[0].source.parameters[0]).dtype
    plan = SitePlan(
        spec, choice.backend, choice.layout, scale_rule, dtype, structure.pattern, structure.retained,
        structure.request, structure.captured.out_spec,
    )  # fmt: skip
    weights, biases, errors, warnings = {}, {}, [], []
    by_name: dict[str, dict[str, float]] = {}
    for projection in projections_of(spec):
        if reader is not None and reader.quantized(projection.source.parameters[0]):
            program = codes_program(projection, params, choice.backend, choice.layout)
        else:
            program = prep_program(projection, params, scale_rule, choice.backend, choice.layout)
        prepared = run_prep(program, projection, module, advance, reader)
        weights[projection.slot] = prepared.tensors
        bias = prepare_bias(projection, module, params, choice.backend, choice.layout, reader)
        if bias is not None:
            biases[projection.slot] = bias
        errors.append(prepared.errors)
        if prepared.errors.numel():
            both = {"mean": float(prepared.errors.mean()), "max": float(prepared.errors.max())}
            by_name.update(dict.fromkeys(projection.source.parameters, both))
        warnings += check_weights(prepared.errors, scale_rule, projection.source.parameters)
    counts = {slot: len(tensors) for slot, tensors in weights.items()}
    key = tuple(counts.values())
    if key not in structure.graphs:
        structure.graphs[key] = rewrite(structure.captured, structure.found, counts, choice.backend, choice.layout)
        observe("site_captured", structure.captured.graph)
        observe("site_rewritten", structure.graphs[key].graph)
    built = MXFP4Experts(plan, structure.graphs[key], module, weights, biases)
    built.weight_errors = by_name
    return built, torch.cat(errors), warnings


def verify_structures(
    sites: list[Site],
    scale_rule: str,
    model: nn.Module,
    reader_of: Callable[[Site], ExpertReader | None] = lambda _: None,
) -> None:
    """Build and verify one site of each structure, and drop it again: nothing is released yet."""
    for site in sites:
        structure = site.structure
        assert structure is not None
        if structure.verified:
            continue
        try:
            result = trial_of_backends(site, scale_rule, model, reader_of(site))
            if result.error > _FINER_ABOVE * result.original_error and _can_round_finer(structure):
                _try_finer(site, scale_rule, model, result, reader_of(site))
        except (VerificationError, RewriteError) as error:
            raise OptimizeError(
                f"{site.name} was matched but failed verification: {error}. Nothing was changed."
            ) from error
        structure.verified = True


def trial_of_backends(site: Site, scale_rule: str, model: nn.Module, reader: ExpertReader | None) -> Verification:
    """Try the chosen backend; under "auto" one whose kernels fail gives way to the next.

    OptimizeError, naming the site, where the one asked for fails, or the last.
    """
    structure = site.structure
    assert structure is not None
    failed: dict[str, str] = {}
    while True:
        try:
            return _trial(site, scale_rule, model, reader)
        except BackendError as error:
            message = f"{site.name}: {error}. Nothing was changed."
            if structure.requested is not None:
                raise OptimizeError(message) from error
            failed[structure.choice.backend] = str(error)
            device = next(site.candidate.module.parameters()).device
            try:
                structure.choice = choose(structure.request.params, device, None, structure.request, failed)
            except BackendUnavailable as unavailable:
                raise OptimizeError(f"{message} {unavailable}") from error
            structure.graphs.clear()


# Kernels that round where the original does come out at 0.95 to 1.05 times its error. Well above that, the
# original works in fp32 inside (openai_privacy_filter's default implementation does) though its captured
# form does not.
_FINER_ABOVE = 1.25


def _trial(site: Site, scale_rule: str, model: nn.Module, reader: ExpertReader | None) -> Verification:
    built, _, _ = build_site(site, scale_rule, lambda _: None, reader)
    with experts_implementation(model, "eager"):
        return verify_site(built, site)


def _can_round_finer(structure: Structure) -> bool:
    return isinstance(structure.found, FusedMatch) and structure.found.spec.params.round_dtype.itemsize < 4


def _try_finer(
    site: Site, scale_rule: str, model: nn.Module, before: Verification, reader: ExpertReader | None
) -> None:
    """Keep the stages in fp32 for sites whose original does, if that brings the site closer to it."""
    structure = site.structure
    assert structure is not None and isinstance(structure.found, FusedMatch)
    coarse, spec = structure.found, structure.found.spec
    params = replace(spec.params, round_dtype=torch.float32, accum_dtype=torch.float32)
    structure.found = replace(coarse, spec=replace(spec, params=params))
    structure.graphs.clear()
    if _trial(site, scale_rule, model, reader).error >= before.error:
        structure.found = coarse
        structure.graphs.clear()


def verify_site(built: MXFP4Experts, site: Site) -> Verification:
    """Verify one built site against the module it would replace."""
    assert site.structure is not None
    with unhooked(site.candidate.module):
        if is_loop(built) or routes_itself(built):
            return verify_loop(built, site.candidate.module)
        return verify(built, site.candidate.module, site.structure.found)


def install_site(
    model: nn.Module,
    site: Site,
    scale_rule: str,
    check: bool,
    advance: Callable[[int], None],
    prepared: dict[tuple[int, ...], MXFP4Experts],
    reader: ExpertReader | None = None,
    *,
    last: bool = True,
) -> SiteReport:
    """Put the rewritten module in a site's place; ``reader``: where its weights are, if not in the module.

    ``last``: no other site is still to be made from the same weights, which are released then.
    """
    structure = site.structure
    assert structure is not None
    module, spec = site.candidate.module, structure.found.spec
    projections = projections_of(spec)
    before = sum(
        p.numel() * p.element_size()
        for projection in projections
        for p in (stack(module, n) for n in projection.source.parameters)
    )
    base = SiteReport(
        names=site.candidate.names,
        module_class=type(module).__name__,
        outcome="fused" if isinstance(structure.found, FusedMatch) else "split",
        form=str(spec),
        backend=structure.choice.backend,
        layout=structure.choice.layout,
        rejected=tuple(
            f"{name}: " + ", ".join(f"{r.name} ({r.reason})" for r in unmet)
            for name, unmet in structure.choice.rejected
        ),
        bytes_before=before,
    )
    verification = None
    try:
        built, errors, warnings = build_site(site, scale_rule, advance, reader)
        _share_tensors(built, prepared.setdefault(site.tied, built))
        if check:
            with experts_implementation(model, "eager"):
                verification = verify_site(built, site)
    except (VerificationError, BackendError) as error:
        return replace(base, outcome="failed", reason=str(error))
    built.__dict__["site_name"] = site.name
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    ):
        setattr(built, hooks, copy.copy(getattr(module, hooks)))
    carry_hooks(module, built)
    for name in site.candidate.names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, built)
    if last:
        release(module, source_names(projections))
    return replace(
        base,
        bytes_after=built.expert_bytes(),
        weight_error_mean=float(errors.mean()) if errors.numel() else None,
        weight_error_max=float(errors.max()) if errors.numel() else None,
        error=None if verification is None else verification.error,
        original_error=None if verification is None else verification.original_error,
        warnings=tuple(warnings),
    )


def silenced_hooks(site: Site) -> list[str]:
    """A note where modules inside a site have hooks: the rewritten graph does not call them."""
    hooked = [
        name
        for name, module in site.candidate.module.named_modules()
        if name and (module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))
    ]
    if not hooked:
        return []
    shown = ", ".join(f"{site.name}.{name}" for name in hooked[:4])
    more = f" and {len(hooked) - 4} more" if len(hooked) > 4 else ""
    return [f"hooks of modules inside a rewritten block no longer run: {shown}{more}"]


def _share_tensors(built: MXFP4Experts, first: MXFP4Experts) -> None:
    """Weights tied between two modules stay tied."""
    if built is not first and built.layout == first.layout:
        for name in built._tensor_names:
            built._buffers[name] = first._buffers[name]


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


# 4. life afterwards


class DtypeGuard(nn.Module):
    """First child of a rewritten model: refuses a change of dtype before any other module was cast.

    ``trainable``: names of the parameters that optimize() froze.
    """

    def __init__(self, dtype: torch.dtype, trainable: tuple[str, ...]) -> None:
        super().__init__()
        self.dtype = dtype
        self.trainable = trainable

    def _apply(self, fn: Any, recurse: bool = True) -> DtypeGuard:
        moved = fn(torch.zeros(1, dtype=self.dtype))
        if moved.dtype != self.dtype:
            raise TypeError(dtype_message(self.dtype, moved.dtype))
        return self

    def forward(self) -> None:
        raise RuntimeError("the guard is never called")


def put_guard(model: nn.Module) -> None:
    """Freeze a rewritten model and have it refuse a change of dtype."""
    dtype = next(iter(mxfp4_sites(model).values())).plan.weight_dtype
    trainable = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    model.requires_grad_(False)
    children = dict(model._modules)
    model._modules.clear()
    model._modules[GUARD] = DtypeGuard(dtype, trainable)
    model._modules.update(children)


def restore(model: nn.Module) -> Any:
    """Undo optimize(), in place: ordinary experts with dequantized weights, every hook undone; returns the model.

    Weights keep the values MXFP4 gave them (the original ones are gone). Raises OptimizeError if the model
    is not optimized.
    """
    if not mxfp4_sites(model):
        raise OptimizeError("this model is not optimized: there is nothing to restore")
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, MXFP4Experts):
                module._modules[name] = _restored(child)
    guard = model._modules.pop(GUARD, None)
    parameters = dict(model.named_parameters())
    for name in guard.trainable if isinstance(guard, DtypeGuard) else ():
        if name in parameters:
            parameters[name].requires_grad_(True)
    model.__dict__.pop(REPORT, None)
    quantizer = model.__dict__.get("hf_quantizer")
    if quantizer is not None:  # the model was loaded with ours
        quantizer.remove_quantization_config(model)
    detach(model)
    from .passes import lower

    lower.uninstall(model)
    return model


def _restored(site: MXFP4Experts) -> nn.Module:
    original = site.original
    if not any(p.device.type == "meta" for p in original.parameters()):
        return original  # a shared module, restored under its first name
    values = dict(site.dequantized_biases())
    for projection in site.projections:
        values.update(site.dequantized(projection))
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(value.clone(), requires_grad=False)
        original.get_submodule(owner)._parameters[leaf] = parameter
    return original


@contextmanager
def progress_bar(sites: list[Site], wanted: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of the sites' weights, with the time left; None: on a terminal, for long work."""
    total = sum(p.numel() * p.element_size() for s in sites for p in _weights_of(s))
    if wanted is None:
        # Short work needs no bar: a gigabyte takes seconds.
        wanted = sys.stderr.isatty() and total > 1 << 28
    if not wanted:
        yield lambda count: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, desc="MXFP4") as bar:
        yield lambda count: bar.update(count)


def _weights_of(site: Site) -> list[Stack]:
    if site.structure is None:
        return []
    projections = projections_of(site.structure.found.spec)
    return [stack(site.candidate.module, n) for p in projections for n in p.source.parameters]


def versions_used() -> dict[str, str]:
    """Versions of what a result depends on."""
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        versions["transformers"] = transformers.__version__
    return versions


__all__ = ["OptimizeError", "optimize", "restore"]
