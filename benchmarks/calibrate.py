"""How long calibration takes, phase by phase, and what memory: a published configuration with random weights.

    python benchmarks/calibrate.py --layers 4 --tokens 524288 --out DIR
    python benchmarks/calibrate.py --layers 4 --tokens 524288 --sequential --out DIR
    python benchmarks/calibrate.py --layers 2 --tokens 524288 --record-on host --out DIR
    python benchmarks/calibrate.py --model tiny --tokens 512 --window 64 --device cpu --out DIR    # to try this file

The model has ``--layers`` of its layers, and all that is timed of them; what the whole model would take is extrapolated
from that and marked so: each phase times the layers, forwards also times the passes over the text that it takes to
record the whole model. Text is token ids at random: time does not depend on them, but for how evenly experts are used.
``--record-on host``: as on a card that recorded inputs do not fit on. ``DIR/calibrate-*.json`` is written as it goes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from generate import build, config_of, synchronize

import mxfp4_compile
from mxfp4_compile.calibration import driver, recording, sites, solver
from mxfp4_compile.tools.environment import hardware, versions

# Phase -> where the function lies that is it. A phase within another is taken out of the outer one.
PHASES = {
    "forward and recording": (driver._Run, "_forward"),
    "losses on the text": (driver, "_judge"),
    "inputs to the device": (recording.Recorded, "joined"),
    "sums over inputs": (sites, "_hessians"),
    "factorization": (solver, "undoing"),
    "GPTQ": (solver, "gptq"),
    "coordinate descent": (solver, "descend"),
    "rest of solving": (sites, "_solved"),
    "output errors and codes": (sites, "_choose"),
}
ONCE = frozenset(("anything else",))


class Clock:
    """Seconds of each phase, without those of the phases inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.inner: list[float] = []

    def around(self, phase: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, timed to when the device is done."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            self.inner.append(0.0)
            try:
                return run(*args, **kwargs)
            finally:
                synchronize()
                taken = time.perf_counter() - started
                self.seconds[phase] += taken - self.inner.pop()
                if self.inner:
                    self.inner[-1] += taken

        return timed


@contextmanager
def timed_phases(clock: Clock) -> Iterator[None]:
    """Within the block each phase is timed, wherever it is called from."""
    before = [(place, name, getattr(place, name)) for place, name in PHASES.values()]
    try:
        for phase, (place, name) in PHASES.items():
            setattr(place, name, clock.around(phase, getattr(place, name)))
        yield
    finally:
        for place, name, run in before:
            setattr(place, name, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", help="qwen3-30b-a3b, gpt-oss-20b or tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--whole", type=int, default=48, help="layers of the whole model, extrapolated to")
    parser.add_argument("--tokens", type=int, default=524288)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--record-on", choices=("device", "host"), default="device")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = build(config_of(args.model, args.layers), args.device)
    layers = model.config.num_hidden_layers
    ids = torch.randint(0, model.config.vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(0))
    on_gpu = args.device.startswith("cuda")
    if on_gpu:  # the kernels compile outside of the clock; how long that takes is told apart
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {
        "model": args.model, "layers": layers, "tokens": args.tokens, "sequential": args.sequential,
        "record_on": args.record_on,
        "hardware": asdict(hardware()), "versions": versions(),
        "model_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    how = ("-sequential" if args.sequential else "") + ("-host" if args.record_on == "host" else "")
    file = args.out / f"calibrate-{args.model}-{layers}x{args.tokens}{how}.json"
    if args.record_on == "host":
        driver.free_device_memory = lambda _: 0.0

    started = time.perf_counter()
    warm(args.device)
    synchronize()
    result["first_use_seconds"] = time.perf_counter() - started
    save(result, file)

    clock = Clock()
    started = time.perf_counter()
    try:
        with timed_phases(clock):
            report = mxfp4_compile.calibrate(
                model, ids, tokens=args.tokens, window=args.window, sequential=args.sequential, progress=False
            )
    except BaseException as error:
        result["failed"] = f"{type(error).__name__}: {error}"
        result["phases"] = dict(clock.seconds)
        save(result, file)
        raise
    synchronize()
    total = time.perf_counter() - started
    clock.seconds["anything else"] = total - sum(clock.seconds.values())
    result["seconds"] = total
    result["phases"] = dict(clock.seconds)
    result["sites"] = [asdict(site) | {"by_name": None} for site in report.sites]
    result["notes"] = report.notes
    if on_gpu:
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["peak_gb_beside_the_model"] = result["peak_gb"] - result["model_gb"]
    passes, forwards = passes_of(model, args) if on_gpu else (1, 1.0)
    whole = {
        name: seconds * (1 if name in ONCE else args.whole / layers) * (forwards if name.startswith("forward") else 1)
        for name, seconds in clock.seconds.items()
    }
    result["extrapolated"] = {
        "layers": args.whole, "passes": passes, "forwards": forwards, "seconds": sum(whole.values()), "phases": whole,
        "assumes": "each layer takes the same time; `forwards`: through how many whole models the text runs",
    }  # fmt: skip
    save(result, file)
    print(f"{args.model}, {layers} of {args.whole} layers, {args.tokens} tokens, recorded on the {args.record_on}")
    print(f"  compiling kernels {result['first_use_seconds']:.1f} s, apart")
    for name, seconds in sorted(clock.seconds.items(), key=lambda pair: -pair[1]):
        print(f"  {name:26s} {seconds:8.2f} s   whole model, extrapolated {whole[name]:8.1f} s")
    print(f"  {'together':26s} {total:8.2f} s   whole model, extrapolated {sum(whole.values()):8.1f} s")
    if on_gpu:
        print(f"  peak {result['peak_gb']:.1f} GB, {result['peak_gb_beside_the_model']:.1f} GB beside the model")
    print(file)


def passes_of(model: Any, args: argparse.Namespace) -> tuple[int, float]:
    """Passes over the text that recording the whole model takes, and how many forwards through all of it they are,
    beside one pass of this one. Each pass ends at the last layer that it records.
    """
    layers = model.config.num_hidden_layers
    if args.sequential:  # after one through all of them a site's own forwards go through the layers before it
        return 1 + args.whole, (args.whole + 3) / (layers + 3)
    if args.record_on == "host":
        return 1, 1.0
    own = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".layers." in n) / layers
    rest = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".layers." not in n)
    room = torch.cuda.get_device_properties(0).total_memory - own * args.whole - rest - driver._SOLVING_BYTES
    each = args.tokens * model.config.hidden_size * 2
    some = int(room // each)
    if some < 1 or args.whole * each > room * driver._PASSES:
        return 1, 1.0  # on the host then: --record-on host times it
    ends = [min(end, args.whole) for end in range(some, args.whole + some, some)]
    return len(ends), sum(ends) / args.whole


def warm(device: str) -> None:
    """Have a small problem solved, so that kernels are compiled."""
    weight = torch.randn(2, 64, 192, device=device)
    x = torch.randn(2, 1024, 192, device=device)
    h = solver.shrunk(x.mT @ x, torch.full((2,), 1024))
    solver.solve(weight, h, torch.bfloat16)


def save(result: dict[str, Any], file: Path) -> None:
    """Write what is there so far."""
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
