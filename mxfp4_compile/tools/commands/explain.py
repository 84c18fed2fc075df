"""``mxfp4-compile explain``: what each MoE module of a model is and would become."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ...text import printable
from .models import load, tiny
from .output import PROGRAM, columns, print_json

if TYPE_CHECKING:
    from ..explain import Explanation, SiteExplanation
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    explain = commands.add_parser(
        "explain",
        parents=[common, trust],
        help="show what each MoE module of a model is and would become; changes nothing",
    )
    which = explain.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", metavar="MODEL", help="a directory or a hub id; its weights are loaded")
    which.add_argument("--family", metavar="NAME", help="a tiny random instance of a transformers family instead")
    explain.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page; quantizes one module of each kind to measure it"
    )
    explain.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    model, inputs = tiny(args.family) if args.family else (load(args), None)
    what = f"a tiny random {args.family}" if args.family else args.model
    from ..explain import explain_model

    explanation = explain_model(model, f"{type(model).__name__} ({what})", inputs, measure=args.html is not None)
    if args.html:
        from ..explain_html import page

        args.html.write_text(page(explanation), encoding="utf-8")
        print(f"{PROGRAM}: wrote {args.html}", file=sys.stderr)
    if args.json:
        print_json(explanation.to_dict())
    else:
        print(printable(text(explanation)))
    return 0


def text(explanation: Explanation) -> str:
    count = sum(len(site.names) for site in explanation.sites)
    head = f"{explanation.model}: {count} MoE modules, {len(explanation.sites)} distinct; nothing was changed"
    return "\n\n".join([head, *map(_site_text, explanation.sites)])


def _site_text(site: SiteExplanation) -> str:
    names = textwrap.fill(", ".join(site.names), 118, subsequent_indent="    ", break_on_hyphens=False)
    head = f"{names}\n  [{site.module_class}] {site.outcome}"
    if not site.spec:
        return f"{head}: {site.reason}"
    lines = [
        f"{head}: {site.spec}",
        f"  called as {site.call}",
        *[f"  - {line}" for line in site.words],
        "  weights",
        *[f"    {weight}" for weight in site.weights],
        f"  backend on {site.device}: {site.backend} (layout {site.layout})",
        columns([(f"not {name}", reason) for name, reason in site.others], "    "),
    ]
    for slot, code in site.prep:
        lines += [f"  prep program of {slot}", textwrap.indent(code, "    ")]
    return "\n".join([*lines, "  rewritten graph", textwrap.indent(site.rewritten, "    ")])
