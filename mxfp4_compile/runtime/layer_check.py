"""What a recorded step is checked against: each decoder layer by itself, on inputs that the eager model gives it.

Whole logits of many layers amplify rounding until they say little: on random weights as large as gpt-oss-20b's, two
right ways of computing differ by 0.6 in bf16. One layer does not. For each of several conditions (a second token, left
padding, past and at a window, the last slot, a padded row)::

    eager model, one new token  --inputs of layer i-->  step's layer i      --> output, cache   } of which each may
           (a Lesson)           --inputs of layer i-->  layer i in fp32     --> output, cache   } be as far from fp32
                                                        eager layer i       --> output, cache   } as the eager one is

The step's error may be 1.25 times the eager layer's own, and a rounding of the result. A row of a layer that fails is
tried again on other tokens: a router that is nearly undecided may choose other experts than it does in fp32, but not
for all tokens, and what is wrong with a mask, a position or a slot is wrong for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.build.module import MXFP4Experts
from ..processes import OneProcess
from .caches.base import CACHE, LayerForm
from .layers import decoder_layers, layer_forwards
from .probe import last_logits, positions_of, random_tokens
from .step import DecodeStep, expand_rows

# A row's error may be this many times the eager layer's own, ...
_FACTOR = 1.25
# ... and this many units of rounding of the result's type, relative to the result.
_ROUNDING = {torch.float64: 64.0, torch.float32: 64.0}
_HALF_ROUNDING = 1.0
# Logits from the same hidden states, relative.
_LOGITS = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_LOGITS = 2e-2
_TRIES = 6
# Tokens that are run through the model; longer caches repeat them.
_PROMPT = 24
# A cache that is filled up to its last slot is made for the check unless it takes more than this.
_LARGEST_BYTES = 256 << 20


class CannotCheck(RuntimeError):
    """Layers of this model cannot be run by themselves; the message says why."""


@dataclass(frozen=True)
class Condition:
    """What a step is tried on: ``batch`` rows that have ``seen`` tokens each; padded: the second on the left."""

    name: str
    seen: int
    batch: int
    padded: bool = False


def conditions_for(forms: tuple[LayerForm, ...], rows: int, length: int) -> tuple[Condition, ...]:
    """The conditions of a step of ``rows`` rows and ``length`` tokens."""
    window = next((form.window for form in forms if form.window is not None), None)
    past = window if window is not None and window + 16 < min(length, 1024) else 0
    found = [
        Condition("a prompt", 9 + past, rows, padded=rows > 1),
        Condition("a second token, and a row of padding", 1, max(rows - 1, 1)),
    ]
    if past and rows > 1:
        found.append(Condition("padding in the window", 6, 2, padded=True))
    if past:
        found.append(Condition("a full window", past - 1, min(rows, 2)))
    if sum(form.bytes(1, length) for form in forms) <= _LARGEST_BYTES:
        found.append(Condition("the last slot", length - 1, 1))
    return tuple(found)


class Lesson:
    """One new token of the eager model under a condition: what each decoder layer was given and gave.

    cache: before the token. after: with it. inputs: by layer, arguments of its forward. outputs: [B, 1, H] by layer.
    """

    def __init__(self, model: Any, condition: Condition, seed: int) -> None:
        self.condition = condition
        device = next(model.parameters()).device
        seen, batch = condition.seen, condition.batch
        short = min(seen, _PROMPT)
        ids = random_tokens(model, batch, short + 1, seed)
        mask = torch.ones(batch, seen + 1, dtype=torch.int64, device=device)
        if condition.padded:
            mask[1, :3] = 0
        self.mask = mask if condition.padded else None
        positions = positions_of(mask)
        self.token, self.position = ids[:, -1:], positions[:, -1:]
        output = model(
            input_ids=ids[:, :-1],
            attention_mask=None if self.mask is None else self.mask[:, :short],
            position_ids=positions[:, :short],
            use_cache=True,
            **last_logits(model),
        )
        self.cache = getattr(output, CACHE)
        if short < seen:
            _stretch(self.cache, short, seen)
        self.inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.outputs: dict[int, Tensor] = {}
        self.after = copy.deepcopy(self.cache)
        layers = decoder_layers(model)
        with layer_forwards({layer: _Listening(self, i, layer) for i, layer in layers.items()}):
            eager = model(
                input_ids=self.token,
                attention_mask=self.mask,
                position_ids=self.position,
                use_cache=True,
                **{CACHE: self.after},
            )
        if not layers or self.inputs.keys() != layers.keys():
            raise CannotCheck("its decoder layers cannot be told apart")
        self.logits = eager.logits[:, -1]

    def in_full(self, layer: nn.Module, index: int, processes: OneProcess) -> tuple[Tensor, Any]:
        """The layer's output and its cache after it, computed in fp32 (for fp32 models in fp64)."""
        wide = torch.float32 if self.outputs[index].dtype.itemsize < 4 else torch.float64
        args, kwargs = self.inputs[index]
        cache = _alone(self.cache, index)
        _cast_cache(cache.layers[index], wide)
        made = _widened(layer, wide, processes)
        out = made(*_cast(args, wide), **_cast({**kwargs, CACHE: None}, wide) | {CACHE: cache})
        return _hidden(out), cache.layers[index]


