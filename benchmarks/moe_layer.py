"""One MoE layer, from (x, topk_ids, topk_weights) to the combined output, against what else a user has.

    python benchmarks/moe_layer.py [--shapes qwen3,gpt_oss] [--tokens 1,64] [--providers mxfp4,hf_grouped]

CUDA-graph replay, L2 flushed before each, medians. Every (provider, shape) has a process of its own, so
that they compile side by side; timing is one at a time, after all have compiled. Writes
benchmarks/results/<gpu>-<date>.json and .png.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from mxfp4_compile.timing import matmul_rate, median_us

from mxfp4_compile.mx import dequantize
from mxfp4_compile.spec import Activation, MoEParams, Role

SHAPES = {  # E, K, H, I
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "mixtral-8x7b": (8, 2, 4096, 14336),
}
TOKENS = (1, 8, 64, 512, 4096)
RESULTS = Path(__file__).parent / "results"
# Every provider's output is compared with an fp32 product of the dequantized weights before it is timed.
CHECKED_TOKENS = 64
TOLERANCE = 1e-2
Run = Callable[[], Any]


def inputs(shape: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_ids and normalized topk_weights under uniform routing; the same for every provider."""
    e, top_k, hidden, _ = SHAPES[shape]
    g = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=g, device="cuda", dtype=torch.bfloat16)
    weights, ids = torch.rand(tokens, e, generator=g, device="cuda").topk(top_k, -1)
    return x, ids, (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)


def params_of(shape: str) -> MoEParams:
    """A silu-gated layer, gate rows before up rows."""
    e, _, hidden, inner = SHAPES[shape]
    return MoEParams(e, hidden, inner, Activation("silu"), "halves", 0, False, torch.bfloat16, torch.bfloat16)


