"""Mixture-of-experts blocks of every combination of a routing, a store of weights, an expert, a dispatch and a sum.

``Spelling`` says which; ``Spelled`` is the block. Those with a ``branch`` decide something by the number of tokens.
``together``: so many of them that any two choices meet in one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

# Three experts: a first, one between and a last; traces grow with their number.
H, MI, E, K = 32, 32, 3, 2

ROUTINGS = ("softmax", "top-k first", "sigmoid", "biased choice", "top-1", "masked softmax")
STORES = (
    "modules", "dict", "attributes", "lists of linears", "lists of parameters", "dict of parameters",
    "numbered parameters", "packed", "packed transposed", "flattened",
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "relu", "tanh")
DISPATCHES = (
    "where", "nonzero", "hit experts", "one-hot mask", "unique", "masks", "any of a mask", "split by counts",
    "counts on the host", "ends on the host", "lists of rows", "repeated tokens", "whole sequences",
)  # fmt: skip
SUMS = ("index_add", "add in place", "scatter_add", "places of pairs")
BRANCHES = ("scale", "capacity", "least capacity", "pieces")


@dataclass(frozen=True)
class Spelling:
    """One block of the grammar."""

    routing: str
    store: str
    activation: str
    gated: bool
    dispatch: str
    sum: str
    shared: bool = False
    float_router: bool = False
    own_dtype: bool = False
    branch: str = ""
    limit: int = 0


_CHOICES: dict[str, tuple[Any, ...]] = {
    "routing": ROUTINGS, "store": STORES, "activation": ACTIVATIONS, "gated": (False, True), "dispatch": DISPATCHES,
    "sum": SUMS, "shared": (False, True), "float_router": (False, True), "own_dtype": (False, True),
}  # fmt: skip
_BRANCHING: dict[str, tuple[Any, ...]] = {"branch": BRANCHES, "limit": (16, 40, 200)}


def _pairs(made: dict[str, Any]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(sorted(made.items(), key=lambda item: item[0]), 2))


@cache
def together(branches: bool) -> tuple[Spelling, ...]:
    """Without a branch, any two choices are in one of them; with one, any choice is with any branch and any limit."""
    choices = _CHOICES | (_BRANCHING if branches else {})
    left = {
        pair
        for a, b in itertools.combinations(choices, 2)
        if not branches or {a, b} & _BRANCHING.keys()
        for x, y in itertools.product(choices[a], choices[b])
        for pair in _pairs({a: x, b: y})
    }
    random, found = Random(0), []
    while left:
        # Of some, each filled in with what meets the most, the one that brings the most.
        most: set[tuple[Any, ...]] = set()
        for _ in range(6):
            made: dict[str, Any] = dict(random.choice(sorted(left, key=repr)))
            for name in random.sample(sorted(choices.keys() - made.keys()), len(choices) - 2):
                values = random.sample(choices[name], len(choices[name]))
                _, best = max((len(_pairs(made | {name: v}) & left), -at) for at, v in enumerate(values))
                made[name] = values[-best]
            if len(_pairs(made) & left) > len(most):
                most, spelling = _pairs(made) & left, Spelling(**made)
        left -= most
        found.append(spelling)
    return tuple(found)


def spellings(branches: bool) -> st.SearchStrategy[Spelling]:
    """Any blocks; with ``branches`` each has one."""
    choices = _CHOICES | (_BRANCHING if branches else {})
    return st.builds(Spelling, **{name: st.sampled_from(values) for name, values in choices.items()})


class Expert(nn.Module):
    """``down(act(up x))``, or ``down(act(gate x) * up x)``."""

    def __init__(self, act: Callable[[Tensor], Tensor], gated: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, MI, bias=False), nn.Linear(MI, H, bias=False)
        if gated:
            self.gate = nn.Linear(H, MI, bias=False)
        self.act, self.gated = act, gated

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down(self.act(self.gate(x)) * self.up(x))
        return self.down(self.act(self.up(x)))


class Spelled(nn.Module):
    """The block of a spelling: hidden states [B, T, H] to the same."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.s = s = spelling
        self.k = 1 if s.routing == "top-1" else K
        self.act = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}[s.activation]
        self.router = nn.Linear(H, E, bias=False)
        self.bias = nn.Parameter(torch.zeros(E))
        names = ["up", "down", *(["gate"] if s.gated else [])]
        shapes = {"up": (MI, H), "gate": (MI, H), "down": (H, MI)}
        if s.store == "modules":
            self.experts = nn.ModuleList(Expert(self.act, s.gated) for _ in range(E))
        elif s.store == "dict":
            self.experts = nn.ModuleDict({f"e{i}": Expert(self.act, s.gated) for i in range(E)})
        elif s.store == "attributes":
            for i in range(E):
                self.add_module(f"expert_{i}", Expert(self.act, s.gated))
        for name in names:
            out, width = shapes[name]
            if s.store == "lists of linears":
                self.add_module(name, nn.ModuleList(nn.Linear(width, out, bias=False) for _ in range(E)))
            elif s.store == "lists of parameters":
                self.add_module(name, nn.ParameterList(nn.Parameter(torch.empty(out, width)) for _ in range(E)))
            elif s.store == "dict of parameters":
                matrices = {f"e{i}": nn.Parameter(torch.empty(out, width)) for i in range(E)}
                self.add_module(name, nn.ParameterDict(matrices))
            elif s.store == "numbered parameters":
                for i in range(E):
                    self.register_parameter(f"{name}_{i}", nn.Parameter(torch.empty(out, width)))
            elif s.store == "packed":
                self.register_parameter(name, nn.Parameter(torch.empty(E, out, width)))
            elif s.store == "packed transposed":
                self.register_parameter(name, nn.Parameter(torch.empty(E, width, out)))
            elif s.store == "flattened":
                self.register_parameter(name, nn.Parameter(torch.empty(E * out, width)))
        if s.shared:
            self.shared = Expert(self.act, s.gated)

    # experts

    def product(self, name: str, e: int, rows: Tensor) -> Tensor:
        store = self.s.store
        if store == "numbered parameters":
            return F.linear(rows, getattr(self, f"{name}_{e}"))
        weight = getattr(self, name)
        if store == "lists of linears":
            return weight[e](rows)
        if store == "dict of parameters":
            return F.linear(rows, weight[f"e{e}"])
        if store == "packed transposed":
            return rows @ weight[e]
        if store == "flattened":
            return F.linear(rows, weight.view(E, -1, weight.shape[1])[e])
        return F.linear(rows, weight[e])

    def expert(self, e: int, rows: Tensor) -> Tensor:
        if self.s.store == "modules":
            return self.experts[e](rows)
        if self.s.store == "dict":
            return self.experts[f"e{e}"](rows)
        if self.s.store == "attributes":
            return getattr(self, f"expert_{e}")(rows)
        hidden = self.act(self.product("gate" if self.s.gated else "up", e, rows))
        if self.s.gated:
            hidden = hidden * self.product("up", e, rows)
        return self.product("down", e, hidden)

    # routing

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [..., K]."""
        logits = self.router(x)
        if self.s.float_router:
            logits = logits.float()
        routing = self.s.routing
        if routing == "top-1":
            weights, ids = logits.softmax(-1).max(-1, keepdim=True)
        elif routing == "softmax":
            weights, ids = logits.softmax(-1).topk(self.k, -1)
            weights = weights / weights.sum(-1, keepdim=True)
        elif routing == "sigmoid":
            weights, ids = logits.sigmoid().topk(self.k, -1)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        elif routing == "biased choice":
            scores = logits.sigmoid()
            ids = (scores + self.bias).topk(self.k, -1).indices
            weights = scores.gather(-1, ids) * 1.5
        elif routing == "masked softmax":
            values, ids = logits.topk(self.k, -1)
            weights = torch.full_like(logits, float("-inf")).scatter(-1, ids, values).softmax(-1).gather(-1, ids)
        else:
            values, ids = logits.topk(self.k, -1)
            weights = values.softmax(-1)
        return weights.to(x.dtype), ids

    def limited(self, weights: Tensor, ids: Tensor) -> Tensor:
        """Weights of zero for tokens past an expert's capacity, which depends on the number of tokens."""
        n = ids.shape[0]
        room = max(self.s.limit, 2 * n // E) if self.s.branch == "least capacity" else 1 + n // 2
        chosen = F.one_hot(ids.t().reshape(-1), E)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1).view(ids.shape[1], n).t()
        return weights * (place < room)

    # the block

    def forward(self, x: Tensor) -> Tensor:
        out = self.sequences(x) if self.s.dispatch == "whole sequences" else self.flat(x).view(x.shape)
        if self.s.branch == "scale" and x.shape[0] * x.shape[1] > self.s.limit:
            out = out * 1.05
        return out + self.shared(x) if self.s.shared else out

    def flat(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        if self.s.branch == "pieces":
            return torch.cat([self.tokens(piece) for piece in rows.split(self.s.limit)])
        return self.tokens(rows)

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        if self.s.branch in ("capacity", "least capacity"):
            weights = self.limited(weights, ids)
        if self.s.own_dtype:
            x = x.to(next(p for n, p in self.named_parameters() if "router" not in n and p.dim() > 1).dtype)
        return getattr(self, "by_" + self.s.dispatch.replace(" ", "_").replace("-", "_"))(x, weights, ids)

    def added(self, out: Tensor, token: Tensor, slot: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """``out`` with an expert's rows added."""
        way = self.s.sum
        if way == "places of pairs":
            out[token, slot] = rows * weights[token, slot, None]
            return out
        rows = rows * weights[token, slot, None]
        if way == "add in place":
            out[token] += rows
            return out
        if way == "scatter_add":
            return out.scatter_add(0, token[:, None].expand(-1, H), rows)
        return out.index_add_(0, token, rows)

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.k, H) if self.s.sum == "places of pairs" else torch.zeros_like(x)

    def end(self, out: Tensor) -> Tensor:
        return out.sum(1) if out.dim() == 3 else out

    def by_where(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = self.start(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out = self.added(out, token, slot, self.expert(e, x[token]), weights)
        return self.end(out)

    def by_nonzero(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = self.start(x)
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out = self.added(out, token, slot, self.expert(e, x.index_select(0, token)), weights)
        return self.end(out)

    def by_hit_experts(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = self.start(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            number = int(e)
            slot, token = torch.where(mask[number])
            out = self.added(out, token, slot, self.expert(number, x[token]), weights)
        return self.end(out)

    def by_one_hot_mask(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out, mask = self.start(x), F.one_hot(ids, E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            out = self.added(out, token, slot, self.expert(e, x[token]), weights)
        return self.end(out)

    def by_unique(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = self.start(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            out = self.added(out, token, slot, self.expert(e, x[token]), weights)
        return self.end(out)

    def by_masks(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mask = (ids == e).any(-1)
            if mask.any():
                out[mask] += self.expert(e, x[mask]) * (weights * (ids == e)).sum(-1)[mask, None]
        return out

    def by_any_of_a_mask(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = self.start(x)
        for e in range(E):
            mask = ids == e
            if not mask.any():
                continue
            token, slot = torch.where(mask)
            out = self.added(out, token, slot, self.expert(e, x[token]), weights)
        return self.end(out)

    def by_split_by_counts(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort()
        parts = x[order // self.k].split(ids.flatten().bincount(minlength=E).tolist())
        done = torch.cat([self.expert(e, part) for e, part in enumerate(parts)])
        return torch.zeros_like(x).index_add(0, order // self.k, done * weights.flatten()[order, None])

    def by_counts_on_the_host(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        rows, done, start = x[order // self.k], [], 0
        for e, count in enumerate(F.one_hot(ids, E).sum((0, 1)).cpu().numpy()):
            end = start + count
            if count == 0:
                continue
            done.append(self.expert(e, rows[start:end]))
            start = end
        joined = torch.cat(done)
        back = torch.empty_like(joined)
        back[order] = joined
        return (back.view(*ids.shape, H) * weights[..., None]).sum(1)

    def by_ends_on_the_host(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort()
        out, start = torch.zeros_like(x), 0
        for e, end in enumerate(ids.flatten().bincount().cpu().numpy().cumsum(0)):
            if end == start:
                continue
            token = order[start:end] // self.k
            out.index_add_(0, token, self.expert(e, x[token]) * weights.flatten()[order[start:end], None])
            start = end
        return out

    def by_lists_of_rows(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            if token.shape[0] == 0:
                continue
            t, s = token.tolist(), slot.tolist()
            out.index_add_(0, token, self.expert(e, x[t]) * weights[t, s, None])
        return out

    def by_repeated_tokens(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        flat, repeated = ids.view(-1), x.repeat_interleave(self.k, dim=0)
        y = torch.empty_like(repeated)
        for e in range(E):
            y[flat == e] = self.expert(e, repeated[flat == e])
        return (y.view(*weights.shape, H) * weights[..., None]).sum(1)

    def sequences(self, x: Tensor) -> Tensor:
        """Masks of two dimensions."""
        weights, ids = self.route(x)
        if self.s.branch in ("capacity", "least capacity"):
            weights = self.limited(weights.view(-1, self.k), ids.view(-1, self.k)).view(weights.shape)
        out = torch.zeros_like(x)
        for e in range(E):
            mask = (ids == e).any(-1)
            if mask.any():
                out[mask] += self.expert(e, x[mask]) * (weights * (ids == e)).sum(-1)[mask][:, None]
        return out
