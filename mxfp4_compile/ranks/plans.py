"""What transformers made of a model's experts: read from its parameters and the forwards it put into its modules.

The one file that knows transformers' parallel styles (of 5.17 and 5.23; what it does not know, it refuses by name)::

    style                          parameters                                       forward put into the module
    ep_dispatch_experts (5.23)     all Shard(0): whole experts                      ids made local, sum over the group
    moe_tp_experts, ep_router      all Shard(0): whole experts                      sum over the group; the router has
    (5.17)                                                                          one that makes ids local
    moe_tp_experts                 up _StridedShard(1, 2), down Shard(2), or so     sum over the group

Contract: ``LocalExperts.begin`` has the module take the ids of the whole site, as 5.23 has it: in 5.17 the router's
forward is taken away and what it did stands before the experts'. ``take`` swaps a module's DTensors for the local
tensors they hold, with no copy, and takes the forward away; ``put_back`` undoes all. Nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..planning import OptimizeError
from ..processes import is_dtensor
from ..spec import SHARD, Shard
from .shards import Parts, expert_parts, whole_blocks

_EXPERT, _TENSOR, _ROUTER = "EpDispatchExpertsParallel", "MoeExpertsParallel", "EpRouterParallel"


@dataclass
class LocalExperts:
    """A module with a part of its experts. ``call``: what it was given in one forward, and what it returned."""

    name: str
    module: nn.Module
    shard: Shard
    saved: dict[str, Any] = field(default_factory=dict)
    forward: Any = None
    marked: Any = None
    call: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None
    router: nn.Module | None = None  # whose forward makes ids local (transformers 5.17)
    routed: tuple[Any, Any] | None = None  # what the router's forward, and the module's, were before ``begin``

    def begin(self) -> None:
        """Have the module take ids of the whole site."""
        if self.router is None or self.routed is not None:
            return
        forward = self.module.__dict__["forward"]
        self.routed = (self.router.__dict__.pop("forward"), forward)
        first, count = self.shard.start, self.shard.count

        def of_whole(hidden: Tensor, ids: Tensor, weights: Tensor) -> Any:
            others = (ids < first) | (ids >= first + count)
            return forward(hidden, (ids - first).masked_fill(others, count), weights.masked_fill(others, 0.0))

        self.module.__dict__["forward"] = of_whole

    def take(self) -> None:
        """Local tensors for the DTensors, and the class's own forward."""
        own = self.module._parameters
        self.saved = {n: p for n, p in own.items() if p is not None and is_dtensor(p)}
        for name, parameter in self.saved.items():
            own[name] = nn.Parameter(parameter.detach().to_local(), requires_grad=False)
        self.marked = self.module.__dict__.get("_is_expert_parallel")
        self._bare()
        self.module.__dict__[SHARD] = self.shard

    def _bare(self) -> None:
        self.forward = self.module.__dict__.pop("forward")
        if self.marked is not None:
            self.module.__dict__["_is_expert_parallel"] = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside the block the module is called as transformers has it: ids and results of the whole site."""
        self.module.__dict__["forward"] = self.forward
        if self.marked is not None:
            self.module.__dict__["_is_expert_parallel"] = self.marked
        try:
            yield
        finally:
            self._bare()

    def forget(self) -> None:
        """The module was replaced: let go of its weights."""
        self.saved, self.call, self.routed = {}, None, None

    def put_back(self) -> None:
        """Undo ``take`` and ``begin``, whichever of them was done."""
        if self.saved:
            self.module._parameters.update(self.saved)
            self.module.__dict__["forward"] = self.forward
            if self.marked is not None:
                self.module.__dict__["_is_expert_parallel"] = self.marked
            self.module.__dict__.pop(SHARD, None)
        if self.routed is not None and self.router is not None:
            self.router.__dict__["forward"], self.module.__dict__["forward"] = self.routed
        self.saved, self.routed = {}, None


def local_experts(model: nn.Module, ranks: Sequence[int]) -> list[LocalExperts]:
    """The modules of ``model`` whose packed experts lie on several ranks; OptimizeError for what is not known."""
    found = []
    for name, module in model.named_modules():
        split = {n: p for n, p in module._parameters.items() if p is not None and is_dtensor(p) and p.dim() >= 2}
        if any(p.dim() == 3 for p in split.values()):
            router = _router_of(model, name)
            found.append(LocalExperts(name, module, _shard(name, module, split, ranks, router), router=router))
    return found


def _router_of(model: nn.Module, experts: str) -> nn.Module | None:
    """The router beside some experts whose forward makes ids local, or None (transformers 5.17 has them)."""
    beside = model.get_submodule(experts.rpartition(".")[0])
    routers = [module for module in beside.modules() if _style(module)[0] == _ROUTER]
    if len(routers) > 1:
        raise OptimizeError(f"{experts}: there are {len(routers)} routers beside it that make ids local, not one")
    return routers[0] if routers else None


def _shard(
    name: str, module: nn.Module, split: dict[str, Any], ranks: Sequence[int], router: nn.Module | None
) -> Shard:
    style, cells = _style(module)
    meshes = {p.device_mesh for p in split.values()}
    if len(meshes) > 1 or any(len(p.placements) != 1 for p in split.values()):
        raise OptimizeError(f"{name} is split along more than one dimension of ranks, which is not supported")
    mesh = meshes.pop()
    group = mesh.get_group()
    if tuple(dist.get_process_group_ranks(group)) != tuple(ranks):
        raise OptimizeError(f"{name} is split over some of the ranks only: data parallelism is not supported here")
    rank = mesh.get_local_rank()
    placements = {n: p.placements[0] for n, p in split.items()}
    dims = {n: int(getattr(placement, "dim", 0)) for n, placement in placements.items()}
    plain = {n for n, placement in placements.items() if type(placement).__name__ == "Shard"}
    if all(dims[n] == 0 and n in plain for n in split):
        return _expert_shard(name, style, cells, split, rank, group, router)
    if style != _TENSOR or 0 in dims.values() or any(p.dim() < 3 for p in split.values()):
        told = ", ".join(f"{n} {placement}" for n, placement in placements.items())
        raise OptimizeError(
            f"{name}: its experts are split in a way that is not known ({told}; forward by {style or 'its class'}). "
            'Known are transformers\' "ep_dispatch_experts" and "moe_tp_experts"'
        )
    return _tensor_shard(name, split, dims, rank, group)


def _expert_shard(
    name: str,
    style: str,
    cells: dict[str, Any],
    split: dict[str, Any],
    rank: int,
    group: Any,
    router: nn.Module | None,
) -> Shard:
    by_router = style == _TENSOR and router is not None
    if style != _EXPERT and not by_router:
        raise OptimizeError(
            f"{name}: expert parallelism as transformers 5.17 and 5.23 have it is known (ep_dispatch_experts, or "
            f"ep_router and moe_tp_experts), not that of {style or 'its class'}"
        )
    implementation: Any = cells.get("implementation")
    kind = type(implementation).__name__
    if not by_router and (kind not in ("AutoEP", "AllReduceEP") or not implementation.shares_batch):
        raise OptimizeError(
            f"{name}: expert parallelism by {kind} is not supported where ranks exchange tokens or hold different "
            'batches; use ep_size equal to tp_size and ep_implementation="auto"'
        )
    experts = {p.shape[0] for p in split.values()}
    if len(experts) != 1:
        raise OptimizeError(f"{name}: its weights have {sorted(experts)} experts")
    parts = expert_parts(experts.pop(), dist.get_world_size(group))
    return Shard("expert", rank, parts, group.group_name)


def _tensor_shard(name: str, split: dict[str, Any], dims: dict[str, int], rank: int, group: Any) -> Shard:
    size = dist.get_world_size(group)
    columns = min(p.shape[dims[n]] for n, p in split.items())
    each = columns // size
    parts: Parts = tuple((r * each, (r + 1) * each) for r in range(size))
    if columns % size or not whole_blocks(parts):
        raise OptimizeError(
            f"{name}: transformers cut the {columns} intermediate columns of each expert at {columns / size:g}, which "
            "is no multiple of 32: an MXFP4 block would be cut and have other codes than the whole's. "
            'mxfp4_compile.load(path, tp_plan="auto", experts="tensor") cuts them at blocks; or give each rank whole '
            "experts: DistributedConfig(tp_size=N, ep_size=N)"
        )
    return Shard("tensor", rank, parts, group.group_name)


def _style(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The style that put a forward into the module ("" if none did), and what that forward holds on to."""
    forward: Any = module.__dict__.get("forward")
    code = getattr(forward, "__code__", None)
    if code is None:
        return "", {}
    held = (c.cell_contents for c in forward.__closure__ or () if _full(c))
    cells = dict(zip(code.co_freevars, held, strict=False))
    style = cells.get("self")
    return (type(style).__name__ if style is not None else ""), cells


