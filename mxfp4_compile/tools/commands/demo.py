"""``mxfp4-compile demo``: the small trained model that comes along, before and after."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING

from ..choices import DEMO_MAX_TOKENS, DEMO_TOKENS
from .output import print_json, progress_lines, table

if TYPE_CHECKING:
    from ..demo import DemoResult
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    demo = commands.add_parser(
        "demo", parents=[common], help="optimize a small trained model that comes along; works offline"
    )
    demo.add_argument("--tokens", type=_tokens, metavar="N", help="length of the generated texts, in bytes")
    demo.set_defaults(run=run)


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= DEMO_MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {DEMO_MAX_TOKENS}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from ..demo import run_demo

    result = run_demo(DEMO_TOKENS if args.tokens is None else args.tokens, progress=progress_lines(args))
    if args.json:
        print_json(result.to_dict())
    else:
        print(text(result))
    return 0


def text(result: DemoResult) -> str:
    report, speeds, machine = result.report, result.tokens_per_second, result.hardware
    rows = [("", "perplexity per byte", "change"), ("bf16", f"{result.perplexity['bf16']:.4f}", "")]
    for rule, value in result.perplexity.items():
        if rule != "bf16":
            default = " (default)" if rule == report.scale_rule else ""
            rows.append((f"MXFP4, {rule}{default}", f"{value:.4f}", f"{result.change(rule):+.2%}"))
    samples = [
        f"{name}, after {result.prompt.strip()!r}:\n{textwrap.indent(_printable(text), '  | ', lambda _: True)}"
        for name, text in result.samples.items()
    ]
    parts = [
        f"The model: {result.model}",
        f"What optimize() says:\n{textwrap.indent(str(report), '  ')}",
        f"Expert bytes: {report.bytes_before:,} -> {report.bytes_after:,} ({result.expert_bytes_ratio:.2f}x smaller)",
        f"Held-out text, {result.perplexity_bytes:,} bytes, by scale rule:\n{table(rows)}",
        *samples,
        f"Tokens per second: bf16 {speeds['bf16']:.1f}, MXFP4 {speeds['mxfp4']:.1f} ({result.speed_ratio:.2f}x), "
        f"on {machine.cpu}, {machine.cores} cores, {machine.torch_threads} torch threads",
        *[f"Note: {note}" for note in result.notes],
        f"Took {result.seconds:.0f} s.",
    ]
    return "\n\n".join(parts)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
