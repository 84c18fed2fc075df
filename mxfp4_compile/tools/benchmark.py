"""One MoE layer, from (x, topk_ids, topk_weights) to the combined output: who takes how long.

A layer is silu experts with normally distributed bf16 weights. Providers of bf16 experts run these weights,
providers of MXFP4 experts the same weights quantized (rule mse). It matters: at sizes bound by arithmetic a
GPU runs into its power limit, and multiplying bf16 weights that happen to be MXFP4 values, with few mantissa
bits set, is up to 20% faster than multiplying those of a real bf16 model.

Every output is compared with an fp32 product of the weights that the provider stands for before it is
timed; what is wrong is not timed. ``mxfp4-compile bench`` and ``benchmarks/moe_layer.py`` are made of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import mx
from .. import ops as _ops  # noqa: F401  (registers the backends)
from ..ops.arguments import MoEInputs, Slot
from ..ops.registry import get_backend, known_backends
from ..ops.selection import requirements
from ..ops.synthetic import LayerShape
from ..ops.target import ActivationDtype, Request, Target
from ..spec import MoEParams, Role
from ..timing import matmul_rate, median_us, median_wall_us, stream_bandwidth

Run = Callable[[], Any]
At = Callable[[Tensor, Tensor, Tensor], Run]

TOLERANCE = 2e-2
"""Relative error above which a provider's output is wrong; bf16 rounding alone comes to 3e-3 to 8e-3."""

TOLERANCE_FP8 = 7e-2
"""The same where activations are quantized to e4m3, which comes to 4.5e-2."""

TOKENS = (1, 8, 64, 512, 4096)
TOKENS_CPU = (1, 8, 64)

HF = {"hf_grouped": "grouped_mm", "hf_batched": "batched_mm"}
"""transformers' own experts, by provider name."""

ROLES: tuple[Role, Role] = ("up", "down")

# batched_mm copies the weights of every (token, expert) pair.
_BATCHED_TOKENS = 8


class Unavailable(RuntimeError):
    """This machine lacks what was asked for; the message says what, and what to do."""


