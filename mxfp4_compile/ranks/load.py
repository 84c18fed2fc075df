"""``load`` on every rank: each reads and quantizes its part of every expert site, by the same plan.

1. the process group is there, arguments and configuration are the same on all ranks;
2. the skeleton is planned whole, on the meta device; then the experts' parameters are cut to this rank's part and the
   modules matched again (``split``). transformers' own rules for them are dropped: it neither reads nor splits them;
3. ``PartReader`` reads this rank's part: of whole experts its own, of columns a few experts at a time, cut at blocks.

Contract: every code and scale is the one that one process would make or keep.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import mx
from ..passes.build.prep import ExpertReader
from ..passes.match import FusedMatch, NoMatch
from ..passes.weights import Projection, is_packed, projections_of, source_names
from ..planning import OptimizeError, Site, Structure
from ..processes import OneProcess
from ..spec import SHARD, MoEParams, Shard
from .distribute import refusal
from .session import Ranks
from .shards import EXPERTS, Experts, choose

Rematch = Callable[[nn.Module, Structure], Structure | NoMatch]


def start(options: dict[str, Any], experts: Any, config: Any, model_class: Any, own: Mapping[str, Any]) -> OneProcess:
    """The ranks that load together; ``options`` of ``from_pretrained`` become what transformers understands.

    options: with ``distributed_config``, ``tp_plan`` or ``tp_size``; own: the options that are ours. ValueError or
    OptimizeError for what is not served.
    """
    if experts not in EXPERTS:
        raise ValueError(f"experts={experts!r} is not known; known: {', '.join(EXPERTS)}")
    given, plan, size = (options.pop(name, None) for name in ("distributed_config", "tp_plan", "tp_size"))
    if given is not None and (plan is not None or size is not None):
        raise ValueError("pass distributed_config, or tp_plan and tp_size, not both")
    if options.get("device_map") is not None:
        raise OptimizeError(
            f"device_map={options['device_map']!r} spreads a model over devices of one process, tp_plan and "
            "distributed_config over ranks: use one of them"
        )
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        if (size or getattr(given, "tp_size", None) or 1) > 1:
            raise OptimizeError(f"{size or given.tp_size} ranks are asked for, but there is one process: use torchrun")
        return OneProcess()
    if not dist.is_initialized():
        from transformers.distributed.utils import _ensure_torch_distributed

        _ensure_torch_distributed()
    ranks = LoadingRanks(experts)
    ranks.agree("load", experts=experts, plan=plan, size=size, given=str(given), config=config.to_json_string(), **own)
    options["distributed_config"] = ranks.together(
        "the plan", lambda: ranks.plan(given, plan, size, config, model_class)
    )
    return ranks


class LoadingRanks(Ranks):
    """The ranks of one ``load``. ``experts``: how experts are to be split."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts: Experts = experts
        self.notes: list[str] = []
        self.rules: dict[str, str] = {}  # those that were asked for, which transformers 5.17 takes in place of its own

    def plan(self, given: Any, plan: Any, size: int | None, config: Any, model_class: Any) -> Any:
        """transformers' ``DistributedConfig``: attention by its plan; experts are split here, whatever it says."""
        from transformers.distributed import DistributedConfig

        ep_size = (given.get("ep_size") if isinstance(given, dict) else getattr(given, "ep_size", None)) or 1
        if given is None:
            given = DistributedConfig(tp_size=size or self.size, tp_plan=plan)
        elif isinstance(given, dict):
            given = DistributedConfig.from_dict(given)  # 5.17 passes over what it does not know
        for name in ("fsdp_size", "dp_replicate_size", "pp_size"):
            if getattr(given, name, 1) > 1:
                raise OptimizeError(f"{name}={getattr(given, name)} is not supported: all ranks compute one model")
        if given.tp_size != self.size:
            raise OptimizeError(f"tp_size={given.tp_size}, but there are {self.size} ranks: all of them hold the model")
        if ep_size not in (1, given.tp_size):
            raise OptimizeError(f"ep_size={ep_size} is not supported: it is tp_size, {given.tp_size}, or left out")
        if ep_size > 1 or given.enable_expert_parallel:  # transformers 5.17 has the second only
            if self.experts == "tensor":
                raise OptimizeError('ep_size and experts="tensor" contradict each other: leave one of them out')
            self.experts = "expert"
        known = {"ep_size": 1, "ep_plan": None, "enable_expert_parallel": False}
        given = replace(given, **{name: value for name, value in known.items() if hasattr(given, name)})
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(text, "num_key_value_heads", None)
        rules = getattr(text, "base_model_tp_plan", None) or {}
        if heads and heads % self.size and given.tp_plan in (None, "auto"):
            prefix = getattr(model_class, "base_model_prefix", "model")
            attention = [f"{prefix}.{rule}" for rule in rules if ".self_attn." in rule]
            if attention:
                given = replace(given, tp_plan=_without(attention, prefix, rules, model_class))
                self.notes.append(f"attention lies whole on every rank: {heads} key/value heads, {self.size} ranks")
        if isinstance(given.tp_plan, dict):
            given = replace(given, tp_plan=dict(given.tp_plan))
            self.rules = given.tp_plan
        return given

    def split(self, model: Any, sites: list[Site], rematch: Rematch) -> list[str]:
        """Cut the planned sites of a model on the meta device to this rank's part, and match them again; notes."""
        known: dict[Any, Structure | NoMatch] = {}
        cut: dict[int, nn.Parameter] = {}
        notes = list(self.notes)
        assert dist.group.WORLD is not None
        group = dist.group.WORLD.group_name
        for site in sites:
            if site.structure is None:
                continue
            found = site.structure.found
            _drop_rules(model, site.name, self.rules)
            whole = _whole_because(site)
            if whole or not isinstance(found, FusedMatch):
                notes.append(f"{site.name} lies whole on every rank: {whole}")
                continue
            params = found.spec.params
            kind, parts, reason = choose(self.experts, params.num_experts, params.intermediate, self.size)
            note = f"experts are split by {kind}: {reason}"
            notes += [note] if note not in notes else []
            shard = Shard(kind, self.agreement.rank, parts, group)
            before = site.structure
            _cut(site, shard, params, cut)
            key = (id(before), shard)
            if key not in known:
                known[key] = rematch(site.candidate.module, before)
            again = known[key]
            if isinstance(again, NoMatch):
                raise OptimizeError(f"{site.name} has no match as {shard}: {again.reason}")
            words = refusal(again.found, shard)
            if words is not None:
                raise OptimizeError(f"{site.name} {words}")
            site.structure = again
            self.shards[site.name] = shard
        return notes

    def reader_of(self, site: Site, reader: ExpertReader) -> ExpertReader:
        """What reads this rank's part where ``reader`` reads the whole."""
        shard = self.shards.get(site.name)
        return reader if shard is None else PartReader(reader, site, shard)


