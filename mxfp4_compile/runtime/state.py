"""The recorded steps of one model, compiled layers for its prompts, and what both are worth."""

from __future__ import annotations

import dataclasses
import os
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..circumstances import exclusively
from ..processes import OneProcess, is_spread
from ..report import CaptureReport, PrefillReport, RuntimeReport
from . import linear
from .caches.base import Arena, CannotMove, LayerForm
from .eligibility import fingerprint_of, modules_of, refusal_of, versions_of
from .graphs import Recorder, brief, recorder_for
from .latent import latent_modules
from .layer_check import LayerCheck
from .layers import compiled_layer, decoder_layers, have_biases, let_compile
from .packing import PACK_LINEARS, Siblings, find_siblings, pack
from .probe import Probe
from .prompts import Prefill, RecordedPrompt, kind_of
from .sizes import length_for, prompt_length_for, size_for
from .step import DecodeStep, StepKey

# Prompts of few tokens are recorded whole when one of their size comes for the second time; at once if this is 1, never
# if it is 0.
RECORD_PROMPTS = "MXFP4_COMPILE_RECORD_PROMPTS"
# Latents are attended to as they are if this is 1 (latent.py): not yet by themselves, as it was run on a CPU only.
ABSORB_LATENTS = "MXFP4_COMPILE_ABSORB_LATENTS"
# Set to 0, products with a bias stay cuBLAS's in steps of one row (graph_pass.py).
REDUCE_BIASED = "MXFP4_COMPILE_REDUCE_BIASED"
# If this is 1, dense products of 2 to 64 rows are by a kernel of ours (linear.py): not measured on a GPU yet.
LINEAR_ROWS = "MXFP4_COMPILE_LINEAR_ROWS"

MOVED = "weights or modules moved: recorded steps were dropped"

# Free memory that a capture must leave for activations and whatever else runs on the device.
_RESERVE_BYTES = 1 << 30
# Activations of a prompt, for each token and number of its hidden state: 512 tokens of Qwen3-30B-A3B took a third.
_ACTIVATIONS_BYTES = 256

# Relative error of a recorded step's logits above which it is not used: against itself without recording, and against
# eager ones where layers cannot be checked by themselves (layer_check.py). A wrong mask, position or cache comes out
# near 1; whole models in half precision differ by rounding, and by experts that are chosen differently where the router
# is nearly undecided.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
_HALF_TOLERANCE = 0.5


_CHANGES = {
    "share": "those of one input as one",
    "reduce_biased": "those with a bias as sums",
    "few_rows": "by a kernel for few rows",
}


