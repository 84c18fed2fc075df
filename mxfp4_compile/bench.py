"""The layer benchmark on this machine: one MoE layer, from (x, topk_ids, topk_weights) to the combined output.

Every registered backend that serves the layer, beside transformers' experts in bf16. On a GPU by
CUDA-graph replay with a cold L2, medians; on the CPU by the wall clock.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import mx, timing
from . import ops as _ops  # noqa: F401  (registers the backends)
from .environment import hardware, versions
from .ops.registry import get_backend, known_backends
from .ops.selection import choose
from .ops.synthetic import LayerShape, Prepared, call, prepare, random_inputs, random_layer
from .ops.target import Request, Target

DEFAULT_SHAPE = LayerShape(128, 8, 2048, 768)
DEFAULT_SHAPE_NAME = "the layer of Qwen3-30B-A3B"
DEFAULT_TOKENS = {"cuda": (1, 8, 64, 512, 4096), "cpu": (1, 8, 64)}
BF16 = "HF bf16"
METHODS = {
    "cuda": "CUDA-graph replay, L2 flushed before each, median of 20",
    "cpu": "wall clock on the CPU, median; a CPU is for checking, not for speed",
}
Run = Callable[[], Any]


class BenchError(RuntimeError):
    """The benchmark cannot run on this machine."""


@dataclass(frozen=True)
class Row:
    """Microseconds for ``tokens`` tokens by provider, and why others have none.

    ``floor`` is the time that the bytes of the ``experts_hit`` experts or the multiply-adds take at the rates
    measured here, whichever is longer; None on a CPU. ``eager``: the providers that no CUDA graph can hold,
    timed with their launches and waits.
    """

    tokens: int
    experts_hit: int
    floor: float | None
    us: dict[str, float]
    skipped: dict[str, str]
    eager: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchResult:
    """One layer's table. ``ours`` is the provider that optimize() would choose here."""

    shape: LayerShape
    device: str
    method: str
    ours: str
    bandwidth: float | None
    matmul_rate: float | None
    rows: tuple[Row, ...]

    @property
    def providers(self) -> tuple[str, ...]:
        """Those with a time, ours first and bf16 next."""
        found = {name for row in self.rows for name in row.us}
        return tuple(sorted(found, key=lambda n: (n != self.ours, n != BF16, n)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what is needed to know where it came from."""
        e, k, h, i = self.shape.sizes
        return {
            "shape": {"num_experts": e, "top_k": k, "hidden": h, "intermediate": i, "gated": self.shape.gated,
                      "biased": self.shape.biased, "dtype": str(self.shape.dtype).removeprefix("torch.")},
            "device": self.device,
            "method": self.method,
            "unit": "microseconds",
            "ours": self.ours,
            "bandwidth": self.bandwidth,
            "matmul_rate": self.matmul_rate,
            "rows": [asdict(row) for row in self.rows],
            "versions": versions(),
            "hardware": asdict(hardware()),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }  # fmt: skip


def find_device(name: str) -> torch.device:
    """"cuda", "cuda:1", "cpu" -> a device that is there; BenchError says what is missing."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise BenchError(f"device {name}: a CUDA or ROCm GPU or the cpu is meant")
    if not torch.cuda.is_available():
        raise BenchError("there is no GPU that torch can use")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BenchError(f"there is no {name}: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def run_bench(
    shape: LayerShape,
    tokens: Sequence[int],
    device: torch.device,
    progress: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Time one layer at each number of tokens on ``device``."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(), torch.no_grad():
        return _run_bench(shape, tokens, device, progress)


def _run_bench(
    shape: LayerShape, tokens: Sequence[int], device: torch.device, progress: Callable[[str], None]
) -> BenchResult:
    bandwidth = rate = None
    if device.type == "cuda":
        progress("measuring bandwidth and matrix rate")
        free = torch.cuda.mem_get_info(device)[0]
        bandwidth, rate = timing.copy_bandwidth(min(2 << 30, free // 4)), timing.matmul_rate()
    ours = choose(shape.params, device, None).backend
    us: dict[int, dict[str, float]] = {t: {} for t in tokens}
    skipped: dict[int, dict[str, str]] = {t: {} for t in tokens}
    eager: dict[int, list[str]] = {t: [] for t in tokens}
    for name, provider in _providers(shape, device):
        try:
            at = provider()
        except Exception as error:
            for t in tokens:
                skipped[t][name] = _reason(error)
            continue
        for t in tokens:
            progress(f"{name}, {t} tokens")
            try:
                us[t][name], captured = _time(at(t), device, name != "reference")
                if not captured and device.type == "cuda":
                    eager[t].append(name)
            except Exception as error:
                skipped[t][name] = _reason(error)
        del at
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows = []
    for t in tokens:
        hit = random_inputs(shape, t, device).experts_hit
        floor = None if bandwidth is None or rate is None else _floor(shape, t, hit, bandwidth, rate)
        rows.append(Row(t, hit, floor, us[t], skipped[t], tuple(eager[t])))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware().cpu
    return BenchResult(shape, where, METHODS[device.type], ours, bandwidth, rate, tuple(rows))


def _floor(shape: LayerShape, tokens: int, hit: int, bandwidth: float, rate: float) -> float:
    """Microseconds of moving the hit experts' weights at 17/32 byte each, or of the arithmetic."""
    bytes_per_weight = 0.5 + 1 / mx.BLOCK
    pairs = tokens * shape.top_k
    return max(hit * shape.expert_weights * bytes_per_weight / bandwidth, 2 * pairs * shape.expert_weights / rate) * 1e6


def _time(run: Run, device: torch.device, capturable: bool) -> tuple[float, bool]:
    if device.type == "cpu":
        return timing.wall_median_us(run), False
    if capturable:
        return timing.median_us(run), True
    return timing.eager_median_us(run), False


def _providers(shape: LayerShape, device: torch.device) -> Iterator[tuple[str, Callable[[], Callable[[int], Run]]]]:
    """Name, and what makes its layer and then its call for a number of tokens; raising says why it is skipped."""
    for name in known_backends():
        yield name, lambda name=name: _backend(name, shape, device)  # type: ignore[misc]
    yield BF16, lambda: _bf16(shape, device)


def _backend(name: str, shape: LayerShape, device: torch.device) -> Callable[[int], Run]:
    backend = get_backend(name)
    unmet = [str(r) for r in backend.supports(Request(shape.params), Target.of(device)) if not r.met]
    if unmet:
        raise BenchError(f"needs {', '.join(unmet)}")
    prepared: Prepared = prepare(random_layer(shape, device), backend, device)

    def at(tokens: int) -> Run:
        inputs = random_inputs(shape, tokens, device)
        return lambda: call(backend, shape, prepared, inputs)

    return at


def _bf16(shape: LayerShape, device: torch.device) -> Callable[[int], Run]:
    """transformers' grouped_mm experts of the same sizes under torch.compile; on the CPU eager."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise BenchError("transformers is not installed") from error
    if not shape.gated or shape.dtype != torch.bfloat16:
        raise BenchError("timed for gated experts in bf16 only")
    config = Qwen3MoeConfig(
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
    )
    config._experts_implementation = "grouped_mm"
    # On the meta device first: its own initialization would run on the CPU, in fp32.
    with torch.device("meta"):
        module = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    module = module.to_empty(device=device)
    for p in module.parameters():
        p.normal_(std=0.02)

    def at(tokens: int) -> Run:
        inputs = random_inputs(shape, tokens, device)
        run = module
        if device.type == "cuda":
            torch._dynamo.reset()
            run = torch.compile(module, dynamic=False)  # type: ignore[assignment]

        def go() -> Any:
            with torch.no_grad():
                return run(inputs.x, inputs.ids, inputs.weights)

        return go

    return at


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:200] if lines else ""
    return text if isinstance(error, BenchError) else f"{type(error).__name__}: {text}"


def plot(results: Sequence[BenchResult], path: Path) -> None:
    """Time over floor (on a CPU: time) by number of tokens, one panel per layer, in a format by the file's suffix."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError('--plot needs matplotlib: pip install "mxfp4_compile[bench]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        over = all(row.floor is not None for row in result.rows)
        for name in result.providers:
            points = [(r.tokens, r.us[name] / ((r.floor or 1.0) if over else 1.0)) for r in result.rows if name in r.us]
            label = f"{name} (ours)" if name == result.ours else name
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        if over:
            axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time / floor" if over else "µs")
        axis.set_title(str(result.shape), fontsize=8)
        axis.legend()
    figure.suptitle(results[0].device)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
