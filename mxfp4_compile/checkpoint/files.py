"""Safetensors on disk: a validated index of what is there, slices of it, and streamed writing.

Contract: nothing here knows models or MXFP4. Reading touches only the bytes asked for. What is written is
whole, or removed. Which names files get, and when, is ``output.py``'s.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..text import printable

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DEFAULT_SHARD_BYTES = 5 * 10**9
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library reads at most

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file and the tensor.

    What no terminal should be sent (names may hold escape sequences) is escaped in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


# reading


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: its file, safetensors dtype name and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype; CheckpointError for one torch has no name for."""
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} has the unknown dtype {self.dtype}")
        return DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r} ({self.dtype} {list(self.shape)})"


class Weights:
    """The tensors of a checkpoint's safetensors files by name. Use it in a ``with`` block."""

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, Stored] = {}
        self.files = tuple(Path(f) for f in files)
        try:
            for file in self.files:
                self._read_header(file)
        except BaseException:
            self.close()
            raise

    def _read_header(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if file.suffix in PICKLED:
            raise CheckpointError(f"{file} is a pickled checkpoint: reading it may run code; only safetensors are read")
        try:
            handle = safe_open(str(file), framework="pt")
            handle.__enter__()
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors (truncated or corrupt?): {error}") from error
        self._open[file] = handle
        for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
            part = handle.get_slice(name)
            if name in self.tensors:
                raise CheckpointError(f"tensor {name!r} is both in {self.tensors[name].file} and in {file}")
            self.tensors[name] = Stored(file, name, part.get_dtype(), tuple(part.get_shape()))

    def __getitem__(self, name: str) -> Stored:
        if name not in self.tensors:
            raise CheckpointError(f"tensor {name!r} is in none of {', '.join(str(f) for f in self.files)}")
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or ``rows`` of its first dimension, in CPU memory."""
        stored = self[name]
        try:
            part = self._open[stored.file].get_slice(name)
            return part[...] if rows is None or not stored.shape else part[rows]  # type: ignore[no-any-return]
        except Exception as error:
            raise CheckpointError(f"{stored} cannot be read: {error}") from error

    def close(self) -> None:
        """Close every file."""
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, through its index where it has one.

    Raises CheckpointError for a missing shard, a broken index, or pickled weights only.
    """
    if (directory / WEIGHTS).is_file():  # also beside an index, as transformers does
        return [directory / WEIGHTS]
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} is no safetensors index: {error}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                raise CheckpointError(f"{index} names {name!r}, which is no file of this directory")
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory / name} is missing, though {INDEX} names it")
        return [directory / name for name in names]
    pickled = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLED)
    if pickled:
        raise CheckpointError(
            f"{directory} holds pickled weights only ({', '.join(pickled[:3])}): reading them may run code; convert "
            "them to safetensors first"
        )
    raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}")