class Layer:
    """Experts of ``shape`` with random weights on ``device``: the same bits for every provider, by ``seed``.

    ``canonical``: role -> (packed [E, N, ceil(K/2)], scales [E, N, ceil(K/32)]), the quantized weights. The
    originals are drawn again when they are asked for, since they are four times as large.
    """

    def __init__(self, shape: LayerShape, device: torch.device, seed: int = 0) -> None:
        self.shape, self.device, self.params, self._seed = shape, device, shape.params, seed
        self.canonical: dict[Role, tuple[Tensor, Tensor]] = {}
        for role in ROLES:
            e, n, k = self.params.shape(role)
            packed = torch.empty((e, n, (k + 1) // 2), dtype=torch.uint8, device=device)
            scales = torch.empty((e, n, -(-k // mx.BLOCK)), dtype=torch.uint8, device=device)
            for i in range(e):
                packed[i], scales[i] = mx.quantize(self.original(role, i))
            self.canonical[role] = packed, scales

    def original(self, role: Role, expert: int) -> Tensor:
        """One expert's bf16 weight [N, K], normal with about unit row norm."""
        _, n, k = self.params.shape(role)
        number = (self._seed * self.shape.num_experts + expert) * len(ROLES) + ROLES.index(role)
        g = torch.Generator(self.device).manual_seed(number)
        return torch.randn(n, k, generator=g, device=self.device).mul_(k**-0.5).to(torch.bfloat16)

    def dequantized(self, role: Role, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert's quantized weight [N, K] as ``dtype``."""
        packed, scales = self.canonical[role]
        return mx.dequantize(packed[expert], scales[expert], self.params.shape(role)[2], dtype)

    def inputs(self, tokens: int, skew: float = 0.0, hit: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] bf16, topk_ids [T, K] int64, topk_weights [T, K] bf16 that sum to one; the same for the same call.

        ``skew`` 0 is uniform routing; with s the popularity of the i-th expert falls as i^-s (Zipf). ``hit`` draws
        again until so many experts have a token; ValueError if a thousand draws do not.
        """
        for seed in range(tokens, tokens + 1000):
            drawn = self._draw(tokens, skew, seed)
            if hit is None or drawn[1].unique().numel() == hit:
                return drawn
        raise ValueError(f"{tokens} tokens of {self.shape} do not hit {hit} experts in a thousand draws")

    def _draw(self, tokens: int, skew: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        shape, device = self.shape, self.device
        g = torch.Generator(device).manual_seed(seed)
        x = torch.randn(tokens, shape.hidden, generator=g, device=device, dtype=torch.float32).to(torch.bfloat16)
        noise = torch.rand(tokens, shape.num_experts, generator=g, device=device)
        if skew:
            # Gumbel noise on log-popularity draws without replacement in proportion to popularity.
            rank = torch.arange(1, shape.num_experts + 1, device=device).log()
            noise = -torch.log(-torch.log(noise.clamp(1e-7, 1 - 1e-7))) - skew * rank
        ids = noise.topk(shape.top_k, -1).indices
        weights = torch.rand(tokens, shape.top_k, generator=g, device=device) + 0.05
        return x, ids, (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor, original: bool = False) -> Tensor:
        """The layer in fp32, expert by expert, on the quantized weights or on the original ones: [T, H]."""
        out = torch.zeros(x.shape, device=x.device)

        def weight(role: Role, e: int) -> Tensor:
            return self.original(role, e).float() if original else self.dequantized(role, e, torch.float32)

        with torch.no_grad():
            for e in ids[(ids >= 0) & (ids < self.shape.num_experts)].unique().tolist():
                token, slot = (ids == e).nonzero(as_tuple=True)
                y = self.params.activate(x[token].float() @ weight("up", e).T) @ weight("down", e).T
                out.index_add_(0, token, y * weights[token, slot].float().unsqueeze(1))
        return out

    def prepared(self, name: str, activation_dtype: ActivationDtype = "bf16") -> tuple[dict[Role, list[Tensor]], str]:
        """The weights as backend ``name`` reads them, prepared a few experts at a time, and their layout."""
        backend = get_backend(name)
        layout = backend.plan(Request(self.params, activation_dtype=activation_dtype), Target.of(self.device))
        out: dict[Role, list[Tensor]] = {}
        step = max(self.shape.num_experts // 16, 1)
        for role, (packed, scales) in self.canonical.items():
            k = self.params.shape(role)[2]
            parts = [
                backend.prepare(packed[i : i + step], scales[i : i + step], Slot(role, self.params, layout), k=k)
                for i in range(0, self.shape.num_experts, step)
            ]
            out[role] = [torch.cat(p) for p in zip(*parts, strict=True)]
        return out, layout

    def backend(self, name: str, activation_dtype: ActivationDtype = "bf16") -> At:
        """A registered backend, called as the op calls it."""
        weights, layout = self.prepared(name, activation_dtype)
        backend, params = get_backend(name), self.params

        def at(x: Tensor, ids: Tensor, w: Tensor) -> Run:
            inputs = MoEInputs(x, ids, w, weights["up"], weights["down"], None, None, params, layout)
            return lambda: backend.moe(inputs)

        return at

    def hf_module(self, implementation: str) -> Any:
        """transformers' experts with the original bf16 weights, frozen."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        s = self.shape
        if not s.gated:
            raise NotImplementedError("transformers' experts without a gate are not among the peers")
        config = Qwen3MoeConfig(
            num_experts=s.num_experts,
            num_experts_per_tok=s.top_k,
            hidden_size=s.hidden,
            moe_intermediate_size=s.intermediate,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config).to(torch.bfloat16)
        module = module.to_empty(device=self.device).requires_grad_(False)
        for parameter, role in zip((module.gate_up_proj, module.down_proj), ROLES, strict=True):
            for e in range(s.num_experts):
                parameter[e].copy_(self.original(role, e))
        return module

    def hf(self, implementation: str, mode: str | None = None, compiled: bool = True) -> At:
        """transformers' experts on the original bf16 weights, under torch.compile(dynamic=False, mode) or eager."""
        module = self.hf_module(implementation)

        def at(x: Tensor, ids: Tensor, w: Tensor) -> Run:
            if implementation == "batched_mm" and x.shape[0] > _BATCHED_TOKENS:
                raise NotImplementedError(f"batched_mm copies every pair's weights: up to {_BATCHED_TOKENS} tokens")
            torch._dynamo.reset()
            call = torch.compile(module, dynamic=False, mode=mode) if compiled else module

            def run() -> Any:
                with torch.no_grad():
                    return call(x, ids, w)

            return run

        return at


def serving_backends(params: MoEParams, device: torch.device) -> dict[str, str]:
    """Every registered backend -> "" if it serves ``params`` on ``device``, else why not."""
    request, target = Request(params), Target.of(device)
    return {
        name: "; ".join(str(r) for r in requirements(name, request, target) if not r.met) for name in known_backends()
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over norm of ``want``; NaN and infinity where ``got`` holds such."""
    return float((got.float() - want).norm() / want.norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Timing:
    """One provider at one number of tokens: microseconds and relative error, or why there are none."""

    provider: str
    us: float | None
    error: float | None
    skipped: str = ""


def measure(name: str, run: Run, want: Tensor, timer: Callable[[Run], float]) -> Timing:
    """Run once, compare with ``want``, then time; a failure or a wrong result is told, not raised."""
    try:
        error = relative_error(run(), want)
        if not error <= TOLERANCE:  # NaN too
            return Timing(name, None, error, f"wrong: relative error {error:.2g}, at most {TOLERANCE:g} is accepted")
        return Timing(name, timer(run), error)
    except Exception as error:  # other libraries fail in many ways
        return Timing(name, None, None, one_line(error))


def one_line(error: BaseException) -> str:
    """The class and last line of an error, shortened."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1][-200:] if text else ''}"


def floor_us(shape: LayerShape, tokens: int, hit: int, bandwidth: float, rate: float) -> float:
    """max(bytes of the experts hit at 17/32 byte per weight / bandwidth, multiply-adds at the matrix rate)."""
    move = hit * 3 * shape.hidden * shape.intermediate * 17 / 32 / bandwidth
    return max(move, 6 * tokens * shape.top_k * shape.hidden * shape.intermediate / rate) * 1e6


@dataclass(frozen=True)
class Row:
    """All providers at one number of tokens; ``floor`` in microseconds, None where no ceiling was measured."""

    tokens: int
    experts_hit: int
    floor: float | None
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class Bench:
    """A table of rows for one shape on one device; ``notes`` say what was left out and why."""

    shape: LayerShape
    device: str
    method: str
    providers: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    versions: dict[str, str | None] = field(default_factory=dict)
    bandwidth: float | None = None
    matmul_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"shape": self.shape.to_dict()}


def device_of(name: str | None) -> torch.device:
    """The device to measure on; Unavailable where there is no GPU. None: the current GPU."""
    device = torch.device(name or "cuda")
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"device {name!r}: cuda, cuda:N or cpu")
    if not torch.cuda.is_available():
        raise Unavailable(
            "torch finds no GPU here; the native kernels run on a GPU. --device cpu measures the CPU backend instead"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"there is no cuda:{index}; torch finds {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def providers_for(shape: LayerShape, device: torch.device) -> tuple[dict[str, Callable[[Layer], At]], list[str]]:
    """What can be measured on ``device`` by name, best first, and a note for each that cannot."""
    notes = []
    found: dict[str, Callable[[Layer], At]] = {}
    for name, why_not in serving_backends(shape.params, device).items():
        if why_not:
            notes.append(f"{name} left out: {why_not}")
        elif name == "reference" and device.type == "cuda":
            notes.append("reference left out: it waits for the GPU, so that it cannot be captured")
        else:
            found[name] = lambda layer, name=name: layer.backend(name)  # type: ignore[misc]
    try:
        import transformers  # noqa: F401
    except ImportError:
        notes.append('Hugging Face bf16 left out: transformers is not installed (pip install "mxfp4_compile[hf]")')
        return found, notes
    for name, implementation in HF.items():
        found[name] = lambda layer, i=implementation: layer.hf(i)  # type: ignore[misc]
    return found, notes


def run_bench(
    shape: LayerShape,
    tokens: Sequence[int],
    device: torch.device,
    providers: Iterable[str] | None = None,
    skew: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Measure ``providers`` (default: all that there are) at each number of tokens on ``device``.

    Raises ValueError for a provider that is not known or not available here.
    """
    left_out = ["the model's experts have biases; they are left out for every provider"] if shape.biased else []
    shape = replace(shape, biased=False)
    available, notes = providers_for(shape, device)
    notes = left_out + notes
    names = list(available) if providers is None else list(providers)
    for name in names:
        if name not in available:
            raise ValueError(f"no provider {name!r} here; available: {', '.join(available)}. {'; '.join(notes)}")
    gpu = device.type == "cuda"
    timer = median_us if gpu else median_wall_us
    bandwidth = rate = None
    with _on(device):
        if gpu:
            progress("ceilings of this GPU")
            bandwidth, rate = stream_bandwidth(_stream_megabytes(device)), matmul_rate()
        layer = Layer(shape, device)
        cases = {t: layer.inputs(t, skew) for t in tokens}
        wants: dict[bool, dict[int, Tensor]] = {}
        timings: dict[int, list[Timing]] = {t: [] for t in tokens}
        for name in names:
            bf16 = name in HF
            if bf16 not in wants:
                wants[bf16] = {t: layer.reference(*case, original=bf16) for t, case in cases.items()}
            for t, timing in _measure_provider(name, available[name], layer, cases, wants[bf16], timer, progress):
                timings[t].append(timing)
            if gpu:
                torch.cuda.empty_cache()
    rows = []
    for t in tokens:
        hit = int(cases[t][1].unique().numel())
        floor = None if bandwidth is None or rate is None else floor_us(shape, t, hit, bandwidth, rate)
        rows.append(Row(t, hit, floor, tuple(timings[t])))
        notes += [f"{x.provider} at {t} tokens: {x.skipped}" for x in timings[t] if x.skipped]
    from .environment import versions

    return Bench(
        shape,
        torch.cuda.get_device_name(device) if gpu else "cpu",
        "CUDA-graph replay, L2 flushed before each, median of 20" if gpu else "wall clock, median of up to 5",
        tuple(names),
        tuple(rows),
        tuple(dict.fromkeys(notes)),
        versions(),
        bandwidth,
        rate,
    )


def _measure_provider(
    name: str,
    make: Callable[[Layer], At],
    layer: Layer,
    cases: dict[int, tuple[Tensor, Tensor, Tensor]],
    wants: dict[int, Tensor],
    timer: Callable[[Run], float],
    progress: Callable[[str], None],
) -> Iterator[tuple[int, Timing]]:
    try:
        at = make(layer)
    except Exception as error:
        yield from ((t, Timing(name, None, None, one_line(error))) for t in cases)
        return
    for t, case in cases.items():
        progress(f"{name}, {t} tokens")
        try:
            run = at(*case)
        except Exception as error:
            yield t, Timing(name, None, None, one_line(error))
            continue
        yield t, measure(name, run, wants[t], timer)


def _stream_megabytes(device: torch.device) -> int:
    """Up to 2 GB, an eighth of what is free on a small GPU."""
    return max(min(2048, torch.cuda.mem_get_info(device)[0] >> 23), 64)


def _on(device: torch.device) -> Any:
    from contextlib import nullcontext

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def plot(panels: dict[str, list[dict[str, Any]]], providers: Sequence[str], title: str, path: Path) -> None:
    """Time over floor (or microseconds, without a floor) by tokens, a panel per shape, to an image file.

    ``panels``: shape -> rows with "tokens", "floor" and a time per provider. Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (shape, rows) in zip(axes[0], panels.items(), strict=True):
        has_floor = all(r.get("floor") for r in rows)
        for name in providers:
            points = [(r["tokens"], r[name] / (r["floor"] if has_floor else 1.0)) for r in rows if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        if has_floor:
            axis.axhline(1.0, color="gray", linewidth=0.8)
        label = "time / floor" if has_floor else "microseconds"
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title=shape)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def flat_rows(bench: Bench) -> list[dict[str, Any]]:
    """The rows as ``plot`` takes them."""
    return [
        {
            "tokens": row.tokens,
            "floor": row.floor,
            **{t.provider: t.us for t in row.timings if t.us is not None},
        }
        for row in bench.rows
    ]
