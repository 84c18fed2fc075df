"""Capture of experts that are called in a data-dependent Python loop: a trace with every expert in use.

Contract: like ``trace``: the module is read, never changed.

Rows per expert are sizes that the trace does not know (at least two), a loop over the experts that were hit runs over
all of them, counts are sizes. ``collapse`` makes stacked products of the unrolled loop. What the trace assumes,
that an expert without tokens contributes nothing, is proven afterwards: by ``idle`` on the trace, by ``match``,
which admits only heads and tails that are linear in the rows, and by verification, which runs the original module with
each expert without tokens once.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.overrides import handle_torch_function

from ..alterations import without_hooks
from ..calls import TensorInfo
from ..weights import families, stack
from .all_in_use import AllInUse
from .collapse import collapse, expression
from .failures import in_words
from .guards import Exported, Sizes, settle
from .program import exported, functional
from .traced import CallPattern, Traced, TraceError, free_dims, named_dims

aten = torch.ops.aten


class _Caller(nn.Module):
    """Runs the module as if every expert had rows.

    A mask may have a place more than there are experts, for ids that are none. Where the loop would take such an
    expert's weights, which do not exist, the original fails with such ids, and the place counts as never hit.
    """

    def __init__(self, module: nn.Module, without_last: bool, experts: int | None, sizes: Sizes) -> None:
        super().__init__()
        self.module, self.without_last, self.experts, self.sizes = module, without_last, experts, sizes

    def forward(self, args: Any, kwargs: Any) -> Any:
        with (
            AllInUse(self.without_last, self.experts) as self.seen,
            _branches(self.seen),
            self.sizes,
            self.sizes.functions(self.module),
        ):
            result = self.module(*args, **kwargs)
            self.seen.check()
            return result


@contextmanager
def _branches(seen: AllInUse) -> Any:
    """Branches on sizes that the trace does not know, in code that is not torch's own, are shown to ``seen``.

    That a size is two at least answers them, and no graph shows what was asked.
    """
    of_bool, of_int = torch.SymBool.__bool__, torch.SymInt.__bool__

    def truth(condition: torch.SymBool) -> bool:
        return of_bool(condition) if _torchs_own(sys._getframe(1)) else seen.take(condition)

    def not_zero(size: torch.SymInt) -> bool:
        return of_int(size) if _torchs_own(sys._getframe(1)) else seen.take(size != 0)

    def tolist(tensor: FakeTensor) -> Any:
        if tensor.dim() == 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            return handle_torch_function(Tensor.tolist, (tensor,), tensor)  # fake tensors keep it from modes
        return of_list(tensor)

    of_list = FakeTensor.tolist
    torch.SymBool.__bool__, torch.SymInt.__bool__ = truth, not_zero  # type: ignore[method-assign]
    FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FakeTensor.tolist = of_list  # type: ignore[method-assign]
        torch.SymBool.__bool__, torch.SymInt.__bool__ = of_bool, of_int  # type: ignore[method-assign]


def _torchs_own(frame: Any) -> bool:
    """Whether a frame is torch's, or of these modules, which ask for themselves."""
    name = str(frame.f_globals.get("__name__", ""))
    return name in (AllInUse.__module__, Sizes.__module__) or name.partition(".")[0] in ("torch", "sympy")


def holds_list(module: nn.Module) -> bool:
    """Whether experts may be the parts of a list in ``module`` (or ``module`` itself)."""
    for path, _ in families(module).values():
        if ("*" in path.split(".")) and stack(module, path, 1).parts[0].dim() == 2:
            return True
    return False


def trace_loop(module: nn.Module, pattern: CallPattern) -> Traced:
    """Trace ``module`` and collapse its loop over experts; TraceError with the reason where that fails."""
    return collapse(module, unroll(module, pattern))


def unroll(module: nn.Module, pattern: CallPattern) -> Traced:
    """Trace ``module`` as if every expert had tokens; TraceError with the reason where it does not trace."""
    return settle(lambda called, sizes: _exported(module, called, sizes), pattern)


