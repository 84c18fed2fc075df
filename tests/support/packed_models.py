"""Experts in packed or flattened weights that a loop multiplies, in the style of transformers 5."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, MI, E, OTHERS, K = 64, 32, 6, 2, 2


class Loop(nn.Module):
    """The loop over experts that were hit, with a place for ids that are none."""

    places = E

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = E

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.places).permute(2, 1, 0)
        for place in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            e = int(place.item())
            column, token = torch.where(mask[e])
            out = self.step(e, x, weights, out, column, token)
        return out

    def step(self, e: int, x: Tensor, weights: Tensor, out: Tensor, column: Tensor, token: Tensor) -> Tensor:
        y = self.expert(e, x[token]) * weights[token, column, None]
        return out.index_add_(0, token, y.to(x.dtype))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        raise NotImplementedError


class Flattened(Loop):
    """As dbrx: three matrices [E * I, H]; a place for ids that are none, whose expert does not exist."""

    places = E + 1

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.empty(E * MI, H)) for _ in range(3))

    def matrices(self, e: int) -> tuple[Tensor, Tensor, Tensor]:
        w1, v1, w2 = (w.view(-1, MI, H)[e] for w in (self.w1, self.v1, self.w2))
        return w1, v1, w2

    def expert(self, e: int, rows: Tensor) -> Tensor:
        w1, v1, w2 = self.matrices(e)
        return (F.silu(rows @ w1.T) * (rows @ v1.T)) @ w2


class WithoutWeights(Loop):
    """As longcat_flash: experts past the last one hand the token on; one projection has room for them."""

    places = E + OTHERS

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E + OTHERS, 2 * MI, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, MI))

    def hand_on(self, e: int, rows: Tensor) -> Tensor:
        return rows

    def expert(self, e: int, rows: Tensor) -> Tensor:
        if e >= E:
            return self.hand_on(e, rows)
        gate, up = F.linear(rows, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[e])


class Model(nn.Module):
    """One block: a router that chooses among all places with an expert, and the experts."""

    def __init__(self, experts: type[Loop], dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.choices = E + OTHERS if issubclass(experts, WithoutWeights) else E
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gate = nn.Linear(H, self.choices, bias=False)
            self.experts = experts()
            for p in self.parameters():
                nn.init.normal_(p, std=H**-0.5)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.experts(x, ids, weights)
