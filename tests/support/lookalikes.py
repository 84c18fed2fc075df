"""Blocks that choose by values and hold equal weights, and are no mixture of experts. ``LOOKALIKES``: name -> block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, HEADS = 32, 4
D = H // HEADS


def linear(out: int = H, width: int = H) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class IndexedAttention(nn.Module):
    """Each query attends to the keys that an indexer chooses: by a mask, or to those gathered."""

    def __init__(self, kept: int = 4, how: str = "mask", lists: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.kept, self.how = kept, how
        self.index_q, self.index_k, self.o = linear(D), linear(D), linear()
        self.projections = nn.ModuleList(linear() for _ in range(3)) if lists else None
        self.packed = nn.Parameter(torch.empty(3, H, H)) if packed else None
        if not lists and not packed:
            self.q, self.k, self.v = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        if self.projections is not None:
            q, k, v = (p(x) for p in self.projections)
        elif self.packed is not None:
            q, k, v = (x @ w for w in self.packed)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        index = self.index_q(x) @ self.index_k(x).mT
        chosen = index.topk(min(self.kept, x.shape[1]), -1).indices
        scores = q @ k.mT / math.sqrt(H)
        if self.how == "mask":
            mask = torch.full_like(scores, float("-inf")).scatter(-1, chosen, 0.0)
            return self.o((scores + mask).softmax(-1) @ v)
        b = torch.arange(x.shape[0], device=x.device)[:, None, None]
        some = (q[:, :, None] * k[b, chosen]).sum(-1).softmax(-1)
        return self.o((some[..., None] * v[b, chosen]).sum(2))


class HeadsApart(nn.Module):
    """A list or a stack of weights, one for each head; queries keep their best keys."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.o = how, linear()
        if how == "list":
            self.q, self.kv = (nn.ModuleList(linear(D) for _ in range(HEADS)) for _ in range(2))
        elif how == "flat":
            self.q, self.kv = nn.Parameter(torch.empty(HEADS * D, H)), nn.Parameter(torch.empty(HEADS * D, H))
        else:
            self.q, self.kv = nn.Parameter(torch.empty(HEADS, H, D)), nn.Parameter(torch.empty(HEADS, H, D))

    def project(self, weight: nn.ModuleList | Tensor, x: Tensor) -> Tensor:
        if isinstance(weight, nn.ModuleList):
            return torch.stack([head(x) for head in weight], 1)
        if self.how == "flat":
            weight = weight.view(HEADS, D, H).mT
        return torch.einsum("bth,nhd->bntd", x, weight)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = self.project(self.q, x), self.project(self.kv, x)
        scores = q @ kv.mT
        least = scores.topk(min(3, x.shape[1]), -1).values[..., -1:]
        mixed = scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ kv
        return self.o(mixed.transpose(1, 2).flatten(2))


