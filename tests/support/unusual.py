"""Blocks that keep their experts' weights where no list of modules and no two packed parameters show them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, MI, E, K = 32, 32, 4, 2


class Routed(nn.Module):
    """A router, and a loop over experts that asks ``expert`` for each one's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)

    def expert(self, e: int, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(rows).softmax(-1).topk(K, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, rows[token]) * weights[token, slot, None])
        return out.view(x.shape)


class Uneven(Routed):
    """Experts of several widths, in a list."""

    def __init__(self) -> None:
        super().__init__()
        widths = [MI * (1 + e % 2) for e in range(E)]
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, w), nn.GELU(), nn.Linear(w, H)) for w in widths)

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return self.experts[e](rows)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(H))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand_as(x)


class Kinds(Uneven):
    """Experts beside an identity and a constant one."""

    def __init__(self) -> None:
        super().__init__()
        mlps = [nn.Sequential(nn.Linear(H, MI), nn.GELU(), nn.Linear(MI, H)) for _ in range(E - 2)]
        self.experts = nn.ModuleList([*mlps, nn.Identity(), Constant()])


class Holder(nn.Module):
    """Weights without a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(MI, H)), nn.Parameter(torch.empty(H, MI))


class Holders(Routed):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"e{e}": Holder() for e in range(E)})

    def expert(self, e: int, rows: Tensor) -> Tensor:
        held = self.experts[f"e{e}"]
        return F.linear(F.silu(F.linear(rows, held.up)), held.down)


class FourDimensions(Routed):
    """One parameter of all experts' matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.empty(E, 2, H, H))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        up, down = self.both[e]
        return F.relu(rows @ up) @ down


class RowsOfAMatrix(Routed):
    """A matrix of all experts' rows, sliced between numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(E * MI, H)), nn.Parameter(torch.empty(E * MI, H))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        own = slice(e * MI, (e + 1) * MI)
        return F.silu(F.linear(rows, self.up[own])) @ self.down[own]


class Padded(Routed):
    """Every expert's rows padded with zeros to as many as the busiest has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(E, H, MI)), nn.Parameter(torch.empty(E, MI, H))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        weights, ids = self.route(rows)
        found = [torch.where(ids == e) for e in range(E)]
        room = max(len(token) for token, _ in found)
        sent = torch.stack([F.pad(rows[token], (0, 0, 0, room - len(token))) for token, _ in found])
        back = F.silu(sent @ self.up) @ self.down
        out = torch.zeros_like(rows)
        for e, (token, slot) in enumerate(found):
            out.index_add_(0, token, back[e, : len(token)] * weights[token, slot, None])
        return out.view(x.shape)


class SharedInTheList(Routed):
    """The first expert of the list serves every token."""

    def __init__(self) -> None:
        super().__init__()
        mlp = lambda: nn.Sequential(nn.Linear(H, MI, bias=False), nn.GELU(), nn.Linear(MI, H, bias=False))
        self.experts = nn.ModuleList(mlp() for _ in range(E + 1))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return self.experts[e + 1](rows)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.experts[0](x.reshape(-1, H)).view(x.shape)


class Dispatched(Routed):
    """One-hot dispatch into as much room for each expert as the number of tokens gives it; packed weights or a list."""

    def __init__(self, packed: bool = True) -> None:
        super().__init__()
        if packed:
            self.up, self.down = nn.Parameter(torch.empty(E, H, MI)), nn.Parameter(torch.empty(E, MI, H))
        else:
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(H, MI, bias=False), nn.GELU(), nn.Linear(MI, H, bias=False)) for _ in range(E)
            )
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        n = rows.shape[0]
        room = max(2, n // 2)
        share, ids = self.router(rows).softmax(-1).max(-1)
        chosen = F.one_hot(ids, E)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        there = F.one_hot(place.clamp(max=room - 1), room)
        combine = (share * (place < room))[:, None, None] * chosen[:, :, None] * there[:, None, :]
        sent = torch.einsum("nec,nh->ech", (combine > 0).to(x.dtype), rows)
        if self.packed:
            back = F.gelu(sent @ self.up) @ self.down
        else:
            back = torch.stack([expert(part[0]) for part, expert in zip(sent.chunk(E), self.experts, strict=True)])
        return torch.einsum("nec,ech->nh", combine, back).view(x.shape)
