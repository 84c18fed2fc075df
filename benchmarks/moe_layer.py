"""One MoE layer, from (x, topk_ids, topk_weights) to the combined output, against what else a user has.

    python benchmarks/moe_layer.py [--shapes qwen3-30b-a3b,gpt-oss-20b] [--tokens 1,64] [--providers mxfp4,hf_grouped]

A shape NAME@S is routed with Zipf's exponent S instead of uniformly; NAME may be E,K,H,I joined by "x".
CUDA-graph replay, L2 flushed before each, medians; every output is compared with the fp32 product of its
weights first (its relative error is in the JSON), and what is wrong is not timed. bf16 providers run normally
distributed weights, MXFP4 providers the same weights quantized (mxfp4_compile/benchmark.py says why). Every
(provider, shape) has a process of its own, so that they compile side by side; timing is one at a time, after
all have compiled or were given up, and after the process before is gone. Writes <out>/<gpu>-<date>.json and .png.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from mxfp4_compile.ops.synthetic import LayerShape, parse_shape
from mxfp4_compile.timing import matmul_rate, median_us, median_wall_us, stream_bandwidth
from mxfp4_compile.tools.benchmark import (
    TOLERANCE,
    TOLERANCE_FP8,
    At,
    Layer,
    Run,
    Timing,
    floor_us,
    one_line,
    plot,
    relative_error,
)

SHAPES = {
    "qwen3-30b-a3b": LayerShape(128, 8, 2048, 768),
    "gpt-oss-20b": LayerShape(32, 4, 2880, 2880),
    "mixtral-8x7b": LayerShape(8, 2, 4096, 14336),
}
EXTRA = {
    "deepseek-v3": LayerShape(256, 8, 7168, 2048),
    "qwen3-235b-a22b": LayerShape(128, 8, 4096, 1536),
    "glm-4.5-air": LayerShape(128, 8, 4096, 1408),
    "olmoe": LayerShape(64, 8, 2048, 1024),
    "granite-3.1-1b": LayerShape(32, 8, 1024, 512),
}
TOKENS = (1, 8, 64, 512, 4096)
# Where it is left to chance how many experts a few tokens hit, and time goes by it: as in the H100 measurements
# that this project's goals were set from.
HIT = {
    ("qwen3-30b-a3b", 8): 50,
    ("qwen3-30b-a3b", 64): 124,
    ("gpt-oss-20b", 8): 18,
    ("mixtral-8x7b", 8): 7,
}
RESULTS = Path(__file__).parent / "results"


def _peer(name: str) -> Callable[[Layer], At]:
    def make(layer: Layer) -> At:
        import peers

        return getattr(peers, name)(layer)

    return make


_AUTOTUNE = "max-autotune-no-cudagraphs"  # this script captures the graph itself
PROVIDERS: dict[str, Callable[[Layer], At]] = {
    "mxfp4": lambda layer: layer.backend("triton" if layer.device.type == "cuda" else "cpu"),
    "mxfp4_fp8": lambda layer: layer.backend("triton", "fp8"),
    "hf_grouped": lambda layer: layer.hf("grouped_mm"),
    "hf_batched": lambda layer: layer.hf("batched_mm"),
    "hf_grouped_autotune": lambda layer: layer.hf("grouped_mm", _AUTOTUNE),
    "hf_batched_autotune": lambda layer: layer.hf("batched_mm", _AUTOTUNE),
    "triton_kernels": _peer("triton_kernels"),
    "humming": _peer("humming"),
}
# Autotuning takes about a minute per shape, and fp8 activations are another accuracy: only on request.
DEFAULT_PROVIDERS = tuple(p for p in PROVIDERS if not p.endswith(("_autotune", "_fp8")))


def shape_of(text: str) -> tuple[LayerShape, float]:
    """ "olmoe@1.0" -> its shape and the skew of its routing."""
    name, _, skew = text.partition("@")
    known = SHAPES | EXTRA
    if name not in known and "x" not in name:
        raise ValueError(f"unknown shape {name!r}; known: {', '.join(known)}, or ExKxHxI")
    return known.get(name) or parse_shape(name.replace("x", ",")), float(skew or 0)


def worker(name: str, shape: str, device: str, tokens: list[int], answers: Any, go: Any) -> None:
    """Compile and verify at every number of tokens, say "ready", and time when told to."""
    os.setsid()  # so that the parent can end a library's helper processes with it
    timer = median_us if device == "cuda" else median_wall_us
    timings: dict[int, Timing] = {}
    runs: dict[int, tuple[Run, float]] = {}
    start = time.perf_counter()
    try:
        of, skew = shape_of(shape)
        layer = Layer(of, torch.device(device))
        cases = {t: layer.inputs(t, skew, HIT.get((shape, t))) for t in tokens}
        wants = {t: layer.reference(*case, original=name.startswith("hf_")) for t, case in cases.items()}
        at = PROVIDERS[name](layer)
        layer.canonical.clear()
        for t, case in cases.items():
            try:
                run = at(*case)
                error = relative_error(run(), wants.pop(t))
                if not error <= (TOLERANCE_FP8 if name.endswith("_fp8") else TOLERANCE):
                    timings[t] = Timing(name, None, error, f"wrong: relative error {error:.2g}")
                    continue
                run()
                runs[t] = run, error
            except Exception as error:
                timings[t] = Timing(name, None, None, one_line(error))
        synchronize(device)
    except Exception as error:
        timings = {t: Timing(name, None, None, one_line(error)) for t in tokens}
        runs = {}
    answers.put(("ready", name, shape, time.perf_counter() - start))
    go.wait()
    for t, (run, error) in runs.items():
        try:
            timings[t] = Timing(name, timer(run), error)
        except Exception as failure:
            timings[t] = Timing(name, None, error, one_line(failure))
    synchronize(device)
    answers.put(("done", name, shape, timings))
    answers.close()
    answers.join_thread()
    os._exit(0)  # a library's build processes must not keep this one


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def collect(
    jobs: list[tuple[str, str]], device: str, tokens: list[int], seconds: float
) -> dict[tuple[str, str], dict[int, Timing]]:
    """Timings of every job; one that has not compiled after ``seconds`` is given up."""
    context = multiprocessing.get_context("spawn")
    answers, go = context.Queue(), {job: context.Event() for job in jobs}
    running = {job: context.Process(target=worker, args=(*job, device, tokens, answers, go[job])) for job in jobs}
    out: dict[tuple[str, str], dict[int, Timing]] = {}

    def end(job: tuple[str, str]) -> None:
        process = running[job]
        try:
            if process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # ended, or not yet a group of its own
            process.kill()

    def give_up(job: tuple[str, str], why: str) -> None:
        print(f"{job[0]}, {job[1]}: given up: {why}", flush=True)
        out[job] = {t: Timing(job[0], None, None, why) for t in tokens}
        end(job)
        running[job].join(10)

    start = time.perf_counter()
    try:
        for process in running.values():
            process.start()
        waiting = set(jobs)
        while waiting and (left := seconds - (time.perf_counter() - start)) > 0:
            try:
                _, name, shape, took = answers.get(timeout=min(left, 2))
                print(f"{name}, {shape}: compiled and verified after {took:.0f} s", flush=True)
                waiting.discard((name, shape))
            except queue.Empty:
                for job in [j for j in waiting if running[j].exitcode is not None]:
                    give_up(job, f"its process ended with exit code {running[job].exitcode}")
                    waiting.discard(job)
        for job in waiting:
            give_up(job, f"not compiled within {seconds:.0f} s")
        for job in [j for j in jobs if j not in out]:
            go[job].set()
            while job not in out:
                try:
                    kind, name, shape, timings = answers.get(timeout=60)
                    if kind == "done":
                        out.setdefault((name, shape), timings)
                except queue.Empty:
                    give_up(job, "no answer within 60 s of timing")
            # Taking a process's memory back keeps the GPU busy for a while: the next is not to be timed meanwhile.
            running[job].join(30)
            end(job)
    finally:
        for job, process in running.items():
            if process.pid is not None and process.exitcode is None:
                end(job)
    return out


def versions() -> dict[str, str]:
    """Of what takes part, by distribution; humming and triton_kernels where they are installed as such."""
    found = {}
    for package in ("torch", "triton", "transformers", "humming-kernels"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    # Workers are process groups of their own: they are ended in collect(), when this process is told to end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"also: {', '.join(EXTRA)}; NAME@SKEW")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--providers", default=",".join(DEFAULT_PROVIDERS), help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: wall clock, the cpu backend")
    parser.add_argument("--compile-seconds", type=float, default=240, help="give up what has not compiled by then")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="", help="file name, instead of <gpu>-<date>")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    shapes, providers = args.shapes.split(","), args.providers.split(",")
    for p in providers:
        if p not in PROVIDERS:
            parser.error(f"unknown provider {p!r}; known: {', '.join(PROVIDERS)}")
    tokens = [int(t) for t in args.tokens.split(",")]
    answers = collect([(p, s) for s in shapes for p in providers], args.device, tokens, args.compile_seconds)
    bandwidth, rate = (stream_bandwidth(), matmul_rate()) if gpu else (None, None)
    rows = []
    for name in shapes:
        shape, skew = shape_of(name)
        # Only the ids count here: a layer of one row costs nothing, its inputs are the same.
        probe = Layer(LayerShape(shape.num_experts, shape.top_k, shape.hidden, 1), torch.device(args.device))
        for t in tokens:
            hit = int(probe.inputs(t, skew, HIT.get((name, t)))[1].unique().numel())
            row: dict[str, Any] = {
                "shape": name,
                "tokens": t,
                "experts_hit": hit,
                "floor": floor_us(shape, t, hit, bandwidth, rate) if bandwidth and rate else None,
            }
            for p in providers:
                timing = answers[p, name].get(t)
                if timing is None:
                    row[f"{p}_skipped"] = "no answer"
                elif timing.us is None:
                    row[f"{p}_skipped"] = timing.skipped
                else:
                    row[p] = timing.us
                    row[f"{p}_error"] = timing.error
            rows.append(row)
    table = {
        "gpu": torch.cuda.get_device_name() if gpu else "cpu",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions(),
        "bandwidth": bandwidth,
        "matmul_rate": rate,
        "unit": "microseconds; " + ("CUDA-graph replay, L2 flushed, median of 20" if gpu else "wall clock"),
        "error": "norm of the difference from an fp32 product (bf16: of the original weights, else of the quantized "
        "ones) over its norm",
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.name or f"{table['gpu'].replace(' ', '_').lower()}-{table['date']}"
    (args.out / f"{file}.json").write_text(json.dumps(table, indent=1))
    try:
        panels = {s: [r for r in rows if r["shape"] == s] for s in shapes}
        plot(panels, providers, f"{table['gpu']}, {table['date']}", args.out / f"{file}.png")
    except ImportError:
        print("no plot: matplotlib is not installed")
    print(table["gpu"], table["versions"])
    if bandwidth and rate:
        print(f"{bandwidth / 1e12:.2f} TB/s {rate / 1e12:.0f} TFLOP/s")
    print("shape tokens hit floor " + " ".join(providers) + " best_other/ours")
    ratios = []
    for row in rows:
        cells = [f"{row[p]:.1f}" if p in row else "-" for p in providers]
        others = [row[p] for p in providers if p in row and not p.startswith("mxfp4")]
        ratio = min(others) / row["mxfp4"] if others and "mxfp4" in row else None
        ratios += [] if ratio is None else [ratio]
        last = "-" if ratio is None else f"{ratio:.2f}"
        print(row["shape"], row["tokens"], row["experts_hit"], f"{row['floor'] or 0:.1f}", *cells, last)
    if ratios:
        print(f"geometric mean of best other / ours: {torch.tensor(ratios).log().mean().exp():.3f}")
    errors = {p: max((row[f"{p}_error"] for row in rows if f"{p}_error" in row), default=None) for p in providers}
    print("largest relative error:", {p: f"{e:.1e}" for p, e in errors.items() if e is not None})
    skipped = {(p, reason) for row in rows for p in providers if (reason := row.get(f"{p}_skipped"))}
    for p, reason in sorted(skipped):
        print(f"skipped: {p}: {reason[:200]}")


if __name__ == "__main__":
    main()