class PrunedTokens(nn.Module):
    """An MLP, or several layers, for the tokens of the highest scores; the others pass by."""

    def __init__(self, how: str = "topk", layers: int = 2, fewer: bool = False, put: str = "scatter") -> None:
        super().__init__()
        self.score = linear(1)
        self.layers = nn.ModuleList(linear() for _ in range(layers))
        self.how, self.fewer, self.put = how, fewer, put

    def chosen(self, x: Tensor, count: int) -> Tensor:
        score = self.score(x)[..., 0]
        if self.how == "sort":
            return score.argsort(-1, descending=True)[:, :count]
        return score.topk(count, -1).indices

    def forward(self, x: Tensor) -> Tensor:
        count, out = max(1, x.shape[1] // 2), x
        index = self.chosen(x, count)
        rows = rows_of(x, index)
        for layer in self.layers:
            rows = torch.tanh(layer(rows))
            if self.fewer:
                index, rows = self.again(index, rows)
        if self.put == "add":
            return out.scatter_add(1, index[..., None].expand(-1, -1, H), rows)
        return out.scatter(1, index[..., None].expand(-1, -1, H), rows)

    def again(self, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.chosen(rows, max(1, rows.shape[1] - 1))
        return index.gather(1, kept), rows_of(rows, kept)


class Masked(nn.Module):
    """The rows above a threshold go through layers: mixture of depths, or an early exit."""

    def __init__(self, layers: int, exits: bool = False) -> None:
        super().__init__()
        self.score = linear(1)
        self.layers = nn.ModuleList(nn.Sequential(linear(2 * H), nn.GELU(), linear(H, 2 * H)) for _ in range(layers))
        self.exits = exits

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H).clone()
        going = torch.ones(rows.shape[0], dtype=torch.bool, device=x.device)
        for layer in self.layers:
            mask = self.score(rows)[:, 0] > 0
            going = going & mask if self.exits else mask
            rows[going] = rows[going] + layer(rows[going])
        return rows.view(x.shape)


class Memory(nn.Module):
    """Keys and values: the values of the best keys, weighted; ``product``: of two halves of the keys."""

    def __init__(self, product: bool, how: str) -> None:
        super().__init__()
        self.product, self.how = product, how
        self.keys = nn.ParameterList(nn.Parameter(torch.empty(8, H // 2)) for _ in range(2))
        self.values = nn.Embedding(64, H)
        self.key = linear(64)

    def forward(self, x: Tensor) -> Tensor:
        if self.product:
            left, right = (half @ keys.T for half, keys in zip(x.chunk(2, -1), self.keys, strict=True))
            scores = (left[..., :, None] + right[..., None, :]).flatten(-2)
        else:
            scores = self.key(x)
        best, ids = scores.topk(4, -1)
        if self.how == "bag":
            flat = F.embedding_bag(ids.view(-1, 4), self.values.weight, None, mode="sum",
                                   per_sample_weights=best.softmax(-1).view(-1, 4))  # fmt: skip
            return flat.view(x.shape)
        return torch.einsum("...k,...kh->...h", best.softmax(-1), self.values(ids))


class Quantizer(nn.Module):
    """The nearest vectors of codebooks: of what is left each time, or of parts of the features."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        width = H if residual else D
        self.books = nn.ParameterList(nn.Parameter(torch.empty(16, width)) for _ in range(HEADS))
        self.o = linear()

    def nearest(self, x: Tensor, book: Tensor) -> Tensor:
        return F.embedding((x @ book.T).argmax(-1), book)

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return self.o(
                torch.cat([self.nearest(p, b) for p, b in zip(x.chunk(HEADS, -1), self.books, strict=True)], -1)
            )
        left, total = x, torch.zeros_like(x)
        for book in self.books:
            found = self.nearest(left, book)
            left, total = left - found, total + found
        return self.o(total)


class Beams(nn.Module):
    """Keeps the best continuations of every sequence for some steps, and orders the states anew."""

    def __init__(self, steps: int, cells: bool = False) -> None:
        super().__init__()
        self.steps = steps
        self.cell = nn.ModuleList(linear() for _ in range(steps)) if cells else None
        self.one, self.head = linear(), linear(16)

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for step in range(self.steps):
            logits = self.head(state).log_softmax(-1)
            best = logits.max(-1).values.topk(x.shape[1], -1).indices
            state = torch.tanh((self.one if self.cell is None else self.cell[step])(rows_of(state, best)))
        return state


class Winners(nn.Module):
    """An MLP that keeps the largest features of its middle only."""

    def __init__(self, kept: int, numbered: bool) -> None:
        super().__init__()
        self.kept = kept
        for name in ("w1", "w2") if numbered else ("up", "down"):
            self.add_module(name, linear())
        self.parts = tuple(self._modules)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._modules[self.parts[0]](x)
        values, places = hidden.topk(self.kept, -1)
        return self._modules[self.parts[1]](torch.zeros_like(hidden).scatter(-1, places, values))


class Ordered(nn.Module):
    """Sorts the rows, works on all of them, and puts them back."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        order = rows.square().sum(-1).argsort()
        done = rows[order]
        for layer in self.layers:
            done = F.silu(layer(done))
        return torch.empty_like(done).index_copy(0, order, done).view(x.shape)


class Heads(nn.Module):
    """Several heads on all rows; a count, the best token or nothing is made of their outputs."""

    def __init__(self, how: str, packed: bool = False) -> None:
        super().__init__()
        self.how, self.packed = how, packed
        self.heads = nn.Parameter(torch.empty(HEADS, H, H)) if packed else nn.ModuleList(linear() for _ in range(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        outs = torch.stack([x @ h for h in self.heads] if self.packed else [h(x) for h in self.heads])
        if self.how == "argmax":
            return outs.mean(0) + 1e-3 * outs[0].argmax(-1, keepdim=True)
        if self.how == "median":
            return outs.median(0).values
        if self.how == "threshold":
            return outs.masked_fill(outs < 0, 0).sum(0)
        return outs.mean(0) + 0 * (outs > 0).sum()


class Places(nn.Module):
    """Weights by the place of a token, which no value chooses, beside a top-k that counts for all."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.layers = nn.ModuleList(linear() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        scale = x.topk(2, -1).values.mean(-1, keepdim=True)
        if self.by == "parity":
            out[:, ::2], out[:, 1::2] = self.layers[0](x[:, ::2]), self.layers[1](x[:, 1::2])
        else:
            out[:, :1], out[:, 1:] = self.layers[0](x[:, :1]), self.layers[1](x[:, 1:])
        return out * scale


class Pooled(nn.Module):
    """Channels weighted by the best of a pooled view (squeeze and excite), or the best tokens attended to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.down, self.up = how, linear(D), linear(H, D)
        self.parts = nn.ModuleList(linear() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "channels":
            pooled = x.topk(min(3, x.shape[1]), 1).values.mean(1, keepdim=True)
            return x * self.up(F.relu(self.down(pooled))).sigmoid()
        best = rows_of(x, x.square().sum(-1).topk(min(3, x.shape[1]), -1).indices)
        key, value = (part(best) for part in self.parts)
        return (x @ key.mT).softmax(-1) @ value


P = functools.partial
LOOKALIKES: dict[str, Callable[[], nn.Module]] = {
    **{f"attention to the {k} keys of an indexer, {how}": P(IndexedAttention, k, how)
       for k in (1, 2, 4, 8) for how in ("mask", "gathered")},
    **{f"the same, projections in a list, {how}": P(IndexedAttention, 4, how, lists=True)
       for how in ("mask", "gathered")},
    **{f"the same, projections packed, {how}": P(IndexedAttention, 4, how, packed=True)
       for how in ("mask", "gathered")},
    **{f"heads in a {how}": P(HeadsApart, how) for how in ("list", "stack", "flat")},
    **{f"pruned tokens, {how}, {n} layers, {put}": P(PrunedTokens, how, n, False, put)
       for how in ("topk", "sort") for n in (1, 2, 3) for put in ("scatter", "add")},
    **{f"fewer tokens after each of {n} layers, {how}": P(PrunedTokens, how, n, True)
       for n in (2, 3) for how in ("topk", "sort")},
    **{f"rows above a threshold, {n} layers": P(Masked, n) for n in (1, 2)},
    **{f"early exit from {n} layers": P(Masked, n, True) for n in (2, 4)},
    **{f"memory, product {p}, {how}": P(Memory, p, how) for p in (False, True) for how in ("bag", "sum")},
    "residual codebooks": P(Quantizer, True),
    "codebooks of parts": P(Quantizer, False),
    **{f"beams, {n} steps, cells {c}": P(Beams, n, c) for n in (1, 3) for c in (False, True)},
    **{f"{k} winners, numbered {n}": P(Winners, k, n) for k in (4, 16) for n in (False, True)},
    **{f"sorted rows, {n} layers": P(Ordered, n) for n in (1, 3)},
    **{f"heads, {how}, packed {p}": P(Heads, how, p) for p in (False, True)
       for how in ("argmax", "median", "threshold", "count")},
    **{f"weights by {by}": P(Places, by) for by in ("parity", "first token")},
    **{f"pooled {how}": P(Pooled, how) for how in ("channels", "tokens")},
}  # fmt: skip
