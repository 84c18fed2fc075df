"""``torch.compile(model, backend="mxfp4_compile")``: MXFP4 experts in a model that was not optimized.

The graph that Dynamo hands over is searched for mixtures of experts in bf16, fp16 or fp32. Each is cut out as a
module (``dynamo.regions``) and goes through what ``optimize`` does: match, prep, rewrite, verify. The graph then
calls ``mxfp4::moe`` on prepared weights, and Inductor (or ``options={"inner": "eager"}``) compiles it.

::

    Dynamo's graph -> cut regions -> match, prepare, verify -> splice -> Inductor + router pass -> compiled code
                      (regions.py)   (as optimize does)        prepared weights are its last inputs (weight_store.py)

Contract: the graph that Dynamo handed over is copied, not changed, and what is not proven keeps its precision.

The model is not changed, so its own weights STAY ALIVE beside the prepared ones: this path makes a model faster,
never smaller; ``optimize`` does both. Prepared weights are made once per weight and outlive recompilations.
They are made again, into the same memory, when a weight was changed in place (its version counter moved, as by
``load_state_dict``) or replaced. Writes through ``.data`` do not move the counter and are not seen.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import mx
from ..circumstances import exclusively, plain_modes
from ..installing import build_site, trial_of_backends
from ..ops.backend import BackendError
from ..ops.selection import BackendUnavailable, requested_backend
from ..passes.build.rewrite import RewriteError, rewrite
from ..passes.build.verify import Verification, VerificationError, reported
from ..passes.find.discover import Candidate
from ..passes.match import FusedMatch, NoMatch
from ..passes.observe import observe
from ..passes.weights import projections_of, source_names
from ..planning import OptimizeError, Site, match_structure
from ..report import Report, SiteReport
from .regions import Region, RegionError, cuts, find_sites, source_path, splice
from .weight_store import Recipe, store

NAME = "mxfp4_compile"
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STAY = (
    "the original weights stay alive beside the MXFP4 ones on this path; mxfp4_compile.optimize(model) releases them"
)


@dataclass(frozen=True)
class CompileOptions:
    """``torch.compile``'s options for this backend; everything else in them goes to Inductor.

    inner: the backend that compiles the rewritten graph. scale_rule, backend and verify: as for ``optimize``.
    """

    inner: str = "inductor"
    scale_rule: str = mx.DEFAULT_SCALE_RULE
    backend: str = "auto"
    verify: bool = True


_reports: list[Report] = []
_told = False


def compile_reports() -> tuple[Report, ...]:
    """One report for each graph that ``backend="mxfp4_compile"`` was handed in this process, oldest first."""
    return tuple(_reports)


# structures: matched and verified once, whatever the layer and however often it is recompiled


@dataclass(frozen=True)
class _Proven:
    recipe: Recipe
    graph: fx.GraphModule
    constants: tuple[Tensor, ...]
    verification: Verification | None
    weight_errors: tuple[float, float]


_structures: dict[Any, _Proven | str] = {}


def _prove(region: Region, options: CompileOptions, requested: str | None) -> _Proven | str:
    """Match, prepare, rewrite and verify one region; the reason if it does not hold."""
    # Tracing must not see the compilation that is under way.
    with exclusively(), torch._guards.tracing(None), plain_modes(), torch.no_grad():
        try:
            structure = match_structure(region.module, region.pattern, requested)
            if isinstance(structure, NoMatch):
                return structure.reason
            site = Site(Candidate(("region",), region.module, "packed"), structure)
            # First, since under "auto" a backend whose kernels fail gives way to the next.
            verification = trial_of_backends(site, options.scale_rule, region.module, None) if options.verify else None
            built, errors, _ = build_site(site, options.scale_rule, lambda _: None)
        except (RewriteError, VerificationError, BackendError, BackendUnavailable, OptimizeError) as error:
            return str(error)
        finally:
            gc.collect()  # exported programs are cyclic garbage that keeps the weights alive
    found, choice = structure.found, structure.choice
    counts = {p.slot: len(built.weights(p.slot)) for p in projections_of(found.spec)}
    graph = rewrite(structure.traced, found, counts, choice.backend, choice.layout)
    constants = tuple(graph.get_buffer(str(n.target)) for n in graph.graph.nodes if n.op == "get_attr")
    names = source_names(projections_of(found.spec))
    recipe = Recipe((region.key, options), structure, names, options.scale_rule)
    return _Proven(recipe, graph, constants, verification, (float(errors.mean()), float(errors.max())))


# the backend


def _options(given: dict[str, Any] | None) -> tuple[CompileOptions, dict[str, Any]]:
    rest = dict(given or {})
    own = {name: rest.pop(name) for name in CompileOptions.__dataclass_fields__ if name in rest}
    options = CompileOptions(**own)
    mx.check_scale_rule(options.scale_rule)
    if rest and options.inner != "inductor":
        raise ValueError(
            f"unknown options {sorted(rest)} for backend {NAME!r}; known: "
            f"{', '.join(CompileOptions.__dataclass_fields__)} (and Inductor's with inner='inductor')"
        )
    return options, rest


def _parameters(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """Placeholder -> the model's own tensor, for parameters and buffers."""
    found: dict[fx.Node, Tensor] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        real = value
        if isinstance(value, torch._subclasses.FakeTensor):
            argument = node.meta.get("grapharg")
            try:
                real = argument.example if argument is not None else None
            except (AssertionError, AttributeError):
                real = None
        static = getattr(real, "_dynamo_static_input_type", None) is not None or isinstance(real, nn.Parameter)
        if isinstance(real, Tensor) and static and not isinstance(real, torch._subclasses.FakeTensor):
            found[node] = real
    return found


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own with the same parameters and everything Dynamo tells of it."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    new = fx.GraphModule(gm, graph, class_name="Rewritten")
    for name, value in vars(gm).items():
        new.__dict__.setdefault(name, value)
    new.meta = dict(gm.meta)
    for old, node in copies.items():
        if hasattr(old, "_dynamo_source"):
            node._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    return new


