"""``mxfp4-compile bench``: time MoE layers here beside compiled bf16 and other backends."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from . import layers as of_layers
from .output import print_json, progress_lines, table

if TYPE_CHECKING:
    from ..benchmark import Bench
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    layer = of_layers.arguments(trust)
    bench = commands.add_parser(
        "bench", parents=[common, layer], help="time one MoE layer here against compiled bf16 and other backends"
    )
    bench.add_argument("--providers", metavar="NAME,NAME", help="only these, of those that the table shows")
    bench.add_argument("--skew", type=_skew, default=0.0, metavar="S", help="routing by Zipf's law with exponent S")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="also draw the table to an image file")
    bench.set_defaults(run=run)


def _skew(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 <= value <= 10.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an exponent from 0 to 10")
    return value


def run(args: argparse.Namespace) -> int:
    from ..benchmark import TOKENS, TOKENS_CPU, Unavailable, device_of, flat_rows, plot, run_bench

    if args.plot is not None:
        import importlib.util

        if importlib.util.find_spec("matplotlib") is None:
            raise Unavailable('--plot needs matplotlib, which is not installed: pip install "mxfp4_compile[bench]"')
        if not args.plot.absolute().parent.is_dir():
            raise FileNotFoundError(f"--plot: there is no directory {args.plot.absolute().parent}")
    device = device_of(args.device)
    tokens = args.tokens or (TOKENS if device.type == "cuda" else TOKENS_CPU)
    names = args.providers.split(",") if args.providers else None
    what, shapes = of_layers.layers(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile, about what it meets inside transformers
        say = progress_lines(args)
        results = [run_bench(shape, tokens, device, names, args.skew, say) for shape in shapes]
    if args.plot is not None:
        panels = {str(result.shape): flat_rows(result) for result in results}
        plot(panels, results[0].providers, results[0].device, args.plot)
    if args.json:
        print_json({"model": what, "layers": [result.to_dict() for result in results]})
    else:
        print("\n\n".join(map(text, results)))
    return 0


def text(result: Bench) -> str:
    rows: list[tuple[str, ...]] = [("tokens", "experts hit", "floor", *result.providers)]
    for row in result.rows:
        times = {t.provider: "-" if t.us is None else f"{t.us:.1f}" for t in row.timings}
        floor = "-" if row.floor is None else f"{row.floor:.1f}"
        rows.append((str(row.tokens), str(row.experts_hit), floor, *[times[p] for p in result.providers]))
    head = f"One MoE layer, {result.shape}, on {result.device}, microseconds ({result.method})"
    lines = [head, table(rows)]
    if result.bandwidth is not None and result.matmul_rate is not None:
        speeds = f"{result.bandwidth / 1e12:.2f} TB/s and {result.matmul_rate / 1e12:.0f} TFLOP/s in bf16"
        lines.append(f"floor: what the experts' bytes or multiply-adds take at this GPU's {speeds}, as measured")
    errors = {
        t.provider: t.error for row in result.rows for t in row.timings if t.us is not None and t.error is not None
    }
    if errors:
        lines.append(
            "verified against an fp32 product; relative error " + ", ".join(f"{p} {e:.1e}" for p, e in errors.items())
        )
    return "\n".join([*lines, *[f"Note: {note}" for note in result.notes]])
