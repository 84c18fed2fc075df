"""Tuning of the native kernels for one layer's sizes on this GPU: the command ``mxfp4-compile tune``.

1. candidates.py: kernels and tiles worth trying for each number of tokens, the shipped rules' own first;
2. compile: in parallel processes, without tensors, into Triton's cache;
3. check and time: each candidate's layer against the reference on random data, buffers poisoned, then its
   time as up- and as down-projection beside the best so far of its kind;
4. settle: the best of both projections together against the shipped choice; it stays unless it is slower;
5. ranges: a result serves the token counts around it as far as it was measured to be no slower there.

Everything launches through ``moe``, so that what is tuned is what runs.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....timing import median_us
from ...arguments import MoETypes
from ...platforms import processors
from ...synthetic import Inputs, LayerShape, Prepared, call, moe_inputs, prepare, random_inputs, random_layer
from ...target import Target
from .. import reference
from . import tuned
from .ahead import Call, compile_call, instead_of_launching, shortly
from .backend import BACKEND
from .candidates import Candidate, candidates
from .moe import interpreted, moe
from .select import architecture, choose
from .tiles import TileChoice

DEFAULT_TOKENS = (1, 8, 64, 512, 4096)
DEFAULT_BUDGET = 300.0

# Of the time there is: compiling ends, and timing ends, leaving the rest to settle results and ranges.
_COMPILE_UNTIL, _TIME_UNTIL = 0.55, 0.8
# A gain below this is noise; nothing is changed for it.
_GAIN = 0.98
# At the ends of a range tuned kernels may not be slower than the shipped ones by more than noise.
_LEVEL = 1.01

# Relative error of a whole result against the reference in fp32: what rounding the tokens' dtype allows. One
# token may be off by three times as much, one element by ten times as much of its token's root mean square.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}

Candidates = Callable[[str, LayerShape, int], list[Candidate]]
Progress = Callable[[str, int, int], None]


class TuneError(RuntimeError):
    """Tuning could not go on; nothing was changed."""


@dataclass(frozen=True)
class Run:
    """One call of the layer with given kernels: what a timer is handed."""

    shape: LayerShape
    prepared: Prepared
    inputs: Inputs
    choice: TileChoice

    def __call__(self) -> Tensor:
        """[T, H]."""
        return moe(moe_inputs(self.shape, self.prepared, self.inputs), self.choice)


Timer = Callable[[Run], float]


def graph_timer(run: Run) -> float:
    """Microseconds of a layer: CUDA-graph replay, L2 flushed before each."""
    return median_us(run, 12 if run.inputs.x.shape[0] < 2048 else 6)


@dataclass(frozen=True)
class Point:
    """The result for ``tokens`` tokens, in microseconds; ``entry`` is None where the shipped kernels stay.

    ``note`` says why they stay, or what else there is to know.
    """

    tokens: int
    shipped: TileChoice
    shipped_us: float
    us: float
    entry: tuned.Entry | None
    note: str = ""


@dataclass(frozen=True)
class TuneResult:
    """What one tuning found; the counts are of candidates, a candidate being kernels, tiles and a token count.

    ``failures``: why some were skipped, and how many for each reason.
    """

    shape: LayerShape
    points: tuple[Point, ...]
    untouched: tuple[int, ...]
    considered: int
    timed: int
    failed: int
    wrong: int
    unreached: int
    failures: dict[str, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "shape": list(self.shape.sizes),
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "points": [
                {
                    "tokens": p.tokens,
                    "shipped_us": p.shipped_us,
                    "us": p.us,
                    "entry": None if p.entry is None else p.entry.to_dict(),
                    "note": p.note,
                }
                for p in self.points
            ],
            "untouched_tokens": list(self.untouched),
            "candidates": {
                "considered": self.considered,
                "timed": self.timed,
                "failed": self.failed,
                "wrong": self.wrong,
                "unreached": self.unreached,
            },
            "failures": self.failures,
            "seconds": self.seconds,
        }


# 2. compile


@dataclass(frozen=True)
class _Job:
    shape: LayerShape
    tokens: int
    choice: TileChoice
    layout: str


def _both(candidate: Candidate) -> TileChoice:
    regime, tiles = candidate
    return TileChoice(regime, tiles, regime, tiles)


def _start_worker(device: int) -> None:
    # Selecting a device may make a context on it, which costs memory: only where it is not the default one.
    if device:
        torch.cuda.set_device(device)
    instead_of_launching()


def _compile(job: _Job) -> tuple[_Job, str]:
    """Compile what a call would launch; the reason if that fails, else ""."""
    shape = job.shape
    bias = shape.dtype if shape.biased else None
    types = MoETypes(shape.params, shape.top_k, shape.dtype, torch.int64, shape.dtype, bias, bias, job.layout)
    return job, compile_call(Call(types, job.tokens, job.choice))


def _compile_all(
    jobs: Sequence[_Job], device: torch.device, processes: int, until: float, progress: Progress
) -> dict[_Job, str]:
    """Job -> the reason of its failure, or ""; jobs that were not done by ``until`` (monotonic) are left out."""
    done: dict[_Job, str] = {}
    jobs = list(dict.fromkeys(jobs))  # where both projections have the same tiles, the shipped choice is a candidate
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _start_worker, (device.index or 0,)) as pool:
        results = pool.imap_unordered(_compile, jobs)
        while len(done) < len(jobs):
            try:
                job, reason = results.next(timeout=max(until - time.monotonic(), 0.001))
            except multiprocessing.TimeoutError:
                break
            done[job] = reason
            progress("compiling", len(done), len(jobs))
        pool.terminate()
    return done


# 3. check and time


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory comes filled with NaN and the largest integers, so that what a kernel leaves out shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


def wrongness(got: Tensor, want: Tensor, dtype: torch.dtype) -> str:
    """Why ``got`` [T, H] is no result like ``want``, or ""."""
    if not bool(torch.isfinite(got).all()):
        return "results are not finite"
    # The interpreter cuts bf16 off where a GPU rounds to it.
    tolerance = _TOLERANCE[dtype] * (2 if interpreted() else 1)
    difference, wide = got.float() - want.float(), want.float()
    total = float(difference.norm() / wide.norm().clamp(min=1e-30))
    if total > tolerance:
        return f"relative error above {tolerance:g}"
    rms = wide.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    if float((difference.square().mean(1, keepdim=True).sqrt() / rms).max()) > 3 * tolerance:
        return f"a token's relative error above {3 * tolerance:g}"
    if float((difference.abs() / rms).max()) > 10 * tolerance:
        return f"an element off by more than {10 * tolerance:g} of its token's size"
    return ""


class _Bench:
    """One layer's random data on a device, the reference's results for it, and what was found about candidates."""

    def __init__(self, shape: LayerShape, device: torch.device, timer: Timer) -> None:
        self.shape, self.device, self.timer = shape, device, timer
        self.layer = random_layer(shape, device)
        self.prepared = prepare(self.layer, BACKEND, device)
        self._wanted = lru_cache(maxsize=4)(self._reference)

    def _reference(self, tokens: int) -> list[tuple[Inputs, Tensor]]:
        """Inputs under uniform and under skewed routing, the latter with ids that are no expert, and results."""
        shape, layer = self.shape, self.layer
        few = random_inputs(shape, tokens, self.device, max(shape.top_k, shape.num_experts // 8))
        few.ids[tokens // 2, 0] = shape.num_experts
        canonical = Prepared(layer.up, layer.down, layer.up_bias, layer.down_bias, "canonical")
        found = []
        for inputs in (random_inputs(shape, tokens, self.device), few):
            exact = Inputs(inputs.x.float(), inputs.ids, inputs.weights.float())
            want = call(reference.BACKEND, replace(shape, dtype=torch.float32), canonical, exact)
            found.append((inputs, want))
        return found

    def run(self, choice: TileChoice, tokens: int) -> Run:
        return Run(self.shape, self.prepared, self._wanted(tokens)[0][0], choice)

    def check(self, choice: TileChoice, tokens: int) -> str:
        """Why ``choice`` may not be used, or ""; raises what launching it raises."""
        for inputs, want in self._wanted(tokens):
            run = Run(self.shape, self.prepared, inputs, choice)
            with _poisoned():
                got = run()
                again = run()
            if reason := wrongness(got, want, self.shape.dtype):
                return reason
            if not torch.equal(got, again):
                return "results change from run to run"
        return ""

    def time(self, choice: TileChoice, tokens: int) -> float:
        return self.timer(self.run(choice, tokens))


@dataclass
class _Class:
    """The best of either projection among kernels that go together: sorted ones, or the others."""

    up: list[tuple[float, Candidate]] = field(default_factory=list)
    down: list[tuple[float, Candidate]] = field(default_factory=list)
    anchor: TileChoice | None = None

    def choices(self) -> list[TileChoice]:
        best = lambda found: [c for _, c in sorted(found, key=lambda f: f[0])[:2]]
        found = [TileChoice(*up, *down) for up, down in itertools.product(best(self.up), best(self.down))]
        early = [
            replace(c, up=c.up.with_size("PDL", 2), down=c.down.with_size("PDL", 2)) for c in found if c.up["PDL"] > 0
        ]
        return list(dict.fromkeys(found + early))


@dataclass
class _Tally:
    timed: int = 0
    failed: int = 0
    wrong: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def skip(self, reason: str, wrong: bool) -> None:
        self.failures[reason] += 1
        if wrong:
            self.wrong += 1
        else:
            self.failed += 1


def tune(
    shape: LayerShape,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    budget: float = DEFAULT_BUDGET,
    device: torch.device | None = None,
    *,
    timer: Timer = graph_timer,
    propose: Candidates = candidates,
    processes: int | None = None,
    progress: Progress = lambda *_: None,
) -> TuneResult:
    """Find kernels for a layer on ``device`` (default: the current GPU) in about ``budget`` seconds.

    Nothing is written (``save`` does). Raises TuneError if the shipped kernels themselves fail or give wrong
    results, or if a candidate leaves the GPU unusable.
    """
    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    counts = sorted(set(tokens))
    if not counts or counts[0] < 1:
        raise TuneError(f"token counts {list(tokens)}: at least one is needed, each at least 1")
    arch = architecture(device)
    work = {t: propose(arch, shape, t) for t in counts}
    shipped = {t: _shipped(arch, shape, t) for t in counts}
    considered = sum(map(len, work.values()))
    layout = BACKEND.plan(shape.request, Target.of(device))
    tally = _Tally()
    if not interpreted():
        jobs = [_Job(shape, t, shipped[t], layout) for t in counts]
        turns = itertools.zip_longest(*([_Job(shape, t, _both(c), layout) for c in work[t]] for t in counts))
        jobs += [job for turn in turns for job in turn if job is not None]
        workers = processes or max(min(processors() - 1, 16), 1)
        done = _compile_all(jobs, device, workers, start + budget * _COMPILE_UNTIL, progress)
        for t in counts:
            ready = []
            for candidate in work[t]:
                reason = done.get(_Job(shape, t, _both(candidate), layout))
                if reason:
                    tally.skip(reason, wrong=False)
                elif reason == "":
                    ready.append(candidate)
            work[t] = ready
    total, seen = sum(map(len, work.values())), 0
    bench = _Bench(shape, device, timer)
    points: list[Point] = []
    untouched: list[int] = []
    for number, t in enumerate(counts):
        now = time.monotonic()
        if points and now > start + budget * _TIME_UNTIL:
            untouched.append(t)
            continue
        # What is left, in equal parts.
        until = now + (start + budget * _TIME_UNTIL - now) / (len(counts) - number)
        base = _base(bench, shipped[t], t)
        classes = {True: _Class(), False: _Class()}
        classes[shipped[t].up_regime == "sorted"].anchor = shipped[t]
        for candidate in work[t]:
            if time.monotonic() > until:
                break
            seen += 1
            _try(bench, candidate, t, classes[candidate[0] == "sorted"], tally)
            progress("timing", seen, total)
        points.append(_settle(bench, t, shipped[t], base, classes, tally))
    measured = [p.tokens for p in points]
    points = [_widen(bench, p, measured, arch, start + budget) for p in points]
    unreached = considered - tally.timed - tally.failed - tally.wrong
    return TuneResult(
        shape, tuple(points), tuple(untouched), considered, tally.timed, tally.failed, tally.wrong,
        max(unreached, 0), dict(tally.failures), time.monotonic() - start,
    )  # fmt: skip


def _shipped(arch: str, shape: LayerShape, tokens: int) -> TileChoice:
    e, k, h, i = shape.sizes
    return choose(arch, e, k, h, i, tokens, shape.dtype == torch.bfloat16)


def _base(bench: _Bench, choice: TileChoice, tokens: int) -> float:
    try:
        reason = bench.check(choice, tokens)
        if not reason:
            return bench.time(choice, tokens)
    except Exception as error:
        reason = shortly(error)
    raise TuneError(f"the shipped kernels fail for {bench.shape} at {tokens} tokens: {reason}")


def _try(bench: _Bench, candidate: Candidate, tokens: int, group: _Class, tally: _Tally) -> None:
    """Check a candidate as both projections, then time it as each, the other being the group's anchor."""
    choice = _both(candidate)
    try:
        if reason := bench.check(choice, tokens):
            tally.skip(reason, wrong=True)
            return
        anchor = group.anchor = group.anchor or choice
        as_up = TileChoice(*candidate, anchor.down_regime, anchor.down)
        as_down = TileChoice(anchor.up_regime, anchor.up, *candidate)
        group.up.append((bench.time(as_up, tokens), candidate))
        group.down.append((bench.time(as_down, tokens), candidate))
        tally.timed += 1
    except Exception as error:
        _still_usable(bench.device, candidate, error)
        tally.skip(shortly(error), wrong=False)


