"""One call of ``generate``: transformers' own on a driver of the model, which decodes by recorded steps.

The *driver* is an object that shares the model's state and whose class is the model's with a few methods more.
Everything before the decoding loop is transformers' code, and so is the prompt, whose decoder layers are compiled where
that is right (prompts.py). Then one of three:

1. the plain loop of loop.py, for greedy decoding and sampling whose only reasons to stop are a length and end tokens;
2. transformers' own loops (beam search, custom stopping criteria, returned scores, ...) with their model call
   replaced by a recorded step;
3. transformers' own loops on the model as it is, where a recorded step would be wrong or does not exist. The
   report says why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import __version__
from transformers.cache_utils import DynamicCache
from transformers.generation import EosTokenCriteria, GenerationMixin, MaxLengthCriteria

from .caches.base import CACHE, CannotMove
from .caches.handover import HandoverCache
from .eligibility import PLAIN_INPUTS, planes_of, unusual_inputs
from .loop import feed_tokens, plain_loop
from .state import Runtime
from .step import expand_rows


@lru_cache(maxsize=64)
def _driver_class(base: type) -> type:
    """``base`` with decoding methods that may use recorded steps; of the same name, as transformers reads it."""

    class Driver(base):  # type: ignore[misc, valid-type]
        def _sample(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return Session.current(self).sample(input_ids, kwargs)

        def _beam_search(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return Session.current(self).beam_search(input_ids, kwargs)

        def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
            Session.current(self).assisted()
            return super()._assisted_decoding(*args, **kwargs)

        def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
            session = Session.current(self)
            if session.step is not None:
                return True
            return bool(super()._valid_auto_compile_criteria(model_kwargs, generation_config))

        def get_compiled_call(self, compile_config: Any) -> Any:
            session = Session.current(self)
            return session if session.step is not None else super().get_compiled_call(compile_config)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return Session.current(self)(*args, **kwargs)

    Driver.__name__, Driver.__qualname__, Driver.__module__ = base.__name__, base.__qualname__, base.__module__
    return Driver


class Session:
    """One call of generate."""

    _active = threading.local()

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.model: Any = runtime.model
        self.step: Any = None
        self.cache: Any = None  # a HandoverCache once there is a step
        self.reached = False  # whether a way of decoding was reached that recorded steps are for
        self.handed_in = False  # whether the cache is the caller's, who finds it filled as transformers fills it
        self.exact = False  # whether its cache cannot take back a token that was fed too much

    @classmethod
    def current(cls, driver: Any) -> Session:
        session: Session = cls._active.session
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
            result = function(driver, *args, **kwargs)
            if not self.reached:
                self.runtime.report.note("generate runs without graphs: its way of decoding is not one they are for")
            return result
        finally:
            self._active.session = outer
            if self.handed_in:
                self.cache.settle()

    # the decoding methods

    def sample(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """greedy decoding or sampling; arguments of transformers' ``_sample``."""
        model = self.model
        self._choose_step(input_ids, kwargs)
        if self.step is None:
            return type(model)._sample(model, input_ids, **kwargs)
        if self._plain(kwargs):
            return plain_loop(self, input_ids, **kwargs)
        return self._own_cache(type(model)._sample(self.driver, input_ids, **kwargs))

    def beam_search(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """beam search, with or without sampling; arguments of transformers' ``_beam_search``."""
        model = self.model
        self._choose_step(input_ids, kwargs)
        if self.step is None:
            return type(model)._beam_search(model, input_ids, **kwargs)
        return self._own_cache(type(model)._beam_search(self.driver, input_ids, **kwargs))

    def assisted(self) -> None:
        """Speculative decoding, whoever proposes: said, and left to transformers."""
        self.reached = True
        self.runtime.report.note(
            "generate runs without graphs: assisted decoding (an assistant, lookup, early exit, MTP)"
        )

    def _choose_step(self, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        """Choose the recorded step and exchange the cache, if this call's cache is one that can move."""
        self.reached = True
        reason = self._refusal(input_ids, kwargs)
        if reason is not None:
            self.runtime.report.note(f"generate runs without graphs: {reason}")
            return
        cache = kwargs[CACHE]
        batch, seen = input_ids.shape[0], _seen(cache)
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        prompt = embeds.shape[1] if embeds is not None else input_ids.shape[1]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            prompt = max(prompt, mask.shape[1])
        prompt += seen if prompt <= seen else 0
        tokens = prompt + max(kwargs["generation_config"].max_length - input_ids.shape[1], 1)
        step = self.runtime.step(batch, tokens, planes_of(kwargs))
        handed_in = seen > 0 or getattr(cache, "_is_user_defined", False)
        if step is not None and handed_in:
            try:
                step.cache.check(cache, self.model.config.get_text_config(decoder=True), batch)
            except CannotMove as error:
                self.runtime.report.note(f"generate runs without graphs: the cache handed in does not fit: {error}")
                return
        if step is not None:
            self.step = step
            self.cache = kwargs[CACHE] = HandoverCache(cache)
            self.handed_in = handed_in
            self.exact = handed_in and not all(form.forgets for form in step.cache.forms)

    def _refusal(self, input_ids: Tensor, kwargs: dict[str, Any]) -> str | None:
        """Why this call is decoded as transformers has it, or None."""
        config: Any = kwargs["generation_config"]
        cache: Any = kwargs.get(CACHE)
        others = [name for name, value in kwargs.items() if isinstance(value, DynamicCache) and name != CACHE]
        if cache is None and others:
            return f"transformers {__version__} hands its cache over as {others[0]!r}, which is not known here"
        if not kwargs.get("use_cache", True):
            return "use_cache=False"
        if cache is None:
            return "the model makes a cache of its own"
        if type(cache) is not DynamicCache:
            return f"its cache is a {type(cache).__name__}"
        if getattr(cache, "offloading", False):
            return "its cache is offloaded"
        if config.disable_compile or config.compile_config is not None:
            return "disable_compile" if config.disable_compile else "compile_config"
        if getattr(config, "is_assistant", False):
            return "the model is the assistant of another generate"
        if input_ids.device != self.model.device:
            return f"its tokens are on {input_ids.device} and the model on {self.model.device}"
        return None

    def _plain(self, kwargs: dict[str, Any]) -> bool:
        own = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill", "_sample")
        usual = PLAIN_INPUTS | {
            "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer", "inputs_embeds",
        }  # fmt: skip
        extra = [k for k, v in kwargs.items() if v is not None and k not in usual]
        return (
            not kwargs["generation_config"].return_dict_in_generate
            and not kwargs.get("synced_gpus")
            and not extra
            and not planes_of(kwargs)
            and all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in kwargs["stopping_criteria"])
            and all(getattr(type(self.model), n) is getattr(GenerationMixin, n) for n in own)
        )

    def _own_cache(self, result: Any) -> Any:
        """A cache that is returned must not be the one that the next generation overwrites."""
        if isinstance(getattr(result, CACHE, None), HandoverCache):
            setattr(result, CACHE, getattr(result, CACHE).plain())
        return result

    # the model call of transformers' loops

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """``model(**inputs)``, by a recorded step where it is a decode step that one can do."""
        if args or not self._recordable(inputs):
            return self.model(*args, **inputs) if args else self._prompt(inputs)
        step, batch = self.step, inputs["input_ids"].shape[0]
        self.enter(inputs.get("attention_mask"), batch)
        positions = inputs.get("position_ids")
        self.feed(inputs["input_ids"][:, 0], positions)
        step.replay()
        self.cache.advance()
        return step.output_class(logits=step.logits[:batch, None].clone(), **{CACHE: self.cache})

    def _prompt(self, inputs: dict[str, Any]) -> Any:
        """``model(**inputs)`` of anything but a decode step: if it begins the cache, recorded or by compiled layers."""
        ids = inputs.get("input_ids")
        ids = inputs.get("inputs_embeds") if ids is None else ids
        mask = inputs.get("attention_mask")
        if (
            self.step is None
            or self.cache.get_seq_length() > 0
            or id(inputs.get(CACHE)) != id(self.cache)
            or ids is None
            or ids.shape[1] < 2
            or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        ):
            return self.model(**inputs)
        if self.runtime.prompt_size(*ids.shape[:2]) is not None and self._plain_prompt(inputs):
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
            and not unusual_inputs(inputs)
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
        known = cache is not None and id(inputs.get(CACHE)) == id(cache)
        if self.step is None or not known:
            return False
        ids: Any = inputs.get("input_ids")
        mask: Any = inputs.get("attention_mask")
        if ids is None or ids.shape[1] != 1:
            return False
        extra = unusual_inputs(inputs)
        if planes_of(inputs) != self.step.key.planes:
            extra.append("position_ids of another kind")
        if extra:
            self.runtime.report.note(f"decode steps given {', '.join(sorted(extra))} run without graphs")
        return (
            not extra
            and (mask is None or mask.dim() == 2)
            and (cache.static is not None or cache.get_seq_length() > 0)
            and cache.get_seq_length() < self.step.key.length
        )

    def enter(self, attention_mask: Tensor | None, batch: int) -> None:
        """Move the cache of ``batch`` rows into the step, if it is not there."""
        if self.cache.static is None:
            with torch.inference_mode(False), torch.no_grad():
                self.cache.lend(self.step.cache, attention_mask, batch)

    def feed(self, tokens: Tensor, positions: Tensor | None) -> None:
        """The next token of each row, int64 [B]; positions [..., B or 1, 1], or None where they follow the cache."""
        step = self.step
        feed_tokens(step, tokens)
        if positions is None:
            step.position_ids.copy_(step.cache.position.expand_as(step.position_ids))
        else:
            last = positions[..., -1:].expand(*positions.shape[:-2], tokens.shape[0], 1)
            step.position_ids.copy_(expand_rows(last, step.key.rows, last.dim() - 2))


def _seen(cache: DynamicCache) -> int:
    """Tokens in a cache, 0 if it has no layers yet."""
    return int(cache.get_seq_length()) if len(cache.layers) else 0
