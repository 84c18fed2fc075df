"""Export: one module as it is to a functional, undecomposed ATen graph with parameters known by name.

Contract: the module is read, never changed; nothing is computed on its weights (export fakeifies them).

1. replay the recorded call on the real module under ``torch.export`` with the dimensions that differed
   between two recorded calls marked dynamic;
2. ``run_decompositions({})``: in-place ops become functional, composite ones (silu, gelu) stay whole;
3. sort the placeholders into parameters, buffers, constants and inputs;
4. what the trace decided by sizes must hold for all of them (``guards``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from ..alterations import without_hooks
from ..calls import TensorInfo
from .failures import in_words
from .guards import Exported, Sizes, settle
from .program import exported, functional
from .traced import CallPattern, Traced, TraceError, free_dims, named_dims


def trace(module: nn.Module, pattern: CallPattern) -> Traced:
    """Trace ``module`` as ``pattern`` says it is called; TraceError with the reason if it does not trace."""
    return settle(lambda called, sizes: _exported(module, called, sizes), pattern)


def _exported(module: nn.Module, pattern: CallPattern, sizes: Sizes, at_once: bool = False) -> Exported:
    """One trace; ``at_once``: made functional here, so that what fails at that is traced in the other way, too."""
    example = [leaf.zeros() if isinstance(leaf, TensorInfo) else leaf for leaf in pattern.leaves]
    args, kwargs = pattern.arrange(example)
    error: Exception | None = None
    # Sizes that were equal in both recorded calls are one size (the token count); if that does not hold for
    # this module, let export find out the relations by itself.
    for shapes in (named_dims(pattern), free_dims(pattern)):
        arg_shapes, kwarg_shapes = pattern.arrange(shapes)
        try:
            with without_hooks(module):
                sizes.forget()
                # A wrapper gives every module the signature forward(args, kwargs): HF's own wrappers have
                # names in their signatures that the implementation behind them does not accept.
                program = exported(_Caller(module, sizes), args, kwargs, {"args": arg_shapes, "kwargs": kwarg_shapes})
            done = functional(program) if at_once else None
            break
        except Exception as failure:
            error = error or failure
    else:
        assert error is not None
        raise TraceError(f"does not trace: {in_words(error)}") from error

    def finish() -> tuple[Traced, torch.export.ExportedProgram]:
        try:
            whole = done or functional(program)
        except Exception:
            return _exported(module, pattern, sizes, at_once=True).finished
        return _sort_placeholders(whole, pattern), whole

    return Exported(program, sizes, finish)


class _Caller(nn.Module):
    def __init__(self, module: nn.Module, sizes: Sizes) -> None:
        super().__init__()
        self.module, self.sizes = module, sizes

    def forward(self, args: Any, kwargs: Any) -> Any:
        with self.sizes, self.sizes.functions(self.module):
            return self.module(*args, **kwargs)


def _sort_placeholders(program: torch.export.ExportedProgram, pattern: CallPattern) -> Traced:
    signature = program.graph_signature
    for out in signature.output_specs:
        if out.kind != OutputKind.USER_OUTPUT:
            raise TraceError(f"the module changes its state ({out.kind.name.lower()} {out.target})")
    output = program.call_spec.out_spec
    if output is None or not output.is_leaf():
        raise TraceError("the module returns something else than one tensor")
    traced = Traced(program.graph_module.graph, [], {}, {}, {}, pattern)
    strip = len("module.")
    dropped = []
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind == InputKind.PARAMETER:
            traced.parameters[name] = (spec.target or "")[strip:]
        elif spec.kind == InputKind.BUFFER:
            traced.buffers[name] = (spec.target or "")[strip:]
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            traced.constants[name] = program.constants[spec.target or ""]
        elif spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            traced.inputs.append(name)
        elif spec.kind == InputKind.USER_INPUT:
            dropped.append(name)  # a plain value: baked into the graph
        else:
            raise TraceError(f"the module takes an input of kind {spec.kind.name.lower()}")
    for node in list(traced.graph.nodes):
        if node.op == "placeholder" and node.name in dropped:
            if node.users:
                raise TraceError(f"the plain argument {node.name} is used symbolically")
            traced.graph.erase_node(node)
    for node in list(traced.graph.nodes):
        # Export records each cast's assumption; the dtypes of a call are checked where the site is called.
        if node.target == torch.ops.aten._assert_tensor_metadata.default:
            traced.graph.erase_node(node)
    if len(traced.inputs) != len(pattern.tensors):
        raise TraceError("the trace has another number of tensor inputs than the call")
    return traced
