"""What a user should know of a machine where the native kernels do not run, or never were: one sentence each.

Selection puts these into a report's notes, ``env`` prints them. Nothing in here touches a device.
"""

from __future__ import annotations

import os
import platform

from .target import Target

PLAIN = ("cpu", "reference")
_SLOW = "the experts are computed in plain torch, which is right and slow"
# Where no kernel of any backend runs: the name people use, by architecture.
_WITHOUT_KERNELS = {"xpu": "Intel GPUs (xpu)", "mps": "Apple GPUs (mps)"}

# By ``platform.system()``. Linux is what this project runs on.
SYSTEMS = {
    "Windows": "Windows: nothing was run there; torch brings no Triton, so that experts are computed in plain torch; "
    "directories cannot be synced to disk, so that a crash of the machine may undo the last step of a save.",
    "Darwin": "macOS: nothing was run there; no kernel runs on Apple GPUs: optimize on the CPU, to check results.",
}


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def note_of_choice(backend: str, target: Target, reasons: str = "") -> str:
    """What is to be said where ``backend`` serves ``target`` under "auto"; "" where kernels run as measured.

    ``reasons``: what the faster backends lacked, in words.
    """
    if backend not in PLAIN:
        return amd(target.arch) if target.rocm else ""
    if target.arch in ("cpu", "meta"):
        return ""
    if target.arch in _WITHOUT_KERNELS:
        return f"no MXFP4 kernel runs on {_WITHOUT_KERNELS[target.arch]}: {_SLOW}; it was not run there by this project"
    if target.sm is not None and target.sm < 80:
        return f"{before_ampere(target.arch)}; it was not run there by this project"
    return f"no backend with kernels can be used on {target.arch}: {_SLOW}" + (f" ({reasons})" if reasons else "")


def before_ampere(arch: str) -> str:
    """Of an NVIDIA GPU older than the kernels."""
    return f"{arch} is older than sm_80, where MXFP4 kernels begin: {_SLOW}"


def amd(arch: str) -> str:
    """Of an AMD GPU."""
    return (
        f"{arch}: this project has run nothing on an AMD GPU; the native kernels were compiled for gfx942 and gfx950, "
        "and what is used here has passed optimize()'s own verification alone"
    )


def refusal_to_quantize(target: Target) -> str:
    """Why weights cannot be quantized on a device; "" where they can."""
    if target.arch != "mps":
        return ""
    return (
        "the model is on mps, where torch has no float64, in which errors of weights are summed: run optimize() on the "
        'CPU (model.to("cpu")), and move the model afterwards'
    )


def of_devices(target_archs: list[str]) -> list[str]:
    """Sentences about the GPUs of a machine, by their architectures ("sm_75", "gfx942", "xpu", "mps")."""
    said = []
    for arch in dict.fromkeys(target_archs):
        target = Target(arch)
        if target.rocm:
            said.append(amd(arch))
        elif arch in _WITHOUT_KERNELS or (target.sm or 80) < 80:
            said.append(note_of_choice("reference", target))
    return said


def of_system(system: str | None = None) -> str:
    """The sentence about an operating system (by default this one's); "" for Linux."""
    name = platform.system() if system is None else system
    return SYSTEMS.get(name, "" if name == "Linux" else f"{name or 'this system'}: nothing was run there.")


__all__ = ["amd", "before_ampere", "note_of_choice", "of_devices", "of_system", "processors", "refusal_to_quantize"]