def _exported(module: nn.Module, pattern: CallPattern, sizes: Sizes, at_once: bool = False) -> Exported:
    """One trace; ``at_once``: made functional here, so that what fails at that is traced in the other ways, too."""
    example = [leaf.zeros() if isinstance(leaf, TensorInfo) else leaf for leaf in pattern.leaves]
    args, kwargs = pattern.arrange(example)
    error: Exception | None = None
    without_last, experts = False, _experts(module)
    waiting = [named_dims, free_dims] if sum(map(bool, pattern.dynamic)) > 1 else [free_dims]
    while waiting:
        arg_shapes, kwarg_shapes = pattern.arrange(waiting[0](pattern))
        try:
            with without_hooks(module), _casts_of_nothing():
                sizes.forget()
                caller = _Caller(module, without_last, experts, sizes)
                program = exported(caller, args, kwargs, {"args": arg_shapes, "kwargs": kwarg_shapes})
            done = _finished(functional(program), pattern, caller.seen) if at_once else None
            break
        except TraceError:
            raise
        except IndexError as failure:
            error = error or failure
            if without_last:
                waiting.pop(0)
            without_last = True
        except Exception as failure:
            error = failure
            waiting.pop(0)
    else:
        assert error is not None
        raise TraceError(f"its loop over experts does not trace: {in_words(error)}") from error

    def finish() -> tuple[Traced, torch.export.ExportedProgram]:
        try:
            return done or _finished(functional(program), pattern, caller.seen)
        except TraceError:
            raise
        except Exception:
            return _exported(module, pattern, sizes, at_once=True).finished

    return Exported(program, sizes, finish)


def _finished(
    program: torch.export.ExportedProgram, pattern: CallPattern, seen: AllInUse
) -> tuple[Traced, torch.export.ExportedProgram]:
    """What a functional program comes to, and the program."""
    traced = _sorted(program, pattern)
    _check_names(traced, seen)
    traced.branched_sizes = frozenset(seen.branched_sizes)
    traced.graph.eliminate_dead_code()  # its masks were named above
    return traced, program


def _experts(module: nn.Module) -> int | None:
    """How many experts a module's lists of equal parts have, or else its packed weights; None if they disagree."""
    numbers: dict[str, int] = {}
    for path, expert in families(module).values():
        numbers[path] = max(numbers.get(path, 0), expert + 1)
    found = {n for path, n in numbers.items() if stack(module, path, 1).parts[0].dim() == 2}
    if not found:
        found = {int(p.shape[0]) for p in module.parameters() if p.dim() == 3}
    return found.pop() if len(found) == 1 else None


def _check_names(traced: Traced, seen: AllInUse) -> None:
    """The sizes that were branched on are known by their names: these must mean in the graph what they did before."""
    made = [expression(places.shape[0]) for places in seen.places_made]
    found = [expression(n.meta["val"].shape[0]) for n in traced.graph.nodes if n.target == aten.nonzero.default]
    if seen.branched_sizes and [size for size in found if size in made] != made:
        raise TraceError("it branches on whether a mask is true anywhere, and its graph has that mask no longer")


@contextmanager
def _casts_of_nothing() -> Any:
    """``module.to(dtype)`` in a forward hands back the module where it changes nothing: export cannot swap weights."""
    original = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        same = all(
            (dtype is None or not t.is_floating_point() or t.dtype == dtype) and (device is None or t.device == device)
            for t in tensors
        )
        return self if same else original(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


def _sorted(program: torch.export.ExportedProgram, pattern: CallPattern) -> Traced:
    signature = program.graph_signature
    for out in signature.output_specs:
        if out.kind != OutputKind.USER_OUTPUT or not isinstance(out.arg, TensorArgument):
            raise TraceError(f"the module returns or changes something else than tensors ({out.kind.name.lower()})")
    traced = Traced(program.graph_module.graph, [], {}, {}, {}, pattern)
    spec = program.call_spec.out_spec
    traced.out_spec = None if spec is None or spec.is_leaf() else spec
    strip = len("module.")
    for entry in signature.input_specs:
        name = entry.arg.name
        target = entry.target or ""
        if entry.kind == InputKind.PARAMETER:
            traced.parameters[name] = target[strip:]
        elif entry.kind == InputKind.BUFFER:
            traced.buffers[name] = target[strip:]
        elif entry.kind == InputKind.CONSTANT_TENSOR:
            traced.constants[name] = program.constants[target]
        elif entry.kind == InputKind.USER_INPUT and isinstance(entry.arg, TensorArgument):
            traced.inputs.append(name)
        elif entry.kind == InputKind.USER_INPUT:
            node = traced.node(name)
            if node.users:
                raise TraceError(f"the plain argument {name} is used symbolically")
            traced.graph.erase_node(node)
        else:
            raise TraceError(f"the module takes an input of kind {entry.kind.name.lower()}")
    for node in reversed(list(traced.graph.nodes)):
        # What the trace assumed about sizes (every expert has rows) must not be asserted at run time.
        if node.target in (aten._assert_scalar.default, aten._assert_tensor_metadata.default) or "sym_constrain" in str(
            node.target
        ):
            traced.graph.erase_node(node)
    if len(traced.inputs) != len(pattern.tensors):
        raise TraceError("the trace has another number of tensor inputs than the call")
    return traced


__all__ = ["holds_list", "trace_loop", "unroll"]
