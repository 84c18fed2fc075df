"""The whole weights of a model that lies on several ranks: on the first rank, a few experts at a time.

::

    rank 0:  codes of its part --+
    rank 1:  codes of its part --+--> rank 0: [e, N, K/2] of the whole site, bit for bit one process's
    rank 2:  codes of its part --+    the others: tensors of that shape without values (on the meta device)

Contract: every rank makes the same calls in the same order; each is announced, so that a rank that fails (a full disk)
ends all. No rank holds more than some experts besides its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import mx
from ..passes.build.module import MXFP4Experts, mxfp4_sites
from ..passes.build.prep import groups_of
from ..passes.weights import Projection
from ..processes import is_dtensor, is_spread
from ..spec import MoEParams, Shard
from .agree import Agreement

_T = TypeVar("_T")


class Gathering:
    """The whole weights of a model's sites. ``first``: whether this rank gets them. A collective."""

    def __init__(self) -> None:
        self.agreement = Agreement(range(dist.get_world_size()))
        self.first = self.agreement.rank == 0
        self._seen: dict[Any, Tensor] = {}

    def together(self, what: str, work: Callable[[], _T]) -> _T:
        """Run ``work``; what it raises on one rank is raised on all."""
        return self.agreement.together(what, work)

    def shape(self, site: MXFP4Experts, projection: Projection) -> tuple[int, int, int]:
        """[E, N, K] of the whole projection."""
        shard, (e, n, k) = site.plan.shard, projection.shape
        if shard is None:
            return e, n, k
        if shard.kind == "expert":
            return shard.whole, n, k
        return (e, n // shard.count * shard.whole, k) if projection.role == "up" else (e, n, shard.whole)

    def codes(self, site: MXFP4Experts, projection: Projection, experts: slice) -> tuple[Tensor, Tensor]:
        """(packed uint8 [e, N, ceil(K/2)], scales uint8 [e, N, ceil(K/32)]) of some experts of the whole site."""
        shard = site.plan.shard
        if shard is None:  # every rank has them
            return site.canonical(projection, experts)
        _, n, k = self.shape(site, projection)
        count, widths = experts.stop - experts.start, ((k + 1) // 2, -(-k // mx.BLOCK))
        own = slice(experts.start, experts.stop)
        if shard.kind == "expert":
            own = _inside(experts, shard.start, shard.stop)
        parts = list(site.canonical(projection, own)) if own.start < own.stop else []
        received = self._collect(f"{projection.slot} of experts {experts.start} to {experts.stop - 1}", parts)
        if received is None:
            packed, scales = (torch.empty(count, n, width, dtype=torch.uint8, device="meta") for width in widths)
            return packed, scales
        if shard.kind == "expert":
            filled = [part for part in received if part]
            return torch.cat([p for p, _ in filled]), torch.cat([s for _, s in filled])
        packed, scales = (torch.empty(count, n, width, dtype=torch.uint8) for width in widths)
        for i, whole in enumerate((packed, scales)):
            _join(whole, [part[i] for part in received], shard, site.plan.params, projection, (2, mx.BLOCK)[i])
        return packed, scales

    def biases(self, site: MXFP4Experts) -> dict[str, Tensor]:
        """The biases of the whole site by name."""
        shard, own = site.plan.shard, site.dequantized_biases()
        if shard is None or not own:
            return own
        role = {name: projection for projection in site.projections for name in projection.source.bias}
        found: dict[str, Tensor] = {}
        for name, bias in own.items():
            e, n, _ = self.shape(site, role[name])
            shape = (e, bias.shape[1] * n // role[name].shape[1])
            received = self._collect(name, [bias])
            if received is None:
                found[name] = torch.empty(shape, dtype=bias.dtype, device="meta")
            elif shard.kind == "expert":
                found[name] = torch.cat([part[0] for part in received])
            elif role[name].role == "down":  # the first rank adds it
                found[name] = received[0][0]
            else:
                found[name] = torch.empty(shape, dtype=bias.dtype)
                parts = [part[0] for part in received]
                _join(found[name], parts, shard, site.plan.params, role[name], 1)
        return found

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """What ``tensor`` is a part of, on the first rank's CPU; parts of one storage come out as one tensor."""
        if not is_dtensor(tensor):
            return tensor
        value: Any = tensor.detach()
        key = (value.to_local().data_ptr(), tuple(value.shape), str(value.placements))
        if key not in self._seen:
            self.agreement.step(f"gathering {name}")
            whole = value.full_tensor()
            self._seen[key] = whole.cpu() if self.first else torch.empty_like(whole, device="meta")
        return self._seen[key]

    def _collect(self, what: str, own: list[Tensor]) -> list[list[Tensor]] | None:
        """Every rank's tensors, by rank, on the first one; None on the others."""
        own = [tensor.detach().cpu().contiguous() for tensor in own]
        shapes = self.agreement.step(f"gathering {what}", [(tuple(t.shape), t.dtype) for t in own])
        group = self.agreement.group
        if not self.first:
            for tensor in own:
                dist.send(tensor.view(-1).view(torch.uint8), self.agreement.ranks[0], group=group)
            return None
        received = [own]
        for rank in range(1, self.agreement.size):
            tensors = []
            for shape, dtype in shapes[rank]:
                tensor = torch.empty(shape, dtype=dtype)
                dist.recv(tensor.view(-1).view(torch.uint8), self.agreement.ranks[rank], group=group)
                tensors.append(tensor)
            received.append(tensors)
        return received


def _inside(experts: slice, start: int, stop: int) -> slice:
    """Of the whole site's experts those of a rank, counted from its first."""
    first, last = max(experts.start, start), min(experts.stop, stop)
    return slice(first - start, max(first, last) - start)


def _join(
    whole: Tensor, parts: Sequence[Tensor], shard: Shard, params: MoEParams | None, projection: Projection, unit: int
) -> None:
    """Write the parts by column of all ranks into ``whole``; ``unit``: columns of K that one value stands for."""
    assert params is not None
    for rank, part in enumerate(parts):
        own = replace(shard, rank=rank)
        if projection.role == "down":
            first, last = own.start // unit, -(-own.stop // unit)
            if own.start < own.stop:
                whole[..., first:last] = part
            continue
        offset = 0
        for rows in own.rows(params):
            whole[:, rows] = part[:, offset : offset + rows.stop - rows.start]
            offset += rows.stop - rows.start


def gathered_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole ``state_dict`` of a model that lies on several ranks, as one process would have it.

    A collective: call it on every rank. The first rank gets it, in CPU memory, the others get an empty one; in one
    process it is ``model.state_dict()``. (``model.state_dict()`` itself is this rank's part.) Raises OptimizeError on
    all ranks if it fails on one.
    """
    if not is_spread(model):
        return dict(model.state_dict())
    gathering = Gathering()
    return gathering.together("gathering the state", lambda: _gathered(model, gathering))


def _gathered(model: nn.Module, gathering: Gathering) -> dict[str, Tensor]:
    sites = mxfp4_sites(model)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = gathering.tensor(name, tensor)
        found[name] = whole.cpu() if gathering.first else whole
    for prefix, site in sites.items():
        if site.plan.shard is None:
            continue
        for projection in site.projections:
            e, n, k = gathering.shape(site, projection)
            groups = [gathering.codes(site, projection, some) for some in groups_of(e, n * k * 2)]
            rows = [r * n // projection.shape[1] for r in projection.rows(site.original)]
            for suffix, pieces in zip(("packed", "scales"), zip(*groups, strict=True), strict=True):
                parts = torch.cat(pieces).split(rows, dim=1)
                for source, part in zip(projection.source.parameters, parts, strict=True):
                    found[f"{prefix}.{source}_{suffix}"] = part.contiguous()
        found.update({f"{prefix}.{name}": bias for name, bias in gathering.biases(site).items()})
    return found if gathering.first else {}


__all__ = ["Gathering", "gathered_state_dict"]
