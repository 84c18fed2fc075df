"""The directory that one run writes: locked, made apart from what is there, and installed without touching the rest.

Contract: a file that this library did not write is never removed, replaced, truncated or reached through a link.
What may be replaced in an existing DIR is what a checkpoint consists of: ``model.safetensors``, its numbered shards
and index, a model's ``config.json`` and ``generation_config.json``; anything else only if the caller says so.

A run works in DIR.partial, or inside DIR where nothing can be renamed from beside it (a mount point, say):

    mxfp4_compile.lock        locked for the whole run; a second run is refused
    job.json                  that it is ours, and what is being made
    tmp/                      files that are being written
    files/, records/          finished files; size, checksum and facts of each
    install.json, replaced/   while DIR gets its files, one by one: what to undo after a crash

1. lock the working directory, undo what a crash left half installed, and try a rename into DIR;
2. continue the same job, or begin: what another job left is refused by name;
3. write files, each under a name that nobody else has, and give it its own when it is complete;
4. rename files/ to DIR; where DIR exists, move its files there: configuration and index out first and in last, so
   that a reader finds the old checkpoint, the new one, or none.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .directories import (
    CONFIG,
    GENERATION,
    JOURNAL,
    config_of,
    is_checkpoint_file,
    resolved,
    working_directories,
)
from .files import (
    INDEX,
    CheckpointError,
    Unit,
    create,
    index_of,
    named_errors,
    shard_checksum,
    sync,
    write_shard,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK, _JOB, _SCRATCH, _FILES, _RECORDS = "mxfp4_compile.lock", "job.json", "tmp", "files", "records"
_REPLACED = "replaced"
_KNOWN = {_LOCK, _JOB, _SCRATCH, _FILES, _RECORDS, JOURNAL, _REPLACED}
_MADE_BY = "mxfp4_compile"
_OURS = b"locked by mxfp4_compile while it works here\n"


class Output:
    """One run's output directory. In its ``with`` block nobody else writes it; see the top of this file.

    ``directory``: what is made, or gets its files. ``overwrite``: files other than a checkpoint's may be replaced
    too. Raises CheckpointError, naming the path, for whatever is not ours or cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.directory = resolved(directory)
        self.overwrite = overwrite
        self.work = working_directories(self.directory)[0]
        self.notes: list[str] = []
        self.replaced: list[str] = []
        self._names: set[str] = set()
        self._descriptor: int | None = None
        self._keep = False
        self._checksums = False

    @property
    def files(self) -> Path:
        """Where finished files lie."""
        return self.work / _FILES

    def __enter__(self) -> Output:
        if not self.directory.is_dir() and os.path.lexists(self.directory):
            raise CheckpointError(f"{self.directory} is a file; a directory is needed")
        for work in working_directories(self.directory):
            self.work = work
            with named_errors(self.work):
                self._lock()
                self._check_and_mend()
            if self._descriptor is not None:
                return self
        raise CheckpointError(f"{self.directory} cannot be written: nothing can be moved into it")

    def _check_and_mend(self) -> None:
        """All that is checked before work; the lock is given back where DIR is on another file system."""
        checked = fits = False
        try:
            self._check_contents()
            checked = True
            self._undo()
            fits = self._try_rename()
        finally:
            if not fits:
                if checked and not (self.work / _JOB).exists():
                    self._clean()
                self._release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._keep or not any((self.work / _RECORDS).glob("*.json")):
            self._clean()
        self._release()

    # the lock, and whose the directory is

    def _lock(self) -> None:
        self.work.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):  # another run may take its directory away between two steps of this one
            try:
                os.mkdir(self.work, 0o700)
            except FileExistsError:
                self._check_owner()
            try:
                if (names := os.listdir(self.work)) and _LOCK not in names:
                    raise self._foreign(names)
                descriptor = self._open_lock()
            except FileNotFoundError:
                continue
            try:
                self._take(descriptor)
                if not (written := os.read(descriptor, 2 * len(_OURS))):
                    time.sleep(0.01)  # a run that has made it just now writes in it what it is
                    os.close(descriptor)
                    continue
                if written != _OURS:
                    raise self._foreign([_LOCK])
                if os.path.samestat(os.fstat(descriptor), os.stat(self.work / _LOCK, follow_symlinks=False)):
                    self._descriptor = descriptor
                    return
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        if (self.work / _LOCK).exists():
            raise self._foreign([_LOCK])
        raise CheckpointError(f"{self.work} is made and removed by another run all the time")

    def _open_lock(self) -> int:
        """The lock's descriptor, at its beginning; a new lock says whose it is: the name may be anybody's."""
        path, flags = self.work / _LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(path, flags)
        os.write(descriptor, _OURS)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def _take(self, descriptor: int) -> None:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise CheckpointError(
                    f"{self.directory} is being written by another run, which works in {self.work}; wait for it, or "
                    "give another output directory"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
                raise
        self.notes.append(f"{self.work.parent} has no file locks: a second run into {self.directory} is not noticed")

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _check_owner(self) -> None:
        """CheckpointError unless the working directory that is there can only have been filled by us."""
        try:
            found = os.lstat(self.work)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode):
            kind = "a link" if stat.S_ISLNK(found.st_mode) else "no directory"
            raise CheckpointError(f"{self.work} is {kind}; this run would work there: move it away")

        def foreign(uid: int, mode: int) -> bool:
            return found.st_uid != uid or bool(stat.S_IMODE(found.st_mode) & 0o022 & ~mode)

        if hasattr(os, "geteuid") and foreign(os.geteuid(), 0o700):
            # Some file systems show every directory as another's, or as writable: compare with a new one there.
            probe = tempfile.mkdtemp(prefix=self.work.name + ".", dir=self.work.parent)
            try:
                fresh = os.lstat(probe)
            finally:
                os.rmdir(probe)
            if foreign(fresh.st_uid, fresh.st_mode):
                raise CheckpointError(
                    f"{self.work} belongs to somebody else, or others may write to it: it is not used; give another "
                    "output directory"
                )

    def _foreign(self, names: Iterable[str]) -> CheckpointError:
        shown = ", ".join(repr(name) for name in sorted(names)[:3])
        return CheckpointError(
            f"{self.work} exists and is no interrupted run of ours (it holds {shown}); nothing in it is touched: move "
            "it away"
        )

    def _check_contents(self) -> None:
        """CheckpointError if anything in the working directory is not what a run of ours leaves there."""
        names = set(os.listdir(self.work))
        strange = names - _KNOWN
        if _JOB not in names:
            strange |= names - {_LOCK, _SCRATCH}
        for name in names & _KNOWN:
            mode = os.lstat(self.work / name).st_mode
            if not (stat.S_ISREG if name in (_LOCK, _JOB, JOURNAL) else stat.S_ISDIR)(mode):
                strange.add(name)
        if strange:
            raise self._foreign(strange)
        if _JOB in names:
            found = _read_json(self.work / _JOB, self.work)
            if found.get("made_by") != _MADE_BY:
                raise self._foreign(names - {_LOCK})
        finished = {self._record(n).name for n in self._tree(self.files)}
        known = {p.name for p in (self.work / _RECORDS).glob("*.json")}
        if not finished <= known:
            unknown = [f"{_FILES}/{n}" for n in self._tree(self.files) if self._record(n).name not in known]
            raise self._foreign(unknown)

    def _tree(self, top: Path) -> list[str]:
        """Every file below a folder of ours by its path there; a link or anything but a file is refused."""
        found = []
        for root, folders, names in os.walk(top):
            for name in (*folders, *names):
                path = Path(root, name)
                status = os.lstat(path)
                plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
                if not (stat.S_ISDIR(status.st_mode) if name in folders else plain):
                    raise self._foreign([str(path.relative_to(self.work))])
            found += [Path(root, name).relative_to(top).as_posix() for name in names]
        return sorted(found)

    def _try_rename(self) -> bool:
        """Move an empty file into DIR and remove it: what cannot work at the end is found at the beginning.

        False where DIR is on another file system.
        """
        if not self.directory.is_dir():
            return True
        (self.work / _SCRATCH).mkdir(exist_ok=True)
        probe = self._scratch()
        os.close(create(probe))
        there = self.directory / f".mxfp4_compile.{secrets.token_hex(8)}"
        try:
            with named_errors(self.directory, but=errno.EXDEV):
                os.rename(probe, there)
                os.unlink(there)
            return True
        except OSError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(probe)

    # beginning and going on

    def begin(
        self, job: Mapping[str, Any] | None, names: Iterable[str], size: int, copies: Mapping[str, Path] | None = None
    ) -> None:
        """Continue ``job`` where it was interrupted, or begin it; None: something that cannot be continued.

        ``names``: the files that will be written, as far as they are known; ``size``: the bytes of all files;
        ``copies``: by name, the files that will be copied.
        """
        names = {*names, *(copies or {})}
        self.check_names([*names, *self._stale(names)], copies)
        wanted = {"made_by": _MADE_BY, "resumable": job is not None, **(job or {})}
        path = self.work / _JOB
        found = _read_json(path, self.work) if path.exists() else None
        if found is not None and found.get("resumable") and found != _as_json(wanted):
            self._keep = True  # what is there is another run's
            keys = {k for k in wanted if found.get(k) != _as_json(wanted)[k]} - {"resumable", "made_by"}
            what = f"half of another conversion ({', '.join(sorted(keys))} differ)" if job else "half of a conversion"
            raise CheckpointError(f"{self.work} is {what}; finish that one, or remove the directory")
        with named_errors(self.work):
            if found is None or not found.get("resumable"):
                self._clear()
            (self.work / _SCRATCH).mkdir(exist_ok=True)
            for left in (self.work / _SCRATCH).iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            # Before the folders that it says are ours: a run that was killed in between goes on.
            self._write_json(path, wanted)
            for folder in (_FILES, _RECORDS):
                (self.work / folder).mkdir(exist_ok=True)
        self._checksums = self._keep = job is not None
        done = sum(os.lstat(self.files / name).st_size for name in self._tree(self.files))
        free = shutil.disk_usage(self.work).free
        if size - done > free:
            raise CheckpointError(
                f"{self.work} needs {(size - done) / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free; "
                "nothing was written"
            )

    def check_names(self, names: Iterable[str], copies: Mapping[str, Path] | None = None) -> None:
        """CheckpointError if a file of these names would replace one of DIR that is no part of a checkpoint.

        ``copies``: by name, what will be copied there: equal files do not matter.
        """
        for name in names:
            self._replaces(name, (copies or {}).get(name))

    def _replaces(self, name: str, new: Path | None) -> bool:
        """Whether DIR has a file called ``name`` that goes; CheckpointError if it must not."""
        path = self.directory / name
        for folder in Path(name).parents:
            inside = self.directory / folder
            if os.path.lexists(inside) and folder != Path(".") and (inside.is_symlink() or not inside.is_dir()):
                raise CheckpointError(f"{inside} is no folder, but {name} is to be written there; move it away")
        if not os.path.lexists(path):
            return False
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise CheckpointError(f"{path} is no file, but one of that name is to be written; move it away")
        ours = is_checkpoint_file(name) and (name != CONFIG or config_of(self.directory) is not None)
        if ours or self.overwrite:
            return True
        if new is not None and stat.S_ISREG(mode) and filecmp.cmp(path, new, shallow=False):
            return False
        what = "is no model's configuration" if name == CONFIG else "is there already and differs from the new one"
        raise CheckpointError(f"{path} {what}; it is not replaced: move it away, or give another output directory")

    # writing

    def finished(self, name: str) -> dict[str, Any] | None:
        """The facts of a shard that an earlier run finished, if it still is what was written then."""
        path, record = self.files / name, self._record(name)
        if not (path.is_file() and record.is_file()):
            return None
        found = _read_json(record, self.work)
        facts = found.get("facts")
        if not isinstance(found.get("size"), int) or not isinstance(facts, dict):
            raise CheckpointError(f"{record} is broken: remove {self.work} and begin again")
        if path.stat().st_size != found["size"] or shard_checksum(path) != found.get("checksum"):
            return None
        self._names.add(name)
        return facts

    def write_shard(
        self,
        name: str,
        units: Sequence[Unit],
        advance: Callable[[int], None] = lambda _: None,
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> dict[str, Any]:
        """Write one safetensors file and note its ``facts``, which are known once it is written; returns them."""
        temporary = self._scratch()
        with self._removed_on_failure(temporary):
            with named_errors(self.files / name):
                checksum = write_shard(temporary, units, advance, checksum=self._checksums)
            known = facts()
            self._finish(temporary, name, checksum=checksum, facts=known)
        return known

    def leave_out(self, name: str) -> None:
        """A finished file of this run that is no part of the output; it goes when that is installed."""
        self._names.discard(name)

    def write_index(self, shards: Mapping[str, Sequence[Unit]]) -> None:
        """The index of a sharded checkpoint; a single file needs none."""
        text = index_of(shards)
        if text is not None:
            temporary = self._scratch()
            with named_errors(self.files / INDEX), self._removed_on_failure(temporary):
                _write(temporary, text)
                self._finish(temporary, INDEX)

    def copy(self, source: Path, name: str) -> None:
        """A copy of a file, with its mode, under ``name``, which may lie in folders."""
        temporary = self._scratch()
        with named_errors(self.files / name), self._removed_on_failure(temporary):
            with open(source, "rb") as old, open(create(temporary, 0o600), "wb") as new:
                shutil.copyfileobj(old, new, 1 << 20)
                os.chmod(temporary, stat.S_IMODE(os.fstat(old.fileno()).st_mode) & 0o777)
                new.flush()
                os.fsync(new.fileno())
            self._finish(temporary, name)

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty folder; what others have written there becomes part of the output at the end of the block."""
        folder = Path(tempfile.mkdtemp(dir=self.work / _SCRATCH))
        try:
            yield folder
            with named_errors(self.files):
                for name in self._tree(folder):
                    self._replaces(name, folder / name)
                    sync(folder / name)
                    self._finish(folder / name, name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _scratch(self) -> Path:
        return self.work / _SCRATCH / secrets.token_hex(8)

    @contextlib.contextmanager
    def _removed_on_failure(self, path: Path) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def _finish(self, temporary: Path, name: str, **noted: Any) -> None:
        """Note a complete file and give it its name: a file under its name always has its note."""
        self._write_json(self._record(name), {"name": name, "size": temporary.stat().st_size, **noted})
        (self.files / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, self.files / name)
        self._names.add(name)

    def _record(self, name: str) -> Path:
        return self.work / _RECORDS / (hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest() + ".json")

    def _write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        temporary = self._scratch()
        with self._removed_on_failure(temporary):
            _write(temporary, json.dumps(data))
            os.replace(temporary, path)

    # installing

    def install(self) -> None:
        """Give DIR its files: all of them, or (after an exception) none. What was written earlier and is not part of
        this run stays out. ``replaced`` lists what of DIR is gone then."""
        with named_errors(self.directory):
            for name in self._tree(self.files):
                if name not in self._names:
                    os.unlink(self.files / name)
                    self._record(name).unlink(missing_ok=True)
            for folder in {(self.files / name).parent for name in self._names}:
                sync(folder)
            if self.directory.is_dir():
                self._move_in()
            else:
                os.rename(self.files, self.directory)
            sync(self.directory)
            sync(self.directory.parent)
        self._keep = False

    def _move_in(self) -> None:
        new = sorted(self._names, key=_last)
        going = [name for name in new if self._replaces(name, self.files / name)]
        new = [name for name in new if name in going or not os.path.lexists(self.directory / name)]
        going += [name for name in self._stale(self._names) if self._replaces(name, None)]
        self._write_json(self.work / JOURNAL, {"new": new, "old": going})
        try:
            for name in sorted(going, key=_last, reverse=True):
                _move(self.directory / name, self.work / _REPLACED / name)
            sync(self.directory)
            for name in new:
                _move(self.files / name, self.directory / name)
            sync(self.directory)
        except BaseException:
            self._undo()
            raise
        (self.work / JOURNAL).unlink()
        sync(self.work)
        self.replaced = sorted(going)

    def _stale(self, names: Iterable[str]) -> list[str]:
        """Weights and index in DIR that a checkpoint of the files ``names`` does not have."""
        there = os.listdir(self.directory) if self.directory.is_dir() else []
        return [n for n in there if is_checkpoint_file(n) and n not in (*names, CONFIG, GENERATION)]

    def _undo(self) -> None:
        """Bring back what was in DIR before an installation that did not end."""
        journal = self.work / JOURNAL
        if not journal.exists():
            return
        try:
            data = json.loads(journal.read_text(encoding="utf-8"))
            data = {key: [str(name) for name in data[key]] for key in ("new", "old")}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{journal} is broken ({error}); the files of {self.directory} that were being replaced lie in "
                f"{self.work / _REPLACED}: move them back, then remove {self.work}"
            ) from error
        for name in data["new"]:
            if os.path.lexists(self.directory / name) and not os.path.lexists(self.files / name):
                if name not in data["old"] or os.path.lexists(self.work / _REPLACED / name):
                    _move(self.directory / name, self.files / name)
        for name in data["old"]:
            if os.path.lexists(self.work / _REPLACED / name):
                _move(self.work / _REPLACED / name, self.directory / name)
        sync(self.directory)
        journal.unlink()

    # removing what is ours

    def _clear(self) -> None:
        """Remove what an earlier run left in the working directory, but the lock."""
        for name in self._tree(self.files) if self.files.is_dir() else []:
            os.unlink(self.files / name)
        for folder in (_FILES, _RECORDS, _SCRATCH, _REPLACED):
            if (self.work / folder).is_dir():
                shutil.rmtree(self.work / folder)
        (self.work / _JOB).unlink(missing_ok=True)

    def _clean(self) -> None:
        """Remove the working directory; what cannot be removed stays, and is cleared by the next run."""
        if (self.work / JOURNAL).exists():  # what it would undo lies here
            return
        with contextlib.suppress(OSError, CheckpointError):
            self._clear()
            (self.work / _LOCK).unlink()
            self.work.rmdir()


def _last(name: str) -> int:
    """The order of installing: what makes a directory a checkpoint comes last."""
    return {INDEX: 1, CONFIG: 2}.get(name, 0)


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    os.rename(path, to)


def _write(path: Path, text: str) -> None:
    with open(create(path), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _as_json(data: Any) -> Any:
    return json.loads(json.dumps(data))


def _read_json(path: Path, work: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is broken ({error}): remove {work} and begin again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is broken: remove {work} and begin again")
    return found
