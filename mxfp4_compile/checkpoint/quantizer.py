"""Load with transformers: quantize (or take MXFP4 as it is) while the checkpoint is read.

transformers builds the model on the meta device and loads everything but the experts, as always. The experts
are planned before (``meta_planning.py``) and read afterwards, a few at a time, straight into the prepared layout on the
device where they run; the bf16 model never exists.

1. ``_process_model_before_weight_loading``: plan; take the expert parameters out of the skeleton, so that
   transformers neither reads nor initializes them;
2. transformers loads the rest and places it (``device_map``, offloading);
3. ``_process_model_after_weight_loading``: put the empty parameters back, verify one site of each structure on
   its real weights, then prepare and install site by site.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import mx
from ..calibration.driver import Options
from ..calibration.report import SavedCalibration
from ..circumstances import StateChange, exclusive, kept_state
from ..installing import compile_ahead, install_site, progress_bar, verify_structures
from ..lifecycle import finish, note_state
from ..ops.selection import requested_backend
from ..ops.target import DEFAULT_CAPTURE_SIZE, Request, check_request
from ..passes.build.module import MXFP4Experts
from ..passes.build.prep import ExpertReader
from ..passes.calls import TensorInfo
from ..passes.find.discover import traceable_experts
from ..passes.match import NoMatch
from ..passes.same import structure_key
from ..passes.weights import projections_of, source_names
from ..planning import OptimizeError, Site, Structure, left_alone, match_structure
from ..processes import OneProcess
from ..report import Report, versions_used
from ..skipping import as_patterns
from .calibrating import calibrate_loaded
from .claims import check_parameters
from .files import CheckpointError, Weights
from .forms import OWN, Form, declared_form, own_config
from .meta_planning import ExpertParameter, expert_parameters, plan_sites, planned, planning_modes, stand_in
from .names import Names
from .note import facts_of, note_of
from .offloading import offload, offloaded, take_offloaded
from .reader import CheckpointReader
from .requirements import require_transformers_5

_PLACEHOLDER = "mxfp4_bytes"

PROCESSES: ContextVar[OneProcess] = ContextVar("processes", default=OneProcess())  # noqa: B039 (it has no state)
"""The processes that ``load`` loads a model in."""


class _Method(str, Enum):
    """transformers asks the name of a quantization method for its ``value``."""

    OWN = OWN


@register_quantization_config(OWN)
class Mxfp4CompileConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How ``from_pretrained`` makes a model's experts MXFP4: the arguments of ``optimize`` that apply while loading.

    backend, scale_rule, skip, strict, verify, activation_dtype, max_capture_size, example_inputs, progress: as for
    ``optimize``. calibration: as for ``optimize``; statistics are then those of the model rounded to nearest.
    ``checkpoint`` is what a saved checkpoint says about itself. Raises ValueError for values that
    ``optimize`` refuses.
    """

    def __init__(
        self,
        backend: str = "auto",
        scale_rule: str = mx.DEFAULT_SCALE_RULE,
        skip: str | Sequence[str] = (),
        strict: bool = True,
        verify: bool = True,
        activation_dtype: str = "bf16",
        max_capture_size: int = DEFAULT_CAPTURE_SIZE,
        example_inputs: Any = None,
        progress: bool | None = None,
        calibration: Any = None,
        source: Mapping[str, Any] | None = None,
        **checkpoint: Any,
    ) -> None:
        mx.check_scale_rule(scale_rule)
        requested_backend(backend)
        check_request(activation_dtype, max_capture_size)
        self.activation_dtype = activation_dtype
        self.max_capture_size = max_capture_size
        self.quant_method = _Method.OWN
        self.backend = backend
        self.scale_rule = scale_rule
        self.skip = list(as_patterns(skip))
        self.strict = strict
        self.verify = verify
        self.example_inputs = example_inputs
        self.progress = progress
        # In a checkpoint's own note the word is what it says of how it was calibrated.
        self.calibrated = SavedCalibration.of(calibration)
        self.calibration: Options | None = None
        if self.calibrated is None and calibration is not None and calibration is not False:
            self.calibration = Options.of(calibration)
            self.calibration.check()
        self.source = source
        self.met = False  # whether a model was made that it is for
        self.checkpoint = {k: v for k, v in checkpoint.items() if k != "quant_method"}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration in a checkpoint's config.json: of what stands there only ``facts_of`` are taken."""
        declared_form(config_dict, "config.json")
        facts = {name: value for name, value in facts_of(config_dict).items() if name != "skip"}
        config = cls(**facts, source=dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps: the form, the scale rule, what was skipped, and the checkpoint's own facts."""
        return {
            **self.checkpoint,
            **({} if self.calibrated is None else {"calibration": self.calibrated.facts()}),
            **own_config({"scale_rule": self.scale_rule, "skip": self.skip}),
        }


@dataclass
class _SiteReader(ExpertReader):
    """The parameters of one site, read from a checkpoint to the device where they are prepared."""

    reader: CheckpointReader
    site: Site
    device: torch.device

    def quantized(self, name: str) -> bool:
        return self.reader.quantized(f"{self.site.name}.{name}")

    def values(self, name: str, experts: slice) -> Tensor:
        full = f"{self.site.name}.{name}"
        values = self.reader.values(full, experts).to(self.device)
        if not bool(values.isfinite().all()):
            bad = experts.start + int((~values.isfinite().flatten(1).all(1)).nonzero()[0])
            raise CheckpointError(f"{self.reader.where(full, bad)}: {full} holds NaN or Inf in expert {bad}")
        return values

    def codes(self, name: str, experts: slice, n: int, k: int) -> tuple[Tensor, Tensor]:
        packed, scales = self.reader.codes(f"{self.site.name}.{name}", experts, n, k)
        return packed.to(self.device), scales.to(self.device)


@register_quantizer(OWN)
class Mxfp4CompileQuantizer(HfQuantizer):  # type: ignore[misc]
    """The quantizer of ``Mxfp4CompileConfig``, and of checkpoints in our own form."""

    requires_calibration = False

    def __init__(self, quantization_config: Mxfp4CompileConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: Mxfp4CompileConfig = quantization_config
        self.device_map: Any = None
        self.sites: list[Site] = []
        self.held: dict[str, Any] = {}
        self.other_parameters: dict[str, Any] = {}
        self.model: nn.Module | None = None
        self.state_changes: list[StateChange] = []

    # what transformers asks

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called before the model exists, and again with the device map that "auto" became."""
        require_transformers_5("loading a checkpoint with MXFP4 experts")
        if self.model is not None and isinstance(kwargs.get("device_map"), dict):
            self.device_map = kwargs["device_map"]
            self._drop_placeholders()

    def update_device_map(self, device_map: Any) -> Any:
        """Remember where the user wants the model."""
        self.device_map = device_map
        return device_map

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes: ``save_pretrained`` writes canonical MXFP4."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: gradients pass through the experts, whose own weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes: the experts are one op that torch.compile keeps."""
        return True

    @exclusive
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        files = kwargs.get("checkpoint_files")
        if not files:
            raise CheckpointError("MXFP4 is made while a checkpoint is read from files: a state_dict will not do")
        self.processes = PROCESSES.get()
        spread = getattr(model.config, "distributed_config", None)
        if (getattr(spread, "tp_size", None) or 1) > 1 and type(self.processes) is OneProcess:
            raise OptimizeError(
                "on several ranks a model with MXFP4 experts is loaded by mxfp4_compile.load(path, "
                'distributed_config=...) or load(path, tp_plan="auto")'
            )
        self.files = [Path(f) for f in files]
        self.model = model
        self.started = time.perf_counter()
        declared = config.source if config.source is not None else (config.to_dict() if self.pre_quantized else None)
        self.form, notes = declared_form(declared, str(self.files[0].parent / "config.json"))
        self.report = Report(
            str(config.scale_rule),
            config.activation_dtype,
            config.max_capture_size,
            bool(config.verify),
            versions=versions_used(),
        )
        self.report.notes += notes
        config.met = True
        with Weights(self.files) as weights:  # a bad file is found before any work
            if not weights.tensors:
                raise CheckpointError(f"{self.files[0]} holds no tensors")
            other = type(model).__name__ not in (getattr(model.config, "architectures", None) or ())
            held = check_parameters(model, weights, self.form, new_head=other)
        self.report.notes += [f"{name} is not in the checkpoint: it is new, with random values" for name in held.new]
        left = held.left(model, facts_of(note_of(model.config, declared)).get("skip", ()))
        with kept_state(model) as self.state_changes:
            self.sites = plan_sites(
                model,
                self.report,
                requested=requested_backend(config.backend),
                request=self.request,
                skip=[*config.skip, *left],
                strict=config.strict,
                example_inputs=config.example_inputs,
                device_of=self.device_of,
            )
        with Weights(self.files) as weights:
            reader = CheckpointReader(model, expert_parameters(self.sites), weights, self.form)
            reader.leave_unquantized(self.sites)
            wanted = expert_parameters(self.sites)
            self._others = _other_codes(model, wanted, weights, self.form)
        if self._others and type(self.processes) is not OneProcess:
            raise OptimizeError(f"{next(iter(self._others))} is MXFP4 and no expert: not supported on several ranks")
        self.wanted = expert_parameters(self.sites)  # the whole ones
        self.report.notes += self.processes.split(model, self.sites, partial(self._match_again, model))
        if type(self.processes) is OneProcess:
            self.report.notes += compile_ahead(planned(self.sites), lambda site: self.device_of(site.name))
        self._hold(model)
        self.processes.step("planning")
        return model

    def _match_again(self, model: nn.Module, module: nn.Module, structure: Structure) -> Structure | NoMatch:
        """The structure of a module whose parameters have other shapes now."""
        requested = requested_backend(self.quantization_config.backend)
        with planning_modes(model), traceable_experts(model):
            again = stand_in(module, structure.pattern)
            return match_structure(again, structure.pattern, requested, self.request)

    @property
    def request(self) -> Request:
        """What every site asks of its backend."""
        activations: Any = self.quantization_config.activation_dtype
        return Request(activation_dtype=activations, max_capture_size=self.quantization_config.max_capture_size)

    def _hold(self, model: Any) -> None:
        """Take the expert parameters out of the skeleton; transformers loads what is left."""
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        for site in planned(self.sites):
            module = site.candidate.module
            assert site.structure is not None
            size = 0
            for whole in expert_parameters([site]).values():
                numbers = math.prod(whole.shape)
                size += numbers * 17 // 32 if len(whole.shape) == 3 else numbers * 2
                for full, parameter in zip(whole.names, whole.parameters, strict=True):
                    owner, _, leaf = full[len(site.name) + 1 :].rpartition(".")
                    holder = module.get_submodule(owner)
                    if leaf not in holder._parameters:
                        continue  # several weights of a site lie in it
                    del holder._parameters[leaf]
                    # Some families initialize experts from the block around them: let them write into nothing.
                    holder.__dict__[leaf] = parameter.detach()
                    holder._is_hf_initialized = True  # type: ignore[assignment]
                    self.held[full] = parameter
            if isinstance(self.device_map, str):
                # "auto" and the like place modules by the size of their parameters: show the final one.
                nbytes = torch.empty(size, dtype=torch.uint8, device="meta")
                module.register_parameter(_PLACEHOLDER, nn.Parameter(nbytes, requires_grad=False))
            ignored |= _patterns(site)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name in [n for n in tied if n in self.held]:
            del tied[name]  # the plan made these one already
        model._keys_to_ignore_on_load_unexpected = ignored
        for name in self._others:
            owner, _, leaf = name.rpartition(".")
            holder = model.get_submodule(owner)
            parameter = holder._parameters.pop(leaf)
            holder.__dict__[leaf] = parameter.detach()
            self.other_parameters[name] = parameter
            model._keys_to_ignore_on_load_unexpected.add(re.escape(owner) + r"\.")

    def _drop_placeholders(self) -> None:
        for site in planned(self.sites):
            site.candidate.module._parameters.pop(_PLACEHOLDER, None)

    def device_of(self, name: str) -> torch.device:
        """Where the module ``name`` runs: its entry of the device map, or the accelerator it is offloaded from."""
        device = self.place_of(name)
        if device.type == "cpu" and isinstance(self.device_map, dict):
            others = [_device(d) for d in self.device_map.values() if d != "disk"]
            accelerators = [d for d in others if d.type not in ("cpu", "meta")]
            if accelerators:
                return accelerators[0]
        return device

    def place_of(self, name: str) -> torch.device:
        """Where the weights of the module ``name`` lie."""
        if isinstance(self.device_map, dict):
            parts = name.split(".")
            for length in range(len(parts), -1, -1):
                place = self.device_map.get(".".join(parts[:length]))
                if place is not None:
                    if place == "disk":
                        raise CheckpointError(
                            f'device_map puts {name} on disk, and MXFP4 experts stay in memory: give it "cpu", from '
                            "where they are brought to the GPU for each forward, or more room (max_memory={'cpu': ...})"
                        )
                    return _device(place)
        elif isinstance(self.device_map, torch.device):
            return self.device_map
        elif isinstance(self.device_map, str) and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @exclusive
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config, report = self.quantization_config, self.report
        self.processes.step("reading what is no expert")
        for module in model.modules():
            # Some families (jamba) compute their linear layers in another way under this mark; ours are as they were.
            if hasattr(module, "config"):
                vars(module.config).pop("_is_quantized", None)
        self._drop_placeholders()
        for full, parameter in self.held.items():
            owner, _, leaf = full.rpartition(".")
            holder = model.get_submodule(owner)
            holder.__dict__.pop(leaf, None)
            holder._parameters[leaf] = parameter
        self._replan(model)
        for site in planned(self.sites):
            _cast_as_traced(site)
        todo = planned(self.sites)
        for name in self._others:
            report.notes.append(f"{name} is MXFP4 in the checkpoint; it was dequantized, as only experts stay so")
        with Weights(self.files) as weights, progress_bar(todo, config.progress) as advance:
            reader = CheckpointReader(model, self.wanted, weights, self.form)
            for name, (codes, scales) in self._others.items():
                self._load_other(model, name, codes, scales, weights)

            def reader_of(site: Site) -> ExpertReader:
                whole = _SiteReader(reader, site, self.device_of(site.name))
                found: ExpertReader = self.processes.reader_of(site, whole)
                return found

            if config.verify:
                with kept_state(model):
                    verify_structures(todo, config.scale_rule, model, reader_of)
            notes = [n for site in todo if site.structure is not None for n in site.structure.choice.notes]
            report.notes += dict.fromkeys(notes)
            prepared: dict[tuple[int, ...], MXFP4Experts] = {}
            for site in self.sites:
                if site.structure is None:
                    report.sites.append(left_alone(site))
                    continue
                hooked = offloaded(site.candidate.module)
                check = config.verify and not hooked
                done = install_site(
                    model, site, config.scale_rule, check, advance, prepared, reader_of(site), processes=self.processes
                )
                if not done.rewritten:  # there is nothing else that the site could run on
                    raise OptimizeError(f"{site.name} failed verification: {done.reason}. Nothing was loaded.", report)
                if config.verify and not check:
                    where = f"{', '.join(hooked)} is offloaded"
                    report.notes.append(f"{site.name} was not verified by itself, as {where}; one of its kind was")
                report.sites.append(done)
                built = model.get_submodule(site.name)
                take_offloaded(built, hooked, self.device_of(site.name))
                _take_errors(built, site.name, config.checkpoint.get("weight_errors") or {})
                if self.place_of(site.name) != self.device_of(site.name):
                    offload(built, self.device_of(site.name))
            self.processes.tell(report)
            report.calibration = config.calibrated
            note_state(model, report, self.state_changes, todo)
            finish(model, report, self.started)
            if config.calibration is not None:
                calibrate_loaded(model, todo, reader_of, config.calibration, report)
                report.seconds = time.perf_counter() - self.started
        self.held.clear()
        self.sites.clear()
        self.model = None
        config.example_inputs = config.source = None
        return model

    def _load_other(self, model: nn.Module, name: str, codes: str, scales: str, weights: Weights) -> None:
        """Dequantize a layer that is no expert."""
        parameter = self.other_parameters.pop(name)
        exponents, packed = weights.read(scales).view(torch.uint8), weights.read(codes).view(torch.uint8)
        if bool((exponents == 255).any()):
            raise CheckpointError(f"{weights[scales]} has scale bytes of 255 (NaN)")
        try:
            value = mx.dequantize(packed, exponents, parameter.shape[-1], parameter.dtype).view(parameter.shape)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{weights[codes]} does not fit {name} {list(parameter.shape)}: {error}") from error
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        holder.__dict__.pop(leaf, None)
        holder._parameters[leaf] = nn.Parameter(value.to(self.device_of(owner)), requires_grad=False)

    def _replan(self, model: nn.Module) -> None:
        """Trace again what turned out to run on another device than the one planned for."""
        known: dict[Any, Any] = {}
        for site in planned(self.sites):
            structure = site.structure
            assert structure is not None
            device = self.device_of(site.name)
            if structure.pattern.tensors[0].device == device:
                continue
            leaves = tuple(
                replace(v, device=device) if isinstance(v, TensorInfo) else v for v in structure.pattern.leaves
            )
            pattern = replace(structure.pattern, leaves=leaves)
            key = (structure_key(site.candidate.module), pattern)
            if key not in known:
                module = stand_in(site.candidate.module, pattern)
                with traceable_experts(model):
                    requested = requested_backend(self.quantization_config.backend)
                    known[key] = match_structure(module, pattern, requested, self.request)
            if isinstance(known[key], NoMatch):
                raise OptimizeError(f"{site.name} has no match on {device}: {known[key].reason}")
            site.structure = known[key]


def _patterns(site: Site) -> set[str]:
    """Regular expressions for the checkpoint's names of what a site replaces, which transformers does not find."""
    assert site.structure is not None
    found = set()
    for source in source_names(projections_of(site.structure.found.spec)):
        owners = source.split(".")[:-1]
        inside = "".join(re.escape(owner).replace(r"\*", "[^.]+") + r"\." for owner in owners)
        for name in site.candidate.names:
            # With and without the name of the base model.
            found |= {re.escape(outside) + r"\." + inside for outside in (name, name.partition(".")[2]) if outside}
    return found


def _cast_as_traced(site: Site) -> None:
    """What the block's own first forward would cast for good (a router to fp32) is so in the traced graph."""
    assert site.structure is not None
    traced = site.structure.traced
    for placeholder, name in traced.parameters.items():
        if name in site.structure.retained:
            parameter = site.candidate.module.get_parameter(name)
            dtype = traced.node(placeholder).meta["val"].dtype
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def _device(place: Any) -> torch.device:
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _take_errors(built: nn.Module, name: str, errors: Mapping[str, dict[str, float]]) -> None:
    """What the checkpoint says about its own weights."""
    prefix = f"{name}."
    known = {n[len(prefix) :]: e for n, e in errors.items() if n.startswith(prefix)}
    if isinstance(built, MXFP4Experts) and not built.weight_errors:
        built.weight_errors = known


# MXFP4 layers that are no experts


def _other_codes(
    model: nn.Module, wanted: Mapping[str, ExpertParameter], weights: Weights, form: Form | None
) -> dict[str, tuple[str, str]]:
    """Parameters outside the planned experts that the checkpoint has in MXFP4: name -> names of codes and scales."""
    if form is None:
        return {}
    naming = Names(model)
    experts = {real for whole in wanted.values() for real in whole.names}
    found: dict[str, dict[str, str]] = {}
    for key, stored in weights.tensors.items():
        split = form.split(key)
        if split is None or stored.dtype not in ("U8", "I8", "F8_E8M0"):
            continue
        name, pattern = naming.rename(split[1])
        if name in experts or name not in naming.state:
            continue
        if pattern is not None:
            raise CheckpointError(f"{stored}: {name} is in MXFP4, but is no expert that was planned to be so")
        found.setdefault(name, {})[split[0]] = key
    for pair in found.values():
        if len(pair) != 2:
            raise CheckpointError(f"{weights[next(iter(pair.values()))]} lacks its codes or its scales")
    return {name: (pair["codes"], pair["scales"]) for name, pair in found.items()}
