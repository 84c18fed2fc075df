"""What MXFP4 did to a model on a text: perplexity, divergence per token, error by site, and what to leave alone.

The two models are never in memory together: the unquantized one runs first and leaves its log-probabilities in
a file, then makes room. Each site's own error is measured on the way, on the inputs it really gets: it runs once
more with the values MXFP4 gives its weights, one site at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import mx
from ..checkpoint.files import Weights, weight_files
from ..checkpoint.forms import OWN, declared_form
from ..checkpoint.meta_planning import expert_parameters
from ..checkpoint.note import facts_of, note_of
from ..checkpoint.reader import CheckpointReader
from ..circumstances import exclusively, kept_state, plain_modes
from ..hf_models import load_plain, read_config
from ..ops.target import DEFAULT_CAPTURE_SIZE
from ..passes.build.module import mxfp4_sites
from ..passes.find.discover import find_candidates, traceable_experts
from ..passes.weights import projections_of, stack, unstack
from ..pipeline import optimize
from ..planning import Site, check_matches, match_all
from ..report import Report


@dataclass(frozen=True)
class SiteError:
    """One site on its real inputs: relative squared error of its output, ||mxfp4 - original||^2 / ||original||^2.

    ``damage``: mean divergence in nats per token, measured, of the model with this site alone in MXFP4.
    """

    name: str
    error: float
    damage: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Both models on the same tokens; ``kl``: KL(original || MXFP4) in nats per token, over the vocabulary.

    ``suggested_skip``: sites to leave alone for the mean divergence to be at most ``bound``, ``None`` where no bound
    was named. It is an estimate: the divergence is taken to be shared between sites as what each does alone.
    """

    model: str
    against: str
    text: str
    tokens: int
    window: int
    perplexity: float
    perplexity_mxfp4: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    sites: tuple[SiteError, ...]
    bound: float | None = None
    suggested_skip: tuple[str, ...] | None = None
    kl: tuple[float, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        change = self.perplexity_mxfp4 / self.perplexity - 1
        lines = [
            f"{self.model} against {self.against}, {self.tokens} tokens of {self.text}, windows of {self.window}",
            f"perplexity       {self.perplexity:.4f} -> {self.perplexity_mxfp4:.4f} ({change:+.2%})",
            f"KL per token     mean {self.kl_mean:.5f}, median {self.kl_median:.5f}, 99% below {self.kl_p99:.5f}, "
            f"largest {self.kl_max:.4f} nats",
            f"top-1 agreement  {self.top1_agreement:.2%}",
            "relative squared error of each site's output, and mean KL of the model with that site alone in MXFP4:",
            *[f"  {site.name}  {site.error:.5f}{_nats(site.damage)}" for site in self.sites],
        ]
        if self.bound is not None:
            if self.kl_mean <= self.bound:
                lines.append(f"the mean divergence is within the bound of {self.bound:g} as it is")
            elif self.suggested_skip is not None:
                lines.append(f"for a mean divergence of {self.bound:g}, by estimate: skip={list(self.suggested_skip)}")
        return "\n".join(lines)


def _nats(damage: float | None) -> str:
    return "" if damage is None else f"  {damage:.6f} nats"


def compare(
    model: Path,
    text: Path,
    *,
    against: Path | None = None,
    scale_rule: str = mx.DEFAULT_SCALE_RULE,
    tokens: int = 4096,
    window: int = 512,
    bound: float | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Run the model in directory ``model`` and its MXFP4 form over the first ``tokens`` tokens of ``text``.

    against: a saved MXFP4 checkpoint; by default the model is quantized in memory, with ``scale_rule``, which is
    also the rule of the errors by site unless ``against`` says with which one it was made. window:
    tokens of context; every token but a window's first is predicted. bound: a mean divergence in nats that
    should hold. trust_remote_code: run the code that comes with the models. Raises ValueError for bad numbers, a text
    too short or one that ``against`` was calibrated on, OSError for unreadable files.
    """
    from ..checkpoint.loading import load

    if tokens < 2 or window < 2:
        raise ValueError(f"tokens and window must be at least 2, got {tokens} and {window}")
    if bound is not None and not bound > 0:
        raise ValueError(f"the bound must be above 0, got {bound}")
    if against is not None:
        config = json.loads((against / "config.json").read_text())
        rule = (config.get("quantization_config") or {}).get("scale_rule") or (config.get(OWN) or {}).get("scale_rule")
        scale_rule = rule if rule in mx.SCALE_RULES else scale_rule
        _check_judge(against, text, facts_of(note_of(SimpleNamespace(**config), config.get("quantization_config"))))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    first = _unquantized(model, trust_remote_code).to(place)
    windows = _windows(model, first, text, tokens, window, trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        kept = _Scratch(Path(scratch), windows)
        sites = _planned_sites(first, scale_rule)
        with _values(first, sites, against, scale_rule) as values:
            with _site_errors(sites, values) as errors:
                for i, ids in enumerate(windows):
                    kept.put(i, _log_probabilities(first, ids.to(place)))
            damages = _damages(first, sites, values, [ids.to(place) for ids in windows])
        if against is None:
            second: nn.Module = optimize(first, scale_rule=scale_rule)
        else:
            del first, sites, values
            gc.collect()
            second = load(against, device_map=str(place), trust_remote_code=trust_remote_code)
            named = mxfp4_sites(second)
            errors = {n: e for n, e in errors.items() if n in named}
        kl, same, own, theirs = [], [], [], []
        for i, ids in enumerate(windows):
            p, q = kept.get(i), _log_probabilities(second, ids.to(place)).cpu()
            target = ids[0, 1:, None]
            own.append(-p.gather(1, target)[:, 0])
            theirs.append(-q.gather(1, target)[:, 0])
            kl.append((p.exp() * (p - q)).nan_to_num(0.0).sum(1).clamp_(min=0))
            same.append(p.argmax(1) == q.argmax(1))
    divergence = torch.cat(kl).double()
    told = tuple(SiteError(n, e[0] / e[1] if e[1] else 0.0, damages.get(n)) for n, e in errors.items())
    mean = float(divergence.mean())
    return Comparison(
        model=str(model),
        against="MXFP4 made in memory" if against is None else str(against),
        text=str(text),
        tokens=sum(ids.numel() for ids in windows),
        window=window,
        perplexity=math.exp(float(torch.cat(own).double().mean())),
        perplexity_mxfp4=math.exp(float(torch.cat(theirs).double().mean())),
        kl_mean=mean,
        kl_median=float(divergence.median()),
        kl_p99=float(divergence.quantile(0.99)),
        kl_max=float(divergence.max()),
        top1_agreement=float(torch.cat(same).double().mean()),
        sites=told,
        bound=bound,
        suggested_skip=None if bound is None else suggest_skip(told, mean, bound),
        kl=tuple(divergence.tolist()),
    )


def suggest_skip(sites: tuple[SiteError, ...], kl_mean: float, bound: float) -> tuple[str, ...]:
    """The worst sites, as few as bring ``kl_mean`` to ``bound`` if each has the share that it has of all damage.

    Damage alone adds up to that of all sites together but for a few percent. Where it was not measured: of the errors.
    """
    measured = all(site.damage is not None for site in sites)
    shares = {site.name: (site.damage or 0.0) if measured else site.error for site in sites}
    total = sum(shares.values())
    left, skip = kl_mean, []
    for name in sorted(shares, key=lambda n: -shares[n]):
        if left <= bound or not total:
            break
        skip.append(name)
        left -= kl_mean * shares[name] / total
    return tuple(skip)


def _unquantized(path: Path, trust_remote_code: bool) -> nn.Module:
    if getattr(read_config(path, trust_remote_code=trust_remote_code), "quantization_config", None) is not None:
        raise ValueError(f"{path} is quantized: the model to compare with must not be; name it with --against")
    return load_plain(path, trust_remote_code=trust_remote_code)


def _windows(
    path: Path, model: nn.Module, text: Path, tokens: int, window: int, trust_remote_code: bool
) -> list[Tensor]:
    """Token ids [1, <= window] of the text, each window for itself."""
    content = text.read_text(encoding="utf-8")
    ids = torch.tensor(_encode(path, model, content, trust_remote_code), dtype=torch.int64)[:tokens]
    pieces = [piece[None] for piece in ids.split(window) if len(piece) > 1]
    if not pieces:
        raise ValueError(f"{text} has {len(ids)} tokens; at least 2 are needed")
    return pieces


def _encode(path: Path, model: nn.Module, content: str, trust_remote_code: bool) -> list[int]:
    import transformers

    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        return list(tokenizer(content)["input_ids"])
    vocabulary = int(getattr(model.config, "vocab_size", 0))  # type: ignore[union-attr]
    if vocabulary == 256:  # a byte-level model, as the demo's, needs no tokenizer
        return list(content.encode())
    raise ValueError(f"{path} has no tokenizer; one is needed to read the text")


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """[T-1, V] fp32: of the next token, after each but the last."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1]
    out: Tensor = torch.log_softmax(logits.float(), -1)
    return out


class _Scratch:
    """Log-probabilities of each window, on disk: a vocabulary of 150,000 makes 600 KB a token."""

    def __init__(self, directory: Path, windows: list[Tensor]) -> None:
        self.directory = directory

    def _file(self, i: int) -> Path:
        return self.directory / f"{i}.safetensors"

    def put(self, i: int, values: Tensor) -> None:
        from safetensors.torch import save_file

        save_file({"p": values.cpu().contiguous()}, str(self._file(i)))

    def get(self, i: int) -> Tensor:
        from safetensors.torch import load_file

        values: Tensor = load_file(str(self._file(i)))["p"]
        self._file(i).unlink()
        return values


def _check_judge(against: Path, text: Path, facts: Mapping[str, Any]) -> None:
    """ValueError if ``against`` was calibrated on this very text: it would be its own judge."""
    calibration = facts.get("calibration") or {}
    digest = hashlib.sha256(text.read_text(encoding="utf-8").encode()).hexdigest()
    if digest in (calibration.get("text_hash"), *calibration.get("file_hashes", ())):
        raise ValueError(
            f"{against} was calibrated on {text} (SHA-256 {digest[:12]}...): judge it on another text, which it has "
            "not seen"
        )


def _planned_sites(model: nn.Module, scale_rule: str) -> list[Site]:
    report = Report(scale_rule, "bf16", DEFAULT_CAPTURE_SIZE, False)
    sites = [Site(c) for c in find_candidates(model)]
    with exclusively(), plain_modes(), kept_state(model), traceable_experts(model):
        match_all(model, sites, None, None)
    check_matches(sites, report, strict=True)
    return [site for site in sites if site.structure is not None]


# A site -> its parameters by name, with the values that MXFP4 gives them.
Values = Callable[[Site], dict[str, Tensor]]


@contextmanager
def _values(model: nn.Module, sites: list[Site], against: Path | None, scale_rule: str) -> Iterator[Values]:
    """What MXFP4 makes of a site's weights: those of the checkpoint ``against`` where it has them, else rounded."""
    with ExitStack() as stack_:
        reader: CheckpointReader | None = None
        if against is not None:
            weights = stack_.enter_context(Weights(weight_files(against)))
            form, _ = declared_form(json.loads((against / "config.json").read_text()).get("quantization_config"), "")
            reader = CheckpointReader(model, expert_parameters(sites), weights, form)

        def values(site: Site) -> dict[str, Tensor]:
            assert site.structure is not None
            module, found = site.candidate.module, dict[str, Tensor]()
            for projection in projections_of(site.structure.found.spec):
                source = projection.source
                for name, n in zip(source.parameters, projection.rows(module), strict=True):
                    weight, full = stack(module, name), f"{site.name}.{name}"
                    if reader is not None and full in reader.parts and reader.quantized(full):
                        packed, scales = reader.codes(full, slice(0, weight.shape[0]), n, projection.shape[2])
                        value = mx.dequantize(packed, scales, projection.shape[2], weight.dtype)
                        value = value.transpose(1, 2).contiguous() if source.transposed else value
                        value = value.to(weight.parts[0].device)
                    else:
                        value = _rounded(weight[:], source.transposed, scale_rule)
                    found |= unstack(module, name, value)
            return found

        yield values


@contextmanager
def _swapped(site: Site, values: Values) -> Iterator[None]:
    """The site on MXFP4's values of its weights."""
    module, new = site.candidate.module, values(site)
    originals = {name: module.get_parameter(name).data for name in new}
    try:
        for name, value in new.items():
            module.get_parameter(name).data = value
        yield
    finally:
        for name, value in originals.items():
            module.get_parameter(name).data = value


@contextmanager
def _site_errors(sites: list[Site], values: Values) -> Iterator[dict[str, list[float]]]:
    """While the unquantized model runs: site -> [squared error, squared norm] of its output under MXFP4 weights."""
    sums = {site.name: [0.0, 0.0] for site in sites}
    handles = [
        site.candidate.module.register_forward_hook(_error_hook(sums[site.name], site, values), with_kwargs=True)
        for site in sites
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _error_hook(sums: list[float], site: Site, values: Values) -> Callable[..., None]:
    running = False

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal running
        if running:
            return
        running = True
        try:
            with _swapped(site, values), torch.no_grad():
                other = module(*args, **kwargs)
        finally:
            running = False
        # A block may return what its router computed as well; the experts' sum comes first.
        ours, theirs = (next(t for t in tree_leaves(o) if isinstance(t, Tensor)).double() for o in (other, output))
        sums[0] += float((ours - theirs).square().sum())
        sums[1] += float(theirs.square().sum())

    return hook


# Tokens on which the damage of each site alone is taken: a forward for each site.
_DAMAGE_TOKENS = 1024


def _damages(model: nn.Module, sites: list[Site], values: Values, windows: list[Tensor]) -> dict[str, float]:
    """Site -> mean divergence, in nats per token, of the model with that site alone in MXFP4."""
    some, tokens = [], 0
    for ids in windows:
        if tokens < _DAMAGE_TOKENS:
            some.append(ids[:, : _DAMAGE_TOKENS - tokens] if _DAMAGE_TOKENS - tokens > 1 else ids)
            tokens += some[-1].numel()
    truth = [_log_probabilities(model, ids).cpu() for ids in some]
    found = {}
    for site in sites:
        with _swapped(site, values):
            kl = [(p.exp() * (p - _log_probabilities(model, ids).cpu())).nan_to_num(0.0).sum(1)
                  for p, ids in zip(truth, some, strict=True)]  # fmt: skip
        found[site.name] = float(torch.cat(kl).double().mean())
    return found


def _rounded(weight: Tensor, transposed: bool, scale_rule: str) -> Tensor:
    """What MXFP4 makes of a packed weight, [E, N, K] or, transposed, [E, K, N]."""
    values = weight.transpose(1, 2) if transposed else weight
    packed, scales = mx.quantize(values, scale_rule)
    out = mx.dequantize(packed, scales, values.shape[-1], weight.dtype)
    return out.transpose(1, 2).contiguous() if transposed else out


def plot(result: Comparison, path: Path) -> None:
    """Divergence over tokens (sorted) and error by site; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = sorted(result.kl, reverse=True)
    left.plot([100 * (i + 1) / len(values) for i in range(len(values))], values)
    left.set(xscale="log", yscale="log", xlabel="share of tokens, %", ylabel="KL(original || MXFP4), nats")
    left.set_title(f"perplexity {result.perplexity:.3f} -> {result.perplexity_mxfp4:.3f}", fontsize=10)
    right.bar(range(len(result.sites)), [site.error for site in result.sites])
    right.set(xlabel="site, in model order", ylabel="relative squared error of the output")
    right.set_title(f"top-1 agreement {result.top1_agreement:.1%}", fontsize=10)
    figure.savefig(path, dpi=120)


__all__ = ["Comparison", "SiteError", "compare", "plot", "suggest_skip"]