class _Listening:
    """A decoder layer's forward, which a lesson hears."""

    def __init__(self, lesson: Lesson, index: int, layer: nn.Module) -> None:
        self._lesson, self._index, self._layer = lesson, index, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = type(self._layer).forward(self._layer, *args, **kwargs)
        if kwargs.get(CACHE) is self._lesson.after:
            self._lesson.inputs[self._index] = args, kwargs
            self._lesson.outputs[self._index] = _hidden(out)
        return out


class LayerCheck:
    """The lessons of one size of step; made once, for every way of making it."""

    def __init__(
        self, model: Any, forms: tuple[LayerForm, ...], rows: int, length: int, processes: OneProcess | None = None
    ) -> None:
        """Raises CannotCheck where layers cannot be run by themselves."""
        self._model, self._rows = model, rows
        self._processes = processes or OneProcess()
        self._layers = decoder_layers(model)
        self._conditions = conditions_for(forms, rows, length)
        self._lessons: dict[tuple[Condition, int], Lesson] = {}
        self._full: dict[tuple[Condition, int, int], tuple[Tensor, Any]] = {}
        for condition in self._conditions:
            lesson = self._lesson(condition, 0)
            try:
                self._in_full(lesson, 0, next(iter(self._layers)))
            except Exception as failure:
                raise CannotCheck(f"{type(failure).__name__}: {failure}"[:200]) from failure

    def fault_of(self, step: DecodeStep) -> tuple[str | None, float]:
        """What is wrong with a step, or None; and the largest relative difference of a layer from the eager one."""
        largest = 0.0
        for condition in self._conditions:
            wrong: dict[tuple[Any, int], str] | None = None
            for seed in range(_TRIES):
                found, difference = self._compare(step, self._lesson(condition, seed), seed)
                found = self._processes.union("a lesson", found)
                wrong = found if wrong is None else {k: v for k, v in wrong.items() if k in found}
                largest = difference if seed == 0 else largest
                if not wrong:
                    break
            if wrong:
                return f"{condition.name}: {next(iter(wrong.values()))}", largest
        return None, largest

    def _lesson(self, condition: Condition, seed: int) -> Lesson:
        key = condition, seed
        if key not in self._lessons:
            self._lessons[key] = Lesson(self._model, condition, seed)
        return self._lessons[key]

    def _in_full(self, lesson: Lesson, seed: int, index: int) -> tuple[Tensor, Any]:
        key = lesson.condition, seed, index
        if key not in self._full:
            self._full[key] = lesson.in_full(self._layers[index], index, self._processes)
        return self._full[key]

    def _compare(self, step: DecodeStep, lesson: Lesson, seed: int) -> tuple[dict[tuple[Any, int], str], float]:
        """(layer or "logits", row) -> in words, for what is too far off; and the largest relative difference."""
        batch, seen = lesson.condition.batch, lesson.condition.seen
        step.cache.fill(lesson.cache, lesson.mask)
        step.tokens.copy_(expand_rows(lesson.token, step.key.rows))
        step.position_ids.copy_(expand_rows(lesson.position, step.key.rows))
        outputs: dict[int, Tensor] = {}

        def teach(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[..., Any]) -> Any:
            theirs, named = lesson.inputs[index]
            hidden = theirs[0] if theirs else named["hidden_states"]
            hidden = expand_rows(hidden, step.key.rows).contiguous()
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
            out = call(args, kwargs)
            outputs[index] = _hidden(out).clone()
            taught = expand_rows(lesson.outputs[index], step.key.rows).contiguous()
            return (taught, *out[1:]) if isinstance(out, tuple) else taught

        step.run_taught(teach)
        after = copy.deepcopy(lesson.cache)
        step.cache.drain(after, batch, seen + 1)
        wrong: dict[tuple[Any, int], str] = {}
        largest = 0.0
        for index in self._layers:
            full, held = self._in_full(lesson, seed, index)
            got, eager = outputs[index], lesson.outputs[index]
            view = step.cache.views[index]
            pairs = [(got[:batch], eager, full)]
            states = [view.held(cache) for cache in (after.layers[index], lesson.after.layers[index], held)]
            pairs += list(zip(*states, strict=True))
            largest = max(largest, *(_relative(a, b) for a, b, _ in pairs))
            for what, (a, b, f) in zip(("output", *["cache"] * 9), pairs, strict=False):
                for row, (error, allowed) in enumerate(_errors(a, b, f)):
                    if not error <= allowed:
                        text = f"{what} of layer {index}, row {row}: error {error:.2g}, at most {allowed:.2g}"
                        wrong.setdefault((index, row), text)
            for row in range(batch, step.key.rows):
                if not torch.allclose(got[row], got[0], rtol=1e-2, atol=1e-3 * float(got[0].abs().max())):
                    wrong.setdefault((index, row), f"layer {index}: padded row {row} is not as row 0")
        bound = _LOGITS.get(next(iter(outputs.values())).dtype, _HALF_LOGITS)
        for row in range(batch):
            error = _relative(step.logits[row], lesson.logits[row])
            if not error <= bound:
                wrong["logits", row] = f"logits of row {row}: error {error:.2g}, at most {bound:.2g}"
        return wrong, largest