@dataclass(frozen=True)
class Way:
    """How a step is made. layers: how they run; own: with the attention of attention.py, absorb: over latents;
    changes: those of graph_pass.py."""

    layers: str
    own: bool
    absorb: bool = False
    changes: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether siblings are one product (packing.py)."""
        return "share" in self.changes

    def __str__(self) -> str:
        attention = "own attention" if self.own else "the attention of the model"
        return f"{self.layers} layers, {attention}{' over latents' if self.absorb else ''}"

    @property
    def products(self) -> str:
        """What is done with matrix products, in words."""
        return f"products: {', '.join(_CHANGES[name] for name in self.changes)}" if self.changes else ""


class Runtime:
    """The recorded steps of one model, and what they are worth. Copies and pickles start empty."""

    _ranks: OneProcess | None

    def __init__(self, model: Any, max_capture_size: int, report: RuntimeReport) -> None:
        self.model = model
        self.max_capture_size = max_capture_size
        self.report = report
        self.compile_layers = True
        self.use_attention = True
        self.record_prompts = {"0": False, "1": True}.get(os.environ.get(RECORD_PROMPTS, ""))  # None: the second time
        self.absorb_latents = os.environ.get(ABSORB_LATENTS) == "1"
        self.pack_linears = os.environ.get(PACK_LINEARS) != "0"
        self.reduce_biased = os.environ.get(REDUCE_BIASED) != "0"
        self.linear_rows = os.environ.get(LINEAR_ROWS) == "1"
        self.recorder: Recorder | None = None
        self._free()
        self._fresh()

    @property
    def processes(self) -> OneProcess:
        """The processes that hold the model."""
        if not is_spread(self.model):
            return OneProcess()
        if self._ranks is None:
            from ..ranks.recorded import StepRanks

            self._ranks = StepRanks()
        return self._ranks

    def _free(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None  # the thread that holds the lock for a generate
        self._ranks = None

    def _fresh(self) -> None:
        self.steps: dict[Any, Any] = {}
        self.refused: dict[Any, str] = {}
        self.layers: dict[tuple[int, int, tuple[str, ...]], Any] = {}
        self.prefills: dict[Any, Any] = {}
        self.prompts: dict[tuple[int, int], Any] = {}
        self.seen_prompts: set[tuple[int, int]] = set()
        self.siblings: list[Siblings] | None = None  # Linear modules of one product; None until they were looked for
        self.report.packed = ""
        self.arena: Any = None
        self.fingerprint: int | None = None
        self.versions: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "max_capture_size", "report", "compile_layers", "use_attention", "record_prompts")
        return {k: getattr(self, k) for k in (*kept, "absorb_latents", "pack_linears", "reduce_biased", "linear_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.recorder = None
        self._free()
        self._fresh()

    def generating(self) -> bool:
        """Whether this thread is inside the model's generate."""
        return self.owner == threading.get_ident()

    def drop(self) -> None:
        """Let go of every recorded step and its memory."""
        self._fresh()
        self.report.captures.clear()
        self.report.prefills.clear()

    def _drop_recordings(self) -> None:
        """Let go of what was recorded and checked with other weights; compiled layers read weights when they run."""
        self.steps.clear()
        self.prompts.clear()
        self.arena = None
        self.report.captures.clear()
        self.report.prefills[:] = [p for p in self.report.prefills if not p.replay]

    def forget_steps(self) -> None:
        """Let go of recorded steps, so that the next call makes them as the attributes say then."""
        self._drop_recordings()
        self.siblings, self.report.packed = None, ""
        self.refused.clear()

    # whether

    def begin(self) -> str | None:
        """A generate begins: why none of the processes records a step of this model as it is now, or None."""
        return self.processes.start(self, self.refusal())

    def refusal(self) -> str | None:
        """Why no step of this model may be recorded as it is now, or None."""
        model: Any = self.model
        if self.max_capture_size < 1:
            return "max_capture_size=0"
        device = next(model.parameters()).device
        if self.recorder is not None and self.recorder.device not in (None, device):
            if self.steps or self.refused:
                self.report.note(MOVED)
            self.drop()
            self.recorder = None  # it records on the device that the model left
        if self.recorder is None:
            self.recorder = recorder_for(device)
        if self.recorder is None:
            return f"there are no CUDA graphs on {device.type}"
        modules = modules_of(model)
        reason = refusal_of(model, modules) or self.processes.refusal(self.recorder)
        if reason is not None:
            return reason
        if self.recorder.compiles:
            let_compile(modules)
        fingerprint = fingerprint_of(model, modules)
        if fingerprint != self.fingerprint:
            if self.steps or self.refused:
                self.report.note(MOVED)
                self.drop()
            self.fingerprint = fingerprint
        versions = versions_of(modules)
        if versions != self.versions:
            if self.steps or self.prompts:
                self.report.note("weights were written to: recorded steps were dropped")
                self._drop_recordings()
            self.versions = versions
        return self.refused.get("model")

    def step(self, batch: int, tokens: int, planes: int = 0) -> Any:
        """The recorded step for ``batch`` rows and ``tokens`` tokens each, made if it can be; None if not.

        ``planes``: kinds of positions that a token has, 0 for just one.
        """
        rows = size_for(batch, self.max_capture_size)
        if rows is None:
            self.report.note(f"batches above max_capture_size={self.max_capture_size} run without graphs")
            return None
        longer = [k for k in self.steps if (k.rows, k.planes) == (rows, planes) and k.length >= tokens]
        if longer:
            return self.steps[min(longer, key=lambda k: k.length)]
        key = StepKey(rows, length_for(tokens), planes)
        if key in self.refused or "model" in self.refused:
            return None
        return self._make(key)

    def prefill(self, batch: int, attention_mask: Tensor | None) -> Any:
        """Compiled layers for a prompt of ``batch`` rows with the mask [B, T], made if they can be; None if not."""
        if not self.compile_layers or self.recorder is None or not self.recorder.compiles:
            return None
        if self.processes.several:  # a rank whose compilation fails later would go on with other bits
            self.report.note("prompts run as the model has them: on several ranks their layers are not compiled")
            return None
        kind = kind_of(batch, attention_mask)
        if kind is None or kind in self.refused:
            return None
        made = self.prefills.get(kind)
        if made is None:
            with exclusively(), torch.inference_mode(False), torch.no_grad(), self.recorder.guard():
                try:
                    made = Prefill(self.model, kind)
                except Exception as failure:
                    return self._refuse(kind, f"{kind}: layers are not compiled ({brief(failure)})")
            if made.broken is None and made.error > self._tolerance():
                made.broken = f"they differ from the eager ones by {made.error:.2g}"
            if made.broken is None:
                self.prefills[kind] = made
                self.report.prefills.append(PrefillReport(str(kind), made.seconds, made.error))
        if made.broken is not None:
            self.prefills.pop(kind, None)
            return self._refuse(kind, f"{kind}: layers are not compiled ({made.broken})")
        return made

    def prompt_size(self, batch: int, tokens: int) -> tuple[int, int] | None:
        """Rows and length of the recording for a prompt [batch, tokens] without padding; None if it has none."""
        rows = size_for(batch, self.max_capture_size) if self.record_prompts is not False else None
        length = prompt_length_for(tokens, rows, self.max_capture_size) if rows else None
        return (rows, length) if rows and length and tokens > 1 else None

    def recorded_prompt(self, batch: int, tokens: int, ahead: bool = False) -> Any:
        """The recorded forward for a prompt [batch, tokens] without padding; None if there is none.

        It is made if it can be, the second time that it is asked for or ``ahead`` of all.
        """
        key = self.prompt_size(batch, tokens)
        if key is None:
            return None
        rows, length = key
        name = f"prompts, batch {rows}, {length} tokens"
        if key in self.prompts or name in self.refused:
            return self.prompts.get(key)
        if not (ahead or self.record_prompts or key in self.seen_prompts):
            self.seen_prompts.add(key)
            return None
        prefill = self.prefill(rows, None)
        if prefill is None:
            return None
        if not prefill.keys_alone:
            return self._refuse(name, "prompts are not recorded: padding would enter the states that its layers keep")
        assert self.recorder is not None
        need, free = self._prompt_bytes(rows, length), self.recorder.free_bytes()
        if free is not None and need + _RESERVE_BYTES > free:
            free_text = f"about {need / 2**30:.2f} GiB are needed and {free / 2**30:.2f} free"
            return self._refuse(name, f"{name}: not recorded, {free_text}")
        with exclusively(), torch.inference_mode(False), torch.no_grad(), self.recorder.guard():
            try:
                made = RecordedPrompt(self.model, rows, length, self.recorder, prefill)
            except Exception as failure:
                return self._refuse(name, f"{name}: not recorded ({brief(failure)})")
        if made.error > self._tolerance():
            return self._refuse(name, f"{name}: not recorded, differs from the eager one by {made.error:.2g}")
        self.prompts[key] = made
        how = self.recorder.name
        self.report.prefills.append(PrefillReport(name, made.seconds, made.error, how, made.bytes))
        return made

    def _prompt_bytes(self, rows: int, length: int) -> int:
        """About what a recorded prompt holds: keys and values, logits, and a layer's activations, rather too much."""
        config = self.model.config.get_text_config(decoder=True)
        forms = next((step.cache.forms for step in self.steps.values()), ())
        kept = sum(form.bytes(rows, length) for form in forms) + rows * config.vocab_size * 4
        return int(kept + rows * length * config.hidden_size * _ACTIVATIONS_BYTES)

    def _tolerance(self) -> float:
        return _TOLERANCE.get(_dtype(self.model), _HALF_TOLERANCE)

    # making

    def _make(self, key: Any) -> Any:

        assert self.recorder is not None
        processes = self.processes
        processes.holds(self)
        # Static tensors made in inference mode could not be written outside of it.
        with exclusively(), torch.inference_mode(False), torch.no_grad(), self.recorder.guard():
            self.arena = self.arena or Arena()
            try:
                probe = processes.together(f"{key}: probe", lambda: Probe(self.model, key.rows, key.length))
                forms, kinds = processes.together(f"{key}: cache", lambda: (probe.forms(), probe.kinds))
            except CannotMove as error:
                return self._refuse("model", f"{error}: generate runs without graphs")
            except Exception as error:
                return self._refuse("model", f"the model's forward is not one a step can be made of ({brief(error)})")
            need, free = self.arena.missing(forms, key.rows, key.length), self.recorder.free_bytes()
            free = processes.least(f"{key}: memory", free)
            if free is not None and need + _RESERVE_BYTES > free:
                text = f"{key}: not captured, its cache takes {need / 2**30:.2f} GiB and {free / 2**30:.2f} are free"
                return self._refuse(key, text)
            self._pack(probe)
            check = self._layer_check(key, forms)
            for way in self._ways(key.rows):
                made = str(way)
                described = f"{made} ({way.products})" if way.products else made
                try:
                    make = partial(
                        DecodeStep, self.model, key, forms, kinds, self.recorder, self.arena,
                        layer=self._layer(way, key), any_length=way.layers == "compiled", use_attention=way.own,
                        absorb=way.absorb, siblings=self.siblings or () if way.packed else (),
                    )  # fmt: skip
                    step = processes.together(f"{key}: {described}", make)
                    fault, difference = processes.together(
                        f"{key}: checking", partial(self._fault_of, step, probe, check)
                    )
                    fault = processes.reason(f"{key}: fault", fault)
                    fault = fault or processes.same_bits(f"{key}: bits", step.logits)
                except torch.OutOfMemoryError:
                    return self._refuse(key, f"{key}: not captured, out of memory")
                except Exception as failure:
                    if "OutOfMemoryError" in str(failure):  # of another rank
                        return self._refuse(key, f"{key}: not captured, out of memory ({failure})")
                    self.report.note(f"{key} with {described}: {brief(failure)}")
                    continue
                if fault is None:
                    for note in step.notes:
                        self.report.note(f"{key}: {note}")
                    self.steps[key] = step
                    size = sum(f.bytes(key.rows, key.length) for f in forms)
                    how = self.recorder.name
                    self.report.captures.append(
                        CaptureReport(
                            key.rows, key.length, how, made, step.seconds, size, step.bytes, difference, way.products
                        )
                    )
                    return step
                self.report.note(f"{key} with {described}: not used, {fault}")
            return self._refuse("model", "no recorded step agrees with the eager one: generate runs without graphs")

    def _layer_check(self, key: StepKey, forms: tuple[LayerForm, ...]) -> LayerCheck | None:
        try:
            return self.processes.together(
                f"{key}: conditions",
                lambda: LayerCheck(self.model, forms, key.rows, key.length, self.processes),
            )
        except Exception as failure:
            self.report.note(f"steps are checked by whole logits, not by the layer ({brief(failure)})")
            return None

    def _fault_of(self, step: DecodeStep, probe: Probe, check: LayerCheck | None) -> tuple[str | None, float]:
        """What is wrong with a step, or None; and its relative difference from the eager one (layers, or logits)."""
        if check is None:
            difference = probe.error_of(step)
            wrong = difference > self._tolerance()
            return f"logits differ from the eager ones by {difference:.2g}" if wrong else None, difference
        fault, difference = check.fault_of(step)
        if fault is None:
            recorded = probe.difference_when_recorded(step)
            if recorded > self._tolerance():
                fault = f"recorded it gives other logits than unrecorded ({recorded:.2g})"
        return fault, difference

    def _layer(self, way: Way, key: StepKey) -> Any:
        """What runs the decoder layers, or None."""
        if way.layers == "eager":
            return None
        which = (key.rows, 0 if way.layers == "compiled" else key.length, way.changes)
        if which not in self.layers:
            self.layers[which] = compiled_layer(key.rows, way.changes, self.processes)
        return self.layers[which]

    def _ways(self, rows: int) -> list[Way]:
        """Ways to make a step, best first."""
        assert self.recorder is not None
        compiled = self.compile_layers and self.recorder.compiles
        layers = decoder_layers(self.model).values()
        if compiled and not layers:
            self.report.note("its decoder layers cannot be told apart: steps are recorded with layers as they are")
            compiled = False
        attention = [(True, False), (False, False)] if self.use_attention else [(False, False)]
        if self.use_attention and self.absorb_latents and latent_modules(self.model):
            attention.insert(0, (True, True))
        kinds = ["compiled", "compiled for this length:", "eager"] if compiled else ["eager"]
        ways = [Way(kind, own, absorb) for own, absorb in attention for kind in kinds]
        wanted = {
            "share": bool(self.siblings),
            "reduce_biased": self.reduce_biased and rows == 1 and have_biases(layers),
            "few_rows": self.linear_rows and 1 < rows <= linear.MAX_ROWS,
        }
        changes = tuple(name for name, use in wanted.items() if use)
        if compiled and changes:
            ways.insert(0, dataclasses.replace(ways[0], changes=changes))
        return ways

    def _pack(self, probe: Probe) -> None:
        """Put weights that one product can read side by side, once; recorded steps are then of these places."""
        assert self.recorder is not None
        if self.siblings is not None or not (self.pack_linears and self.compile_layers and self.recorder.compiles):
            return
        self.siblings = []
        if self.steps or self.prompts:
            return  # they hold the addresses of now
        layers = list(decoder_layers(self.model).values())
        try:
            found = self.processes.together("siblings", lambda: find_siblings(layers, probe.eager_step))
        except Exception as failure:
            return self.report.note(f"sibling products are not looked for ({brief(failure)})")
        reasons: dict[str, int] = {}
        for group in found:
            reason = pack(group)
            if reason is None:
                self.siblings.append(group)
            else:
                reasons[reason] = reasons.get(reason, 0) + 1
        every = [self.processes.least("siblings", count) for count in (len(self.siblings), -len(self.siblings))]
        if every != [len(self.siblings), -len(self.siblings)]:
            self.siblings = []
            self.report.note("linear modules with one input stay apart: the ranks found others")
        for reason, count in reasons.items():
            self.report.note(f"{count} groups of linear modules with one input stay apart: {reason}")
        if self.siblings:
            count = sum(len(group.linears) for group in self.siblings)
            self.report.packed = f"{count} linear modules as {len(self.siblings)} products, weights side by side"
        if found:
            modules = modules_of(self.model)
            self.fingerprint, self.versions = fingerprint_of(self.model, modules), versions_of(modules)

    def _refuse(self, what: Any, reason: str) -> None:
        self.refused[what] = reason
        self.report.note(reason)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