def _still_usable(device: torch.device, candidate: Candidate, error: Exception) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as broken:
        raise TuneError(
            f"the GPU gives errors since {candidate[0]} {candidate[1]} ran ({shortly(error)}); nothing was changed"
        ) from broken


# 4. settle


def _settle(
    bench: _Bench, tokens: int, shipped: TileChoice, shipped_us: float, classes: dict[bool, _Class], tally: _Tally
) -> Point:
    """The best pair of projections, if it is right and faster than the shipped one in a comparison of its own."""
    keep = lambda us, note: Point(tokens, shipped, us, us, None, note)
    choices = [c for group in classes.values() for c in group.choices() if c != shipped]
    if not choices:
        return keep(shipped_us, "no candidate was timed")
    timed = sorted(((bench.time(c, tokens), c) for c in choices), key=lambda f: f[0])
    note = "the shipped kernels are the fastest"
    for _, choice in timed[:3]:
        # Turn by turn, so that a clock that drifts meets both.
        rounds = [(bench.time(shipped, tokens), bench.time(choice, tokens)) for _ in range(3)]
        shipped_us, us = (sorted(r[i] for r in rounds)[1] for i in (0, 1))
        if us > shipped_us * _GAIN:
            continue
        try:
            reason = bench.check(choice, tokens) or _other_forms(bench, choice, tokens)
        except Exception as error:
            reason = shortly(error)
        if reason:
            tally.failures[f"a winner, at last: {reason}"] += 1
            note = f"the fastest failed a last check: {reason}"
            continue
        entry = tuned.Entry(
            bench.shape.sizes, str(bench.shape.dtype).removeprefix("torch."), tokens, tokens, choice, tokens,
            us, shipped_us,
        )  # fmt: skip
        return Point(tokens, shipped, shipped_us, us, entry)
    return keep(shipped_us, note)


