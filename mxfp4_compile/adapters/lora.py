"""PEFT's LoRA on rewritten experts: a ``ParamWrapper`` that adds low-rank products instead of dense weights.

Contract: names, shapes and files are those of PEFT on the original experts, whose parameters are gone but for their
shapes. In PEFT's tensors lora_A has the expert slowest, [E * r, in], and lora_B has it fastest, [out, r * E]. On
experts that ``restore`` made ordinary again, every method is PEFT's own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, fx, nn

from ..passes.build.module import RUNS, MXFP4Experts
from ..passes.weights import is_packed, members
from .products import Place, Term, with_terms

_GRAPH = "_mxfp4_graph"

_MERGE = (
    "adapters cannot be merged into MXFP4 experts: the sum is no longer 4-bit codes. Call "
    "mxfp4_compile.restore(peft_model.get_base_model()) first, which gives ordinary experts, then merge"
)


def _name(site: MXFP4Experts) -> str:
    """The site's name in its model, as it was installed."""
    return str(site.__dict__.get("site_name", "experts"))


class ParamWrapper(peft_layer.ParamWrapper):  # type: ignore[misc]
    """As PEFT's, for a parameter of rewritten experts; PEFT knows it by this name."""

    adapts_mxfp4 = True

    @property
    def site(self) -> MXFP4Experts | None:
        """The rewritten experts below; None once they are ordinary again."""
        base = self.get_base_layer()
        return base if isinstance(base, MXFP4Experts) else None

    def get_param(self) -> Tensor:
        """The parameter; of rewritten experts its shape, dtype and device without data."""
        site = self.site
        if site is None:
            return super().get_param()  # type: ignore[no-any-return]
        was = site.original.get_parameter(self.parameter_name)
        return torch.zeros((), dtype=was.dtype, device=site.device).expand(was.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's; ValueError on rewritten experts."""
        if self.site is not None:
            raise ValueError(f"{_name(self.site)}: {_MERGE}")
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def terms(self, transposed: bool) -> list[Term]:
        """What the active adapters add, [E, r, K] and [E, N, r]; ``transposed``: the parameter was [E, K, N].

        PEFT takes a parameter for [E, N, K] unless its module says otherwise, which need not be so.
        """
        if self.disable_adapters:
            return []
        found = []
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                a = a.reshape(self.num_experts, -1, a.shape[-1])
                b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
                if self._did_swap_in_out_features == transposed:
                    a, b = b.mT, a.mT
                found.append(Term(a, b, self.scaling[name]))
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The experts with what this wrapper and those inside it add."""
        site = self.site
        if site is None:
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                f"{_name(site)}: torch.export is not served with adapters on MXFP4 experts. Export under "
                "peft_model.disable_adapter(), or restore(peft_model.get_base_model()), merge, and optimize again"
            )
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("lora.ParamWrapper does not support mixed batch inference")
        wrappers: dict[str, ParamWrapper] = {}
        wrapper: Any = self
        while isinstance(wrapper, ParamWrapper):
            wrappers[wrapper.parameter_name] = wrapper
            wrapper = wrapper.base_layer
        found = _terms_of(site, wrappers)
        if not found:
            return site(x, *args, **kwargs)
        places = tuple(place for place, _, _ in found)
        tensors = [t for _, a, b in found for t in (a, b)]

        def runs(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
            return self._graph(graph, places)(*inputs, *tensors)

        return site(x, *args, **kwargs, **{RUNS: runs})

    def _graph(self, graph: fx.GraphModule, places: tuple[Place, ...]) -> fx.GraphModule:
        """The site's graph with these terms, made once."""
        kept = self.__dict__.get(_GRAPH)
        if kept is None or kept[0] is not graph or kept[1] != places:
            self.__dict__[_GRAPH] = kept = (graph, places, with_terms(graph, places))
        return kept[2]  # type: ignore[no-any-return]


def _terms_of(site: MXFP4Experts, wrappers: dict[str, ParamWrapper]) -> list[tuple[Place, Tensor, Tensor]]:
    """What active adapters add to the site's projections."""
    found = []
    for projection in site.projections:
        start = 0
        rows = projection.rows(site.original)
        for name, n in zip(projection.source.parameters, rows, strict=True):
            if name in wrappers:
                for term in wrappers[name].terms(projection.source.transposed):
                    found.append((Place(projection.slot, term.scaling, start), term.a, term.b))
            start += n
    return found


# what PEFT's LoraModel does, where it meets rewritten experts


def sites_of(model: nn.Module) -> dict[str, MXFP4Experts]:
    """Rewritten experts by the name that they have without wrappers."""
    named = model.named_modules()
    return {name.replace(".base_layer", ""): m for name, m in named if isinstance(m, MXFP4Experts)}


class Shown:
    """While it is entered, the sites have the parameters that they replaced, without data: PEFT matches names on these.

    ValueError if a parameter is asked for that PEFT's adapters cannot have here.
    """

    def __init__(self, sites: dict[str, MXFP4Experts], targets: list[str]) -> None:
        self.shown: list[tuple[MXFP4Experts, str]] = []
        self.sites = sites
        for name, site in sites.items():
            for projection in site.projections:
                for source in (*projection.source.parameters, *projection.source.bias):
                    for member in members(site.original, source):
                        key = f"{name}.{member}"
                        if not any(key == t or key.endswith(f".{t}") for t in targets):
                            continue
                        if source in projection.source.bias:
                            raise ValueError(f"{key} is a bias of MXFP4 experts: adapters are for their weights")
                        if not is_packed(source) or "." in member:
                            raise ValueError(
                                f"{key}: adapters are for experts whose weights lie in one parameter of their own "
                                "module; call mxfp4_compile.restore(model) first"
                            )
                        if site.plan.shard is not None:
                            raise ValueError(f"{key}: adapters are not for experts on several ranks")
                        self.shown.append((site, member))

    def __enter__(self) -> None:
        order: dict[int, list[str]] = {}
        for site, member in self.shown:
            order.setdefault(id(site), []).append(member)
        for site in self.sites.values():
            for name, parameter in site.original.named_parameters(recurse=False):  # in the original's order
                if name in order.get(id(site), ()):
                    site._parameters[name] = parameter

    def __exit__(self, *_: Any) -> None:
        for site, member in self.shown:
            site._parameters.pop(member, None)


def wrapped(target: nn.Module, adapter_name: str, lora_config: Any, parameter_name: str | None, **rest: Any) -> Any:
    """The wrapper of a parameter of rewritten experts; None if ``target`` is something else."""
    base: Any = target
    if isinstance(target, BaseTunerLayer):
        base = target.get_base_layer()
    if not isinstance(base, MXFP4Experts):
        return None
    if parameter_name is None:
        names = [n for p in base.projections for n in p.source.parameters]
        raise ValueError(
            f"{_name(base)}: target_modules cannot name MXFP4 experts, as it cannot name "
            f"the ones of a model of stacked experts; give target_parameters={names}"
        )
    return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=lora_config, **rest)


def refuse_merge(model: nn.Module) -> None:
    """ValueError if rewritten experts of ``model`` have adapters; before anything else was merged."""
    for module in model.modules():
        if isinstance(module, ParamWrapper) and module.site is not None:
            raise ValueError(f"{_name(module.site)}: {_MERGE}")


__all__ = ["ParamWrapper", "Shown", "refuse_merge", "sites_of", "wrapped"]
