"""Blocks written for the tests in the style of remote code and of transformers 4: experts called in Python loops.

``RemoteMoE`` is DeepSeek-V2 like: a ModuleList, a group-limited router, shared experts, and an inference loop
over sorted slices with counts on the host. ``LoopMoE`` has the where/index_add loops, and the mutations of
test_loop_mutations.py as overrides of its steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, MI, E, K = 64, 32, 4, 2


class GatedMLP(nn.Module):
    def __init__(self, width: int = MI, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(H, width, bias=bias)
        self.up_proj = nn.Linear(H, width, bias=bias)
        self.down_proj = nn.Linear(width, H, bias=bias)

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(H, MI)
        self.down_proj = nn.Linear(MI, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class GroupLimitedGate(nn.Module):
    """Softmax scores; only experts of the best groups are eligible."""

    def __init__(self, groups: int = 2, kept: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))
        self.groups, self.kept = groups, kept

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), self.weight.float()).softmax(-1)
        best = scores.view(x.shape[0], self.groups, -1).max(-1).values
        chosen = torch.zeros_like(best).scatter_(1, best.topk(self.kept, dim=-1).indices, 1)
        mask = chosen.unsqueeze(-1).expand(-1, self.groups, E // self.groups).reshape(x.shape[0], -1)
        weights, ids = scores.masked_fill(~mask.bool(), 0.0).topk(K, dim=-1, sorted=False)
        return ids, weights * 1.5


class RemoteMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([GatedMLP() for _ in range(E)])
        self.gate = GroupLimitedGate()
        self.shared_experts = GatedMLP(2 * MI)

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape
        ids, weights = self.gate(hidden_states.view(-1, shape[-1]))
        y = self.infer(hidden_states.view(-1, shape[-1]), ids, weights).view(*shape)
        return y + self.shared_experts(hidden_states)

    @torch.no_grad()
    def infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = ids.new_zeros((ids.shape[0], len(self.experts)))
        counts.scatter_(1, ids, 1)
        per_expert = counts.sum(dim=0)
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        per_expert = per_expert.cpu().numpy()
        outputs, start = [], 0
        for i, count in enumerate(per_expert):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.experts[i](rows[start:end]))
            start = end
        joined = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
        back = torch.empty_like(joined)
        back[order] = joined
        return back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1)).sum(dim=1).type(back.dtype)


class SortedExperts(nn.ModuleList):
    """A list that is called with finished ids and weights, and serves a token once per expert."""

    experts = property(lambda self: self)
    infer = RemoteMoE.infer

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.infer(x, ids, weights)


class CalledListMoE(RemoteMoE):
    def __init__(self) -> None:
        super().__init__()
        self.experts = SortedExperts(self.experts)

    def infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, ids, weights)


class LoopMoE(nn.Module):
    """Mixtral's loop of transformers 4: over all experts, or (``hit``) over those that have tokens."""

    def __init__(self, expert: type[nn.Module] = GatedMLP, hit: bool = False, named: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        experts = [expert() for _ in range(E)]
        self.experts = nn.ModuleDict({f"e{i}": m for i, m in enumerate(experts)}) if named else nn.ModuleList(experts)
        self.hit, self.named = hit, named

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = hidden_states.shape
        x = hidden_states.view(-1, width)
        logits = self.gate(x)
        weights, ids = F.softmax(logits, dim=1, dtype=torch.float).topk(K, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros((batch * length, width), dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        experts = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero() if self.hit else range(E)
        for e in experts:
            column, token = torch.where(mask[e].squeeze(0))
            if not self.hit and token.numel() == 0:
                continue
            out = self.step(e, x, weights, out, column, token)
        return out.reshape(batch, length, width), logits

    def expert(self, e: Tensor | int) -> nn.Module:
        return self.experts[f"e{int(e)}"] if self.named else self.experts[e]

    def step(self, e: Tensor | int, x: Tensor, weights: Tensor, out: Tensor, column: Tensor, token: Tensor) -> Tensor:
        rows = x[None, token].reshape(-1, x.shape[1])
        current = self.expert(e)(rows) * weights[token, column, None]
        return out.index_add_(0, token, current.to(x.dtype))


class MaskMoE(nn.Module):
    """Every expert asks its mask whether it has tokens; ``by_tokens``: the rows are those where a mask of tokens is."""

    def __init__(self, asks: str = "any", by_tokens: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([GatedMLP() for _ in range(E)])
        self.asks, self.by_tokens = asks, by_tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        weights, ids = F.softmax(self.gate(x), dim=1, dtype=torch.float).topk(K, dim=-1)
        weights = self.kept(weights.to(x.dtype))
        out = torch.zeros_like(x)
        for e in range(E):
            mask = ids == e
            chosen = mask.any(-1) if self.by_tokens else mask
            if self.has_some(e, chosen, x):
                out = self.step(e, x, weights, out, chosen, (weights * mask).sum(-1))
        return out.view(hidden_states.shape)

    def kept(self, weights: Tensor) -> Tensor:
        return weights

    def has_some(self, e: int, mask: Tensor, x: Tensor) -> bool:
        return {
            "any": lambda: mask.any(),
            "torch.any": lambda: bool(torch.any(mask)),
            "sum": lambda: mask.sum() > 0,
            "count": lambda: torch.count_nonzero(mask).item() != 0,
            "sum is zero": lambda: not mask.sum().eq(0),
            "items": lambda: mask.sum().item() >= 1 and mask.any().item(),
            "truth": lambda: mask.sum(),
            "nothing": lambda: True,
        }[self.asks]()  # type: ignore[no-any-return, no-untyped-call]

    def step(self, e: int, x: Tensor, weights: Tensor, out: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        if self.by_tokens:
            out[mask] += self.experts[e](x[mask]) * weight[mask, None]
            return out
        token, slot = torch.where(mask)
        return out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])


class FlatMaskMoE(nn.Module):
    """DeepSeek's loop for training: a token once per choice, and a mask that is made anew wherever it is used."""

    def __init__(self, asks: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([GatedMLP() for _ in range(E)])
        self.asks = asks

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        weights, ids = F.softmax(self.gate(x), dim=1, dtype=torch.float).topk(K, dim=-1)
        flat, x = ids.view(-1), x.repeat_interleave(K, dim=0)
        y = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            if self.asks and not (flat == e).any():
                continue
            y[flat == e, :] = expert(x[flat == e])
        y = (y.view(*weights.shape, -1) * weights.to(y.dtype).unsqueeze(-1)).sum(dim=1)
        return y.view(hidden_states.shape)


class OneHotMoE(LoopMoE):
    """Asks the one-hot mask of integers, which is transformers' own."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(x)
        weights, ids = F.softmax(logits, dim=1, dtype=torch.float).topk(K, dim=-1)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            if mask[e].any():
                out = self.step(e, x, weights.to(x.dtype), out, *torch.where(mask[e]))
        return out.view(hidden_states.shape), logits


class CountsMoE(RemoteMoE):
    """As transformers 4 spells it: it goes through the counts as a tensor, and slices between sums of them."""

    @torch.no_grad()
    def infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        outputs, start = [], 0
        for i, count in enumerate(F.one_hot(ids, len(self.experts)).sum(dim=(0, 1))):
            if count == 0:
                continue
            end = start + count
            outputs.append(self.experts[i](rows[start:end]))
            start = end
        joined = torch.cat(outputs, dim=0)
        back = torch.empty_like(joined)
        back[order] = joined
        return back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1)).sum(dim=1).type(back.dtype)


class AllWeightsMoE(LoopMoE):
    """Its routing weights are those of all experts, zero for those that a token does not go to."""

    def step(self, e: Tensor | int, x: Tensor, weights: Tensor, out: Tensor, column: Tensor, token: Tensor) -> Tensor:
        current = self.experts[e](x[token]) * self.dense[token, self.column(e), None]
        return out.index_add_(0, token, current)

    def column(self, e: Tensor | int) -> Tensor | int:
        return e

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = F.softmax(self.gate(hidden_states).flatten(0, 1), dim=-1).topk(K, dim=-1)
        self.dense = values.new_zeros(values.shape[0], E).scatter(1, ids, values)
        try:
            return super().forward(hidden_states)
        finally:
            del self.dense


class OffsetsMoE(nn.Module):
    """Packed weights, rows sorted by expert, each expert's written into its slice (aria's of transformers 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, H, 2 * MI))
        self.down = nn.Parameter(torch.randn(E, MI, H))

    def offsets(self, counts: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.long, device=counts.device), counts.cumsum(0)])

    def products(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        out = rows.new_zeros(rows.shape[0], weight.shape[2])
        offsets = self.offsets(counts)
        for e in range(weight.shape[0]):
            start, end = offsets[e], offsets[e + 1]
            out[start:end] = rows[start:end] @ weight[e]
        return out

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, H)
        values, ids = self.gate(x).topk(K, dim=-1)
        counts = F.one_hot(ids, E).sum(dim=(0, 1))
        order = ids.view(-1).argsort()
        gate, up = self.products(x[order // K], self.up, counts).chunk(2, dim=-1)
        y = self.products(F.silu(gate) * up, self.down, counts)
        back = torch.zeros_like(y).index_copy_(0, order, y).view(-1, K, H)
        return (back * values.softmax(-1).unsqueeze(-1)).sum(1).view_as(hidden_states)


class Model(nn.Module):
    """Blocks with a residual; takes hidden states."""

    def __init__(self, make: object, dtype: torch.dtype = torch.bfloat16, seed: int = 0, layers: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([make().to(dtype) for _ in range(layers)])  # type: ignore[operator]
            for p in self.parameters():
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            y = block(x)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


class NormedMLP(nn.Module):
    """A middle no kernel knows: an RMSNorm over the activated values, with one more gate before it."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(H, MI, bias=bias)
        self.up_proj = nn.Linear(H, MI, bias=bias)
        self.norm = nn.RMSNorm(MI, eps=1e-6)
        self.down_proj = nn.Linear(MI, H, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.norm(torch.tanh(self.gate_proj(x)) * self.up_proj(x)))
