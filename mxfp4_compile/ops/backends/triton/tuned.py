"""What ``mxfp4-compile tune`` found on this machine, one JSON file per GPU; select.py asks here first.

A file that cannot be read, or that is of another GPU, Triton or version of the kernels, is ignored with a
warning that names it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from .tiles import TileChoice, check_entry, choice_of, entry_of

ENVIRONMENT_VARIABLE = "MXFP4_COMPILE_TUNED"
_FORMAT = 1
_OFF = ("0", "off")
_LARGEST = 1 << 22  # characters of a file; a layer that was tuned takes some thousand
# The modules and the folder that decide what a tile size means and how quick it is.
_KERNELS = ("activation", "combine", "decode", "dependent", "fp8", "launch", "layout", "routing", "vector", "matmul")


class TunedDataError(ValueError):
    """A file is no tuned data for this GPU; the message says why."""


@dataclass(frozen=True)
class Host:
    """What tuned data hold for: a GPU by name and architecture, and the compiler's version."""

    gpu: str
    architecture: str
    triton: str

    @property
    def file_name(self) -> str:
        """<gpu>-<architecture>-triton<version>.json, of characters that any file system takes."""
        gpu = re.sub(r"[^a-z0-9]+", "_", self.gpu.lower()).strip("_")
        return f"{gpu}-{self.architecture}-triton{re.sub(r'[^A-Za-z0-9.]+', '_', self.triton)}.json"


@dataclass(frozen=True)
class Entry:
    """The kernels for exactly this (E, K, H, I) and dtype, from ``min_tokens`` to ``max_tokens`` tokens.

    ``us`` and ``shipped_us``: microseconds of the layer at ``tokens`` tokens, with them and with the shipped rules.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    min_tokens: int
    max_tokens: int
    choice: TileChoice
    tokens: int
    us: float
    shipped_us: float

    def to_dict(self) -> dict[str, Any]:
        """As it lies in a file."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "min_tokens": self.min_tokens,
            "max_tokens": self.max_tokens,
            "up": entry_of(self.choice.up_regime, self.choice.up),
            "down": entry_of(self.choice.down_regime, self.choice.down),
            "tokens": self.tokens,
            "us": self.us,
            "shipped_us": self.shipped_us,
        }

    @staticmethod
    def from_dict(data: Any) -> Entry:
        """Inverse of ``to_dict``; ValueError, TypeError or KeyError for anything else."""
        shape = tuple(map(_whole, data["shape"]))
        if len(shape) != 4:
            raise ValueError(f"shape is {data['shape']!r}")
        low, high = _whole(data["min_tokens"]), _whole(data["max_tokens"])
        if low > high:
            raise ValueError(f"tokens from {low} to {high}")
        check_entry(data["up"])
        check_entry(data["down"])
        if (data["up"]["kernel"] == "sorted") != (data["down"]["kernel"] == "sorted"):
            raise ValueError("kernel sorted goes with sorted only")
        return Entry(
            shape,
            str(data["dtype"]),
            low,
            high,
            choice_of(data["up"], data["down"]),
            _whole(data["tokens"]),
            _time(data["us"]),
            _time(data["shipped_us"]),
        )


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return value


def _time(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 < float(value) < float("inf"):
        raise ValueError(f"{value!r} is no time in microseconds")
    return float(value)


# What meta tensors stand for where there is no GPU: an architecture, set by a process that only compiles.
meta_device: str | None = None


@cache
def architecture(device: torch.device) -> str:
    """The name under which configs/ files this device's tuned data; meta tensors stand for those of the current GPU."""
    if device.type == "meta" and meta_device is not None:
        return meta_device
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@cache
def host_of(device: torch.device) -> Host:
    """The GPU ``device`` and this Triton. Imports nothing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Host(name, architecture(device), _triton_version())


def _triton_version() -> str:
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


@cache
def kernels_digest() -> str:
    """Of the kernels' sources: tiles tuned for other kernels are no longer the best, or no longer valid."""
    here = Path(__file__).parent
    files = [file for name in _KERNELS for file in (sorted((here / name).glob("*.py")) or [here / f"{name}.py"])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def path_for(host: Host) -> Path | None:
    """Where the tuned data of ``host`` lie, whether there are any or not; None if the user switched them off."""
    override = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if override.lower() in _OFF:
        return None
    if override:
        return Path(override).expanduser()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a path that is not absolute is to be ignored.
    root = Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()
    return root / "mxfp4_compile" / "tuned" / host.file_name


def read(path: Path, host: Host) -> tuple[Entry, ...]:
    """The entries of a file; none if there is no file. TunedDataError if it is not tuned data for ``host``."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise TunedDataError(f"it cannot be read ({error})") from error
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} characters")
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']!r}, not {_FORMAT}")
        entries = tuple(Entry.from_dict(e) for e in data["entries"])
        here = {"gpu": host.gpu, "architecture": host.architecture, "triton": host.triton, "kernels": kernels_digest()}
        found = {key: data[key] for key in here}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise TunedDataError(f"it holds no tuned data ({type(error).__name__}: {str(error)[:200]})") from error
    for key, value in here.items():
        if found[key] != value:
            what = "version of the kernels" if key == "kernels" else f"{key} ({found[key]!r}; here {value!r})"
            raise TunedDataError(f"it was tuned for another {what}")
    return entries


def write(path: Path, host: Host, entries: Iterable[Entry]) -> None:
    """Replace the file in one step: a reader sees the old or the new, never a part."""
    data = {
        "format": _FORMAT,
        "gpu": host.gpu,
        "architecture": host.architecture,
        "triton": host.triton,
        "kernels": kernels_digest(),
        "entries": [e.to_dict() for e in entries],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def merge(old: Iterable[Entry], new: Iterable[Entry], shape: tuple[int, ...], dtype: str, span: range) -> list[Entry]:
    """``new`` and what remains of ``old`` outside the token counts ``span`` that were tuned again for ``shape``."""
    kept = []
    for entry in old:
        if (entry.shape, entry.dtype) != (shape, dtype):
            kept.append(entry)
            continue
        for low, high in (
            (entry.min_tokens, min(entry.max_tokens, span.start - 1)),
            (max(entry.min_tokens, span.stop), entry.max_tokens),
        ):
            if low <= high:
                kept.append(replace(entry, min_tokens=low, max_tokens=high))
    return sorted([*kept, *new], key=lambda e: (e.shape, e.dtype, e.min_tokens))


@lru_cache(maxsize=64)
def _entries(path: Path, host: Host) -> tuple[Entry, ...]:
    try:
        return read(path, host)
    except TunedDataError as error:
        warnings.warn(
            f"mxfp4_compile ignores the tuned data in {path}: {error}. Remove it or run mxfp4-compile tune again; "
            f"{ENVIRONMENT_VARIABLE}=off switches tuned data off.",
            stacklevel=2,
        )
        return ()


def lookup(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, tokens: int
) -> TileChoice | None:
    """The user's tuned kernels for this layer on this device, or None."""
    host = host_of(device)
    path = path_for(host)
    if path is None:
        return None
    name = str(dtype).removeprefix("torch.")
    for entry in _entries(path, host):
        if entry.shape == shape and entry.dtype == name and entry.min_tokens <= tokens <= entry.max_tokens:
            return entry.choice
    return None


def forget() -> None:
    """Read files anew at the next look-up."""
    _entries.cache_clear()
