"""Times tile sizes of the native kernels, each kernel by itself: the data behind configs/*.json.

    python benchmarks/sweep.py --out sweep.json [--shape qwen3 --tokens 8 --regime scan ...]

Compiles in parallel processes first, then times in one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from mxfp4_compile.ops.triton.moe import _Plan, pairs_class
from mxfp4_compile.ops.triton.select import Choice, Tiles
from mxfp4_compile.spec import Activation, MoEParams
from mxfp4_compile.timing import median_us

SHAPES = {
    "qwen3": (128, 8, 2048, 768),
    "gpt_oss": (32, 4, 2880, 2880),
    "mixtral": (8, 2, 4096, 14336),
}


def params_of(shape: str) -> MoEParams:
    e, _, h, i = SHAPES[shape]
    return MoEParams(e, h, i, Activation("silu"), "halves", 0, False, torch.bfloat16, torch.bfloat16)


def candidates(regime: str, tokens: int) -> list[Tiles]:
    """Tiles worth trying; both projections share the list."""
    out = []
    if regime == "vector":
        for rows, block, warps in itertools.product((8, 4, 2), (8, 16, 32, 64), (2, 4, 8)):
            if 16 <= rows * block * 16 / (warps * 32) <= 64:
                out.append(Tiles(warps, 1, (("ROWS", rows), ("BLOCK", block))))
        return out
    if tokens <= 128:
        tiles = itertools.product(
            ((64, 2), (64, 4), (128, 4), (256, 4), (256, 8)), (8, 16), (3, 5), (0, 1), (1, 2), (0,)
        )
    elif tokens <= 1024:
        tiles = itertools.product(
            ((128, 4), (128, 8), (256, 8)), (16, 32, 64, 128), (4,), (0,), (1, 2), (0, 16, 32)
        )
    else:
        tiles = itertools.product(
            ((128, 4), (128, 8), (256, 8)), (64, 128, 256), (3, 4, 5, 6), (0,), (1, 2), (0, 32, 64)
        )
    for (bm, warps), bt, stages, quads, unroll, tail in tiles:
        # mma.sync where wgmma does not apply, and only there.
        if quads != (bt < 16 or warps < 4) or tail * 2 > bt or bm * bt // (warps * 32) > 128:
            continue
        if unroll * stages * (bm * 34 + bt * 128) > 225 << 10 or unroll * stages > 8:
            continue
        sizes = [("BM", bm), ("BT", bt), ("QUADS", quads), ("UNROLL", unroll), ("WAIT", 1 - quads)]
        if regime == "sorted":
            sizes += [("GROUP", 8), ("TAIL", tail)]
        elif tail:
            continue
        out.append(Tiles(warps, stages, tuple(sizes)))
    return out


class Bench:
    """Random prepared weights and buffers of one shape and number of tokens."""

    def __init__(self, shape: str, tokens: int) -> None:
        from mxfp4_compile.ops.triton import layout as layouts

        torch.manual_seed(0)
        self.e, self.top_k, self.hidden, self.inner = SHAPES[shape]
        self.params = params_of(shape)
        self.tokens, self.pairs = tokens, tokens * self.top_k
        dev = "cuda"
        self.w = {}
        for role, gated in (("up", True), ("down", False)):
            e, n, k = self.params.shape(role)  # type: ignore[arg-type]
            s, t = layouts.slabs(n, gated), layouts.steps(k)
            codes = torch.randint(0, 256, (e, s, t, 512), dtype=torch.uint8, device=dev).view(torch.int32)
            scales = torch.randint(212, 216, (e, s, t, 32), dtype=torch.uint8, device=dev).view(torch.int32)
            self.w[role] = (codes, scales)
        self.x = torch.randn(tokens, self.hidden, device=dev, dtype=torch.bfloat16)
        self.ids = torch.rand(tokens, self.e, device=dev).topk(self.top_k, -1).indices
        self.weights = torch.softmax(torch.randn(tokens, self.top_k, device=dev), -1)
        self.h = torch.randn(self.pairs, self.inner, device=dev, dtype=torch.bfloat16)
        self.y = torch.empty(self.pairs, self.hidden, device=dev, dtype=torch.bfloat16)
        self.out = torch.empty(tokens, self.hidden, device=dev, dtype=torch.bfloat16)
        flat = self.ids.flatten()
        self.order = flat.argsort(stable=True).to(torch.int32)
        self.offsets = flat.bincount(minlength=self.e).cumsum(0).to(torch.int32)

    def plan(self, regime: str, tiles: Tiles) -> _Plan:
        choice = Choice(regime, tiles, regime, tiles)  # type: ignore[arg-type]
        return _Plan(
            self.params, self.top_k, self.hidden, False, True, choice, pairs_class(choice, self.pairs)
        )

    def call(self, regime: str, part: str, tiles: Tiles) -> tuple[Any, tuple[int, int, int], tuple[Any, ...]]:
        """The step, grid and arguments of one kernel."""
        plan = self.plan(regime, tiles)
        codes, scales = self.w["down" if part == "down" else "up"]
        if regime == "vector":
            if part == "up":
                return (
                    plan.up,
                    (plan.up_tiles, self.pairs, 1),
                    (self.x, codes, scales, None, self.ids, None, self.h),
                )
            return (
                plan.down,
                (plan.down_tiles, self.tokens, 1),
                (self.h, codes, scales, None, self.ids, self.weights, self.out),
            )
        if part == "route":
            return (
                plan.route,
                (self.e, 1, 1),
                (self.ids, self.offsets.clone(), self.order.clone(), self.pairs),
            )
        if part == "combine":
            return (
                plan.combine,
                (self.tokens, plan.combine_tiles, 1),
                (self.y, self.ids, self.weights, self.out),
            )
        x, out = (self.x, self.h) if part == "up" else (self.h, self.y)
        step, n = (plan.up, plan.up_tiles) if part == "up" else (plan.down, plan.down_tiles)
        if regime == "scan":
            programs = self.e if plan.by_expert else self.pairs
            return step, (n, programs, 1), (x, codes, scales, None, self.ids, None, out, self.pairs)
        slots = self.pairs // tiles["BT"] + self.e
        return step, (n * slots, 1, 1), (x, codes, scales, None, self.offsets, self.order, None, out)


_bench: dict[tuple[str, int], Bench] = {}


def bench_of(shape: str, tokens: int) -> Bench:
    if (shape, tokens) not in _bench:
        _bench.clear()
        torch.cuda.empty_cache()
        _bench[shape, tokens] = Bench(shape, tokens)
    return _bench[shape, tokens]


def compile_job(job: tuple[str, int, str, str, Tiles]) -> None:
    shape, tokens, regime, part, tiles = job
    try:
        step, _, args = bench_of(shape, tokens).call(regime, part, tiles)
        step.kernel.warmup(*args, **step.constants, **step.options, grid=(1, 1, 1))
    except Exception:
        pass  # the timing process meets the same failure and reports it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--points", default="", help="shape:tokens:regime,... (default: the standard list)")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=300.0, help="stop timing after this long")
    args = parser.parse_args()
    points = [tuple(p.split(":")) for p in args.points.split(",") if p] or [
        (s, t, r)
        for s in SHAPES
        for t, r in (
            ("1", "vector"),
            ("1", "scan"),
            ("2", "vector"),
            ("2", "scan"),
            ("4", "vector"),
            ("4", "scan"),
            ("8", "scan"),
            ("8", "sorted"),
            ("64", "sorted"),
            ("512", "sorted"),
            ("4096", "sorted"),
        )
    ]
    jobs = []
    for shape, tokens, regime in points:
        tiles = candidates(regime, int(tokens))
        for t, part in itertools.product(tiles, ("up", "down")):
            jobs.append((shape, int(tokens), regime, part, t))
        if regime == "sorted":
            jobs += [(shape, int(tokens), regime, part, tiles[0]) for part in ("route", "combine")]
    start = time.time()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.map(compile_job, jobs, chunksize=max(len(jobs) // (args.processes * 4), 1))
    print(f"{len(jobs)} kernels compiled in {time.time() - start:.0f} s", flush=True)
    results = []
    best: dict[tuple[str, int, str, str], tuple[float, str]] = {}
    start = time.time()
    for job in jobs:
        shape, tokens, regime, part, t = job
        if time.time() - start > args.seconds:
            print("out of time", flush=True)
            break
        name = f"{dict(t.sizes)} w{t.warps} s{t.stages} r{t.registers}"
        try:
            step, grid, call_args = bench_of(shape, tokens).call(regime, part, t)
            us = median_us(partial(step, grid, *call_args), 12 if tokens < 4096 else 6)
            info = next(iter(step._compiled.values()))
            row = {"registers": info.n_regs, "spills": info.n_spills, "shared": info.metadata.shared}
        except Exception:
            us, row = float("inf"), {"error": traceback.format_exc()[-300:]}
        results.append(
            {"shape": shape, "tokens": tokens, "regime": regime, "part": part, "tiles": name, "us": us, **row}
        )
        key = (shape, tokens, regime, part)
        if key not in best or us < best[key][0]:
            best[key] = (us, name)
    Path(args.out).write_text(json.dumps(results))
    for key, (us, name) in best.items():
        rows = sorted(r["us"] for r in results if (r["shape"], r["tokens"], r["regime"], r["part"]) == key)
        print(
            *key,
            f"{us:.1f}",
            name,
            "next",
            [round(u, 1) for u in rows[1:4]],
            "median",
            round(rows[len(rows) // 2], 1),
        )
    failed = [r for r in results if "error" in r]
    print(len(failed), "failed", {r["error"].strip().splitlines()[-1][:120] for r in failed})
    print(f"timed in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