def installed_again(module: nn.Module) -> None:
    """A copy of a module has the forward that a style put into the original, which calls that: make it the copy's."""
    _, cells = _style(module)
    if cells.get("module") is not None and cells["module"] is not module and "mesh" in cells:
        del module.__dict__["forward"]
        cells["self"].install_forward(module, cells["mesh"])


def _full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def check_model_plan(model: Any, size: int) -> None:
    """OptimizeError for ways of spreading a model that are not served here, by name and with the way out."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    for kind, words in (
        ("fsdp_size", "FSDP gives every rank other inputs and gathers whole layers"),
        ("dp_replicate_size", "data parallelism gives every rank other inputs"),
        ("pp_size", "pipeline parallelism gives every rank other layers"),
    ):
        if (getattr(config, kind, None) or 1) > 1:
            raise OptimizeError(
                f"this model has {kind}={getattr(config, kind)}: {words}, which is not supported. Load it with "
                "DistributedConfig(tp_size=N) or DistributedConfig(tp_size=N, ep_size=N)"
            )
    for name, module in model.named_modules():
        if any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__):
            raise OptimizeError(
                f"{name or 'this model'} is managed by FSDP, which gathers whole layers in each forward: not "
                "supported. Load it with DistributedConfig(tp_size=N) or DistributedConfig(tp_size=N, ep_size=N)"
            )
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        raise OptimizeError(
            f"this model is spread over devices by a device_map ({', '.join(map(str, sorted(places, key=str)))}) and "
            "over ranks as well: use one of them"
        )
    text: Any = getattr(model, "config", None)
    text = text.get_text_config() if hasattr(text, "get_text_config") else text
    heads = getattr(text, "num_key_value_heads", None)
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.weight") and is_dtensor(parameter) and heads and heads % size:
            if any(type(p).__name__ == "Shard" for p in parameter.placements):
                raise OptimizeError(
                    f"{name} is split over {size} ranks, but this model has {heads} key/value heads, which do not "
                    f'divide by {size}: leave attention whole with tp_plan={{"model.layers.*.self_attn.q_proj": '
                    '"replicate", ...} for q_proj, k_proj, v_proj and o_proj'
                )


__all__ = ["LocalExperts", "check_model_plan", "installed_again", "local_experts"]
