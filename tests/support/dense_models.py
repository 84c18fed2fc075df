"""Blocks that multiply every token with every expert, as Llama 4 does, and mutations of them.

``DenseMoE`` routes by a matrix [T, E] that is zero but for a token's experts; the weight scales the expert's input.
Its steps are methods, so that each mutation overrides one. ``CapacityMoE`` routes by a mask with a capacity and calls
the experts of a dict by formatted names, as Switch does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from loop_models import PlainMLP
from torch import Tensor, nn

H, MI, E = 64, 32, 6


class DenseMoE(nn.Module):
    def __init__(self, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate_up = nn.Parameter(torch.empty(E, H, 2 * MI))
        self.down = nn.Parameter(torch.empty(E, MI, H))
        self.router = nn.Linear(H, E, bias=False)
        self.shared = nn.Linear(H, H, bias=False)

    def places(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = logits.topk(self.top_k, dim=1)
        return values, ids

    def scores(self, logits: Tensor) -> Tensor:
        values, ids = self.places(logits)
        spread = torch.full_like(logits, float("-inf")).scatter_(1, ids, values)
        return torch.sigmoid(spread.float()).to(logits.dtype)

    def rows(self, x: Tensor, scores: Tensor) -> Tensor:
        return x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)

    def activate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        return up * F.silu(gate)

    def products(self, rows: Tensor) -> Tensor:
        y = torch.bmm(rows.view(E, -1, H), self.gate_up)
        return torch.bmm(self.activate(y), self.down)

    def join(self, out: Tensor, scores: Tensor) -> Tensor:
        return out.sum(dim=0)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, H)
        logits = self.router(x)
        scores = self.scores(logits)
        out = self.products(self.rows(x, scores))
        return (self.shared(x) + self.join(out, scores)).view(hidden_states.shape), logits


class OneExpert(DenseMoE):
    def __init__(self) -> None:
        super().__init__(1)


class SoftmaxOverPlaces(DenseMoE):
    def scores(self, logits):
        values, ids = self.places(logits)
        return torch.full_like(logits, float("-inf")).scatter_(1, ids, values).softmax(-1)


class WeightOnOutput(DenseMoE):
    def rows(self, x, scores):
        return x.repeat(E, 1)

    def join(self, out, scores):
        return (out * scores.transpose(0, 1).unsqueeze(-1)).sum(0)


class WeightOnOutputBiases(WeightOnOutput):
    """As gpt-oss of transformers 4 on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.up_bias = nn.Parameter(torch.empty(E, 2 * MI))
        self.down_bias = nn.Parameter(torch.empty(E, H))

    def activate(self, y):
        return super().activate(y + self.up_bias[..., None, :])

    def join(self, out, scores):
        return super().join(out + self.down_bias[..., None, :], scores)


# Mutations: the router's zeros


class NoMask(DenseMoE):
    def scores(self, logits):
        return torch.sigmoid(logits)


class ZerosThenSigmoid(DenseMoE):
    def scores(self, logits):
        values, ids = self.places(logits)
        return torch.sigmoid(torch.zeros_like(logits).scatter_(1, ids, values))


class SmallInsteadOfZero(DenseMoE):
    def scores(self, logits):
        return super().scores(logits) + 1e-3


class FillNotLow(DenseMoE):
    def scores(self, logits):
        values, ids = self.places(logits)
        return torch.sigmoid(torch.full_like(logits, -8.0).scatter_(1, ids, values))


class OneForAll(DenseMoE):
    """Expert 0 gets every token besides."""

    def scores(self, logits):
        return super().scores(logits) + F.one_hot(torch.zeros_like(logits[:, 0], dtype=torch.int64), E) * 0.5


class SamePlaceTwice(DenseMoE):
    def places(self, logits):
        values, ids = logits.topk(1, dim=1)
        return values.expand(-1, 2).contiguous(), ids.expand(-1, 2).contiguous()


class TopOfTokens(DenseMoE):
    """The places come from a top-k over tokens: not different ones within a row."""

    def places(self, logits):
        tokens = logits.topk(1, dim=0).indices.expand(logits.shape[0], -1)[:, :2] % E
        return logits[:, :2], tokens


class SoftmaxAgain(DenseMoE):
    """Zeros become exp(0)."""

    def scores(self, logits):
        return super().scores(logits).softmax(-1)


class DividedBySum(DenseMoE):
    def scores(self, logits):
        scores = super().scores(logits)
        return scores / scores.sum(-1, keepdim=True)


class Squared(DenseMoE):
    def scores(self, logits):
        return super().scores(logits).square()


# the rows


class OutputUnmasked(WeightOnOutput):
    """Dense rows, and another matrix than the routing one on the output."""

    def join(self, out, scores):
        return super().join(out, scores + 1e-3)


class WeightOnBoth(DenseMoE):
    def join(self, out, scores):
        return (out * scores.transpose(0, 1).unsqueeze(-1)).sum(0)


