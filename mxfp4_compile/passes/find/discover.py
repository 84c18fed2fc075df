"""Discover: which modules look like a mixture of experts, and how each is called in a forward.

Contract: the model runs twice, on tiny inputs of two sizes, without gradients; nothing of it is changed
(hooks are removed, the experts implementation and the random state are put back).

"Looks like" is structural, never a matter of names:
- packed: a module with two or more floating 3-D parameters of equal first dimension;
- list: a ModuleList or ModuleDict of two or more structurally equal children with two or more matrices
  each, of which the forwards used an input-dependent part;
- block: what only the forwards show (``sightings``), or the module around one of the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calls import Call, describe
from ..weights import equal_children, listed
from .foreign_hooks import on_execution_device, underlying
from .sightings import Watch, is_plain, subset_of_rows
from .weights_met import WeightWatch


class DiscoveryError(RuntimeError):
    """The forward that shows how experts are called could not be run."""


@dataclass
class Candidate:
    """A module that looks like a mixture of experts. ``names``: every path to it (shared modules have several)."""

    names: tuple[str, ...]
    module: nn.Module
    kind: Literal["packed", "list", "block"]
    calls: list[Call] = field(default_factory=list)
    listed: nn.Module | None = None  # of kind "list": the list; ``module`` is the one that calls its children
    owner: Candidate | None = None  # the module that calls this one, of kind "block": with the router, perhaps
    refusal: str = ""  # why it can be no site, where the forward shows that
    unrouted: bool = False  # no part of its weights has rows of its own: the forward showed it

    @property
    def weights(self) -> nn.Module:
        """The module that holds the experts' weights, and nothing else where they are in a list."""
        return self.module if self.listed is None else self.listed

    @property
    def name(self) -> str:
        """The first path."""
        return self.names[0]


def packed_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The floating 3-D parameters of equal first dimension (>= 2) that a module owns itself."""
    own = {
        name: p
        for name, p in module._parameters.items()
        if p is not None and p.dim() == 3 and p.is_floating_point() and p.shape[0] >= 2 and min(p.shape[1:]) >= 2
    }
    firsts = [p.shape[0] for p in own.values()]
    return {n: p for n, p in own.items() if firsts.count(p.shape[0]) >= 2}


def find_candidates(model: nn.Module) -> list[Candidate]:
    """Packed experts, and lists of equal children that may be experts (their use decides), in model order."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    found = []
    for key, module in modules.items():
        if packed_parameters(module):
            found.append(Candidate(tuple(names[key]), module, "packed"))
        elif isinstance(module, (nn.ModuleList, nn.ModuleDict)) and equal_children(module):
            # A list that several blocks share is called by each of them, after a router of its own.
            owned = [_list_candidate(model, (path,), module, names) for path in names[key]]
            found += {id(c.module): c for c in owned if c.module is not module}.values()
            if all(c.module is module for c in owned):
                found.append(_list_candidate(model, tuple(names[key]), module, names))
    return found


def _list_candidate(
    model: nn.Module, paths: tuple[str, ...], module: nn.Module, names: dict[int, list[str]]
) -> Candidate:
    """A list whose own forward, or else whose owner's, calls its children."""
    if is_plain(module):
        owner = model.get_submodule(paths[0].rpartition(".")[0])
        while is_plain(owner) and owner is not model:
            paths = tuple(p.rpartition(".")[0] for p in paths)
            owner = model.get_submodule(paths[0].rpartition(".")[0])
        if owner is not model:
            return Candidate(tuple(names[id(owner)]), owner, "list", listed=module)
    return Candidate(paths, module, "list", listed=module)


# inputs


