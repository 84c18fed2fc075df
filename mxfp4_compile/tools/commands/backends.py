"""``mxfp4-compile backends``: which backends could serve a model's experts, and why not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...text import printable
from .models import load, tiny
from .output import columns, print_json, whole

if TYPE_CHECKING:
    from ..matrix import Matrix
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    backends = commands.add_parser(
        "backends",
        parents=[common, trust],
        help="which backends could serve a model's experts, here or on an architecture by name, and why not",
    )
    backends.add_argument("--arch", metavar="NAME", help="an architecture by name, such as sm_90")
    of = backends.add_mutually_exclusive_group()
    of.add_argument("model", nargs="?", metavar="MODEL", help="a directory or a hub id; without: availability alone")
    of.add_argument("--family", metavar="NAME", help="a tiny random instance of a transformers family instead")
    backends.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...ops.target import Target
    from ..matrix import here, matrix

    target = Target(args.arch) if args.arch else here()
    model, inputs = None, None
    if args.family:
        model, inputs = tiny(args.family)
    elif args.model:
        model = load(args)
    found = matrix(target, model, inputs)
    if args.json:
        print_json(found.to_dict())
    else:
        print(printable(text(found)))
    return 0


def text(found: Matrix) -> str:
    basis = "from measurements" if found.measured else "not measured"
    borrowed = "" if found.target.endswith((found.order_of, f"({found.order_of})")) else f", as on {found.order_of}"
    lines = [
        f"Backends on {found.target}",
        f"  auto tries: {', '.join(found.order)}{borrowed}",
        f"  this order is {basis}: {found.source}",
    ]
    for name, why in found.failed.items():
        lines.append(f"  could not be loaded: {name} ({why})")
    for row in found.rows:
        names = row.names[0] if len(row.names) == 1 else f"{row.names[0]} ... {row.names[-1]} ({len(row.names)} sites)"
        lines += ["", f"{names}: {row.form}"]
        cells = []
        for cell in row.cells:
            mark = "chosen" if cell.backend == row.chosen else "usable" if cell.usable else "no"
            why = ", ".join(map(str, cell.unmet))
            install = "; ".join(dict.fromkeys(whole(r.install) for r in cell.unmet if r.install))
            cells.append((cell.backend, mark, why + (f"; {install}" if install else "")))
        lines.append(columns(cells))
        lines.append(f"  -> {row.chosen} (layout {row.layout})" if row.chosen else "  -> none")
        lines += [columns([("note:", note)]) for note in row.notes]
    return "\n".join(line.rstrip() for line in lines)
