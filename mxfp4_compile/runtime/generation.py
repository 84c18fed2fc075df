"""``generate`` of an optimized model: transformers' own, with recorded decode steps where they are right.

``attach`` puts a callable in the place of ``model.generate``. It runs transformers' ``generate`` on a *driver*,
an object that shares the model's state and whose class is the model's with three methods more. Everything
before the decoding loop is transformers' code, and so is the prefill, whose decoder layers are compiled where that is
right (prefill.py). Then one of three:

1. the *plain* loop below, for greedy decoding and sampling whose only reasons to stop are a length and end
   tokens: the same operations as transformers' ``_sample`` in the same order, but the device is never waited
   for; whether everything has finished is read one step late and the surplus token is dropped;
2. transformers' own loops (beam search, custom stopping criteria, returned scores, ...) with their model call
   replaced by a recorded step;
3. transformers' own loops on the model as it is, where a recorded step would be wrong or does not exist. The
   report says why.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..circumstances import exclusively
from ..passes.build.module import mxfp4_sites
from ..report import CaptureReport, PrefillReport, Report, RuntimeReport
from .graphs import Recorder, brief, recorder_for
from .sizes import MIN_LENGTH, capture_sizes, length_for, prompt_length_for, prompt_lengths, size_for

HOOK = "generate"
# Prompts of few tokens are recorded whole if this is 1: not yet by themselves, as captures of it have been seen to
# work on a GPU for three models only, with eager and sdpa attention (tests/gpu/test_generation_gpu.py, benchmarks).
RECORD_PROMPTS = "MXFP4_COMPILE_RECORD_PROMPTS"

# Free memory that a capture must leave for activations and whatever else runs on the device.
_RESERVE_BYTES = 1 << 30
# Relative error of a recorded step's logits against the eager ones, above which it is not used. What this is
# to catch (a wrong mask, position or cache) comes out near 1; half precision differs by rounding, and by
# experts that are chosen differently where the router is nearly undecided: on random weights as large as
# gpt-oss-20b's, bf16 differs from fp32 by 0.28 without any of this.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
_HALF_TOLERANCE = 0.5

_PLAIN_INPUTS = {
    "input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep",
}  # fmt: skip


@lru_cache(maxsize=1)
def _cache_name() -> str:
    from .cache import CACHE

    return CACHE


class Runtime:
    """The recorded steps of one model, and what they are worth. Copies and pickles start empty."""

    def __init__(self, model: Any, max_capture_size: int, report: RuntimeReport) -> None:
        self.model = model
        self.max_capture_size = max_capture_size
        self.report = report
        self.compile_layers = True
        self.use_attention = True
        self.record_prompts = os.environ.get(RECORD_PROMPTS) == "1"
        self.recorder: Recorder | None = None
        self._free()
        self._fresh()

    def _free(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None  # the thread that holds the lock for a generate

    def _fresh(self) -> None:
        self.steps: dict[Any, Any] = {}
        self.refused: dict[Any, str] = {}
        self.layers: dict[tuple[int, int], Any] = {}
        self.prefills: dict[Any, Any] = {}
        self.prompts: dict[tuple[int, int], Any] = {}
        self.arena: Any = None
        self.fingerprint: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "max_capture_size", "report", "compile_layers", "use_attention", "record_prompts")
        return {k: getattr(self, k) for k in kept}

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

    # whether

    def refusal(self) -> str | None:
        """Why no step of this model may be recorded as it is now, or None."""
        model: Any = self.model
        if self.max_capture_size < 1:
            return "max_capture_size=0"
        device = next(model.parameters()).device
        if self.recorder is None:
            self.recorder = recorder_for(device)
        if self.recorder is None:
            return f"there are no CUDA graphs on {device.type}"
        modules = _modules(model)
        if len({p.device for module in modules for p in module._parameters.values() if p is not None}) > 1:
            return "the model is spread over several devices"
        if model.config.is_encoder_decoder:
            return "the model is an encoder-decoder"
        if model.training:
            return "the model is in training mode"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        odd = _odd_attention(model)
        if odd is not None:
            return odd
        hooked = _hooked(model, modules)
        if hooked is not None:
            return f"{hooked} has forward hooks, which a recorded step would not call"
        fingerprint = _fingerprint(model, modules)
        if fingerprint != self.fingerprint:
            if self.steps or self.refused:
                self.report.note("weights or modules moved: recorded steps were dropped")
                self.drop()
            self.fingerprint = fingerprint
        return self.refused.get("model")

    def step(self, batch: int, tokens: int, planes: int = 0) -> Any:
        """The recorded step for ``batch`` rows and ``tokens`` tokens each, made if it can be; None if not.

        ``planes``: kinds of positions that a token has, 0 for just one.
        """
        from .step import StepKey

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
        from .prefill import Prefill, kind_of

        if not self.compile_layers or self.recorder is None or not self.recorder.compiles:
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

    def recorded_prompt(self, batch: int, tokens: int) -> Any:
        """The recorded forward for a prompt [batch, tokens] without padding, made if it can be; None if not."""
        from .prefill import RecordedPrompt

        rows = size_for(batch, self.max_capture_size) if self.record_prompts else None
        length = prompt_length_for(tokens, rows, self.max_capture_size) if rows else None
        if rows is None or length is None or tokens < 2:
            return None
        key = (rows, length)
        name = f"prompts, batch {rows}, {length} tokens"
        if key in self.prompts or name in self.refused:
            return self.prompts.get(key)
        prefill = self.prefill(rows, None)
        if prefill is None:
            return None
        assert self.recorder is not None
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

    def _tolerance(self) -> float:
        return _TOLERANCE.get(_dtype(self.model), _HALF_TOLERANCE)

    # making

    def _make(self, key: Any) -> Any:
        from .cache import Arena, CannotMove
        from .step import DecodeStep, compiled_layer

        assert self.recorder is not None
        # Static tensors made in inference mode could not be written outside of it.
        with exclusively(), torch.inference_mode(False), torch.no_grad(), self.recorder.guard():
            self.arena = self.arena or Arena()
            try:
                probe = _Probe(self.model, key.rows)
                shapes = probe.shapes()
            except CannotMove as error:
                return self._refuse("model", f"{error}: generate runs without graphs")
            except Exception as error:
                return self._refuse("model", f"the model's forward is not one a step can be made of ({brief(error)})")
            need, free = self.arena.missing(shapes, key.rows, key.length), self.recorder.free_bytes()
            if free is not None and need + _RESERVE_BYTES > free:
                text = f"{key}: not captured, its cache takes {need / 2**30:.2f} GiB and {free / 2**30:.2f} are free"
                return self._refuse(key, text)
            for layers, use_attention in self._attempts():
                made = f"{layers} layers, {'own attention' if use_attention else 'the attention of the model'}"
                try:
                    function = None
                    if layers != "eager":
                        which = (key.rows, 0 if layers == "compiled" else key.length)
                        function = self.layers.setdefault(which, compiled_layer(key.rows))
                    step = DecodeStep(
                        self.model, key, shapes, self.recorder, self.arena,
                        layer=function, any_length=layers == "compiled", use_attention=use_attention,
                    )  # fmt: skip
                    difference = probe.error_of(step)
                except torch.OutOfMemoryError:
                    return self._refuse(key, f"{key}: not captured, out of memory")
                except Exception as failure:
                    self.report.note(f"{key} with {made}: {brief(failure)}")
                    continue
                if difference <= self._tolerance():
                    self.steps[key] = step
                    size = sum(s.bytes(key.rows, key.length) for s in shapes)
                    how = self.recorder.name
                    self.report.captures.append(
                        CaptureReport(key.rows, key.length, how, made, step.seconds, size, step.bytes, difference)
                    )
                    return step
                self.report.note(f"{key} with {made}: not used, logits differ from the eager ones by {difference:.2g}")
            return self._refuse("model", "no recorded step agrees with the eager one: generate runs without graphs")

    def _attempts(self) -> list[tuple[str, bool]]:
        """Ways to make a step, best first: how layers run, and whether attention.py stands in for attention."""
        assert self.recorder is not None
        compiled = self.compile_layers and self.recorder.compiles
        ways = ["compiled", "compiled for this length:", "eager"] if compiled else ["eager"]
        return [(way, own) for own in (True, False) if own <= self.use_attention for way in ways]

    def _refuse(self, what: Any, reason: str) -> None:
        self.refused[what] = reason
        self.report.note(reason)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _odd_attention(model: Any) -> str | None:
    """Why the masks of this model are not those of full and sliding attention, or None."""
    from transformers.generation import GenerationMixin

    config = model.config.get_text_config(decoder=True)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if kinds:
        return f"its layers are of kinds whose caches have no static form here ({', '.join(kinds)})"
    if getattr(config, "attention_chunk_size", None) is not None and not getattr(config, "layer_types", None):
        return "its attention is chunked"
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    usual = getattr(GenerationMixin, "create_masks_for_generate", None)
    if getattr(type(model), "create_masks_for_generate", None) is not usual:
        return "the model makes attention masks of its own"
    return None


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules, each once: every generate looks at them, and ``model.modules()`` makes a name for each."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting.extend(module._modules.values())
    return list(found.values())


def _hooked(model: nn.Module, modules: list[nn.Module]) -> str | None:
    """The name of a module with forward hooks of the user's; transformers' own, which record outputs, do no harm."""
    from torch.nn.modules import module as registry

    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return "torch"
    for module in modules:
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith("transformers.utils.output_capturing"):
                return next(name for name, m in model.named_modules() if m is module) or "the model"
    return None


def _fingerprint(model: nn.Module, modules: list[nn.Module]) -> int:
    """Changes when a parameter, buffer or module was exchanged or moved: recorded addresses are stale then."""
    parts: list[Any] = [getattr(getattr(model, "config", None), "_attn_implementation", None)]
    for module in modules:
        parts.append(id(module))
        parts += [t.data_ptr() for t in module._parameters.values() if t is not None]
        parts += [t.data_ptr() for t in module._buffers.values() if t is not None]
    return hash(tuple(parts))


class _Probe:
    """A short eager generation against which a recorded step is checked, with left padding and past a window."""

    def __init__(self, model: Any, rows: int) -> None:
        from .step import last_logits, positions_of, probe_tokens

        self.model, self.rows = model, rows
        ids = probe_tokens(model, rows, 10)
        self.mask = torch.ones_like(ids)
        if rows > 1:
            self.mask[1, :3] = 0
        positions = positions_of(self.mask)
        self.token, self.positions = ids[:, -1:], positions
        output = model(
            input_ids=ids[:, :-1],
            attention_mask=self._mask(ids.shape[1] - 1),
            position_ids=positions[:, :-1],
            use_cache=True,
            **last_logits(model),  # all of them, for many rows and a large vocabulary, are gigabytes
        )
        self.cache = getattr(output, _cache_name())

    def _mask(self, length: int) -> Tensor | None:
        return self.mask[:, :length] if self.rows > 1 else None

    def shapes(self) -> Any:
        from .cache import shapes_of

        return shapes_of(self.cache)

    def error_of(self, step: Any) -> float:
        """Relative error of the step's logits for the token after the prompt."""
        from .step import relative_error

        step.kv.fill(self.cache, self._mask(self.mask.shape[1] - 1))
        step.tokens.copy_(self.token)
        step.position_ids.copy_(self.positions[:, -1:])
        step.replay()
        expected = self.model(
            input_ids=self.token,
            attention_mask=self._mask(self.mask.shape[1]),
            position_ids=self.positions[:, -1:],
            use_cache=True,
            **{_cache_name(): copy.deepcopy(self.cache)},
        ).logits[:, -1]
        return relative_error(step.logits, expected)