class NextExpert(DenseMoE):
    def rows(self, x, scores):
        return super().rows(x, scores.roll(1, 1))


class OtherTokens(DenseMoE):
    def rows(self, x, scores):
        return super().rows(x.roll(1, 0), scores)


class RowsPlusMean(DenseMoE):
    def rows(self, x, scores):
        return super().rows(x, scores) + x.mean(0)


class Interleaved(DenseMoE):
    """Rows ordered by token, read as if by expert."""

    def rows(self, x, scores):
        return x.repeat_interleave(E, 0) * scores.reshape(-1, 1)


# between and after the products


class UpBias(DenseMoE):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(E, 2 * MI))

    def activate(self, y):
        return super().activate(y + self.bias[:, None])


class DownBias(DenseMoE):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(E, H))

    def products(self, rows):
        return super().products(rows) + self.bias[:, None]


class NotZeroAtZero(DenseMoE):
    def activate(self, y):
        gate, up = y.chunk(2, dim=-1)
        return (up + 1) * torch.sigmoid(gate)


class ShiftedUp(DenseMoE):
    """silu(gate) * (up + 1): zero at zero all the same."""

    def activate(self, y):
        gate, up = y.chunk(2, dim=-1)
        return (up + 1) * F.silu(gate)


class AcrossExperts(DenseMoE):
    def activate(self, y):
        return super().activate(y - y.mean(0, keepdim=True))


class ConstantForOthers(DenseMoE):
    """What is zero becomes one; a token's own rows are as they should be."""

    def activate(self, y):
        h = super().activate(y)
        return torch.where((y == 0).all(-1, keepdim=True), torch.ones_like(h), h)


class Largest(DenseMoE):
    def join(self, out, scores):
        return out.amax(0)


class FirstHalf(DenseMoE):
    def join(self, out, scores):
        return out[: E // 2].sum(0)


class Scaled(DenseMoE):
    def join(self, out, scores):
        return out.mean(0)


class ClampedSum(DenseMoE):
    def join(self, out, scores):
        return out.sum(0).clamp(-1e3, 1e3)


FAITHFUL = (
    DenseMoE, WeightOnOutputBiases, OneExpert, WeightOnOutput, SoftmaxOverPlaces, ShiftedUp, DividedBySum, Squared,
)  # fmt: skip
MUTATIONS = (
    NoMask, ZerosThenSigmoid, SmallInsteadOfZero, FillNotLow, OneForAll, SamePlaceTwice, TopOfTokens, SoftmaxAgain,
    OutputUnmasked, WeightOnBoth, NextExpert, OtherTokens, RowsPlusMean, Interleaved, UpBias, DownBias, NotZeroAtZero,
    AcrossExperts, ConstantForOthers, Largest, FirstHalf, Scaled, ClampedSum,
)  # fmt: skip


class CapacityMoE(nn.Module):
    """Top-1 with a capacity per sequence; ``mask`` makes the dispatch mask, which mutations change."""

    capacity = 3

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleDict({f"expert_{i}": PlainMLP() for i in range(E)})
        self.experts["dropout"] = nn.Dropout(0.1)

    def mask(self, probs: Tensor) -> Tensor:
        chosen = F.one_hot(probs.argmax(-1), num_classes=E)
        return chosen * (chosen.cumsum(-2) <= self.capacity)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(hidden_states)
        probs = logits.softmax(-1)
        mask = self.mask(probs).view(-1, 1, E).permute(2, 1, 0)
        weights = probs.max(-1).values.view(-1, 1)
        x = hidden_states.view(-1, H)
        out = torch.zeros_like(x)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            column, token = torch.where(mask[e].squeeze(0))
            rows = self.experts[f"expert_{e[0]}"](x[None, token].reshape(-1, H)) * weights[token, column, None]
            out.index_add_(0, token, self.experts["dropout"](rows) * 0.5)
        return out.view(hidden_states.shape), logits


class TwoPerToken(CapacityMoE):
    """Two experts a token in one mask, with one weight."""

    def mask(self, probs):
        return torch.zeros_like(probs, dtype=torch.int64).scatter_(-1, probs.topk(2, dim=-1).indices, 1)


class AnyNumberPerToken(CapacityMoE):
    def mask(self, probs):
        return (probs > 1 / E).to(torch.int64)


class CountsInMask(CapacityMoE):
    """2 where a token is the first of its expert; the mask is not 0 and 1, but its places are the same."""

    def mask(self, probs):
        chosen = super().mask(probs)
        return chosen * (1 + (chosen.cumsum(-2) == 1).to(torch.int64))


class FilledMask(CapacityMoE):
    """Every token goes to expert 0 besides."""

    def mask(self, probs):
        return super().mask(probs) | F.one_hot(torch.zeros_like(probs[..., 0], dtype=torch.int64), E)
