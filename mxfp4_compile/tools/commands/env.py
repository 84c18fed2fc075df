"""``mxfp4-compile env``: versions, devices, and what optional parts would need."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .output import print_json

if TYPE_CHECKING:
    from ..environment import BackendStatus, Environment
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    env = commands.add_parser("env", parents=[common], help="versions, devices, and what optional parts would need")
    env.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..environment import environment

    found = environment()
    if args.json:
        print_json(found.to_dict())
    else:
        print(text(found))
    return 0


def text(found: Environment) -> str:
    machine = found.hardware
    lines = ["Versions"]
    lines += [f"  {name:<18} {version or 'none'}{_note(name, version)}" for name, version in found.versions.items()]
    lines += ["", "Devices", f"  cpu     {machine.cpu}, {machine.cores} cores, {machine.torch_threads} torch threads"]
    lines += [
        f"  cuda:{i}  {gpu.name}, capability {gpu.capability}, {gpu.memory / 2**30:.0f} GiB"
        for i, gpu in enumerate(machine.gpus)
    ]
    others = [b.device for b in found.backends if b.device.startswith(("xpu", "mps"))]
    lines += [f"  {device:<6}  as torch has it" for device in dict.fromkeys(others)]
    if not machine.gpus and not others:
        lines.append("  no GPU that torch can use")
    lines += [f"  {note}" for note in found.notes]
    lines += ["", "Backends", *[f"  {_backend_line(status)}" for status in found.backends]]
    if found.tuned:
        lines += ["", "Tuned data", *[f"  {status.device:<7} {status.state}" for status in found.tuned]]
    lines += ["", "Optional parts"]
    if not found.optional:
        lines.append("  not known, as mxfp4_compile runs without being installed")
    for part in found.optional:
        missing = part.missing()
        state = f"missing {', '.join(missing)}: {part.install}" if missing else "installed"
        lines.append(f"  {part.extra:<8} {part.purpose}: {state}")
    return "\n".join(lines)


def _note(package: str, version: str | None) -> str:
    """What else is to be said of a version: which Triton the figures are from."""
    if package != "triton" or not version:
        return ""
    from ...ops.backends.triton.instruction import TIMED

    timed = version.split("+")[0] in TIMED
    return "" if timed else f"  (figures are from {', '.join(TIMED)}; this one was not timed)"


def _backend_line(status: BackendStatus) -> str:
    unmet = ", ".join(f"{r.name} ({r.reason})" for r in status.requirements if not r.met)
    state = f"no: {unmet}" if unmet else "available"
    return f"{status.name:<10} on {status.device:<7} {state}" + (f"; {status.install}" if status.install else "")
