"""``mxfp4-compile compare``: what MXFP4 does to a model on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...text import printable
from ..choices import DEFAULT_SCALE_RULE, SCALE_RULES
from .models import directory
from .output import print_json

if TYPE_CHECKING:
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    compare = commands.add_parser(
        "compare",
        parents=[common, trust],
        help="what MXFP4 does to a model on a text: perplexity, divergence, error by site",
    )
    compare.add_argument("model", metavar="MODEL", help="a directory or a hub id, unquantized")
    compare.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to measure on")
    compare.add_argument("--against", metavar="DIR", help="an MXFP4 checkpoint; default: MODEL is quantized in memory")
    compare.add_argument("--scale-rule", default=DEFAULT_SCALE_RULE, choices=SCALE_RULES, help="default: %(default)s")
    compare.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the text; default: %(default)s")
    compare.add_argument("--window", type=int, default=512, metavar="N", help="context; default: %(default)s")
    compare.add_argument(
        "--bound", type=float, metavar="KL", help="suggest a skip list for this mean divergence, in nats"
    )
    compare.add_argument("--plot", metavar="FILE", help="write a picture (needs matplotlib)")
    compare.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    model, against = directory(args.model), None if args.against is None else directory(args.against)
    from ..compare import compare, plot
    from ..demo import quiet

    if args.plot:
        try:
            import matplotlib  # noqa: F401  (before the work, not after it)
        except ImportError as error:
            raise ValueError('--plot needs matplotlib: pip install "mxfp4_compile[bench]"') from error
    with quiet():
        result = compare(
            model,
            Path(args.text),
            against=against,
            scale_rule=args.scale_rule,
            tokens=args.tokens,
            window=args.window,
            bound=args.bound,
            trust_remote_code=args.trust_remote_code,
        )
    if args.plot:
        plot(result, Path(args.plot))
    if args.json:
        print_json(result.to_dict())
    else:
        print(printable(str(result)))
    return 0
