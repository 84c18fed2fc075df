"""What is changed in the graph of a compiled decode layer before Inductor lowers it.

Contract: the graph computes what it did, but for rounding that is no coarser than before.

``share``: what is computed twice is computed once. Linear modules of one input (packing.py) are traced as parts of one
product each; this makes them parts of the same one.

``reduce_biased``: with one row, a product is a sum over each row of the weight. Inductor writes ``mm`` of one row that
way under coordinate_descent_tuning, and fuses it with the norm before it and what follows; a product with a bias
(``addmm``) it leaves to cuBLAS, which takes two launches (split-K, and the sum over its parts). Here such a product
becomes the same sum, in fp32, with the bias added before the one rounding, as cuBLAS has it.

``few_rows``: products of 2 to 64 rows with a weight [N, K] by a kernel of ours (linear.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

_KEPT = ("empty", "new_empty", "bernoulli", "rand", "dropout")


def share(graph: fx.Graph) -> None:
    """Compute once what a graph computes twice, of the deterministic ops of aten that write to nothing."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _shareable(node.target):
            continue
        try:
            key = node.target, _frozen(node.args), _frozen(node.kwargs)
            first = known.setdefault(key, node)
        except TypeError:  # an argument that has no hash
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _shareable(target: Any) -> bool:
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "prims")
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not any(word in str(target) for word in _KEPT)
    )


def _frozen(value: Any) -> Any:
    """A value that can be a key; numbers of different types are different."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    hash(value)
    return type(value), value


def reduce_biased(graph: fx.Graph) -> None:
    """Products [1, K] x [K, N] with a bias [N] become sums over K, in fp32."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
        given: tuple[Any, ...] = node.args
        if node.kwargs or len(given) != 3 or not _one_row(*(n.meta.get("val") for n in given)):
            continue
        bias, row, weight = given
        dtype = row.meta["val"].dtype
        aten, cast = torch.ops.aten, torch.ops.prims.convert_element_type.default
        with graph.inserting_before(node):
            wide = [_call(graph, cast, n, torch.float32) for n in (bias, row, weight)]
            column = _call(graph, aten.unsqueeze.default, wide[1], 2)
            matrix = _call(graph, aten.unsqueeze.default, wide[2], 0)
            products = _call(graph, aten.mul.Tensor, column, matrix)
            total = _call(graph, aten.sum.dim_IntList, products, [1])
            result = _call(graph, cast, _call(graph, aten.add.Tensor, total, wide[0]), dtype)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _one_row(bias: Any, row: Any, weight: Any) -> bool:
    if not all(isinstance(t, Tensor) for t in (bias, row, weight)):
        return False
    half = row.dtype in (torch.bfloat16, torch.float16) and row.dtype == weight.dtype == bias.dtype
    return half and bias.dim() == 1 and row.shape[0] == 1 and isinstance(weight.shape[1], int)


def few_rows(graph: fx.Graph, device: str = "cuda") -> None:
    """Products [M, K] x [K, N] of few rows, with a bias [N] or without, by ``mxfp4_runtime::linear_rows``."""
    aten = torch.ops.aten
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            bias: Any
            *bias, rows, turned = node.args
            weight = _turned(turned)
            if node.kwargs or weight is None or not _few(rows.meta.get("val"), weight.meta["val"], device):
                continue
            if bias and bias[0].meta["val"].shape != weight.meta["val"].shape[:1]:
                continue
            with graph.inserting_before(node):
                made = graph.call_function(_linear_rows(), (rows, weight, bias[0] if bias else None))
            made.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _linear_rows() -> Any:
    from . import linear  # noqa: F401 - defines the op

    return torch.ops.mxfp4_runtime.linear_rows.default


def _turned(node: Any) -> Any:
    """What a node is the transpose of, a contiguous [N, K]; or None."""
    aten = torch.ops.aten
    if not isinstance(node, fx.Node) or node.target not in (aten.t.default, aten.permute.default, aten.transpose.int):
        return None
    source: Any = node.args[0]
    value, turned = source.meta.get("val"), node.meta["val"]
    if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_contiguous():
        return None
    return source if turned.shape == value.shape[::-1] and turned.stride() == value.stride()[::-1] else None


def _few(rows: Any, weight: Tensor, device: str) -> bool:
    half = (torch.bfloat16, torch.float16)
    count, depth = rows.shape
    return (
        isinstance(count, int)
        and 2 <= count <= 64
        and rows.dtype == weight.dtype
        and rows.dtype in half
        and rows.device.type == device
        and depth % 16 == 0
        and all(isinstance(n, int) for n in weight.shape)
    )


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A node, and what it is worth."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


CHANGES: dict[str, Callable[[fx.Graph], None]] = {
    "share": share,
    "reduce_biased": reduce_biased,
    "few_rows": few_rows,
}


class LayerPass(CustomGraphPass):
    """Changes by their names, as a pass of Inductor, behind what is configured in its place."""

    def __init__(self, changes: tuple[str, ...]) -> None:
        import torch._inductor.config as config

        configured: Any = config.joint_custom_post_pass
        several = isinstance(configured, (list, tuple))
        self.before = tuple(configured) if several else (configured,) if configured else ()
        self.changes = changes

    def __call__(self, graph: fx.Graph) -> None:
        for one in (*self.before, *(CHANGES[name] for name in self.changes)):
            one(graph)
        graph.lint()

    def uuid(self) -> Any:
        """Changes with the source of the passes and with which there are."""
        theirs = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.before]
        return None if None in theirs else f"mxfp4_compile.layer:{_source_hash()}:{self.changes}:{theirs}"


@lru_cache(maxsize=1)
def _source_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:24]
