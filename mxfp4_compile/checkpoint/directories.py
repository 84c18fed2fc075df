"""What lies in model directories: names that are a checkpoint's, what may be written where, what comes along.

Contract: nothing here writes or removes. A directory is judged by what it holds, never by what it is called.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import INDEX, WEIGHTS, CheckpointError, Weights, is_weight_file
from .forms import NOTE, is_own

PARTIAL = ".partial"
CONFIG = "config.json"
GENERATION = "generation_config.json"
_INSIDE = ".mxfp4_compile" + PARTIAL
JOURNAL = "install.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name in a model directory is part of what ``save`` writes, and replaces."""
    return name in (CONFIG, GENERATION, WEIGHTS, INDEX) or _SHARD.fullmatch(name) is not None


def resolved(path: str | os.PathLike[str]) -> Path:
    """An absolute path without links; CheckpointError for what no path can be (a circle of links, a long name, ...)."""
    try:
        found = Path(path).resolve()
        with contextlib.suppress(FileNotFoundError):
            os.lstat(found)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be resolved: {reason}") from error
    return found


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """CheckpointError unless the output directory and what is read share nothing, whatever they are called."""
    output = resolved(output)
    for given in inputs:
        found = resolved(given)
        if _same(found, output):
            raise CheckpointError(f"{output} is the source itself; the output needs a directory of its own")
        for inner, outer, words in ((found, output, f"holds the source {given}"), (output, found, "is in the source")):
            if any(_same(parent, outer) for parent in inner.parents):
                raise CheckpointError(f"{output} {words}; the output needs a directory of its own")


def _same(a: Path, b: Path) -> bool:
    if a == b:
        return True
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def config_of(directory: Path) -> dict[str, Any] | None:
    """The config.json of a directory if it is that of a model, else None."""
    path = directory / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and ("model_type" in found or "architectures" in found) else None


def working_directories(directory: Path) -> list[Path]:
    """Where the run that makes ``directory`` may work: beside it, and inside where that is on another disk."""
    directory = resolved(directory)
    inside = [directory / _INSIDE] if directory.is_dir() else []
    if inside and (os.path.ismount(directory) or not os.access(directory.parent, os.W_OK)):
        return inside
    return [directory.with_name(directory.name + PARTIAL), *inside]


def check_links(weights: Weights, target: Path) -> None:
    """CheckpointError if weights that are read are links to what would be replaced."""
    for file in weights.files:
        real = resolved(file)
        if target in real.parents:
            raise CheckpointError(f"{file} is a link to {real}, in the output directory; give another one")


def check_free(directory: Path, overwrite: bool) -> None:
    """CheckpointError unless an output directory is missing, empty or an MXFP4 checkpoint; ``overwrite``: or whatever.

    Even then only files of the same names are replaced, and the weights of the model that was there.
    """
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    names = [name for name in names if directory / name not in working_directories(directory)]
    if not names or overwrite:
        return
    config = config_of(directory) or {}
    if NOTE in config or is_own(config.get("quantization_config")):
        return
    what = "holds a model that this library did not make" if config else "is not empty and holds no model"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    there = [n for n in names if is_checkpoint_file(n)]
    goes = f"replaces {', '.join(there[:6])}{', ...' if len(there) > 6 else ''}" if there else "writes beside them"
    raise CheckpointError(f"{directory} {what} ({shown}); give another output directory, or --overwrite, which {goes}")


def other_files(origin: Path) -> tuple[dict[str, Path], list[str]]:
    """What comes along (tokenizer, templates, code, ...), by its path in the directory, and notes on what does not.

    Left out are weights in other forms, hidden folders, what is no file, and links that lead out of the source and of
    the hub's cache: a checkpoint from somewhere must not make copies of whatever it points to.
    """
    real = resolved(origin)
    # A snapshot in the hub's cache consists of links to blobs/ of the same repository.
    roots = [real] if real.parent.name != "snapshots" else [real, real.parent.parent / "blobs"]
    found: dict[str, Path] = {}
    left: list[str] = []
    for top, folders, names in os.walk(origin):
        inside = Path(top).relative_to(origin)
        hidden = [name for name in folders if name.startswith(".") or (Path(top) / name).is_symlink()]
        left += [f"{(inside / name).as_posix()}/ is not copied" for name in sorted(hidden)]
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(names):
            path, called = Path(top, name), (inside / name).as_posix()
            end = resolved(path)
            if called == CONFIG or (inside == Path(".") and _is_read(name)):
                continue
            if not path.is_file():
                left.append(f"{called} is no file and is not copied")
            elif not any(root in end.parents for root in roots):
                left.append(f"{called} is a link that leads out of the source, and is not copied")
            elif is_weight_file(name):
                left.append(f"{called} is pickled, or weights in another form, and is not copied")
            else:
                found[called] = path
    return found, left


def _is_read(name: str) -> bool:
    return is_checkpoint_file(name) and name != GENERATION