class _Compiled:
    """The compiled graph with prepared weights supplied as its last inputs at each call."""

    def __init__(
        self, inner: Callable[..., Any], sites: list[tuple[Recipe, tuple[int, ...]]], constants: Sequence[Tensor]
    ) -> None:
        self.inner, self.sites, self.constants = inner, sites, list(constants)

    def __call__(self, *args: Any) -> Any:
        extra: list[Tensor] = []
        for recipe, positions in self.sites:
            extra += store.get(recipe, [args[i] for i in positions])
        return self.inner(*args, *extra, *self.constants)


def mxfp4_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The Dynamo backend: rewrite every proven mixture of experts in ``gm``, compile the rest as it is.

    Sites that do not match, or fail verification, keep their precision; ``compile_reports()`` says why.
    """
    started = time.perf_counter()
    observe("traced", gm.graph)
    chosen, rest = _options(options)
    requested = requested_backend(chosen.backend)
    report = Report(chosen.scale_rule, "bf16", 0, chosen.verify, versions={"torch": torch.__version__})
    _reports.append(report)
    gm = _copy(gm)  # Dynamo reads the placeholders of its own graph again
    parameters = _parameters(gm, example_inputs)
    proven: list[tuple[Region, _Proven]] = []
    for site in find_sites(gm.graph, parameters):
        path = source_path(site[0].weight).rpartition(".")[0]
        outcome: _Proven | str | None = _refusal(site, parameters)
        if outcome is None:
            try:
                region, outcome = _first_fused(cuts(gm.graph, site, parameters), chosen, requested)
            except RegionError as error:
                outcome = str(error)
        if not isinstance(outcome, _Proven):
            report.sites.append(SiteReport((path,), "region", "unmatched", reason=str(outcome)))
        else:
            proven.append((region, outcome))
            report.sites.append(_describe(path, region, outcome))
    if not report.sites:
        report.notes.append("no product of rows with packed experts in this graph")
    if proven:
        report.notes.append(_STAY)
    inner_inputs, sites, constants = _splice_all(gm, list(example_inputs), proven)
    if proven:
        observe("rewritten", gm.graph)
    report.seconds = time.perf_counter() - started
    _tell(report)
    inner = _compile_inner(gm, inner_inputs, chosen.inner, mode, rest)
    return _Compiled(inner, sites, constants) if proven else inner


def _first_fused(
    regions: Iterable[Region], chosen: CompileOptions, requested: str | None
) -> tuple[Region, _Proven | str]:
    """The first of a site's regions that is fused, else the first that is proven, else the first with its reason."""
    best: tuple[Region, _Proven | str] | None = None
    for region in regions:
        key = (region.key, chosen)
        if key not in _structures:
            _structures[key] = _prove(region, chosen, requested)
        outcome = _structures[key]
        if isinstance(outcome, _Proven) and isinstance(outcome.recipe.structure.found, FusedMatch):
            return region, outcome
        if best is None or (isinstance(best[1], str) and isinstance(outcome, _Proven)):
            best = region, outcome
    assert best is not None  # ``cuts`` raises where there is none
    return best


