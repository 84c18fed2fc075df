"""Gradients of ``mxfp4::moe`` and ``mxfp4::grouped_linear`` through frozen MXFP4 weights.

Contract: gradients reach the tokens and the routing weights, never the quantized weights or biases. Nothing of the
forward is saved but its inputs; the up-projection is computed again. For a pair of token t and expert e with routing
weight w, and g the gradient of out[t]::

    y  = x[t] Wup^T + b_up           computed again
    h  = act(y)
    q  = g Wdown
    dw = <q, h> + <g, b_down>
    dy = act'(y) (w q)
    dx = dy Wup                      summed over the experts of a token, in the order of its pairs

With ``weight_on_input``, where the expert sees w x[t]: dx = w (dy Wup), dw = <dy Wup, x[t]>, and dy lacks the w.
Rounding counts as the identity. Ids >= E contribute nothing. The same inputs give the same bits: no atomic sums.

Backends without kernels for it (triton has them) have this by way of ``Backend.recover``: canonical weights of the
experts that are hit, dequantized a few at a time, so that the dense weights of a layer never lie in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import mx
from ..spec import MoEParams
from .arguments import MoEInputs

# Dense weights that lie in memory together, in bytes: some tens of experts of today's models.
SCRATCH_BYTES = 256 << 20

# The experts of a chunk (indices, on the weights' device) -> their dense weights [e, N, K].
Dense = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert: ``experts`` [G] that have any, ``counts`` [G] rows of each; both also as Python ints."""

    experts: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of_ends(cls, ends: Tensor) -> Groups:
        """Of rows sorted by expert, ``ends`` [E]: the end row of each; waits for the device."""
        listed = ends.tolist()
        counts = [max(0, end - begin) for begin, end in zip([0, *listed], listed, strict=False)]
        hit = [e for e, count in enumerate(counts) if count]
        return cls(torch.tensor(hit, dtype=torch.int64, device=ends.device), tuple(counts[e] for e in hit))

    def chunks(self, size: int) -> Iterator[tuple[Tensor, slice, tuple[int, ...]]]:
        """At most ``size`` experts at a time: their indices, their rows, and the rows of each."""
        start = 0
        for first in range(0, len(self.counts), size):
            counts = self.counts[first : first + size]
            yield self.experts[first : first + size], slice(start, start + sum(counts)), counts
            start += sum(counts)


def moe_backward(grad: Tensor, inputs: MoEInputs, up: Dense, down: Dense, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens [T, H] and of the routing weights [T, K], in the dtypes of these.

    grad: [T, H]. inputs: with biases in the model's row order. up, down: the dense weights [e, N, K] of some experts,
    in ``dtype``, which the products have.
    """
    x, topk_ids, topk_weights, params = inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.params
    up_bias, down_bias = inputs.up_bias, inputs.down_bias
    tokens, top_k = topk_ids.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = topk_ids.reshape(-1)
    sorted_ids, order = flat.sort(stable=True)
    experts, counts = sorted_ids.unique_consecutive(return_counts=True)
    known = int((experts < params.num_experts).sum())
    groups = Groups(experts[:known].long(), tuple(counts[:known].tolist()))
    dx = torch.zeros((tokens * top_k, params.hidden), dtype=dtype, device=x.device)
    dw = torch.zeros(tokens * top_k, dtype=wide, device=x.device)
    size = max(1, SCRATCH_BYTES // (dtype.itemsize * params.up_rows * params.hidden))
    for chosen, rows, count in groups.chunks(size):
        pairs = order[rows]
        token = pairs // top_k
        w = topk_weights.reshape(-1, 1)[pairs].to(wide)
        g, seen = grad[token].to(dtype), x[token]
        if params.weight_on_input:
            seen = (seen * topk_weights.reshape(-1, 1)[pairs]).to(params.round_dtype)
        dense = up(chosen)
        y = grouped(seen.to(dtype), dense.mT, count).to(params.round_dtype)
        if up_bias is not None:
            y = y + _of_rows(up_bias[chosen], count).to(params.round_dtype)
        q = grouped(g, down(chosen), count).to(wide)
        h, dy = _through_activation(y.to(wide), q if params.weight_on_input else q * w, params)
        dseen = grouped(dy.to(dtype), dense, count)
        if params.weight_on_input:
            dw[pairs] = (dseen.to(wide) * x[token].to(wide)).sum(1)
            dx[pairs] = (dseen.to(wide) * w).to(dtype)
        else:
            dw[pairs] = (q * h.to(params.round_dtype).to(wide)).sum(1)
            if down_bias is not None:
                dw[pairs] += (g.to(wide) * _of_rows(down_bias[chosen], count).to(wide)).sum(1)
            dx[pairs] = dseen
    summed = dx.view(tokens, top_k, params.hidden).sum(1, dtype=wide)
    return summed.to(x.dtype), dw.view(tokens, top_k).to(topk_weights.dtype)


def linear_backward(
    grad: Tensor, offsets: Tensor, weight: Dense, k: int, dtype: torch.dtype, products: torch.dtype
) -> Tensor:
    """Gradient [S, K] of the rows of ``mxfp4::grouped_linear``, in ``dtype``; rows of no expert get zeros.

    grad: [S, N]. offsets [E]: the end row of each expert. weight: dense [e, N, K] of some experts, in ``products``.
    """
    groups = Groups.of_ends(offsets)
    dx = torch.zeros((grad.shape[0], k), dtype=dtype, device=grad.device)
    size = max(1, SCRATCH_BYTES // max(1, products.itemsize * grad.shape[1] * k))
    for chosen, rows, count in groups.chunks(size):
        dx[rows] = grouped(grad[rows].to(products), weight(chosen), count).to(dtype)
    return dx


def dense_weights(
    recover: Callable[[list[Tensor]], tuple[Tensor, Tensor]], tensors: Sequence[Tensor], k: int, dtype: torch.dtype
) -> Dense:
    """The dense weights behind prepared tensors (first dimension E). ``recover``: prepared -> canonical."""

    def dense(chosen: Tensor) -> Tensor:
        packed, scales = recover([t.index_select(0, chosen) for t in tensors])
        return mx.dequantize(packed, scales, k, dtype)

    return dense


def grouped(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of group i times weight[i]: x [R, A], weight [G, A, B], counts [G] rows of each group -> [R, B]."""
    if x.is_cuda and x.dtype == torch.bfloat16 and _aligned(x) and _aligned(weight):
        ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    return torch.cat([rows @ w for rows, w in zip(x.split(list(counts)), weight, strict=True)])


def _aligned(tensor: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, along the one dimension whose stride is not 1."""
    pitch = max(tensor.stride(-1), tensor.stride(-2))
    return pitch * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0


def _of_rows(values: Tensor, counts: Sequence[int]) -> Tensor:
    """[G, N] -> [R, N]: the values of each row's group."""
    return values.repeat_interleave(torch.tensor(counts, device=values.device), 0, output_size=sum(counts))


def _through_activation(y: Tensor, dh: Tensor, params: MoEParams) -> tuple[Tensor, Tensor]:
    """y [R, N] and the gradient of h [R, I] -> h [R, I] and the gradient of y [R, N]."""
    gate, up = params.split_gate(y)
    dgate, dup = params.activation.gradient(gate, up, dh)
    return params.activation(gate, up), params.join_gate(dgate, dup)