def _whole_because(site: Site) -> str:
    """Why a site is not split, "" if it is."""
    assert site.structure is not None
    found = site.structure.found
    if not isinstance(found, FusedMatch):
        return "its middle is no kernel's"
    if site.candidate.kind != "packed" or not all(is_packed(n) for n in source_names(projections_of(found.spec))):
        return "its experts are no packed parameters of one module"
    if found.edits.gathers or found.edits.handed_on is not None:
        return "it uses the expert ids for more than its experts"
    return ""


def _replicates() -> bool:
    """Whether transformers has a rule that leaves a module whole; 5.17 has none, and takes a dict as the whole plan."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    return "replicate" in ALL_PARALLEL_STYLES


def _without(attention: list[str], prefix: str, rules: Mapping[str, str], model_class: Any) -> dict[str, str]:
    """The plan with the modules of ``attention`` left whole."""
    if _replicates():
        return dict.fromkeys(attention, "replicate")
    plan = {f"{prefix}.{rule}": style for rule, style in rules.items()} | (getattr(model_class, "_tp_plan", None) or {})
    return {rule: style for rule, style in plan.items() if rule not in attention}


def _drop_rules(model: Any, site: str, asked: dict[str, str]) -> None:
    """Take a site out of transformers' plans for this model, and of the one that was asked for."""
    wildcard = re.sub(r"\.\d+(?=\.|$)", ".*", site)
    plans: list[Any] = [getattr(model, "_tp_plan", None), getattr(model, "_ep_plan", None), asked]
    for rules in plans:
        if isinstance(rules, dict):
            own = [rule for rule in rules if f"{rule}.".startswith((f"{wildcard}.", f"{site}."))]
            for rule in own:
                del rules[rule]
            if own and not rules and rules is plans[0] and _replicates():
                # it asks for a plan with something in it
                rules[next(n for n, m in model.named_modules() if n and not any(True for _ in m.children()))] = (
                    "replicate"
                )


