"""``mxfp4-compile optimize``: convert a checkpoint file by file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...text import printable, size
from ..choices import CALIBRATION_TOKENS, CALIBRATION_WINDOW, DEFAULT_SCALE_RULE, FORMATS, SCALE_RULES
from .models import directory
from .output import byte_progress, print_json

if TYPE_CHECKING:
    from ...checkpoint.convert import Converted
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    optimize = commands.add_parser(
        "optimize",
        parents=[common, trust],
        help="convert a checkpoint to MXFP4 experts, file by file; the same command resumes an interrupted one",
    )
    optimize.add_argument("model", metavar="MODEL", help="a directory or a hub id (bf16, fp16, fp32, or MXFP4)")
    optimize.add_argument("--out", required=True, metavar="DIR", help="made as DIR.partial, and there when complete")
    optimize.add_argument(
        "--format",
        default=FORMATS[0],
        choices=FORMATS,
        help="auto (the default): compressed_tensors, which every reader reads; what it cannot express, as gpt_oss or, "
        "for import mxfp4_compile only, mxfp4_compile",
    )
    optimize.add_argument("--scale-rule", default=DEFAULT_SCALE_RULE, choices=SCALE_RULES, help="default: %(default)s")
    optimize.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="modules to leave alone")
    optimize.add_argument("--no-strict", action="store_true", help="leave what has no match as it is")
    text = optimize.add_mutually_exclusive_group()
    text.add_argument(
        "--calibrate", action="append", metavar="FILE", help="choose codes by what the experts compute on this text"
    )
    text.add_argument("--calibrate-self", action="store_true", help="the same, on text that the model writes itself")
    optimize.add_argument(
        "--calibration-tokens", type=int, default=CALIBRATION_TOKENS, metavar="N", help="default: %(default)s"
    )
    optimize.add_argument(
        "--calibration-window", type=int, default=CALIBRATION_WINDOW, metavar="N", help="default: %(default)s"
    )
    optimize.add_argument("--seed", type=int, default=0, metavar="N", help="of what calibration draws; default: 0")
    optimize.add_argument(
        "--sequential", action="store_true", help="calibrate layer after layer; holds the unquantized model in memory"
    )
    optimize.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s")
    optimize.add_argument(
        "--overwrite",
        action="store_true",
        help="write into a DIR that is neither empty nor an MXFP4 checkpoint; files of other names stay there",
    )
    optimize.set_defaults(run=run, interrupted="the same command goes on with the files that are finished")


def run(args: argparse.Namespace) -> int:
    if args.sequential and not (args.calibrate or args.calibrate_self):
        raise ValueError("--sequential says how to calibrate: it needs --calibrate FILE or --calibrate-self")
    source = directory(args.model)
    from ...checkpoint.convert import convert
    from ...checkpoint.writing import parse_size
    from ..demo import quiet

    limit = parse_size(args.max_shard_size)
    calibration = None
    if args.calibrate or args.calibrate_self:
        from ...calibration.driver import Options

        files = [Path(file) for file in args.calibrate] if args.calibrate else None
        calibration = Options(files, args.calibration_tokens, args.calibration_window, args.seed, args.sequential)
    with quiet(), byte_progress(args) as progress:
        done = convert(
            source,
            args.out,
            format=args.format,
            scale_rule=args.scale_rule,
            skip=args.skip,
            strict=not args.no_strict,
            max_shard_bytes=limit,
            trust_remote_code=args.trust_remote_code,
            overwrite=args.overwrite,
            progress=progress,
            calibration=calibration,
        )
    if args.json:
        print_json(done.to_dict())
    else:
        print(printable(text(done)))
    return 0


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def text(done: Converted) -> str:
    resumed = f", {done.resumed} of them from before" if done.resumed else ""
    head = (
        f"{done.directory}: {size(done.bytes_before)} -> {size(done.bytes_after)} in {_files(done.files)}"
        f"{resumed}, in the form {done.format}, {done.seconds:.0f} s"
    )
    left = [f"- {site.names[0]}: {site.outcome}, stays as it was: {site.reason}" for site in done.report.sites]
    notes = [*done.report.notes, *[f"{name} was there and was replaced" for name in done.replaced]]
    calibration = [] if done.report.calibration is None else done.report.calibration.lines()
    return "\n".join([head, *calibration, *left, *[f"note: {note}" for note in notes]])
