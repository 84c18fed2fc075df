"""Rows sorted by expert times a stack of weights: ``aten._grouped_mm`` and transformers' fallback op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ...trace.traced import Traced
from .anchor import ExpertGemm, trace_weight

NAME = "grouped_mm"


def experts_of_offsets(offsets: Tensor, rows: int) -> Tensor:
    """offsets [E] (end row of each expert) -> [rows] expert of each row (E past the last)."""
    return torch.searchsorted(offsets.to(torch.int64), torch.arange(rows, device=offsets.device), right=True)


def find(traced: Traced) -> Iterator[ExpertGemm]:
    """Anchors of this form in graph order."""
    for node in traced.graph.nodes:
        operands = _operands(node)
        if operands is None:
            continue
        rows, stack, offsets = operands
        place = trace_weight(stack, traced)
        if place is None or place[2][0] != 0 or rows.meta["val"].dim() != 2:
            continue
        name, _, order = place
        experts, k, n = stack.meta["val"].shape  # the op reads [E, K, N]
        yield ExpertGemm(
            node=node,
            form=NAME,
            weight=name,
            transposed=order == (0, 1, 2),
            shape=(int(experts), int(n), int(k)),
            rows=rows,
            selector=offsets,
            experts_of=experts_of_offsets,
            row_matrix=lambda value: value,
            as_output=lambda value: value,
        )


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    if node.op != "call_function":
        return None
    name = str(node.target)
    if name == "aten._grouped_mm.default":
        args = dict(zip(("self", "mat2", "offs", "bias", "out_dtype"), node.args, strict=False)) | node.kwargs
        if args.get("bias") is not None:
            return None
        operands = args.get("self"), args.get("mat2"), args.get("offs")
    elif name == "transformers.grouped_mm_fallback.default":
        args = dict(zip(("input", "weight", "offs"), node.args, strict=False)) | node.kwargs
        operands = args.get("input"), args.get("weight"), args.get("offs")
    else:
        return None
    if all(isinstance(n, fx.Node) for n in operands):
        return operands  # type: ignore[return-value]
    return None
