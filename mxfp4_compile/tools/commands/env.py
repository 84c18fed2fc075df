"""``mxfp4-compile env``: versions, devices, and what optional parts would need."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...text import size
from .output import columns, print_json, whole

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
    versions = [(name, f"{version or 'none'}{_note(name, version)}") for name, version in found.versions.items()]
    devices = [("cpu", f"{machine.cpu}, {machine.cores} cores, {machine.torch_threads} torch threads")]
    devices += [
        (f"cuda:{i}", f"{gpu.name}, capability {gpu.capability}, {size(gpu.memory)}")
        for i, gpu in enumerate(machine.gpus)
    ]
    others = dict.fromkeys(b.device for b in found.backends if b.device.startswith(("xpu", "mps")))
    devices += [(device, "as torch has it") for device in others]
    lines = ["Versions", columns(versions), "", "Devices", columns(devices)]
    if not machine.gpus and not others:
        lines.append("  no GPU that torch can use")
    lines += [columns([("note:", note)]) for note in found.notes]
    lines += ["", "Backends", columns(map(_backend_row, found.backends))]
    if found.tuned:
        lines += ["", "Tuned data", columns([(status.device, status.state) for status in found.tuned])]
    lines += ["", "Optional parts"]
    if not found.optional:
        lines.append("  not known, as mxfp4_compile runs without being installed")
    parts = []
    for part in found.optional:
        missing = part.missing()
        state = f"missing {', '.join(missing)}: {whole(part.install)}" if missing else "installed"
        parts.append((part.extra, f"{part.purpose}: {state}"))
    return "\n".join([*lines, columns(parts)]).rstrip()


def _note(package: str, version: str | None) -> str:
    """What else is to be said of a version: which Triton the figures are from."""
    if package != "triton" or not version:
        return ""
    from ...ops.backends.triton.instruction import TIMED

    timed = version.split("+")[0] in TIMED
    return "" if timed else f"  (figures are from {', '.join(TIMED)}; this one was not timed)"


def _backend_row(status: BackendStatus) -> tuple[str, ...]:
    unmet = ", ".join(f"{r.name} ({r.reason})" for r in status.requirements if not r.met)
    state = ("no", unmet) if unmet else ("available", "")
    return status.name, status.device, state[0], state[1] + (f"; {whole(status.install)}" if status.install else "")
