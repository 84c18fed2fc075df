"""optimize(), readable top to bottom.

Order: everything that can fail for reasons of the model (discover, trace, match, plan, the scan for
NaN and Inf, verification of every site) is finished for ALL sites before the first weight is released.
Until then a failure leaves the model untouched.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from . import mx
from .calibration.driver import Options, prepare_windows
from .calibration.model import calibrate_sites, check_model_kind, mark_of, reader_of, tell_calibration
from .circumstances import StateChange, exclusively, kept_state, others_wait, plain_modes
from .installing import build_site, compile_ahead, install_site, progress_bar, silenced_hooks, try_sites
from .lifecycle import finish, note_state
from .ops import schema as _schema  # noqa: F401  (registers torch.ops.mxfp4)
from .ops.selection import requested_backend
from .ops.target import DEFAULT_CAPTURE_SIZE, check_request
from .passes.build.module import MXFP4Experts, mxfp4_sites
from .passes.find.discover import Candidate
from .planning import OptimizeError, Site, left_alone, plan_model
from .processes import OneProcess, is_spread
from .report import Report, versions_used
from .skipping import as_patterns


def optimize(
    model: nn.Module,
    *,
    backend: str = "auto",
    activation_dtype: str = "bf16",
    max_capture_size: int = DEFAULT_CAPTURE_SIZE,
    scale_rule: str = mx.DEFAULT_SCALE_RULE,
    skip: str | Sequence[str] = (),
    strict: bool = True,
    verify: bool = True,
    example_inputs: Any = None,
    progress: bool | None = None,
    calibration: Any = None,
) -> Any:
    """Make a model's mixture-of-experts weights MXFP4, in place, and return the model.

    Every experts module (packed weights [E, N, K] or [E, K, N] in bf16, fp16 or fp32) is traced as a
    graph, matched, quantized, rewritten to one fused op (or to grouped projections around a middle no
    kernel knows), verified against the original, and replaced. ``model.mxfp4_report`` says what happened.

    backend: "auto", or a name that must then serve every site. activation_dtype: "bf16" (the model's own
    dtype), "fp8" (e4m3 for many tokens, native kernels on sm_89 and newer; the report says from how many on, and the
    error there) or "mxfp8" (backends that quantize activations only). max_capture_size: largest batch that
    ``generate`` decodes with CUDA graphs, 0 for none. scale_rule: one of mx.SCALE_RULES. skip: a module-name pattern
    (fnmatch) or several; experts that it names, or that lie below or around what it names, are left alone. strict:
    raise when nothing is found, something MoE-looking has no match, or a pattern of ``skip`` names nothing.
    verify: check each site numerically. example_inputs: dict or tuple for one forward, where token ids alone
    will not do. progress: None shows a bar on a terminal only. calibration: choose the codes by what the experts
    compute on a text, for about half of the loss: True (the model writes the text), or what ``calibrate`` takes as
    ``text``; ``calibrate`` itself, called before, has more options.

    Raises TypeError or ValueError for bad arguments, OptimizeError (with ``.report``) otherwise. The model
    is untouched then: every site is tried against its original before the first is installed. What cannot be undone,
    memory that runs out half-way, is an OptimizeError that lists which sites changed.
    """
    with exclusively(), plain_modes():
        requested = _check_arguments(model, backend, activation_dtype, max_capture_size, scale_rule)
        options = None if calibration is None or calibration is False else Options.of(calibration)
        if options is not None:
            options.check()
            check_model_kind(model)
        if mxfp4_sites(model):
            print("mxfp4_compile: this model is optimized already; nothing to do", file=sys.stderr)
            return model
        report = Report(scale_rule, activation_dtype, max_capture_size, verify, versions=versions_used())
        with others_wait(model):
            processes = _processes_of(model)
            processes.agree(
                "optimize", backend=backend, activation_dtype=activation_dtype, max_capture_size=max_capture_size,
                scale_rule=scale_rule, skip=as_patterns(skip), strict=strict, verify=verify,
                example_inputs=example_inputs,
            )  # fmt: skip
            return _optimize(model, report, requested, skip, strict, example_inputs, progress, processes, options)


def _weights_device(candidate: Candidate) -> torch.device:
    return next(candidate.weights.parameters()).device


def _processes_of(model: nn.Module) -> OneProcess:
    if not is_spread(model):
        return OneProcess()
    from .ranks.session import Ranks

    return Ranks.of(model)


def _optimize(
    model: nn.Module,
    report: Report,
    requested: str | None,
    skip: str | Sequence[str],
    strict: bool,
    example_inputs: Any,
    progress: bool | None,
    processes: OneProcess,
    options: Options | None = None,
) -> Any:
    started = time.perf_counter()
    scale_rule, verify = report.scale_rule, report.verified
    windows = None if options is None else prepare_windows(model, options)
    with ExitStack() as stack:
        parts = processes.parts(model, skip, example_inputs)
        processes.together("finding split experts", lambda: stack.enter_context(parts))
        seen: list[StateChange] = []
        with kept_state(model) as changes:
            sites = processes.together(
                "planning", lambda: plan_model(model, report, requested, skip, strict, example_inputs, seen, processes)
            )
            processes.alike("the sites of the model", sites)
            planned = [s for s in sites if s.structure is not None]
            if type(processes) is OneProcess:
                report.notes += compile_ahead(planned, lambda site: _weights_device(site.candidate))
            calibration, readers = mark_of(model, planned), dict[int, Any]()
            if options is not None:
                found = calibrate_sites(model, planned, options, scale_rule, windows, progress)
                calibration, readers = found.report, {id(s): reader_of(s, found) for s in planned}
            advance = stack.enter_context(progress_bar(planned, progress, 2 if verify else 1))
            if verify:
                processes.together(
                    "verification",
                    lambda: try_sites(planned, scale_rule, model, advance, lambda site: readers.get(id(site))),
                )
                processes.fail_alike(planned)
                _check_trials(sites, report, strict)
                processes.verify_sums(
                    planned, lambda site: build_site(site, scale_rule, lambda _: None, None, False)[0]
                )
        todo = [s for s in sites if s.structure is not None]
        note_state(model, report, list(dict.fromkeys([*seen, *changes])), todo)
        report.notes += dict.fromkeys(n for s in todo if s.structure is not None for n in s.structure.choice.notes)
        prepared: dict[tuple[int, ...], MXFP4Experts] = {}
        waiting = Counter(s.candidate.weights for s in planned)  # blocks may share one list of experts
        try:
            for site in sites:
                if site.structure is None:
                    report.sites.append(left_alone(site))
                else:
                    report.notes += silenced_hooks(site)
                    waiting[site.candidate.weights] -= 1
                    last = not waiting[site.candidate.weights]
                    done = install_site(
                        model, site, scale_rule, verify, advance, prepared, readers.get(id(site)), last=last,
                        processes=processes,
                    )  # fmt: skip
                    report.sites.append(done)
                    if done.rewritten:
                        processes.installed(site)
            processes.tell(report)
        except BaseException as error:
            # Memory that runs out half-way: what was changed so far is told and guarded.
            if report.rewritten:
                finish(model, report, started)
            if not isinstance(error, Exception):
                raise
            names = [s.name for s in todo]
            raise OptimizeError(_half_way(f"{type(error).__name__}: {error}", names, report), report) from error
    tell_calibration(model, report, calibration)
    finish(model, report, started)
    failures = [s for s in report.sites if s.outcome == "failed"]
    if failures and strict:
        words = "; ".join(f"{s.names[0]} ({s.reason})" for s in failures)
        raise OptimizeError(_half_way(words, [s.name for s in todo], report), report)
    return model


def _check_trials(sites: list[Site], report: Report, strict: bool) -> None:
    """Under ``strict``: OptimizeError for sites that failed when they were tried."""
    failed = [s for s in sites if s.outcome == "failed"]
    if not failed or not strict:
        return
    report.sites = [left_alone(s) for s in sites if s.outcome]
    told = "; ".join(f"{s.name} was matched but failed verification: {s.reason}" for s in failed[:4])
    more = f"; and {len(failed) - 4} more" if len(failed) > 4 else ""
    hint = "strict=False leaves them in their original precision; skip=[...] names them."
    raise OptimizeError(f"{told}{more}. Nothing was changed. {hint}", report)


def _half_way(reason: str, sites: list[str], report: Report) -> str:
    """The message of an error that came when sites were changed already."""
    changed = [n for s in report.rewritten for n in s.names]
    left = [n for n in sites if n not in changed]
    return (
        f"{reason}. Changed to MXFP4 before that, which cannot be undone: {', '.join(changed) or 'none'}. In their "
        f"original precision: {', '.join(left) or 'none'}. The model remains usable."
    )


def _check_arguments(
    model: Any, backend: str, activation_dtype: str, max_capture_size: int, scale_rule: str
) -> str | None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize() takes a torch.nn.Module, got {type(model).__name__}")
    mx.check_scale_rule(scale_rule)
    check_request(activation_dtype, max_capture_size)
    requested = requested_backend(backend)
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or model._compiled_call_impl is not None:
        raise OptimizeError("this model is compiled already: optimize() it first, then torch.compile it")
    if model.training:
        raise OptimizeError(
            "this model is in training mode, where experts are not traced: call model.eval() first, train() after"
        )
    return requested


__all__ = ["optimize"]
