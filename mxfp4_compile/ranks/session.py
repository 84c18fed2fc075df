"""``optimize`` on every rank: what one process does, on each rank's part, with the other ranks' consent.

1. the arguments, versions and switches are the same on all ranks;
2. experts that transformers split lie in their modules as plain local tensors, as long as the work goes on; one forward
   before that shows what each module gives for what, with transformers' own sums;
3. planned, verified and prepared as ever, on the part; the ranks found the same sites;
4. for one site of each kind: the rewritten graph with ids made local and the sum over ranks gives what the module gave
   with transformers' own (a wrong offset or group is far off), and the same bits on all ranks;
5. installed on all ranks or on none.

Contract: until the first site is installed a failure leaves the model as it was, on every rank.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import __version__
from ..buffers import as_bytes
from ..circumstances import kept_state
from ..passes.build.module import MXFP4Experts
from ..passes.build.verify import Verification
from ..passes.find.discover import Candidate, forward_runs, traceable_experts
from ..planning import OptimizeError, Site
from ..processes import OneProcess
from ..report import Report, versions_used
from ..skipping import as_patterns, protects
from ..spec import Shard
from .agree import Agreement, words_of
from .distribute import distribute, refusal
from .plans import LocalExperts, check_model_plan, local_experts

_T = TypeVar("_T")

# How far a rewritten site on all ranks may be from the original one, relative to it. MXFP4 weights alone make 0.1 to
# 0.2; other experts than the right ones, or a part missing from the sum, 0.7 and more.
_FAR = 0.5


class Ranks(OneProcess):
    """All ranks, which compute one model together. A collective; OptimizeError for what cannot be served.

    ``shards``: the part that this rank has of each split site, by name.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise OptimizeError(
                "this model is tensor-parallel or has DTensors, but torch.distributed is not initialized in this "
                "process: start it on every rank (torchrun --nproc_per_node N script.py)"
            )
        self.agreement = Agreement(range(dist.get_world_size()))
        self.locals: list[LocalExperts] = []
        self.shards: dict[str, Shard] = {}

    @classmethod
    def of(cls, model: Any) -> Ranks:
        """The ranks that hold a model that transformers has split."""
        ranks = cls()
        ranks.together("the plan", lambda: check_model_plan(model, ranks.size))
        return ranks

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.agreement.size

    def agree(self, what: str, **values: Any) -> None:
        """OptimizeError on all ranks if arguments, versions or switches in the environment differ."""
        switches = {k: v for k, v in os.environ.items() if k.startswith("MXFP4_COMPILE")}
        known = {k: _comparable(v) for k, v in values.items()}
        self.agreement.agree(
            f"the arguments, versions and environment of {what}",
            **known, **{f"version of {k}": v for k, v in versions_used().items()},
            **{"version of mxfp4_compile": __version__}, **switches,
        )  # fmt: skip

    def together(self, what: str, work: Callable[[], _T]) -> _T:
        """Run ``work``; what it raises on one rank is raised on all, with the same words."""
        return self.agreement.together(what, work)

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Forwards of the whole model: split experts are called as transformers has it, collectives are announced."""
        with ExitStack() as stack:
            for local in self.locals:
                stack.enter_context(local.together())
            stack.enter_context(self.agreement.forwards())
            yield

    @contextmanager
    def parts(self, model: nn.Module, skip: str | Sequence[str], example_inputs: Any) -> Iterator[None]:
        """Inside the block split experts are plain modules with local weights; what is still there is put back."""
        patterns = as_patterns(skip)
        found = [
            local
            for local in local_experts(model, self.agreement.ranks)
            if not any(protects(p, Candidate((local.name,), local.module, "packed")) for p in patterns)
        ]
        try:
            for local in found:
                local.begin()
            if found:
                self._record(model, found, example_inputs)
            for local in found:
                local.take()
                self.locals.append(local)
                self.shards[local.name] = local.shard
            yield
        finally:
            for local in found:
                local.put_back()
            self.locals = []

    def _record(self, model: nn.Module, found: list[LocalExperts], example_inputs: Any) -> None:
        """One forward as transformers has it: what each split module is given and returns."""

        def keep(local: LocalExperts) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if local.call is None and isinstance(output, Tensor):
                    copied = torch.utils._pytree.tree_map(
                        lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs)
                    )
                    local.call = (*copied, output.clone())

            return hook

        handles = [local.module.register_forward_hook(keep(local), with_kwargs=True) for local in found]
        inputs = forward_runs(model, example_inputs)[0]
        try:
            with ExitStack() as stack:
                for context in (torch.no_grad(), torch.random.fork_rng(devices=[]), kept_state(model)):
                    stack.enter_context(context)
                stack.enter_context(traceable_experts(model))
                stack.enter_context(self.agreement.forwards())
                model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        finally:
            for handle in handles:
                handle.remove()

    # what was planned

    def planned(self, sites: list[Site]) -> None:
        """OptimizeError where a split site cannot be served, or where the ranks found other sites."""
        split = {id(local.module): local for local in self.locals}
        for site in sites:
            if site.structure is None:
                continue
            module = site.candidate.module
            inside = [split[id(m)].name for m in module.modules() if m is not module and id(m) in split]
            if inside:
                raise OptimizeError(f"{site.name} holds {inside[0]}, which lies on several ranks: not supported")
            local = split.get(id(module))
            reason = refusal(site.structure.found, local.shard) if local is not None else None
            if reason is not None:
                raise OptimizeError(f"{site.name} {reason}. Nothing was changed.")

    def alike(self, what: str, sites: list[Site]) -> None:
        """OptimizeError if the ranks have other sites, or other outcomes for them."""
        found = {s.name: s.outcome or ("matched" if s.structure is not None else "") for s in sites}
        self.agreement.agree(what, **found)

    def fail_alike(self, sites: list[Site]) -> None:
        """A site that failed on one rank fails on all, for that reason."""
        failed = {s.name: s.reason for s in sites if s.outcome == "failed"}
        everywhere = self.agreement.gathered("failures", failed)
        for site in sites:
            reason = _first([known.get(site.name, "") for known in everywhere])
            if reason:
                site.structure, site.outcome, site.reason = None, "failed", reason

    def verify_sums(self, sites: list[Site], build: Callable[[Site], MXFP4Experts]) -> None:
        """OptimizeError unless one site of each kind gives on all ranks what it gave before, and the same bits."""
        by_module = {id(local.module): local for local in self.locals}
        seen: set[int] = set()
        for site in sites:
            local = by_module.get(id(site.candidate.module))
            if site.structure is None or local is None or local.call is None or id(site.structure) in seen:
                continue
            seen.add(id(site.structure))
            args, kwargs, before = local.call
            shard = local.shard

            def prepare(site: Site = site, shard: Shard = shard) -> MXFP4Experts:
                built = build(site)
                built.rewritten = distribute(built.rewritten, shard)
                return built

            built = self.together(f"{site.name}: preparing", prepare)

            def run(built: MXFP4Experts = built, args: Any = args, kwargs: Any = kwargs) -> Tensor:
                with torch.no_grad(), self.agreement.forwards():
                    return built(*args, **kwargs)  # type: ignore[no-any-return]

            after = self.together(f"{site.name}: its sum over ranks", run)
            self.together(f"{site.name}: comparing", partial(_check_far, site, after.double(), before.double()))
            self.agreement.agree(f"the output of {site.name}", bits=_comparable(after))

    # installing

    def attempt(
        self, what: str, work: Callable[[], _T], failures: tuple[type[Exception], ...]
    ) -> tuple[_T | None, str]:
        """The result of ``work`` and "", or None and the reason of the first rank on which it failed."""
        result: _T | None = None
        stopped: BaseException | None = None
        reason = ""
        try:
            result = work()
        except failures as error:
            reason = str(error)
        except BaseException as error:
            stopped, reason = None if isinstance(error, Exception) else error, words_of(error)
        everywhere = self.agreement.gathered(what, reason)
        if stopped is not None:
            raise stopped
        told = _first(everywhere)
        return (None if told else result), told

    def whole_errors(
        self, site: str, built: MXFP4Experts, errors: Tensor, verification: Verification | None
    ) -> tuple[Tensor, Verification | None]:
        """Errors of the experts of all ranks, as one process has them, and the largest error of verification.

        errors: of this rank's experts or parts of experts, all projections one after the other.
        """
        shard, projections = built.plan.shard, built.projections
        every = self.agreement.gathered(f"errors of {site}", (errors, built.weight_powers, verification))
        checks = [check for _, _, check in every if check is not None]
        worst = max(checks, key=lambda check: check.error) if checks else None
        if shard is None or any(not own.numel() for own, _, _ in every):  # made from MXFP4: nothing is known
            return errors, worst
        split = [own.chunk(len(projections)) for own, _, _ in every]
        joined = [torch.cat(parts) for parts in zip(*split, strict=True)]
        if shard.kind == "tensor":
            powers = [power.chunk(len(projections)) for _, power, _ in every]
            joined = [_of_whole([own[i] for own in split], [own[i] for own in powers]) for i in range(len(projections))]
        for projection, own in zip(projections, joined, strict=True):
            both = {"mean": float(own.mean()), "max": float(own.max())}
            built.weight_errors.update(dict.fromkeys(projection.source.parameters, both))
        return torch.cat(joined), worst

    def step(self, what: str) -> None:
        """OptimizeError if another rank has failed since."""
        self.agreement.step(what)

    def installed(self, site: Site) -> None:
        """Let go of the weights of a site that was replaced."""
        for local in self.locals:
            if local.module is site.candidate.module:
                local.forget()

    def tell(self, report: Report) -> None:
        """The report is one of all ranks: bytes of all, and how the experts lie."""
        own = {s.names[0]: (s.bytes_before, s.bytes_after) for s in report.rewritten}
        every = self.agreement.gathered("report", own)
        shards = self.shards
        for i, site in enumerate(report.sites):
            if site.rewritten and site.names[0] in shards:
                before, after = (sum(known[site.names[0]][k] for known in every) for k in (0, 1))
                report.sites[i] = replace(site, bytes_before=before, bytes_after=after)
        report.notes.append(
            describe(self.size, [shards[n] for n in own if n in shards], [sum(a for _, a in k.values()) for k in every])
        )


def describe(ranks: int, shards: list[Shard], bytes_of: list[int]) -> str:
    """How a model's experts lie on the ranks, in a line that is the same on all of them."""
    if not shards:
        return f"{ranks} ranks: every rank holds all experts; sums over ranks are transformers' own"
    kinds = sorted({s.kind for s in shards})
    first = shards[0]
    parts = ", ".join(str(stop - start) for start, stop in dict.fromkeys(first.parts)) if first.kind == "tensor" else ""
    each = {
        "expert": f"whole experts ({first.parts[0][1]} of {first.whole} each)",
        "tensor": f"columns of each expert ({parts or first.parts[0][1]} of {first.whole})",
    }
    gib = ", ".join(f"{b / 2**30:.2f}" for b in bytes_of)
    how = " and ".join(each[kind] for kind in kinds)
    return f"{ranks} ranks: experts split by {how}; GiB of experts on each: {gib}; sums by mxfp4::reduce"


