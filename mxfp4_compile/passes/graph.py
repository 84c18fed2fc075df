"""Graphs: walks over their nodes, the names of their ops, and one table of aten ops by purpose.

Everything here reads; nothing runs an op or changes a graph. Running a part of a graph is ``passes.evaluate``.
Single ops are named where a pattern needs them; a set of ops that are alike for some purpose stands in the table at
the end of this file, with the purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols

FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})


# Walks


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node | None] = ()) -> set[fx.Node]:
    """All nodes that ``nodes`` depend on, themselves included, not going past ``stop`` (not included)."""
    blocked = set(stop)
    seen: set[fx.Node] = set()
    stack = [n for n in nodes if n not in blocked]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(n for n in node.all_input_nodes if n not in blocked)
    return seen


def read_by(nodes: Iterable[fx.Node], stop: Iterable[fx.Node | None]) -> set[fx.Node]:
    """As ``ancestors``, but not past what reads only the sizes of its operands."""
    blocked = set(stop)
    seen: set[fx.Node] = set()
    stack = [n for n in nodes if n not in blocked]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            skipped = {node.args[0]} if reads_no_values(node) else set()
            stack.extend(n for n in node.all_input_nodes if n not in blocked and n not in skipped)
    return seen


def descendants(nodes: Iterable[fx.Node], within: set[fx.Node] | None = None) -> set[fx.Node]:
    """All nodes that depend on ``nodes``, themselves included; with ``within``, over nodes of that region only."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen and (within is None or node in within):
            seen.add(node)
            stack.extend(node.users)
    return seen


# Values of traced nodes


def concrete(value: Any, sizes: Mapping[Any, int]) -> int:
    """A dimension of a traced shape with its symbols replaced by ``sizes`` (sympy symbol -> int)."""
    if isinstance(value, int):
        return value
    expr = value.node.expr
    return int(expr.subs({symbol: sizes[symbol] for symbol in expr.free_symbols}))


def shape_of(node: fx.Node, sizes: Mapping[Any, int]) -> tuple[int, ...]:
    """The shape of a traced tensor node at ``sizes``."""
    return tuple(concrete(d, sizes) for d in node.meta["val"].shape)