# writing


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its name, dtype and shape, known before its values are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """Tensors that are produced together, in pieces.

    ``produce`` yields (name, piece): the pieces of one tensor come in order and cover it; those of different
    tensors may alternate. ``facts`` is filled by ``produce`` with what is worth keeping about the tensors.
    """

    entries: tuple[Entry, ...]
    produce: Callable[[], Iterable[tuple[str, Tensor]]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(e.bytes for e in self.entries)


def shards_of(units: Sequence[Unit], limit: int = DEFAULT_SHARD_BYTES) -> dict[str, list[Unit]]:
    """Units by file name, in order, each file at most ``limit`` bytes unless a single unit is larger."""
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if groups[-1] and size + unit.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_shard(
    path: Path, units: Sequence[Unit], advance: Callable[[int], None] = lambda _: None, *, checksum: bool = False
) -> str:
    """Write one new safetensors file, piece by piece, to disk; returns its ``shard_checksum`` if wanted, else "".

    The safetensors library writes whole tensors that lie in memory; here none has to. FileExistsError if there is
    such a file; one that could not be completed is removed.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    offset = 0
    for entry in (e for u in units for e in u.entries):
        if entry.name in header:
            raise CheckpointError(f"{path}: two tensors are called {entry.name!r}")
        if entry.dtype not in _NAMES:
            raise CheckpointError(f"{path}: tensor {entry.name!r} has dtype {entry.dtype}, which safetensors lacks")
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        start[entry.name], end[entry.name] = offset, offset + entry.bytes
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
    base = 8 + len(text)
    digests = {name: hashlib.sha256() for name in start}
    descriptor = create(path)
    try:
        with open(descriptor, "wb") as file:
            _reserve(file.fileno(), base + offset)
            file.write(len(text).to_bytes(8, "little") + text)
            dtypes = {e.name: e.dtype for u in units for e in u.entries}
            for unit in units:
                for name, piece in unit.produce():
                    if piece.dtype != dtypes[name]:
                        raise CheckpointError(f"{path}: tensor {name!r} came as {piece.dtype}, not {dtypes[name]}")
                    raw = piece.detach().cpu().contiguous().view(-1)
                    data = memoryview(raw.view(torch.uint8).numpy() if raw.numel() else b"")  # type: ignore[arg-type]
                    if start[name] + len(data) > end[name]:
                        raise CheckpointError(f"{path}: tensor {name!r} got more values than its shape has")
                    file.seek(base + start[name])
                    file.write(data)
                    if checksum:
                        digests[name].update(data)
                    start[name] += len(data)
                    advance(len(data))
            short = [name for name in start if start[name] != end[name]]
            if short:
                raise CheckpointError(f"{path}: tensor {short[0]!r} got fewer values than its shape has")
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return _combined(text, digests.values()) if checksum else ""


def _combined(header: bytes, digests: Iterable[Any]) -> str:
    whole = hashlib.sha256(header)
    for digest in digests:
        whole.update(digest.digest())
    return whole.hexdigest()


def shard_checksum(path: Path) -> str:
    """SHA-256 over the header of a safetensors file that ``write_shard`` wrote and the SHA-256 of each tensor in it.

    By tensors, since they are written side by side. "" for a file that is damaged where it says what it holds.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES))
            digests = []
            for name, tensor in json.loads(text).items():
                if name == "__metadata__":
                    continue
                digest, (left, end) = hashlib.sha256(), tensor["data_offsets"]
                file.seek(8 + len(text) + left)
                while left < end and (data := file.read(min(end - left, 1 << 20))):
                    digest.update(data)
                    left += len(data)
                digests.append(digest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return _combined(text, digests)


def create(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a new file, never of one that is there and never through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, mode)


def _reserve(descriptor: int, size: int) -> None:
    """Take the disk space at once, where the file system can: a disk too small fails now and not in an hour."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        os.truncate(descriptor, size)


@contextlib.contextmanager
def named_errors(path: Path, *, but: int | None = None) -> Iterator[None]:
    """What fails in the block while ``path`` is written becomes a CheckpointError that names both.

    ``but``: an errno whose OSError goes on as it is.
    """
    try:
        yield
    except OSError as error:
        if but is not None and error.errno == but:
            raise
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "no permission to write",
            errno.EPERM: "no permission to write",
            errno.EROFS: "the file system is read-only",
        }
        # The file of the failure, where that is another one: a folder that is no folder, say.
        named = error.filename if isinstance(error.filename, (str, os.PathLike)) else None
        also = f" ({named})" if named is not None and Path(named) != path and error.errno not in reasons else ""
        raise CheckpointError(
            f"{path} cannot be written: {reasons.get(error.errno or 0, error.strerror or str(error))}{also}"
        ) from error


def index_of(shards: Mapping[str, Sequence[Unit]]) -> str | None:
    """The text of a sharded checkpoint's index; None for a single file, which needs none."""
    if set(shards) == {WEIGHTS}:
        return None
    names = {e.name: file for file, units in shards.items() for u in units for e in u.entries}
    total = sum(u.bytes for units in shards.values() for u in units)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}, indent=1) + "\n"


def is_weight_file(name: str) -> bool:
    """Whether a file of a model directory holds weights, or is an index of such files."""
    return Path(name).suffix in (*PICKLED, ".safetensors") or name.endswith(".index.json")


def sync(path: Path) -> None:
    """Have a file, or a directory's names, on disk."""
    if os.name == "nt" and path.is_dir():
        return  # no directory can be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # directories of some file systems
            raise
    finally:
        os.close(descriptor)