def _refusal(site: Sequence[Any], parameters: dict[fx.Node, Tensor]) -> str | None:
    tensors = [parameters[a.weight] for a in site]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return (
            "compiled with gradients enabled: this backend is for inference, call the model under torch.no_grad(), or "
            "optimize() it to train around frozen experts"
        )
    for t in tensors:
        if t.dtype not in _WEIGHT_DTYPES:
            return f"its weights are {t.dtype}"
        if t.is_inference():
            return "its weights are inference tensors, whose changes cannot be seen: create the model outside of it"
        if type(t.data).__name__ == "DTensor" or t.device.type == "meta":
            return "its weights are distributed or on the meta device"
        if not bool(torch.stack(torch.aminmax(t.detach())).isfinite().all()):
            return "its weights hold NaN or Inf"
    return None


def _describe(path: str, region: Region, proven: _Proven) -> SiteReport:
    structure = proven.recipe.structure
    weights = [
        region.module.get_parameter(n) for p in projections_of(structure.found.spec) for n in p.source.parameters
    ]
    after = sum(w.numel() // 2 + w.numel() // mx.BLOCK for w in weights)
    return SiteReport(
        names=(path,),
        module_class="region",
        outcome="fused" if isinstance(structure.found, FusedMatch) else "split",
        form=str(structure.found.spec),
        backend=structure.choice.backend,
        layout=structure.choice.layout,
        rejected=tuple(f"{n}: " + ", ".join(f"{r.name} ({r.reason})" for r in u) for n, u in structure.choice.rejected),
        bytes_before=sum(w.numel() * w.element_size() for w in weights),
        bytes_after=after,
        weight_error_mean=proven.weight_errors[0],
        weight_error_max=proven.weight_errors[1],
        **reported(proven.verification),
    )


def _splice_all(
    gm: fx.GraphModule, inputs: list[Any], proven: list[tuple[Region, _Proven]]
) -> tuple[list[Any], list[tuple[Recipe, tuple[int, ...]]], list[Tensor]]:
    if not proven:
        return inputs, [], []
    graph = gm.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    position = {node: i for i, node in enumerate(placeholders)}
    fake_mode = torch._guards.detect_fake_mode(inputs)
    last, number = placeholders[-1], 0

    def add(tensor: Tensor) -> fx.Node:
        nonlocal last, number
        with graph.inserting_after(last):
            last = graph.placeholder(f"mxfp4_prepared_{number}")
        number += 1
        # Not from user code, and at the same address in every call.
        last._dynamo_source = None  # type: ignore[attr-defined]
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        value = tensor if fake_mode is None else fake_mode.from_tensor(tensor, static_shapes=True)
        last.meta["example_value"] = value
        inputs.append(value)
        return last

    sites, constants, later = [], [], []
    for region, p in proven:
        sources = [region.sources[name] for name in p.recipe.names]
        real = [region.module.get_parameter(name) for name in p.recipe.names]
        sites.append((p.recipe, tuple(position[n] for n in sources)))
        later.append((region, p, [add(t) for t in store.get(p.recipe, real)]))
    for region, p, extra in later:
        own = [add(t) for t in p.constants]
        constants += list(p.constants)
        splice(region, p.graph, [*extra, *own], p.recipe.structure.retained)
    graph.lint()
    gm.recompile()
    return inputs, sites, constants


def _tell(report: Report) -> None:
    """Once per process that the weights stay, and each time that something was left alone."""
    global _told
    left = [s for s in report.sites if not s.rewritten]
    if left:
        warnings.warn(
            f"mxfp4_compile: {len(left)} of {len(report.sites)} mixtures of experts in this graph keep their "
            f"precision; first: {left[0].names[0]}: {left[0].reason} (mxfp4_compile.compile_reports() has all)",
            stacklevel=2,
        )
    if report.rewritten and not _told:
        _told = True
        warnings.warn(f"mxfp4_compile: {_STAY}", stacklevel=2)


def _compile_inner(
    gm: fx.GraphModule, inputs: list[Any], inner: str, mode: str | None, rest: dict[str, Any]
) -> Callable[..., Any]:
    if inner == "inductor":
        import torch._inductor.config as inductor_config
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        from .router_pass import HOOK, with_lowering

        lowered = {HOOK: with_lowering(rest.get(HOOK, getattr(inductor_config, HOOK)))}
        patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **rest, **lowered}
        compiled: Any = compile_fx(gm, inputs, config_patches=patches)
        return compiled  # type: ignore[no-any-return]
    if inner == NAME:
        raise ValueError(f"{NAME!r} cannot be its own inner backend")
    if mode and mode != "default":
        warnings.warn(f"mxfp4_compile: mode={mode!r} has no effect with inner={inner!r}", stacklevel=2)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(inner)(gm, inputs)


__all__ = ["CompileOptions", "compile_reports", "mxfp4_backend"]