def default_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    """Random token ids for one forward, derived from the model's signature and configuration.

    Raises DiscoveryError if the model's main input is not token ids: then ``example_inputs`` are needed.
    """
    model = underlying(model)
    parameters = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    if "input_ids" not in parameters or config is None:
        raise DiscoveryError(
            "this model does not take input_ids: pass example_inputs=... to optimize(), a dict of keyword "
            "arguments (or a tuple of positional ones) for one forward"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 100)
    find_embeddings: Any = getattr(model, "get_input_embeddings", None)
    embeddings = find_embeddings() if find_embeddings is not None else None
    rows = getattr(getattr(embeddings, "weight", None), "shape", None)
    if rows:
        vocabulary = min(vocabulary, int(rows[0]))
    device = next(iter(model.parameters())).device if embeddings is None else embeddings.weight.device
    special = {v for k, v in _token_ids(config)} | {v for k, v in _token_ids(text)}
    allowed = torch.tensor([i for i in range(min(vocabulary, 4096)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(0)

    def tokens() -> Tensor:
        return allowed[torch.randint(len(allowed), (batch, length), generator=generator)].to(device)

    inputs: dict[str, Any] = {"input_ids": tokens()}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = tokens()
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def _token_ids(config: Any) -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")):
            for v in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(v, int):
                    yield name, v


def _doubled(inputs: Any) -> Any:
    """The same inputs with every tensor's first dimension doubled: a second size."""

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value

    return torch.utils._pytree.tree_map(twice, inputs)


def forward_runs(model: nn.Module, example_inputs: Any) -> list[Any]:
    """Two input sets of different sizes."""
    if example_inputs is None:
        return [default_inputs(model, 2, 9), default_inputs(model, 3, 11)]
    return [example_inputs, _doubled(example_inputs)]


# running


@contextmanager
def experts_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Have transformers' experts modules of ``model`` use implementation ``name`` inside the block.

    ``eager`` experts loop over experts in Python and do not trace; ``grouped_mm`` ones do. Modules without
    this switch are left alone.
    """
    attribute = "_experts_implementation_internal"
    configs = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, attribute):
            configs[id(config)] = config
    old = {key: getattr(config, attribute) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, attribute, name)
        yield
    finally:
        for key, config in configs.items():
            setattr(config, attribute, old[key])


def traceable_experts(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block transformers' experts trace: by "grouped_mm", which wants rows of a multiple of 16 bytes.

    Where some rows are of another size, by "batched_mm".
    """
    packed = (p for module in model.modules() for p in packed_parameters(module).values())
    fits = all(size * p.element_size() % 16 == 0 for p in packed for size in p.shape[1:])
    return experts_implementation(model, "grouped_mm" if fits else "batched_mm")


def record_calls(
    model: nn.Module, candidates: list[Candidate], example_inputs: Any = None, runs: list[Any] | None = None
) -> None:
    """Run the model twice and fill in ``calls`` of each candidate and its owner; drop lists used as a whole.

    Modules that only the forward shows to be mixtures of experts (``sightings``) are added to ``candidates``.

    ``runs``: the inputs of the two forwards, made before, in place of ``forward_runs(model, example_inputs)``.
    Raises DiscoveryError with the reason if the forward fails.
    """
    lists = [c for c in candidates if c.kind == "list"]
    watch = Watch(model, {id(c.module) for c in candidates if c.kind == "packed"})
    met = WeightWatch(model)
    if not candidates and not watch.watchers and not met.families:
        return
    for c in candidates:
        c.owner = _owner(model, c)
    around = {id(m): _owner(model, Candidate(paths, m, "block")) for paths, m in watch.sorted_outside()}
    recorded = [*candidates, *(o for o in (*(c.owner for c in candidates), *around.values()) if o is not None)]
    uses = {id(c): _Uses(c) for c in lists}
    handles = []

    def recorder(candidate: Candidate) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            candidate.calls.append(on_execution_device(module, describe(args, kwargs)))

        return hook

    for c in recorded:
        handles.append(c.module.register_forward_pre_hook(recorder(c), with_kwargs=True))
    for use in uses.values():
        handles += use.hooks()
    number = 0
    handles += met.recorders(lambda: number)
    watch.start()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), traceable_experts(model):
            for number, inputs in enumerate(forward_runs(model, example_inputs) if runs is None else runs):
                before = {id(c): len(c.calls) for c in recorded}
                seen = [(s, len(s.calls)) for s in watch.recorded()]
                try:
                    with met.watched(number):
                        _run(model, inputs)
                except DiscoveryError:
                    if candidates or watch.expects():
                        raise
                    return  # nothing was looked for in particular
                for c in recorded:  # a module called several times in one forward: one call is enough
                    del c.calls[before[id(c)] + 1 :]
                for watcher, count in seen:
                    del watcher.calls[count + 1 :]
                for use in uses.values():
                    use.finish()
                if number == 0:
                    kept = [c for c in candidates if c.kind != "list" or uses[id(c)].chosen]
                    met.choose_sites({id(p) for c in kept for p in c.weights.parameters()})
    finally:
        watch.stop()
        for handle in handles:
            handle.remove()
    for c in lists:
        if not uses[id(c)].chosen or met.sequential(c.weights):
            candidates.remove(c)  # every child got the same rows, or those of another (layers), or none was called
    taken = {id(m) for c in candidates for m in (c.module, c.weights)}
    for sighting in watch.sightings():
        if id(sighting.module) not in taken:
            taken.add(id(sighting.module))
            owner = around.get(id(sighting.module))
            candidates.append(
                Candidate(sighting.paths, sighting.module, "block", sighting.calls, None, owner, sighting.refusal)
            )
    for c in candidates:
        c.unrouted = met.unrouted(c.module)
    candidates += _met(model, met, candidates)


def _met(model: nn.Module, met: WeightWatch, candidates: list[Candidate]) -> Iterator[Candidate]:
    """What only the weights show, and is no candidate's."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    known = [c.module for c in candidates]
    told = {id(p) for m in known for p in m.parameters()}
    for module, calls, weights in met.found():
        if any(module is part for m in known for part in m.modules()) or weights <= told:
            continue
        refusal = ""
        inside = [m for m in module.modules() if any(m is k for k in known)]
        if inside:
            name = next(n for n, m in module.named_modules() if m is inside[0])
            refusal = f"it multiplies weights chosen by data beside {name}, which is a site by itself"
        if module is model:
            refusal = "experts that the model itself computes; only modules within a model are replaced"
        yield Candidate(tuple(paths[id(module)]), module, "block", calls, refusal=refusal)


def _owner(model: nn.Module, candidate: Candidate) -> Candidate | None:
    """The module around a candidate, unless that is the model or a list."""
    names = tuple(name.rpartition(".")[0] for name in candidate.names)
    owner = model.get_submodule(names[0])
    if owner is model or is_plain(owner) or any(model.get_submodule(name) is not owner for name in names):
        return None
    return Candidate(names, owner, "block")


class _Uses:
    """Which rows the children of a list get. ``chosen``: they depend on the input."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.children = [candidate.weights.get_submodule(name) for name in listed(candidate.weights)]
        self.chosen = False
        self.rows = [0] * len(self.children)
        self.given: list[Tensor] = []
        self.got: dict[int, Tensor] = {}

    def hooks(self) -> list[Any]:
        def counter(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
                self.rows[index] += 1 if first is None else first.numel()
                if first is not None and self.given and first.dim() == 2:
                    self.got[index] = first

            return hook

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            self.got = {}

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self.chosen and len(self.got) >= 2:
                self.chosen = subset_of_rows(self.given, list(self.got.values()))
            self.given, self.got = [], {}

        handles = [c.register_forward_pre_hook(counter(i), with_kwargs=True) for i, c in enumerate(self.children)]
        handles.append(self.candidate.module.register_forward_pre_hook(enter, with_kwargs=True))
        return [*handles, self.candidate.module.register_forward_hook(leave)]

    def finish(self) -> None:
        """One forward is over."""
        self.chosen |= len(set(self.rows)) > 1
        self.rows[:] = [0] * len(self.rows)


def _run(model: nn.Module, inputs: Any) -> None:
    try:
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs)
    except Exception as error:
        raise DiscoveryError(
            "a forward with "
            + ("these inputs" if not isinstance(inputs, Mapping) else ", ".join(inputs))
            + f" failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); pass "
            "example_inputs=... to optimize(), the arguments of a forward that works"
        ) from error


__all__ = ["Candidate", "DiscoveryError", "default_inputs", "experts_implementation", "find_candidates", "record_calls"]