def _cut(site: Site, shard: Shard, params: MoEParams, done: dict[int, nn.Parameter]) -> None:
    """The module's parameters with the shapes of this rank's part; tied ones stay tied."""
    module = site.candidate.module
    assert site.structure is not None
    for projection in projections_of(site.structure.found.spec):
        for name in (*projection.source.parameters, *projection.source.bias):
            old = module._parameters[name]
            assert old is not None
            if id(old) not in done:
                shape = _part_shape(projection, name, tuple(old.shape), shard, params)
                empty = torch.empty(shape, dtype=old.dtype, device="meta")
                done[id(old)] = nn.Parameter(empty, requires_grad=False)
                done[id(done[id(old)])] = done[id(old)]  # met again in a module that shares it
            module._parameters[name] = done[id(old)]
    if shard.kind == "expert" and getattr(module, "num_experts", None) == params.num_experts:
        module.num_experts = shard.count  # type: ignore[assignment]
    module.__dict__[SHARD] = shard
    site.tied = tuple(
        id(module._parameters[n]) for p in projections_of(site.structure.found.spec) for n in p.source.parameters
    )


def _part_shape(
    projection: Projection, name: str, shape: tuple[int, ...], shard: Shard, params: MoEParams
) -> tuple[int, ...]:
    if shard.kind == "expert":
        return (shard.count, *shape[1:])
    dim = _dim_of_columns(projection, name)
    if dim is None:
        return shape
    return (*shape[:dim], shape[dim] // params.intermediate * shard.count, *shape[dim + 1 :])


def _dim_of_columns(projection: Projection, name: str) -> int | None:
    """Along which dimension of a parameter [E, ...] its columns I lie; None for the down-projection's bias."""
    bias = name in projection.source.bias
    if projection.role == "up":
        return 1 if bias or not projection.source.transposed else 2
    return None if bias else 1 if projection.source.transposed else 2


@dataclass(frozen=True)
class PartReader(ExpertReader):
    """A rank's part of what ``whole`` reads of a site."""

    whole: ExpertReader
    site: Site
    shard: Shard

    def quantized(self, name: str) -> bool:
        """Whether the checkpoint has the parameter in MXFP4."""
        return self.whole.quantized(name)

    def values(self, name: str, experts: slice) -> Tensor:
        """This rank's part of some of its experts, in the parameter's own layout [e, ...]."""
        values = self.whole.values(name, self._experts(experts))
        if self.shard.kind == "expert":
            return values
        projection, params = self._projection(name)
        dim = _dim_of_columns(projection, name)
        if dim is None:  # added once
            return values if self.shard.rank == 0 else torch.zeros_like(values)
        return self._columns(values, dim, projection, params, 1, 0)

    def codes(self, name: str, experts: slice, n: int, k: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the canonical codes and scales of some of its experts."""
        if self.shard.kind == "expert":
            return self.whole.codes(name, self._experts(experts), n, k)
        projection, params = self._projection(name)
        if projection.role == "up":
            packed, scales = self.whole.codes(name, experts, n // self.shard.count * self.shard.whole, k)
            return (
                self._columns(packed, 1, projection, params, 1, 0),
                self._columns(scales, 1, projection, params, 1, _ONE),
            )
        packed, scales = self.whole.codes(name, experts, n, self.shard.whole)
        return (
            self._columns(packed, 2, projection, params, 2, 0),
            self._columns(scales, 2, projection, params, mx.BLOCK, _ONE),
        )

    def _experts(self, experts: slice) -> slice:
        first = self.shard.start if self.shard.kind == "expert" else 0
        return slice(first + experts.start, first + experts.stop)

    def _projection(self, name: str) -> tuple[Projection, MoEParams]:
        assert self.site.structure is not None
        spec: Any = self.site.structure.found.spec
        for projection in projections_of(spec):
            if name in projection.source.parameters or name in projection.source.bias:
                return projection, spec.params
        raise KeyError(name)

    def _columns(
        self, value: Tensor, dim: int, projection: Projection, params: MoEParams, unit: int, empty: int
    ) -> Tensor:
        """The part along ``dim``; ``unit``: columns that one value stands for; ``empty``: for a rank without any."""
        start, stop = self.shard.start, self.shard.stop
        if start == stop:
            factor = value.shape[dim] // self.shard.whole if projection.role == "up" else 1
            shape = list(value.shape)
            shape[dim] = factor * self.shard.count // unit
            return value.new_full(shape, empty)
        if projection.role == "up":
            parameters = len(projection.source.parameters)
            parts = [value.narrow(dim, r.start, r.stop - r.start) for r in self.shard.rows(params, parameters)]
            return torch.cat(parts, dim)
        first, last = start // unit, -(-stop // unit)
        return value.narrow(dim, first, last - first).contiguous()


_ONE = 127  # the scale byte of 1


__all__ = ["LoadingRanks", "PartReader", "start"]
