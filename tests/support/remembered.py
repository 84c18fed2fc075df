"""Traces and matches that are made once a process, for tests that are about something else.

Two experts modules of one code, of equal shapes and plain attributes, called alike, trace to one graph:
`same.structure_key` says so of the layers of a model, and this of tiny models made anew by one test after another, of
whatever family: many families have the same code under names of their own, and of a configuration only what that code
names matters. Regions of graphs that Dynamo traced are told by their code, as the library itself does. Any other module
may be changed in ways that no key shows, and is not remembered.
A wrong graph would not pass for right: a site is verified against its module after matching.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mxfp4_compile import planning
from mxfp4_compile.dynamo.regions import RegionModule
from mxfp4_compile.passes import same
from mxfp4_compile.passes.observe import observers
from mxfp4_compile.passes.trace.traced import CallPattern, Traced

_matches: dict[Any, tuple[Traced, Any]] = {}
_KEPT = 200


def _known(module: nn.Module) -> bool:
    return isinstance(module, RegionModule) or type(module).__module__.startswith("transformers.")


def _key(module: nn.Module, pattern: CallPattern) -> Any:
    if isinstance(module, RegionModule):
        own = (*module.named_parameters(), *module.named_buffers())
        tensors = tuple((name, tuple(t.shape), t.dtype, t.device, t.stride()) for name, t in own)
        said = module.program.code, module.names, module.packed, module.traced_dtype
        return said, tensors, pattern, _modes()
    structure, names = [], {"_experts_implementation"}
    for name, cls, plain, tensors in same.structure_key(module):
        code = _code(cls)
        names |= set(_names(code))
        structure.append((name, code, tuple(a for a in plain if a[0] != "config"), tensors))
    configs = [_said(m.config, names) for m in module.modules() if getattr(m, "config", None) is not None]
    return tuple(structure), tuple(configs), pattern, _modes()


def _said(config: Any, names: set[str]) -> str:
    """The attributes of a configuration that code with these names may read."""
    own = {name.lstrip("_"): name for name in (*vars(config), *getattr(config, "attribute_map", ()))}
    return repr(
        [(name, getattr(config, own[name], None)) for name in sorted({n.lstrip("_") for n in names} & set(own))]
    )


def _code(cls: type) -> Any:
    """A class of transformers by the code of the methods that it has now, wrapped or not; any other by itself."""
    if not cls.__module__.startswith("transformers."):
        return cls
    methods = [
        (c, n, f) for c in reversed(cls.__mro__) for n, f in vars(c).items() if isinstance(f, types.FunctionType)
    ]
    return _code_of(
        tuple((n, f) for c, n, f in methods if n != "__init__" and c.__module__.startswith("transformers."))
    )


@functools.cache
def _code_of(methods: tuple[tuple[str, types.FunctionType], ...]) -> Any:
    return tuple((name, _function(method, ())) for name, method in sorted(methods, key=lambda named: named[0]))


def _of_models(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and value.__module__.startswith("transformers.")


def _function(function: types.FunctionType, above: tuple[Any, ...]) -> Any:
    """Its code, and what its names and its closure mean, other functions of transformers by theirs."""
    if function in above:
        return "again", above.index(function)
    above = (*above, function)
    code = function.__code__
    cells = [c.cell_contents for c in function.__closure__ or ()]
    known = [function.__globals__[n] for n in _names(_plain(code)) if n in function.__globals__]
    meant = [_function(v, above) if _of_models(v) else same.Itself(v) for v in (*cells, *known)]
    return _plain(code), repr((function.__defaults__, function.__kwdefaults__)), tuple(meant)


def _plain(code: types.CodeType) -> Any:
    """A code object without the places of its lines."""
    constants = tuple(_plain(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, constants


def _names(key: Any) -> Iterator[str]:
    """All strings in a key: names, and constants that may be names of attributes."""
    if isinstance(key, str):
        yield key.strip("'")
    elif isinstance(key, tuple):
        for part in key:
            yield from _names(part)


def _modes() -> tuple[Any, ...]:
    """What a trace may depend on that is set around it."""
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype(), *autocast


def _steps() -> tuple[Any, ...]:
    return planning.trace, planning.unroll, planning.collapse, planning.match


_ALONE = _steps()
_made = planning._match_of


def match_of(module: nn.Module, pattern: CallPattern) -> tuple[Traced, Any]:
    """As planning's: how a module of transformers traces and what was matched, once a process.

    A test that looks at one of the steps, in whose place it has put another, gets what it asks for each time.
    """
    if not _known(module) or observers or _steps() != _ALONE:
        return _made(module, pattern)
    key = _key(module, pattern)
    if key not in _matches:
        if len(_matches) >= _KEPT:
            _matches.clear()
        _matches[key] = _made(module, pattern)
    return _matches[key]