def graph_symbols(graph: fx.Graph) -> list[Any]:
    """The free symbols in the shapes of the graph's placeholders, in order of appearance."""
    symbols: dict[Any, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor):
            for dim in value.shape:
                symbols.update(dict.fromkeys(sorted(free_symbols(dim), key=str)))
        elif isinstance(value, torch.SymInt):
            symbols.update(dict.fromkeys(sorted(free_symbols(value), key=str)))
    return list(symbols)


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_integer(node: fx.Node) -> bool:
    """Whether the node's value is an integer tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)


# Names of ops


def op_name(node: fx.Node) -> str:
    """ "where" of aten.where.self, "ge" of operator.ge."""
    name = str(node.target)
    if name.startswith(("aten.", "prims.")):
        bare = name.split(".")[1]
        return bare if bare.startswith("__") else bare.rstrip("_")
    return str(getattr(node.target, "__name__", ""))


def reads_no_values(node: fx.Node) -> bool:
    """Sizes, and new tensors of the same shape."""
    return op_name(node) in VALUELESS


# The table: names as ``op_name`` gives them


def _ops(*groups: str | frozenset[str]) -> frozenset[str]:
    return frozenset().union(*(group.split() if isinstance(group, str) else group for group in groups))


# The same numbers in the same order, as they lie in memory.
RESHAPES = _ops("view reshape _unsafe_view unsqueeze")
VIEWS = _ops(RESHAPES, "squeeze flatten")
COPIES = _ops("clone alias detach contiguous")
CASTS = _ops("_to_copy to convert_element_type")
# The same numbers, arranged in another way or several times.
LAYOUT = _ops(
    VIEWS, COPIES, CASTS, "lift_fresh_copy expand permute transpose t movedim repeat repeat_interleave getitem"
)

SIZES = _ops("sym_size sym_numel sym_stride")
# New tensors of given sizes, whatever else they are made after.
FRESH = _ops("zeros empty ones zeros_like empty_like ones_like new_zeros new_empty new_ones arange")
CREATES = _ops(FRESH, "full full_like new_full scalar_tensor")
# New tensors that are filled with one number.
FILLED = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
# What looks at the sizes of its first operand, not at its values.
VALUELESS = _ops(SIZES, "new_zeros new_empty new_ones new_full zeros_like empty_like ones_like full_like")

CUTS = _ops("slice narrow select split split_with_sizes chunk unbind")
PICKS = _ops("index index_select gather embedding")
# Their numbers are sizes, dimensions and numbers of experts, none of a formula's.
SHAPING = _ops(LAYOUT, CUTS, "cat stack index index_select rows_of_expert")

COMPARES = _ops("ge gt le lt eq ne isin maximum minimum clamp clamp_min clamp_max sym_max sym_min sym_ite")
ARITHMETIC = _ops(
    "add sub rsub mul div floor_divide floordiv truediv remainder fmod mod pow neg bitwise_and bitwise_or bitwise_xor",
    "__rshift__ __lshift__ rshift lshift",
)
# A number of rows, or a place among them, out of other values.
COUNTS = _ops(
    "sum cumsum histc bincount searchsorted bucketize nonzero nonzero_numpy count_nonzero argsort argmax argmin amax",
    "amin",
)
# Sums over rows: of whole numbers they count.
COUNTING = _ops("sum cumsum histc bincount scatter_add index_add index_put scatter_reduce count_nonzero")

# Rows are gathered and summed by these alone: they act on all magnitudes alike.
LINEAR = _ops(
    LAYOUT, CREATES, CUTS, PICKS,
    "index_put _unsafe_index_put index_add index_copy scatter scatter_add cat stack roll flip",
    "add sub rsub mul div neg sum mean mm bmm matmul addmm baddbmm mv dot einsum linear where masked_fill",
    "rows_of_expert",
)  # fmt: skip
# What makes numbers or masks of ids row by row, never across a token's row of ids.
BY_ROW = _ops(
    LAYOUT, CREATES, COMPARES, ARITHMETIC, PICKS, "sort logical_not logical_and logical_or bitwise_not one_hot"
)
# They branch. In a middle they make up activations, and the probes there are dense; a head or tail of a mixture of
# experts has no use for them.
BRANCHES = _ops(
    "where clamp clamp_min clamp_max clip minimum maximum fmin fmax masked_fill masked_scatter ge gt le lt eq ne",
    "sign sgn heaviside nan_to_num isnan isinf isfinite logical_and logical_or logical_not threshold relu hardtanh",
    "floor ceil round trunc bitwise_and bitwise_or sym_max sym_min sym_ite",
)
# Of these, the ones that leave out what is none of the experts.
SELECTS = _ops("where masked_fill clamp clamp_min clamp_max clip minimum maximum")
# A sum is still a sum after them, whatever it is added to.
ADDS = _ops(CASTS, VIEWS, COPIES, "add index_add")

# Writes rows into its first operand: name -> positions of the indices and of the values among its arguments.
WRITES = {
    "index_add": (2, 3),
    "index_copy": (2, 3),
    "index_put": (1, 2),
    "_unsafe_index_put": (1, 2),
    "scatter": (2, 3),
    "scatter_add": (2, 3),
    "scatter_reduce": (2, 3),
    "masked_scatter": (1, 2),
}
# Reads or writes at places: name -> position of the places among its arguments.
PLACES = {"index_select": 2, "index": 1, **{name: at[0] for name, at in WRITES.items() if name.startswith("index")}}
# Fills: name -> position of the size among its arguments.
FILL_SIZES = {"full": 0, "new_full": 1}
# Between the writes of a loop's experts the sum may go through these.
HANDS_ON = _ops(VIEWS, COPIES, CASTS, "permute transpose t expand lift_fresh_copy getitem stack")
# Integers among the arguments of these are sizes and dimensions, but for what is filled in.
SIZED = _ops(
    HANDS_ON,
    "zeros empty ones full new_zeros new_empty new_ones new_full repeat split_with_sizes cat repeat_interleave",
)

# What a router is made of, beside its top-k.
ROUTING = _ops(
    "_softmax softmax amax sub exp sum div convert_element_type _to_copy sigmoid neg add mul reciprocal clone alias",
    "detach max",
)

# Of a graph that Dynamo traced, whose nodes are Python's functions and methods:
# a packed weight may go through these on its way to a product;
CALLED_LAYOUT = _ops("transpose permute to contiguous unsqueeze squeeze swapaxes type mT clone bfloat16")
# a size stands among the arguments of these;
CALLED_SIZED = _ops("view reshape expand arange empty zeros ones full new_empty new_zeros new_ones new_full")
# these write to their first operand, besides the methods whose names end in an underscore.
CALLED_IN_PLACE = _ops("setitem iadd imul isub itruediv")
