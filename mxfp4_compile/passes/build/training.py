"""What a module does in training mode and not in eval mode, read off its code and its attributes.

Contract: a rewritten graph is that of eval mode, so whatever is found here is missing in it. Found are dropout modules
with p > 0, and every mention of ``self.training`` in a forward or a method of the module, unless the condition or call
that it stands in also mentions an attribute which is 0, None or False now: a dropout or a noise that is switched off.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import Any

from torch import nn

_OFF = (bool, int, float, type(None))


def changed_by_training(module: nn.Module) -> tuple[str, ...]:
    """In words, what training mode adds to ``module`` or what is in it; nothing where it adds nothing."""
    found: list[str] = []
    for name, part in module.named_modules():
        label = f"{name} ({type(part).__name__})" if name else type(part).__name__
        if isinstance(part, nn.modules.dropout._DropoutNd):
            if part.p > 0:
                found.append(f"{label} with p={part.p}")
        elif not type(part).__module__.startswith("torch.nn."):
            found += [f"self.training in {method} of {label}" for method in _methods_that_ask(part)]
    return tuple(found)


def _methods_that_ask(module: nn.Module) -> list[str]:
    """Names of the methods behind ``forward`` in which ``self.training`` may change something."""
    waiting, seen, found = ["forward"], {"forward"}, []
    while waiting:
        name = waiting.pop()
        function = inspect.unwrap(getattr(type(module), name))
        function = getattr(function, "fget", function)
        code = getattr(function, "__code__", None)
        if not isinstance(code, types.CodeType):
            continue
        codes = (code, *(c for c in code.co_consts if isinstance(c, types.CodeType)))
        names = {n for one in codes for n in one.co_names}
        if "training" in names and not _all_off(function, module):
            found.append(name)
        methods = {n for n in names - seen if hasattr(type(module), n) and not hasattr(nn.Module, n)}
        seen |= methods
        waiting += sorted(methods)
    return sorted(found)


def _all_off(function: Any, module: nn.Module) -> bool:
    """Whether every ``self.training`` stands with an attribute that is off; False where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    asked = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "training"]
    return all(_is_off(node, parents, module) for node in asked)


def _is_off(node: ast.AST, parents: dict[ast.AST, ast.AST], module: nn.Module) -> bool:
    while node in parents and not isinstance(node, ast.stmt):
        node = parents[node]
        together = isinstance(node, ast.Call) or (isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And))
        if together and any(_value_is_off(n, module) for n in ast.walk(node) if isinstance(n, ast.Attribute)):
            return True
    return False


def _value_is_off(node: ast.Attribute, module: nn.Module) -> bool:
    if not (isinstance(node.value, ast.Name) and node.value.id == "self") or node.attr == "training":
        return False
    value = getattr(module, node.attr, True)
    return isinstance(value, _OFF) and not value


__all__ = ["changed_by_training"]