def weight(shape: str, role: Role, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's canonical weights, random; the same for every provider."""
    _, n, k = params_of(shape).shape(role)
    g = torch.Generator("cuda").manual_seed(2 * expert + (role == "up"))
    packed = torch.randint(0, 256, (1, n, k // 2), generator=g, dtype=torch.uint8, device="cuda")
    return packed, torch.randint(118, 122, (1, n, k // 32), generator=g, dtype=torch.uint8, device="cuda")


def reference(shape: str, tokens: int) -> torch.Tensor:
    """The layer in fp32 on the dequantized weights."""
    x, ids, weights = inputs(shape, tokens)
    params = params_of(shape)
    out = torch.zeros(tokens, params.hidden, device="cuda")
    for expert in ids.unique().tolist():
        at, slot = (ids == expert).nonzero(as_tuple=True)
        up, down = (
            dequantize(*weight(shape, role, expert), dtype=torch.float32)[0] for role in ("up", "down")
        )
        h = params.activate(x[at].float() @ up.T)
        out.index_add_(0, at, (h @ down.T) * weights[at, slot, None].float())
    return out


def mxfp4(shape: str) -> Callable[[int], Run]:
    """This library's native backend, as the op calls it."""
    from mxfp4_compile.ops.triton import BACKEND

    params = params_of(shape)
    layout = BACKEND.plan(params, torch.device("cuda"))
    prepared = {}
    roles: tuple[Role, ...] = ("up", "down")
    for role in roles:
        k = params.shape(role)[2]
        parts = [
            BACKEND.prepare(*weight(shape, role, i), k=k, role=role, params=params, layout=layout)
            for i in range(params.num_experts)
        ]
        prepared[role] = [torch.cat(p) for p in zip(*parts, strict=True)]

    def at(tokens: int) -> Run:
        x, ids, weights = inputs(shape, tokens)
        return lambda: BACKEND.moe(
            x, ids, weights, prepared["up"], prepared["down"], None, None, params, layout
        )

    return at


def _hf(shape: str, implementation: str, mode: str = "default") -> Callable[[int], Run]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    e, top_k, hidden, inner = SHAPES[shape]
    config = Qwen3MoeConfig(
        num_experts=e, num_experts_per_tok=top_k, hidden_size=hidden, moe_intermediate_size=inner
    )
    config._experts_implementation = implementation
    with torch.device("cuda"):
        module = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for i in range(e):
        for role, p in (("up", module.gate_up_proj), ("down", module.down_proj)):
            p[i].copy_(dequantize(*weight(shape, role, i))[0])  # type: ignore[arg-type]

    def at(tokens: int) -> Run:
        torch._dynamo.reset()
        compiled = torch.compile(module, dynamic=False, mode=mode)
        x, ids, weights = inputs(shape, tokens)

        def run() -> Any:
            with torch.no_grad():
                return compiled(x, ids, weights)

        return run

    return at


def hf_grouped(shape: str) -> Callable[[int], Run]:
    """transformers' bf16 grouped_mm experts under torch.compile."""
    return _hf(shape, "grouped_mm")


def hf_autotuned(shape: str) -> Callable[[int], Run]:
    """The same with mode="max-autotune" (its own CUDA graphs left out: the timing captures one)."""
    return _hf(shape, "grouped_mm", "max-autotune-no-cudagraphs")


def hf_batched(shape: str) -> Callable[[int], Run]:
    """transformers' bf16 batched_mm experts under torch.compile (few tokens only: it gathers weights)."""
    at = _hf(shape, "batched_mm")

    def few(tokens: int) -> Run:
        if tokens > 8:
            raise NotImplementedError("batched_mm copies the weights of every pair: timed up to 8 tokens")
        return at(tokens)

    return few


def triton_kernels(shape: str) -> Callable[[int], Run]:
    """OpenAI's triton_kernels, where its 3.6 generation can be imported."""
    import peers

    layer = peers.triton_kernels(SHAPES[shape], partial(weight, shape))
    return lambda tokens: layer(*inputs(shape, tokens))


def humming(shape: str) -> Callable[[int], Run]:
    """humming-kernels: no adapter yet."""
    raise NotImplementedError("humming: no adapter yet")


PROVIDERS: dict[str, Callable[[str], Callable[[int], Run]]] = {
    "mxfp4": mxfp4,
    "hf_grouped": hf_grouped,
    "hf_batched": hf_batched,
    "hf_autotuned": hf_autotuned,
    "triton_kernels": triton_kernels,
    "humming": humming,
}


def floor_us(shape: str, tokens: int, hit: int, bandwidth: float, rate: float) -> float:
    """max(bytes of the experts hit at 17/32 byte per weight, multiply-adds at the matrix rate)."""
    _, top_k, hidden, inner = SHAPES[shape]
    move = hit * 3 * hidden * inner * 17 / 32 / bandwidth
    return max(move, 6 * tokens * top_k * hidden * inner / rate) * 1e6


def worker(name: str, shape: str, tokens: list[int], ready: Any, lock: Any, out: Any) -> None:
    """Compile every number of tokens, wait for all workers, then time alone."""
    runs: dict[int, Run | None] = {}
    errors: dict[int, str] = {}
    distances: dict[int, float] = {}
    try:
        at = PROVIDERS[name](shape)
        for t in tokens:
            try:
                runs[t] = at(t)
                for _ in range(3):
                    y = runs[t]()  # type: ignore[misc]
                if t <= CHECKED_TOKENS:
                    expected = reference(shape, t)
                    distances[t] = float((y.float() - expected).norm() / expected.norm())
                    if not distances[t] < TOLERANCE:
                        runs[t], errors[t] = None, f"wrong: relative error {distances[t]:.2e}"
            except Exception as error:
                runs[t], errors[t] = None, f"{type(error).__name__}: {str(error)[-300:]}"
        torch.cuda.synchronize()
    except Exception as error:
        errors = dict.fromkeys(tokens, f"{type(error).__name__}: {str(error)[-300:]}")
    ready.wait()
    with lock:
        times: dict[int, float] = {}
        for t, run in runs.items():
            if run is None:
                continue
            try:
                times[t] = median_us(run)
            except Exception as error:
                errors[t] = f"{type(error).__name__}: {str(error)[-300:]}"
        torch.cuda.synchronize()
    out.put((name, shape, times, errors, distances))


def stream_bandwidth() -> float:
    """Bytes per second of reading and writing a few GB by a plain kernel."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / (median_us(lambda: torch.add(a, 1.0, out=b), 10) * 1e-6)


def plot(table: dict[str, Any], path: Path) -> None:
    """Time over floor by number of tokens, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(r["shape"] for r in table["rows"]))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        rows = [r for r in table["rows"] if r["shape"] == shape]
        for name in PROVIDERS:
            points = [(r["tokens"], r[name] / r["floor"]) for r in rows if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time / floor", title=shape)
        axis.legend()
    figure.suptitle(f"{table['gpu']}, {table['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    shapes, providers = args.shapes.split(","), args.providers.split(",")
    tokens = [int(t) for t in args.tokens.split(",")]
    context = multiprocessing.get_context("spawn")
    jobs = [(p, s) for s in shapes for p in providers]
    ready, lock, queue = context.Barrier(len(jobs)), context.Lock(), context.Queue()
    processes = [context.Process(target=worker, args=(p, s, tokens, ready, lock, queue)) for p, s in jobs]
    for process in processes:
        process.start()
    answers = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    bandwidth, rate = stream_bandwidth(), matmul_rate()
    rows = []
    for shape in shapes:
        for t in tokens:
            hit = int(inputs(shape, t)[1].unique().numel())
            row: dict[str, Any] = {
                "shape": shape,
                "tokens": t,
                "experts_hit": hit,
                "floor": floor_us(shape, t, hit, bandwidth, rate),
            }
            for name, of, times, errors, distances in answers:
                if of == shape and t in distances:
                    row[f"{name}_error"] = distances[t]
                if of == shape and t in times:
                    row[name] = times[t]
                elif of == shape and t in errors:
                    row[f"{name}_skipped"] = errors[t]
            rows.append(row)
    table = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "triton", "transformers")},
        "bandwidth": bandwidth,
        "matmul_rate": rate,
        "unit": "microseconds; CUDA-graph replay, L2 flushed, median of 20",
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{table['gpu'].replace(' ', '_').lower()}-{table['date']}"
    (args.out / f"{name}.json").write_text(json.dumps(table, indent=1))
    try:
        plot(table, args.out / f"{name}.png")
    except ImportError:
        print("no plot: matplotlib is not installed")
    print(f"{table['gpu']} {table['versions']} {bandwidth / 1e12:.2f} TB/s {rate / 1e12:.0f} TFLOP/s")
    print("shape tokens hit floor " + " ".join(PROVIDERS))
    for row in rows:
        cells = [f"{row[p]:.1f}" if p in row else "-" for p in PROVIDERS]
        print(row["shape"], row["tokens"], row["experts_hit"], f"{row['floor']:.1f}", *cells)
    for name in PROVIDERS:
        worst = max((row[f"{name}_error"] for row in rows if f"{name}_error" in row), default=None)
        if worst is not None:
            print(f"{name}: relative error against fp32 at most {worst:.1e} up to {CHECKED_TOKENS} tokens")
    for reason in {(k, v) for row in rows for k, v in row.items() if k.endswith("_skipped")}:
        print(f"{reason[0]}: {reason[1].splitlines()[-1][:160]}")


if __name__ == "__main__":
    main()