def _other_forms(bench: _Bench, choice: TileChoice, tokens: int) -> str:
    """Whether it also runs with biases, int32 ids and fp32 weights: an entry serves those layers as well."""
    p, inputs = bench.prepared, bench.run(choice, tokens).inputs
    new = lambda weight: torch.zeros(
        (bench.shape.num_experts, weight[0].shape[1] * 16), dtype=bench.shape.dtype, device=bench.device
    )
    zero = Prepared(p.up, p.down, p.up_bias if p.up_bias is not None else new(p.up),
                    p.down_bias if p.down_bias is not None else new(p.down), p.layout)  # fmt: skip
    other = Inputs(inputs.x, inputs.ids.int(), inputs.weights.float())
    with _poisoned():
        got = Run(bench.shape, zero, other, choice)()
    return wrongness(got, bench._wanted(tokens)[0][1], bench.shape.dtype)


# 5. ranges


def _widen(bench: _Bench, point: Point, measured: list[int], arch: str, until: float) -> Point:
    """Let an entry serve up to half-way to the neighbouring token counts where it is measured to do no harm."""
    if point.entry is None:
        return point
    at = measured.index(point.tokens)
    ends = [point.tokens, point.tokens]
    if at > 0:
        ends[0] = math.isqrt(measured[at - 1] * point.tokens) + 1
    if at + 1 < len(measured):
        ends[1] = math.isqrt(point.tokens * measured[at + 1])
    choice = point.entry.choice
    for side, end in enumerate(ends):
        if end != point.tokens and (time.monotonic() > until or not _no_worse(bench, choice, end, arch)):
            ends[side] = point.tokens
    return Point(
        point.tokens, point.shipped, point.shipped_us, point.us,
        tuned.Entry(
            point.entry.shape, point.entry.dtype, ends[0], ends[1], choice, point.tokens, point.us, point.shipped_us
        ),
        point.note,
    )  # fmt: skip