# the driver


@lru_cache(maxsize=64)
def _driver_class(base: type) -> type:
    """``base`` with decoding methods that may use recorded steps; of the same name, as transformers reads it."""

    class Driver(base):  # type: ignore[misc, valid-type]
        def _sample(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return _Session.current(self).sample(input_ids, kwargs)

        def _beam_search(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return _Session.current(self).beam_search(input_ids, kwargs)

        def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
            session = _Session.current(self)
            if session.step is not None:
                return True
            return bool(super()._valid_auto_compile_criteria(model_kwargs, generation_config))

        def get_compiled_call(self, compile_config: Any) -> Any:
            session = _Session.current(self)
            return session if session.step is not None else super().get_compiled_call(compile_config)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _Session.current(self)(*args, **kwargs)

    Driver.__name__, Driver.__qualname__, Driver.__module__ = base.__name__, base.__qualname__, base.__module__
    return Driver


class _Session:
    """One call of generate."""

    _active = threading.local()

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.model: Any = runtime.model
        self.step: Any = None
        self.cache: Any = None  # a HandoverCache once there is a step

    @classmethod
    def current(cls, driver: Any) -> _Session:
        session: _Session = cls._active.session
        return session

    def generate(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """transformers' generate on a driver of the model."""
        base: Any = type(self.model)
        driver: Any = object.__new__(_driver_class(base))
        object.__setattr__(driver, "__dict__", self.model.__dict__)
        self.driver = driver
        outer = getattr(self._active, "session", None)
        self._active.session = self
        try:
            return function(driver, *args, **kwargs)
        finally:
            self._active.session = outer

    # the decoding methods

    def sample(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """greedy decoding or sampling; arguments of transformers' ``_sample``."""
        model = self.model
        self._take(input_ids, kwargs)
        if self.step is None:
            return type(model)._sample(model, input_ids, **kwargs)
        if self._plain(kwargs):
            return _plain_loop(self, input_ids, **kwargs)
        return self._own_cache(type(model)._sample(self.driver, input_ids, **kwargs))

    def beam_search(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """beam search, with or without sampling; arguments of transformers' ``_beam_search``."""
        model = self.model
        self._take(input_ids, kwargs)
        if self.step is None:
            return type(model)._beam_search(model, input_ids, **kwargs)
        return self._own_cache(type(model)._beam_search(self.driver, input_ids, **kwargs))

    def _take(self, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        """Choose the recorded step and exchange the cache, if this call's cache is one that can move."""
        from transformers import __version__
        from transformers.cache_utils import DynamicCache

        from .cache import HandoverCache

        config: Any = kwargs["generation_config"]
        cache: Any = kwargs.get(_cache_name())
        if cache is None:
            for name, value in kwargs.items():
                if isinstance(value, DynamicCache):
                    self.runtime.report.note(
                        f"transformers {__version__} hands its cache over as {name!r}, which is not known "
                        "here: no recorded steps"
                    )
        if (
            type(cache) is not DynamicCache
            or (len(cache.layers) and cache.get_seq_length() > 0)
            or getattr(cache, "_is_user_defined", False)
            or getattr(cache, "offloading", False)
            or not kwargs.get("use_cache", True)
            or config.disable_compile
            or config.compile_config is not None
            or getattr(config, "is_assistant", False)
            or input_ids.device != self.model.device
        ):
            return
        embeds = kwargs.get("inputs_embeds")
        prompt = embeds.shape[1] if embeds is not None else input_ids.shape[1]
        tokens = prompt + max(config.max_length - input_ids.shape[1], 1)
        self.step = self.runtime.step(input_ids.shape[0], tokens, _planes(kwargs))
        if self.step is not None:
            self.cache = kwargs[_cache_name()] = HandoverCache(cache)

    def _plain(self, kwargs: dict[str, Any]) -> bool:
        from transformers.generation import EosTokenCriteria, GenerationMixin, MaxLengthCriteria

        own = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill", "_sample")
        usual = _PLAIN_INPUTS | {
            "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer", "inputs_embeds",
        }  # fmt: skip
        extra = [k for k, v in kwargs.items() if v is not None and k not in usual]
        return (
            not kwargs["generation_config"].return_dict_in_generate
            and not kwargs.get("synced_gpus")
            and not extra
            and not _planes(kwargs)
            and all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in kwargs["stopping_criteria"])
            and all(getattr(type(self.model), n) is getattr(GenerationMixin, n) for n in own)
        )

    def _own_cache(self, result: Any) -> Any:
        """A cache that is returned must not be the one that the next generation overwrites."""
        from .cache import HandoverCache

        name = _cache_name()
        if isinstance(getattr(result, name, None), HandoverCache):
            setattr(result, name, getattr(result, name).plain())
        return result

    # the model call of transformers' loops

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """``model(**inputs)``, by a recorded step where it is a decode step that one can do."""
        if args or not self._recordable(inputs):
            return self.model(*args, **inputs) if args else self._prompt(inputs)
        self.enter(inputs.get("attention_mask"))
        step, batch = self.step, inputs["input_ids"].shape[0]
        positions = inputs.get("position_ids")
        self.feed(inputs["input_ids"][:, 0], positions)
        step.replay()
        self.cache.advance()
        return step.output_class(logits=step.logits[:batch, None].clone(), **{_cache_name(): self.cache})

    def _prompt(self, inputs: dict[str, Any]) -> Any:
        """``model(**inputs)`` of anything but a decode step: if it begins the cache, recorded or by compiled layers."""
        ids = inputs.get("input_ids")
        ids = inputs.get("inputs_embeds") if ids is None else ids
        mask = inputs.get("attention_mask")
        if (
            self.step is None
            or self.cache.get_seq_length() > 0
            or id(inputs.get(_cache_name())) != id(self.cache)
            or ids is None
            or ids.shape[1] < 2
            or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        ):
            return self.model(**inputs)
        if self.runtime.record_prompts and self._plain_prompt(inputs):
            recorded = self.runtime.recorded_prompt(*ids.shape)
            if recorded is not None:
                with torch.inference_mode(False), torch.no_grad():
                    return recorded(ids, self.cache)
        prefill = self.runtime.prefill(ids.shape[0], mask)
        if prefill is None:
            return self.model(**inputs)
        with prefill.applied():
            out = self.model(**inputs)
        if prefill.broken is not None:
            self.runtime.prefill(ids.shape[0], mask)  # says so, once
        return out

    def _plain_prompt(self, inputs: dict[str, Any]) -> bool:
        """Nothing but tokens, at positions 0, 1, ... in every row, of which the last one's logits are wanted."""
        ids, mask, positions = (inputs.get(n) for n in ("input_ids", "attention_mask", "position_ids"))
        return (
            ids is not None
            and not _unusual(inputs)
            and isinstance(inputs.get("logits_to_keep"), int)
            and inputs["logits_to_keep"] == 1
            and (mask is None or (mask.shape == ids.shape and bool(mask.all())))
            and (
                positions is None
                or (positions.dim() == 2 and bool((positions == torch.arange(ids.shape[1], device=ids.device)).all()))
            )
        )

    def _recordable(self, inputs: dict[str, Any]) -> bool:
        cache: Any = self.cache
        known = cache is not None and id(inputs.get(_cache_name())) == id(cache)
        if self.step is None or not known:
            return False
        ids: Any = inputs.get("input_ids")
        mask: Any = inputs.get("attention_mask")
        if ids is None or ids.shape[1] != 1:
            return False
        extra = _unusual(inputs)
        if _planes(inputs) != self.step.key.planes:
            extra.append("position_ids of another kind")
        if extra:
            self.runtime.report.note(f"decode steps given {', '.join(sorted(extra))} run without graphs")
        return (
            not extra
            and (mask is None or mask.dim() == 2)
            and (cache.static is not None or cache.get_seq_length() > 0)
            and cache.get_seq_length() < self.step.key.length
        )

    def enter(self, attention_mask: Tensor | None) -> None:
        """Move the cache into the step, if it is not there."""
        if self.cache.static is None:
            with torch.inference_mode(False), torch.no_grad():
                self.cache.lend(self.step.kv, attention_mask)

    def feed(self, tokens: Tensor, positions: Tensor | None) -> None:
        """The next token of each row, int64 [B]; positions [..., B or 1, 1], or None where they follow the cache."""
        from .step import expand_rows

        step = self.step
        _feed_tokens(step, tokens)
        if positions is None:
            step.position_ids.copy_(step.kv.position.expand_as(step.position_ids))
        else:
            last = positions[..., -1:].expand(*positions.shape[:-2], tokens.shape[0], 1)
            step.position_ids.copy_(expand_rows(last, step.key.rows, last.dim() - 2))


def _unusual(inputs: dict[str, Any]) -> list[str]:
    """Names of what a model is called with beside tokens, their places and the cache."""
    usual = _PLAIN_INPUTS | {"return_dict"}
    return [k for k, v in inputs.items() if k not in usual and v is not None and v is not False]


def _planes(inputs: dict[str, Any]) -> int:
    """Kinds of positions that a token has (multimodal models: three or four), 0 for just one."""
    positions = inputs.get("position_ids")
    return positions.shape[0] if positions is not None and positions.dim() == 3 else 0


class _Late:
    """Values from the device, read one step after they were asked for; nothing waits for the newest step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[tuple[Tensor, ...], Any]] = deque()

    def put(self, *values: Tensor) -> None:
        copies = tuple(
            torch.empty(v.shape, dtype=v.dtype, pin_memory=self._cuda).copy_(v, non_blocking=self._cuda) for v in values
        )
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending.append((copies, event))

    def take(self, leave: int) -> list[tuple[Tensor, ...]]:
        """All but the newest ``leave`` of what was put, in order."""
        out = []
        while len(self._pending) > leave:
            copies, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            out.append(copies)
        return out


def _plain_loop(
    session: _Session,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """transformers' ``_sample`` without waiting for the device: int64 [B, prompt] -> [B, prompt + new]."""
    model, step = session.model, session.step
    device, batch = input_ids.device, input_ids.shape[0]
    do_sample: bool = generation_config.do_sample
    pad: Any = generation_config._pad_token_tensor
    ends = [c.eos_token_id.to(device) for c in stopping_criteria if hasattr(c, "eos_token_id")]
    max_length = stopping_criteria.max_length or generation_config.max_length
    pad = None if pad is None else pad.to(device)
    unfinished = torch.ones(batch, dtype=torch.int64, device=device)
    late = _Late(device)

    outputs = session.driver._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    del outputs
    start = input_ids.shape[1]
    total = max(max_length, start + 1)
    sequences = torch.empty(batch, total, dtype=input_ids.dtype, device=device)
    sequences[:, :start] = input_ids
    positions = model_kwargs.get("position_ids")
    plain_greedy = not do_sample and len(logits_processor) == 0

    length, stopped, drawn = start, False, None
    greedy: Tensor | None = None
    while True:
        if plain_greedy:
            tokens = torch.argmax(logits, dim=-1) if greedy is None else greedy[:batch]
        else:
            scores = logits_processor(sequences[:, :length].contiguous(), logits)
            if do_sample:
                drawn = _random_state(device) if ends else None
                tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                tokens = torch.argmax(scores, dim=-1)
        if ends:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        sequences[:, length] = tokens
        tokens = sequences[:, length]  # what the step writes is overwritten by the next one
        length += 1
        if ends:
            for end in ends:
                unfinished = unfinished & ~torch.isin(tokens, end)
        last = length >= total
        if not last:
            # Launched before anything is read back: the device has its next step while the host looks.
            if length == start + 1:
                session.enter(model_kwargs.get("attention_mask"))
                session.feed(tokens, positions)
            else:
                _feed_tokens(step, tokens)  # positions advance by themselves
            step.replay()
            session.cache.advance()
            greedy, logits = step.greedy, step.logits[:batch]
            if not plain_greedy:
                logits = logits.clone()  # processors may write to it
        if streamer is not None or ends:
            late.put(unfinished.max() == 0, tokens)
            for finished, streamed in late.take(0 if last else 1):
                if stopped:
                    break  # the surplus step: its tokens were never asked for
                if streamer is not None:
                    streamer.put(streamed.clone())
                stopped = bool(finished) and bool(ends)
        if last or stopped:
            break
    if stopped and not last:
        # Everything had finished one step before the newest token was drawn.
        length -= 1
        if drawn is not None:
            _set_random_state(device, drawn)
    if streamer is not None:
        streamer.end()
    return sequences[:, :length].clone() if length < total else sequences


def _feed_tokens(step: Any, tokens: Tensor) -> None:
    """The next token of each row, int64 [B]; padded rows take that of row 0."""
    batch = tokens.shape[0]
    step.tokens[:batch, 0].copy_(tokens)
    if batch < step.key.rows:
        step.tokens[batch:, 0].copy_(tokens[0].expand(step.key.rows - batch))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


# on and off


class Generate:
    """What stands in for ``model.generate``; called the same way."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def __wrapped__(self) -> Any:
        return type(self.runtime.model).generate.__get__(self.runtime.model)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return str(type(self.runtime.model).generate.__doc__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime: Runtime = self.runtime
        function: Any = type(runtime.model).generate
        if not runtime.lock.acquire(blocking=False):
            # Another thread decodes, or a user's callback calls generate: the static caches are taken.
            return function(runtime.model, *args, **kwargs)
        runtime.owner = threading.get_ident()
        try:
            reason = runtime.refusal()
            if reason is not None:
                runtime.report.note(f"generate runs without graphs: {reason}")
                return function(runtime.model, *args, **kwargs)
            return _Session(runtime).generate(function, args, kwargs)
        finally:
            runtime.owner = None
            runtime.lock.release()


def attach(model: Any, max_capture_size: int, report: Report) -> None:
    """Let ``model.generate`` use recorded steps. Models without a generate of transformers' are left alone."""
    if not _generates(model):
        return
    model.__dict__[HOOK] = Generate(Runtime(model, max_capture_size, report.runtime))


def detach(model: Any) -> None:
    """Undo ``attach``."""
    if isinstance(model.__dict__.get(HOOK), Generate):
        del model.__dict__[HOOK]


def runtime_of(model: Any) -> Runtime | None:
    """The runtime of an optimized model, or None where generate is not transformers'."""
    hook = model.__dict__.get(HOOK)
    return hook.runtime if isinstance(hook, Generate) else None


def _generates(model: Any) -> bool:
    try:
        from transformers.generation import GenerationMixin
    except ImportError:
        return False
    return isinstance(model, GenerationMixin) and HOOK not in model.__dict__ and model.can_generate()


def capture(model: Any, sizes: Any = None, max_length: int = MIN_LENGTH, progress: bool | None = None) -> RuntimeReport:
    """Record the decode steps of an optimized model, and compile for its prompts, now instead of when first needed.

    Prompts with padding are compiled for when the first one comes. sizes: batch sizes, by default all up to
    ``max_capture_size``. max_length: tokens of prompt and answer together. progress: None shows a bar on a terminal.
    Returns what was captured, and why not the rest.

    Raises TypeError if the model is not one that optimize() has rewritten and whose generate is transformers'.
    """
    runtime = runtime_of(model)
    if runtime is None or not mxfp4_sites(model):
        raise TypeError("capture() takes an optimized model with transformers' generate")
    with runtime.lock:
        reason = runtime.refusal()
        if reason is not None:
            runtime.report.note(f"generate runs without graphs: {reason}")
            return runtime.report
        wanted = capture_sizes(runtime.max_capture_size) if sizes is None else tuple(sizes)
        # The largest first: the smaller ones then share its cache.
        for size in _bar(sorted(wanted, reverse=True), progress):
            runtime.step(size, max_length)
        for size in wanted if "model" not in runtime.refused else ():
            runtime.prefill(size, None)
            for length in reversed(prompt_lengths(size, runtime.max_capture_size)):
                runtime.recorded_prompt(size, length)
    return runtime.report


def _bar(sizes: list[int], wanted: bool | None) -> Any:
    import sys

    if wanted is None:
        wanted = sys.stderr.isatty()
    if not wanted:
        return sizes
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return sizes
    return tqdm(sizes, desc="CUDA graphs")
