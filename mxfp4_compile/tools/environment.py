"""What this machine has: versions, devices, backends, and what each optional part would need.

Data only; ``commands/env.py`` prints it. Nothing optional is imported: versions come from the packages' metadata.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement as PipRequirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from .. import __version__
from .. import ops as _ops  # noqa: F401  (registers the backends)
from ..ops import platforms
from ..ops.backend import Requirement
from ..ops.backends.triton import tuned
from ..ops.registry import known_backends
from ..ops.selection import requirements
from ..ops.target import Request, Target
from ..text import INSTALL_HF

# What happens without a package.
_WITHOUT = {
    "triton": "without triton no kernel runs: on a GPU experts are computed in plain torch, slowly: pip install triton",
    "transformers": "without transformers optimize() and restore() take any torch module; load, save and the commands "
    f"that read models need it: {INSTALL_HF}",
    "numpy": "without numpy all works that works without transformers, which brings it; torch warns of it itself",
}

_PACKAGE = "mxfp4_compile"
PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "compressed-tensors", "numpy", "depyf")

# What the extras of this package are for; those for developers are left out.
PURPOSES = {
    "hf": "Hugging Face models; the commands explain and demo",
    "hf4": "models of transformers 4 in memory",
    "demo": "the command demo",
    "serve": "the commands serve and chat",
    "inspect": "readable dumps of what torch.compile made",
    "gguf": 'GGUF files (save with format="gguf")',
    "bench": "benchmarks and their plots",
    "test": "the tests",
}


@dataclass(frozen=True)
class OptionalPart:
    """An extra of this package: what it is for, and the versions it requires of packages, as pip writes them."""

    extra: str
    purpose: str
    required: dict[str, str]

    def missing(self) -> tuple[str, ...]:
        """The packages that are not there in a version that will do, each with what is there instead."""
        return tuple(lack for name, versions in self.required.items() if (lack := _lack(name, versions)))

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f'pip install "mxfp4_compile[{self.extra}]"'


def optional_parts() -> tuple[OptionalPart, ...]:
    """The extras by the metadata of the installed package; none where it runs without being installed."""
    try:
        declared = [PipRequirement(text) for text in importlib.metadata.requires(_PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        return ()

    def required(extra: str) -> dict[str, str]:
        found: dict[str, SpecifierSet] = {}
        for one in declared:
            if one.marker is None or not one.marker.evaluate({"extra": extra}):
                continue
            if canonicalize_name(one.name) == canonicalize_name(_PACKAGE):
                several = [(n, SpecifierSet(v)) for inner in one.extras for n, v in required(inner).items()]
            else:
                several = [(one.name, one.specifier)]
            for name, versions in several:
                found[name] = found.get(name, SpecifierSet()) & versions
        return {name: str(versions) for name, versions in sorted(found.items())}

    return tuple(
        OptionalPart(extra, purpose, needs) for extra, purpose in PURPOSES.items() if (needs := required(extra))
    )


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it; ``memory`` in bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Hardware:
    """The processor by name, the cores this process may use, torch's threads, and the GPUs."""

    cpu: str
    cores: int
    torch_threads: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class BackendStatus:
    """What one backend needs on one device; ``install`` is a command, or "" where there is nothing to install."""

    name: str
    device: str
    requirements: tuple[Requirement, ...]
    install: str = ""

    @property
    def available(self) -> bool:
        """Whether every requirement is met."""
        return all(r.met for r in self.requirements)


@dataclass(frozen=True)
class TunedStatus:
    """Whether tuned data of the user are in use on a GPU: ``state`` in words, ``path`` of the file or ""."""

    device: str
    in_use: bool
    state: str
    path: str


@dataclass(frozen=True)
class Environment:
    """Everything ``mxfp4-compile env`` prints; a version is None where the package is not installed."""

    versions: dict[str, str | None]
    hardware: Hardware
    backends: tuple[BackendStatus, ...]
    optional: tuple[OptionalPart, ...]
    tuned: tuple[TunedStatus, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "versions": self.versions,
            "hardware": asdict(self.hardware),
            "backends": [{**asdict(b), "available": b.available} for b in self.backends],
            "optional": [
                {"extra": p.extra, "purpose": p.purpose, "missing": list(p.missing()), "install": p.install}
                for p in self.optional
            ],
            "tuned": [asdict(t) for t in self.tuned],
            "notes": list(self.notes),
        }


def environment() -> Environment:
    """Look at this machine; takes no GPU memory beyond what asking a driver takes."""
    statuses = tuple(_status(name, device) for name in known_backends() for device in devices())
    tuned_statuses = tuple(_tuned_status(device) for device in devices() if device.type == "cuda")
    found = versions()
    return Environment(found, hardware(), statuses, optional_parts(), tuned_statuses, _notes(found))


def _notes(found: dict[str, str | None]) -> tuple[str, ...]:
    """What a user of this machine should know: its system, its GPUs, packages that are not there; a sentence each."""
    archs = [Target.of(device).arch for device in devices() if device.type != "cpu"]
    said = [platforms.of_system(), *platforms.of_devices(archs)]
    return tuple(filter(None, [*said, *(text for name, text in _WITHOUT.items() if not found[name])]))


def versions() -> dict[str, str | None]:
    """Versions of this package, Python, torch's toolkit and the packages that matter; None if not there."""
    found: dict[str, str | None] = {"mxfp4_compile": __version__, "python": platform.python_version()}
    found |= {name: installed(name) for name in PACKAGES}
    found["cuda"] = torch.version.cuda
    found["hip"] = torch.version.hip
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return found


def installed(package: str) -> str | None:
    """The version of an installed package, by its metadata, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> Hardware:
    """The machine, as far as this process may use it."""
    return Hardware(_cpu_name(), platforms.processors(), torch.get_num_threads(), gpus())


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch can use, in its order."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(properties.name, f"{properties.major}.{properties.minor}", properties.total_memory))
    return tuple(found)


def devices() -> list[torch.device]:
    """The CPU, then the GPUs: NVIDIA's and AMD's, then Intel's, then Apple's."""
    found = [torch.device("cpu"), *[torch.device("cuda", i) for i in range(len(gpus()))]]
    if torch.xpu.is_available():
        found += [torch.device("xpu", i) for i in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _status(name: str, device: torch.device) -> BackendStatus:
    found = requirements(name, Request(), Target.of(device))
    return BackendStatus(name, str(device), found, next((r.install for r in found if not r.met and r.install), ""))


def _tuned_status(device: torch.device) -> TunedStatus:
    host = tuned.host_of(device)
    path = tuned.path_for(host)
    if path is None:
        return TunedStatus(str(device), False, f"switched off by {tuned.ENVIRONMENT_VARIABLE}", "")
    try:
        entries = tuned.read(path, host)
    except tuned.TunedDataError as error:
        return TunedStatus(str(device), False, f"{path} is ignored: {error}", str(path))
    if not entries:
        return TunedStatus(str(device), False, "none; the shipped rules are used (mxfp4-compile tune)", str(path))
    shapes = ", ".join(dict.fromkeys(f"E,K,H,I={','.join(map(str, e.shape))} {e.dtype}" for e in entries))
    return TunedStatus(str(device), True, f"in use for {shapes}, from {path}", str(path))


def _lack(package: str, versions: str) -> str:
    have = installed(package)
    if have is None:
        return package
    return "" if SpecifierSet(versions).contains(have, prereleases=True) else f"{package}{versions} (found {have})"


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        info = ""
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return name.group(1).strip() if name else platform.processor() or platform.machine()


__all__ = ["Environment", "Hardware", "devices", "environment", "gpus", "hardware", "versions"]
