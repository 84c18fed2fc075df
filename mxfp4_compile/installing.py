"""Make a planned site's module: prepare its weights, verify it against the module it replaces, put it in its place.

Contract: nothing is released before ``install_site``, which does it site by site. Where the weights are in memory,
``try_sites`` has built and verified every site by then and dropped it again; the same weights are prepared anew, which
must give the same bytes. (All sites' prepared weights beside the originals would be a quarter more memory.)
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from .ops.arguments import MoETypes
from .ops.backend import BackendError
from .ops.registry import get_backend
from .ops.selection import BackendUnavailable, choose
from .passes.alterations import copy_hooks, hooks_of, own_forwards, without_hooks
from .passes.build.module import MXFP4Experts
from .passes.build.prep import ExpertReader, codes_program, prep_program, prepare_bias, run_prep
from .passes.build.rewrite import RewriteError, rewrite
from .passes.build.state import SitePlan, release
from .passes.build.verify import Verification, VerificationError, check_weights, reported, verify
from .passes.build.verify_block import is_loop, routes_itself, verify_loop
from .passes.find.discover import experts_implementation
from .passes.find.foreign_hooks import carry_hooks, unhooked
from .passes.match import FusedMatch
from .passes.observe import observe
from .passes.trace.program import quietly
from .passes.weights import Projection, Stack, projections_of, source_names, stack
from .planning import OptimizeError, Site, Structure, Trial
from .processes import OneProcess
from .progress import advancing
from .report import SiteReport
from .spec import SHARD


def compile_ahead(sites: Iterable[Site], device_of: Callable[[Site], torch.device]) -> list[str]:
    """Have backends begin to compile what planned sites will launch; what to say of it."""
    layers: dict[tuple[str, torch.device], dict[MoETypes, None]] = {}
    for site in sites:
        structure = site.structure
        if structure is None or not isinstance(structure.found, FusedMatch):
            continue
        found, choice = structure.found, structure.choice
        x, ids, weights = (node.meta["val"] for node in (found.x, found.topk_ids, found.topk_weights))

        def bias(projection: Projection, module: nn.Module = site.candidate.module) -> torch.dtype | None:
            return stack(module, projection.source.bias[0]).dtype if projection.source.bias else None

        up, down = (bias(projection) for projection in projections_of(found.spec))
        types = MoETypes(found.spec.params, ids.shape[1], x.dtype, ids.dtype, weights.dtype, up, down, choice.layout)
        layers.setdefault((choice.backend, device_of(site)), {})[types] = None
    said = (get_backend(name).compile_ahead(of, device) for (name, device), of in layers.items())
    return list(dict.fromkeys(filter(None, said)))


def build_site(
    site: Site,
    scale_rule: str,
    advance: Callable[[int], None],
    reader: ExpertReader | None = None,
    measure: bool = True,
) -> tuple[MXFP4Experts, torch.Tensor, list[str]]:
    """Quantize and prepare a site's weights; the module that would take its place, errors, warnings.

    ``measure``: compute the errors; there are none and no warnings otherwise.
    """
    structure = site.structure
    assert structure is not None
    module, choice, spec = site.candidate.module, structure.choice, structure.found.spec
    params = structure.found.spec.params if isinstance(structure.found, FusedMatch) else None
    dtype = stack(module, projections_of(spec)[0].source.parameters[0]).dtype
    plan = SitePlan(
        spec, choice.backend, choice.layout, scale_rule, dtype, structure.pattern, structure.retained,
        structure.request, structure.traced.out_spec, getattr(module, SHARD, None),
    )  # fmt: skip
    weights, biases, errors, powers, warnings = {}, {}, [], [], []
    by_name: dict[str, dict[str, float]] = {}
    for projection in projections_of(spec):
        if reader is not None and reader.quantized(projection.source.parameters[0]):
            program = codes_program(projection, params, choice.backend, choice.layout)
        else:
            program = prep_program(projection, params, scale_rule, choice.backend, choice.layout)
        prepared = run_prep(program, projection, module, advance, reader, measure)
        weights[projection.slot] = prepared.tensors
        bias = prepare_bias(projection, module, params, choice.backend, choice.layout, reader)
        if bias is not None:
            biases[projection.slot] = bias
        errors.append(prepared.errors)
        powers += [] if prepared.powers is None else [prepared.powers]
        if prepared.errors.numel():
            both = {"mean": float(prepared.errors.mean()), "max": float(prepared.errors.max())}
            by_name.update(dict.fromkeys(projection.source.parameters, both))
        warnings += check_weights(prepared.errors, scale_rule, projection.source.parameters)
    counts = {slot: len(tensors) for slot, tensors in weights.items()}
    key = tuple(counts.values())
    if key not in structure.graphs:
        structure.graphs[key] = rewrite(structure.traced, structure.found, counts, choice.backend, choice.layout)
        observe("site_traced", structure.traced.graph)
        observe("site_rewritten", structure.graphs[key].graph)
    built = MXFP4Experts(plan, structure.graphs[key], module, weights, biases)
    built.weight_errors = by_name
    if plan.shard is not None and powers:
        built.weight_powers = torch.cat(powers)
    return built, torch.cat(errors), warnings


def verify_structures(
    sites: list[Site],
    scale_rule: str,
    model: nn.Module,
    reader_of: Callable[[Site], ExpertReader | None] = lambda _: None,
) -> None:
    """Build and verify one site of each structure, and drop it again: nothing is released yet.

    For weights that are still in files: the others are verified when they are read.
    """
    for site in sites:
        structure = site.structure
        assert structure is not None
        if structure.verified:
            continue
        try:
            _try_site(site, scale_rule, model, lambda _: None, reader_of(site))
        except (VerificationError, RewriteError) as error:
            raise OptimizeError(
                f"{site.name} was matched but failed verification: {error}. Nothing was changed."
            ) from error


def try_sites(
    sites: list[Site],
    scale_rule: str,
    model: nn.Module,
    advance: Callable[[int], None],
    reader_of: Callable[[Site], ExpertReader | None] = lambda _: None,
) -> None:
    """Build and verify every site and drop it again: each gets its ``trial``, or the outcome "failed" and the reason.

    ``reader_of``: where a site's weights are, if not in the module.
    OptimizeError where the backend that was asked for by name fails, or the last one.
    """
    of_structure: dict[int, list[Site]] = {}
    for site in sites:
        of_structure.setdefault(id(site.structure), []).append(site)
    for own in of_structure.values():
        structure, waiting, done = own[0].structure, deque(own), list[Site]()
        assert structure is not None
        while waiting:
            site, choice = waiting.popleft(), structure.choice
            try:
                site.trial = _try_site(site, scale_rule, model, advance, reader_of(site))
            except OptimizeError:
                raise
            except Exception as error:
                own_words = isinstance(error, (VerificationError, RewriteError))
                site.reason = str(error) if own_words else f"{type(error).__name__}: {error}"
                site.reason = _altered(site, scale_rule, model, reader_of(site)) or site.reason
                site.outcome = "failed"
            if structure.choice is not choice:
                waiting.extendleft(reversed(done))  # another backend serves them now
                done.clear()
            done.append(site)
    for site in sites:
        if site.outcome == "failed":
            site.structure = None


def _altered(site: Site, scale_rule: str, model: nn.Module, reader: ExpertReader | None) -> str:
    """What changes the values of a site that failed from outside its class, "" if nothing is known to."""
    module = site.candidate.module
    hooks, own = hooks_of(module), own_forwards(module)
    if hooks:
        try:
            with without_hooks(module):
                _trial(site, scale_rule, model, lambda _: None, reader)
        except Exception:  # the hooks are not, or not alone, what it failed for
            pass
        else:
            return f"hooks change its values, and would be lost: {', '.join(hooks[:4])}; remove them first"
    if own:
        return (
            f"its forward is not its class's, and its MXFP4 form does not give the same: {', '.join(own[:4])}; "
            "a forward that was bound to the module before it was set on it keeps to the original weights"
        )
    return ""


def _try_site(
    site: Site, scale_rule: str, model: nn.Module, advance: Callable[[int], None], reader: ExpertReader | None
) -> Trial:
    """Try one site; the first of its structure decides how finely the stages round."""
    structure = site.structure
    assert structure is not None
    trial = _try_backends(site, scale_rule, model, advance, reader)
    if not structure.verified and trial.verification.error > _FINER_ABOVE * trial.verification.original_error:
        if _can_round_finer(structure):
            trial = _try_finer(site, scale_rule, model, trial, reader)
    structure.verified = True
    return trial


def trial_of_backends(site: Site, scale_rule: str, model: nn.Module, reader: ExpertReader | None) -> Verification:
    """Try the chosen backend; under "auto" one whose kernels fail gives way to the next.

    OptimizeError, naming the site, where the one asked for fails, or the last.
    """
    return _try_backends(site, scale_rule, model, lambda _: None, reader).verification


def _try_backends(
    site: Site, scale_rule: str, model: nn.Module, advance: Callable[[int], None], reader: ExpertReader | None
) -> Trial:
    structure = site.structure
    assert structure is not None
    failed: dict[str, str] = {}
    while True:
        try:
            return _trial(site, scale_rule, model, advance, reader)
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
# original works in fp32 inside (openai_privacy_filter's default implementation does) though its traced
# form does not.
_FINER_ABOVE = 1.25


def _trial(
    site: Site, scale_rule: str, model: nn.Module, advance: Callable[[int], None], reader: ExpertReader | None
) -> Trial:
    built, errors, warnings = build_site(site, scale_rule, advance, reader)
    with experts_implementation(model, "eager"):
        verification = verify_site(built, site)
    return Trial(verification, errors, tuple(warnings), built.weight_errors, _sums(built), built.weight_powers)


def _sums(built: MXFP4Experts) -> tuple[int, ...]:
    """The sum of the bytes of each prepared tensor, eight at a time."""
    sums = []
    for name in built._tensor_names:
        flat = getattr(built, name).contiguous().view(-1).view(torch.uint8)
        whole = flat.numel() // 8 * 8
        sums.append(int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum()))
    return tuple(sums)


def _can_round_finer(structure: Structure) -> bool:
    return isinstance(structure.found, FusedMatch) and structure.found.spec.params.round_dtype.itemsize < 4


def _try_finer(site: Site, scale_rule: str, model: nn.Module, before: Trial, reader: ExpertReader | None) -> Trial:
    """Keep the stages in fp32 for sites whose original does, if that brings the site closer to it."""
    structure = site.structure
    assert structure is not None and isinstance(structure.found, FusedMatch)
    coarse, spec = structure.found, structure.found.spec
    params = replace(spec.params, round_dtype=torch.float32, accum_dtype=torch.float32)
    structure.found = replace(coarse, spec=replace(spec, params=params))
    structure.graphs.clear()
    trial = _trial(site, scale_rule, model, lambda _: None, reader)
    if trial.verification.error < before.verification.error:
        return trial
    structure.found = coarse
    structure.graphs.clear()
    return before


def verify_site(built: MXFP4Experts, site: Site) -> Verification:
    """Verify one built site against the module it would replace."""
    assert site.structure is not None
    traced = site.structure.traced
    try:
        with unhooked(site.candidate.module), quietly():
            if is_loop(built) or routes_itself(built):
                return verify_loop(built, site.candidate.module, sides=traced.sides)
            return verify(built, site.candidate.module, site.structure.found, sides=traced.sides)
    except VerificationError as error:
        if not traced.branches:
            raise
        raise VerificationError(f"{error}. The module branches on {traced.branches}") from error


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
    processes: OneProcess | None = None,
) -> SiteReport:
    """Put the rewritten module in a site's place; ``reader``: where its weights are, if not in the module.

    ``check``: verify it before, if it was not tried. ``last``: no other site is still to be made from the same weights,
    which are released then. ``processes``: those that hold the model; on all of them it is put there, or on none.
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
    trial = site.trial

    def make() -> tuple[MXFP4Experts, torch.Tensor, list[str], Verification | None]:
        built, errors, warnings = build_site(site, scale_rule, advance, reader, trial is None)
        verification = None if trial is None else trial.verification
        if trial is not None:
            if _sums(built) != trial.sums:
                raise VerificationError("its weights, prepared once more, came out other than those that were verified")
            errors, warnings, built.weight_errors = trial.errors, list(trial.warnings), trial.by_name
            built.weight_powers = trial.powers
        _share_tensors(built, prepared.setdefault(site.tied, built))
        if check and trial is None:
            with experts_implementation(model, "eager"):
                verification = verify_site(built, site)
        if built.plan.shard is not None:
            from .ranks.distribute import distribute

            key = tuple(built._counts.values())
            if key not in structure.spread:
                structure.spread[key] = distribute(built.rewritten, built.plan.shard)
                observe("site_spread", structure.spread[key].graph)
            built.rewritten = structure.spread[key]
        return built, errors, warnings, verification

    processes = OneProcess() if processes is None else processes
    made, reason = processes.attempt(site.name, make, (VerificationError, BackendError))
    if made is None:
        return replace(base, outcome="failed", reason=reason)
    built, errors, warnings, verification = made
    if built.plan.shard is not None:
        errors, verification = processes.whole_errors(site.name, built, errors, verification)
        built.weight_powers = None
    built.__dict__["site_name"] = site.name
    copy_hooks(module, built)
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
        warnings=tuple(warnings),
        **reported(verification),
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


# progress


def progress_bar(
    sites: list[Site], wanted: bool | None, times: int = 1
) -> AbstractContextManager[Callable[[int], None]]:
    """A bar over the bytes of the sites' weights, read so many times; None: on a terminal, for long work."""
    total = times * sum(p.numel() * p.element_size() for s in sites for p in _weights_of(s))
    if wanted is None:
        # Short work needs no bar: a gigabyte takes seconds.
        wanted = sys.stderr.isatty() and total > 1 << 28
    return advancing(wanted, total=total, unit="B", unit_scale=True, desc="MXFP4")


def _weights_of(site: Site) -> list[Stack]:
    if site.structure is None:
        return []
    projections = projections_of(site.structure.found.spec)
    return [stack(site.candidate.module, n) for p in projections for n in p.source.parameters]
