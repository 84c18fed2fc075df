"""``mxfp4-compile tune``: find faster tiles for a model's layers on this GPU, and keep them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import layers as of_layers
from .output import print_json, progress_lines, table, told

if TYPE_CHECKING:
    import torch

    from ...ops.backends.triton.tune import Progress, TuneResult
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    layer = of_layers.arguments(trust)
    tune = commands.add_parser(
        "tune", parents=[common, layer], help="find the best kernels for MoE layers on this GPU, and keep them"
    )
    tune.add_argument("--budget", type=_seconds, metavar="SECONDS", help="time to take, about; default 300 a layer")
    tune.set_defaults(run=run)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def run(args: argparse.Namespace) -> int:
    from ...ops.backends.triton import BACKEND
    from ..benchmark import Unavailable, device_of

    try:
        device = device_of(args.device)
    except Unavailable:  # its text offers the CPU, on which there is nothing to tune
        raise Unavailable("tune needs a GPU, and there is none that torch can use") from None
    if device.type != "cuda":
        raise Unavailable(f"tune needs a GPU: the native kernels do not run on {device}")
    what, shapes = of_layers.layers(args)
    from ...ops.target import Target

    target = Target.of(device)
    unmet = [str(r) for s in shapes for r in BACKEND.supports(s.request, target) if not r.met]
    if unmet:
        raise Unavailable(f"the native kernels cannot run here: {', '.join(dict.fromkeys(unmet))}")
    import torch

    from ...ops.backends.triton import tune as tuning

    path = tuning.writable_path(device)
    results = []
    with torch.cuda.device(device), torch.no_grad():
        for shape in shapes:
            with _bar(args, str(shape)) as progress:
                budget = args.budget or tuning.DEFAULT_BUDGET
                tokens = args.tokens or tuning.DEFAULT_TOKENS
                results.append(tuning.tune(shape, tokens, budget, device, progress=progress))
            # Layer by layer: what was found stays if a later one fails, or is interrupted.
            tuning.save(results[-1:], device)
    if args.json:
        print_json({"layers_of": what, "device": _gpu_name(device), "file": str(path),
                     "layers": [result.to_dict() for result in results]})  # fmt: skip
    else:
        parts = [text(what, _gpu_name(device), result) for result in results]
        print("\n\n".join([*parts, f"Kept in {path}; used from now on by every process that runs on this GPU."]))
    return 0


def _gpu_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device)


@contextmanager
def _bar(args: argparse.Namespace, title: str) -> Iterator[Progress]:
    """A progress bar on a terminal, by tqdm where that is installed; a line for each phase elsewhere."""
    if not told(args):
        yield lambda phase, done, total: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        said: list[str] = []

        def line(phase: str, done: int, total: int) -> None:
            if said[-1:] != [phase]:
                said.append(phase)
                progress_lines(args)(f"{phase} {title}, {total} candidates")

        yield line
        return
    with tqdm(disable=None, leave=False, unit="candidate") as bar:

        def progress(phase: str, done: int, total: int) -> None:
            bar.set_description(f"{phase} {title}", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def text(what: str, gpu: str, result: TuneResult) -> str:
    rows = [("tokens", "shipped", "tuned", "gain", "serves tokens")]
    notes = []
    for point in result.points:
        entry = point.entry
        gain = f"{point.shipped_us / point.us:.2f}x" if entry else "-"
        tuned = f"{point.us:.1f}" if entry else "kept"
        span = "-" if entry is None else f"{entry.min_tokens}-{entry.max_tokens}"
        rows.append((str(point.tokens), f"{point.shipped_us:.1f}", tuned, gain, span))
        notes += [f"{point.tokens} tokens: {point.note}"] if point.note else []
    notes += [f"{t} tokens: not reached in the time; give a longer --budget" for t in result.untouched]
    counts = (
        f"{result.considered} candidates: {result.timed} right and timed, {result.wrong} wrong, "
        f"{result.failed} failed to compile or launch, {result.unreached} not reached; {result.seconds:.0f} s"
    )
    failures = sorted(result.failures.items(), key=lambda f: -f[1])
    lines = [f"{result.shape} ({what}) on {gpu}, microseconds of a layer", table(rows), *notes, counts]
    lines += [f"  {count} skipped: {reason}" for reason, count in failures[:5]]
    if len(failures) > 5:
        lines.append(f"  and {len(failures) - 5} more reasons (--json has them all)")
    return "\n".join(lines)
