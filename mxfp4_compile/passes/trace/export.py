"""Export: one module as it is to a functional, undecomposed ATen graph with parameters known by name.

Contract: the module is read, never changed; nothing is computed on its weights (export fakeifies them).

1. replay the recorded call on the real module under ``torch.export`` with the dimensions that differed
   between two recorded calls marked dynamic;
2. ``run_decompositions({})``: in-place ops become functional, composite ones (silu, gelu) stay whole;
3. sort the placeholders into parameters, buffers, constants and inputs;
4. what the trace decided by sizes must hold for all of them (``guards``).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from ..calls import TensorInfo
from .capture import CallPattern, Captured, CaptureError, free_dims, named_dims
from .failures import in_words
from .guards import Sizes, Traced, quietly, settle


def capture(module: nn.Module, pattern: CallPattern) -> Captured:
    """Trace ``module`` as ``pattern`` says it is called; CaptureError with the reason if it does not trace."""
    return settle(lambda called, sizes: _traced(module, called, sizes), pattern)


def _traced(module: nn.Module, pattern: CallPattern, sizes: Sizes) -> Traced:
    example = [leaf.zeros() if isinstance(leaf, TensorInfo) else leaf for leaf in pattern.leaves]
    args, kwargs = pattern.arrange(example)
    error: Exception | None = None
    # Sizes that were equal in both recorded calls are one size (the token count); if that does not hold for
    # this module, let export find out the relations by itself.
    for shapes in (named_dims(pattern), free_dims(pattern)):
        arg_shapes, kwarg_shapes = pattern.arrange(shapes)
        try:
            with torch.no_grad(), warnings.catch_warnings(), quietly():
                warnings.simplefilter("ignore")
                sizes.forget()
                # A wrapper gives every module the signature forward(args, kwargs): HF's own wrappers have
                # names in their signatures that the implementation behind them does not accept.
                program = torch.export.export(
                    _Caller(module, sizes),
                    (args, kwargs),
                    dynamic_shapes={"args": arg_shapes, "kwargs": kwarg_shapes},
                    strict=False,
                ).run_decompositions({})
            break
        except Exception as failure:
            error = error or failure
    else:
        assert error is not None
        raise CaptureError(f"does not trace: {in_words(error)}") from error
    return Traced(_sort_placeholders(program, pattern), program, sizes)


class _Caller(nn.Module):
    def __init__(self, module: nn.Module, sizes: Sizes) -> None:
        super().__init__()
        self.module, self.sizes = module, sizes

    def forward(self, args: Any, kwargs: Any) -> Any:
        with self.sizes, self.sizes.functions(self.module):
            return self.module(*args, **kwargs)


def _sort_placeholders(program: torch.export.ExportedProgram, pattern: CallPattern) -> Captured:
    signature = program.graph_signature
    for out in signature.output_specs:
        if out.kind != OutputKind.USER_OUTPUT:
            raise CaptureError(f"the module changes its state ({out.kind.name.lower()} {out.target})")
    output = program.call_spec.out_spec
    if output is None or not output.is_leaf():
        raise CaptureError("the module returns something else than one tensor")
    captured = Captured(program.graph_module.graph, [], {}, {}, {}, pattern)
    strip = len("module.")
    dropped = []
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind == InputKind.PARAMETER:
            captured.parameters[name] = (spec.target or "")[strip:]
        elif spec.kind == InputKind.BUFFER:
            captured.buffers[name] = (spec.target or "")[strip:]
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            captured.constants[name] = program.constants[spec.target or ""]
        elif spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            captured.inputs.append(name)
        elif spec.kind == InputKind.USER_INPUT:
            dropped.append(name)  # a plain value: baked into the graph
        else:
            raise CaptureError(f"the module takes an input of kind {spec.kind.name.lower()}")
    for node in list(captured.graph.nodes):
        if node.op == "placeholder" and node.name in dropped:
            if node.users:
                raise CaptureError(f"the plain argument {node.name} is used symbolically")
            captured.graph.erase_node(node)
    for node in list(captured.graph.nodes):
        # Export records each cast's assumption; the dtypes of a call are checked where the site is called.
        if node.target == torch.ops.aten._assert_tensor_metadata.default:
            captured.graph.erase_node(node)
    if len(captured.inputs) != len(pattern.tensors):
        raise CaptureError("the trace has another number of tensor inputs than the call")
    return captured