def _no_worse(bench: _Bench, choice: TileChoice, tokens: int, arch: str) -> bool:
    shipped = _shipped(arch, bench.shape, tokens)
    if shipped == choice:
        return True
    if "scan" in (choice.up_regime, choice.down_regime) and tokens * bench.shape.top_k > 512:
        return False  # every program of a scan holds all pairs
    try:
        if bench.check(choice, tokens):
            return False
        rounds = [(bench.time(choice, tokens), bench.time(shipped, tokens)) for _ in range(3)]
        ours, theirs = (sorted(r[i] for r in rounds)[1] for i in (0, 1))
    except Exception as error:
        _still_usable(bench.device, (choice.up_regime, choice.up), error)
        return False
    return ours <= theirs * _LEVEL


def save(results: Sequence[TuneResult], device: torch.device) -> tuple[tuned.Entry, ...]:
    """Put results into the file of ``device``, in place of what it held for the same sizes and token counts.

    Returns all its entries. Raises TunedDataError if there is a file that is not this GPU's tuned data, and
    TuneError if tuned data are switched off.
    """
    from .select import forget_tuned

    host = tuned.host_of(device)
    path = writable_path(device)
    entries: Sequence[tuned.Entry] = tuned.read(path, host)
    for result in results:
        if not result.points:
            continue
        span = range(result.points[0].tokens, result.points[-1].tokens + 1)
        new = [p.entry for p in result.points if p.entry is not None]
        dtype = str(result.shape.dtype).removeprefix("torch.")
        entries = tuned.merge(entries, new, result.shape.sizes, dtype, span)
    tuned.write(path, host, entries)
    forget_tuned()
    return tuple(entries)


def writable_path(device: torch.device) -> Any:
    """The file that ``save`` will write; raises what ``save`` would, before hours of tuning."""
    host = tuned.host_of(device)
    path = tuned.path_for(host)
    if path is None:
        raise TuneError(f"{tuned.ENVIRONMENT_VARIABLE} switches tuned data off: unset it, or give it a path")
    try:
        tuned.read(path, host)
    except tuned.TunedDataError as error:
        raise tuned.TunedDataError(f"{path} would be overwritten, but {error}: move it away first") from error
    return path