def _of_whole(errors: list[Tensor], powers: list[Tensor]) -> Tensor:
    """Relative squared errors [E] of whole experts from those of their parts, and the parts' squared norms."""
    noise = torch.stack([e * p for e, p in zip(errors, powers, strict=True)]).sum(0)
    power = torch.stack(powers).sum(0)
    return torch.where(power > 0, noise / power, 0.0)


def _check_far(site: Site, after: Tensor, before: Tensor) -> None:
    error = float((after - before).norm() / before.norm().clamp_min(1e-30))
    if not error < _FAR:
        raise OptimizeError(
            f"{site.name}: rewritten, and summed over the ranks, it is {error:.2g} away from what it gave before, more "
            f"than {_FAR} of MXFP4 weights: the ranks' parts are not what they were taken for. Nothing was changed."
        )


def _first(reasons: list[str]) -> str:
    """One rank's reason, with the rank; without it where all ranks have the same."""
    told = [(rank, reason) for rank, reason in enumerate(reasons) if reason]
    if not told:
        return ""
    rank, reason = told[0]
    return reason if all(r == reason for r in reasons) else f"rank {rank}: {reason}"


def _comparable(value: Any) -> Any:
    """Plain data as it is; tensors, and what holds them, by a digest of their bytes."""
    leaves = torch.utils._pytree.tree_leaves(value)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(as_bytes(plain))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


__all__ = ["Ranks", "describe"]
