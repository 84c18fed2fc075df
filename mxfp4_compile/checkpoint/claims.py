"""What a checkpoint says about itself, held against the headers of its files before anything is made of it.

Contract: nothing large is allocated here, and what is found wrong is a CheckpointError that names file and tensor. A
configuration is a stranger's: its numbers may be absurd, its values of any type.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from .files import CheckpointError, Stored, Weights
from .forms import Form
from .names import Names, converted_by_expert, literal, recipe_of

ADAPTER = "adapter_config.json"
_COUNT = re.compile(r"(^|_)(layers?|experts|blocks|heads|depth)$")
_MIN_COUNT = 4096
_MIN_PARTS, _PARTS_PER_TENSOR = 20_000, 50
_INTEGERS = ("U8", "I8", "F8_E8M0")


def read_config_file(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory; CheckpointError for what is none, or belongs to an adapter."""
    path = directory / "config.json"
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{directory / ADAPTER}: an adapter lies beside the weights, which would be left out; merge it, or give a "
            "directory without it"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is {_short(found)}, not the configuration of a model")
    return found


def check_numbers(config: Mapping[str, Any], weights: Weights, where: Path) -> None:
    """CheckpointError if a configuration counts more layers, experts or heads than its files can hold, or no number."""
    sizes = [max(s.shape, default=1) for s in weights.tensors.values()]
    limit = max(_MIN_COUNT, len(weights.tensors), *sizes)
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        prefix, value = todo.pop()
        items = value.items() if isinstance(value, Mapping) else []
        for key, inner in items:
            if isinstance(inner, Mapping):
                todo.append((f"{prefix}{key}.", inner))
            elif _COUNT.search(str(key)) and not isinstance(inner, (list, bool, type(None))):
                if not (isinstance(inner, int) or (isinstance(inner, float) and inner.is_integer())):
                    if str(key).startswith(("num_", "n_")):
                        raise CheckpointError(f"{where}: {prefix}{key} is {_short(inner)}, not a whole number")
                elif not -1 <= inner <= limit:
                    raise CheckpointError(
                        f"{where}: {prefix}{key} is {_short(inner)}, and the files hold {len(weights.tensors)} tensors "
                        f"of at most {max(sizes, default=0)} rows or columns"
                    )


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def sober(weights: Weights, where: Path, what: str) -> Iterator[None]:
    """While others make something of a configuration: what they raise is a CheckpointError that names the file, and
    a model of far more parts than the files have tensors is not made to its end.

    ImportError (a package that is missing) and ValueError (transformers' own words) go on as they are.
    """
    limit, count = _MIN_PARTS + _PARTS_PER_TENSOR * len(weights.tensors), 0
    thread = threading.get_ident()

    def counted(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise CheckpointError(f"{where} makes a model of more than {limit} modules and parameters; the files hold "
                                  f"{len(weights.tensors)} tensors")  # fmt: skip

    hooks = [
        module_hooks.register_module_module_registration_hook(counted),
        module_hooks.register_module_parameter_registration_hook(counted),
    ]
    try:
        yield
    except (CheckpointError, ImportError):
        raise
    except ValueError as error:
        if str(where) in str(error):
            raise
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{where}: {what}: {type(error).__name__}: {reason[:300]}") from error
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Held:
    """What the files have of a model: the parameters in MXFP4, and those of a new head that are nowhere."""

    quantized: set[str]
    new: list[str]

    def left(self, model: nn.Module, names: Iterable[str]) -> list[str]:
        """Those of the modules that a file says were left alone of which the files indeed hold nothing in MXFP4."""
        known = {name for name, _ in model.named_modules()}
        return [n for n in names if n in known and not any(q.startswith(f"{n}.") for q in self.quantized)]


def check_parameters(model: nn.Module, weights: Weights, form: Form | None, *, new_head: bool = False) -> Held:
    """CheckpointError unless the files hold every parameter and saved buffer of ``model``, in its shape.

    ``new_head``: what lies outside of the base model may be missing (a class other than the checkpoint's).
    """
    naming = Names(model)
    held: dict[str, int] = {}
    exact: dict[str, bool] = {}
    shared: set[str] = set()
    quantized: set[str] = set()
    keys: dict[str, dict[tuple[str | None, str], list[str]]] = {}
    experts: dict[str, int] = {}
    for key, stored in weights.tensors.items():
        split = _split(form, stored)
        role, base = split or ("values", key)
        name, pattern = naming.rename(base)
        if role == "codes":
            quantized.add(name)
        if name not in naming.state:
            continue
        converter = naming.by_pattern.get(pattern) if pattern is not None else None
        if converter is not None and len(converter.target_patterns) > 1:
            first, *others = (literal(p) for p in converter.target_patterns)
            shared |= {name, *[name.replace(first, other) for other in others]}
        elif converter is None and role == "values" and stored.shape != tuple(naming.state[name].shape):
            raise CheckpointError(
                f"{stored} is {name} {list(naming.state[name].shape)} by config.json: the two do not belong together"
            )
        numbers = math.prod(stored.shape) * {"values": 1, "codes": 2, "scales": 0}[role]
        held[name] = held.get(name, 0) + numbers
        keys.setdefault(name, {}).setdefault((pattern, role), []).append(key)
        recipe = recipe_of(converter)
        if recipe is not None and recipe.merge and role == "values":
            experts[name] = naming.state[name].shape[0]
        exact[name] = exact.get(name, True) and role == "values" and converted_by_expert(converter)
    if form is not None and not quantized:
        raise CheckpointError(
            f"{weights.files[0].parent / 'config.json'} says that the weights are MXFP4 ({form.name}), and no "
            "tensor is; remove its quantization_config if they are not quantized"
        )
    for name, numbers in held.items():
        wanted, shape = naming.state[name].numel(), list(naming.state[name].shape)
        for found in keys[name].values():
            if len(found) != experts.get(name, len(found)):
                raise CheckpointError(
                    f"{weights[found[0]]} is one of {len(found)} experts; the model has {experts[name]}"
                )
        if name not in shared and (wanted != numbers if exact[name] else wanted > 2 * max(numbers, 1)):
            first = next(iter(keys[name].values()))[0]
            raise CheckpointError(
                f"{weights[first]}: by config.json {name} {shape} has {wanted} values, and the files hold {numbers}"
            )
    return Held(quantized, _missing(model, naming, weights, {*held, *shared}, new_head))


def _missing(model: nn.Module, naming: Names, weights: Weights, held: set[str], new_head: bool) -> list[str]:
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    objects = {id(parameters[name]) for name in held if name in parameters}
    lacking = []
    for name in naming.state:
        if name in held or id(parameters.get(name)) in objects or any(p.search(name) for p in ignored):
            continue
        if tied.get(name) in held or any(tied.get(other) == name for other in held):
            continue
        lacking.append(name)
    prefix = f"{naming.prefix}."
    head = [n for n in lacking if not n.startswith(prefix)] if new_head and hasattr(model, naming.prefix) else []
    needed = [name for name in lacking if name not in head]
    if needed:
        files = ", ".join(str(f) for f in weights.files[:3])
        raise CheckpointError(
            f"nothing in {files} is for {needed[0]}"
            + (f" and {len(needed) - 1} other parameters" if len(needed) > 1 else "")
        )
    return head


def _split(form: Form | None, stored: Stored) -> tuple[str, str] | None:
    """Role and base name of an MXFP4 tensor, None for others; CheckpointError for what only looks like one."""
    if form is None:
        return None
    form.check_tensor(stored)
    split = form.split(stored.name)
    if split is None or stored.dtype in _INTEGERS:
        return split
    if split[0] == "scales":
        what = "NVFP4 has such scales" if stored.dtype == "F8_E4M3" else "of another quantization"
        raise CheckpointError(f"{stored}: scales of MXFP4 are E8M0 bytes (U8, I8 or F8_E8M0); these are {what}")
    return None


def most_common_float(weights: Weights) -> torch.dtype:
    """The float dtype most bytes of a checkpoint have; bf16 where there is none."""
    sizes: dict[torch.dtype, int] = {}
    for stored in weights.tensors.values():
        if stored.dtype in ("BF16", "F16", "F32"):
            sizes[stored.torch_dtype] = sizes.get(stored.torch_dtype, 0) + stored.bytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else torch.bfloat16