def _errors(got: Tensor, eager: Tensor, full: Tensor) -> list[tuple[float, float]]:
    """(relative error, what it may be) of each row."""
    unit = torch.finfo(eager.dtype).eps / 2 * _ROUNDING.get(eager.dtype, _HALF_ROUNDING)
    if got.shape != full.shape:
        return [(float("inf"), 0.0)] * got.shape[0]
    got, eager, full = (t.double().flatten(1) for t in (got, eager, full))
    norm = full.norm(dim=1).clamp(min=1e-30)
    error = (got - full).norm(dim=1) / norm
    allowed = _FACTOR * (eager - full).norm(dim=1) / norm + unit
    return list(zip(error.tolist(), allowed.tolist(), strict=True))


def _relative(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def _hidden(out: Any) -> Tensor:
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


# a layer alone, in higher precision


class _InItsType(nn.Module):
    """Experts whose weights stay what they are, called with wider numbers."""

    def __init__(self, site: MXFP4Experts, wide: torch.dtype) -> None:
        super().__init__()
        self._site, self._wide = [site], wide  # in a list: not a child, which would be cast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        site = self._site[0]
        wanted = [getattr(leaf, "dtype", site.plan.weight_dtype) for leaf in site.plan.pattern.leaves]
        named = dict(zip(site.plan.pattern.keywords, wanted[len(args) :], strict=True))
        args = tuple(_cast(a, dtype) for a, dtype in zip(args, wanted, strict=False))
        return _cast(site(*args, **{name: _cast(a, named[name]) for name, a in kwargs.items()}), self._wide)


def _widened(layer: nn.Module, wide: torch.dtype, processes: OneProcess) -> nn.Module:
    """A copy of a layer in ``wide``, but for its MXFP4 experts."""
    memo: dict[int, Any] = {}
    for module in layer.modules():
        config = getattr(module, "config", None)
        if config is not None:
            memo[id(config)] = config
        if isinstance(module, MXFP4Experts):
            memo[id(module)] = _InItsType(module, wide)
    processes.copying(layer, memo)
    made = copy.deepcopy(layer, memo)
    processes.copied(made)
    return made.to(wide)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not dtype.is_floating_point:
            return value
        # A mask's lowest number must not become infinite, nor a finite one where -inf was meant.
        return (
            value.to(dtype).clamp(min=torch.finfo(dtype).min)
            if value.dtype.itemsize > dtype.itemsize
            else value.to(dtype)
        )
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def _alone(cache: Any, index: int) -> Any:
    """A copy of a cache of which one layer's contents are copied and the others' are shared."""
    made = copy.copy(cache)
    made.layers = list(cache.layers)
    made.layers[index] = copy.deepcopy(cache.layers[index])
    return made


def _cast_cache(layer: Any, dtype: torch.dtype) -> None:
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) or (
            isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())
        ):
            setattr(layer, name, _cast(value, dtype))
    if hasattr(layer, "dtype"):
        layer.dtype = dtype


def _stretch(cache: Any, held: int, seen: int) -> None:
    """Make a cache of ``held`` tokens one of ``seen``, by repeating them."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if keys is None:
            continue
        window = getattr(layer, "sliding_window", None)
        keep = seen if window is None else min(seen, window - 1)
        rows = torch.arange(seen - keep, seen, device=keys.device) % keys.shape[2]
        layer.keys, layer.values = keys[:, :, rows], layer.values[:, :, rows]
        if window is not None:
            layer.cumulative_length = seen
        indexer = getattr(layer, "indexer_keys", None)
        if indexer is not None:
            layer.indexer_keys = indexer[:, rows]
