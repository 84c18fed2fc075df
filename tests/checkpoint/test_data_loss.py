"""Nothing of the user's is lost: outputs that are inputs, runs side by side, what lies in and around a directory."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same, loaded, saved
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import mxfp4_compile
from mxfp4_compile import CheckpointError
from mxfp4_compile.checkpoint import output
from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.checkpoint.directories import CONFIG, JOURNAL, other_files
from mxfp4_compile.checkpoint.files import WEIGHTS, Entry, Unit, shards_of
from mxfp4_compile.checkpoint.output import Output
from mxfp4_compile.tools.main import main

SHARD = 30_000
CONFIGURATION = json.dumps({"model_type": "tiny", "quantization_config": {"quant_method": "mxfp4_compile"}})


def tree(top: Path) -> dict[str, bytes | str]:
    """Every file below ``top`` by path: its bytes; of a link, where it leads."""
    found: dict[str, bytes | str] = {}
    for root, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = Path(root, name)
            if path.is_symlink():
                found[str(path.relative_to(top))] = os.readlink(path)
            elif path.is_file():
                found[str(path.relative_to(top))] = path.read_bytes()
    return found


def units(value: float = 1.0, count: int = 3) -> list[Unit]:
    def unit(name: str) -> Unit:
        return Unit((Entry(name, torch.float32, (4, 8)),), lambda: [(name, torch.full((4, 8), value))])

    return [unit(f"w{i}") for i in range(count)]


def write(directory: Path, value: float = 1.0, *, shards: bool = False, job: Any = None, **options: Any) -> Output:
    """A small checkpoint as ``save`` and ``convert`` write one."""
    groups = shards_of(units(value), 130 if shards else 10**9)
    with Output(directory, **options) as out:
        out.begin(job, [*groups, CONFIG], 384)
        for file, some in groups.items():
            if out.finished(file) is None:
                out.write_shard(file, some)
        out.write_index(groups)
        with out.staged() as folder:
            (folder / CONFIG).write_text(CONFIGURATION)
        out.install()
    return out


# one run at a time


def test_a_second_run_into_the_same_directory_is_refused_and_the_first_is_right(tmp_path: Path) -> None:
    source, target, refused = saved("qwen3_moe"), tmp_path / "m", []
    (tmp_path / "link").symlink_to(tmp_path)

    def progress(done: int, total: int) -> None:
        if not refused:
            for spelled in (target, tmp_path / "link" / "x" / ".." / "m"):
                with pytest.raises(CheckpointError, match="m is being written by another run") as error:
                    convert(source, spelled, max_shard_bytes=SHARD, scale_rule="floor")
                refused.append(error)

    convert(source, target, max_shard_bytes=SHARD, progress=progress)
    assert len(refused) == 2
    convert(source, tmp_path / "alone", max_shard_bytes=SHARD)
    assert tree(target) == tree(tmp_path / "alone")


def test_a_save_and_a_conversion_into_the_same_directory(tmp_path: Path) -> None:
    with Output(tmp_path / "m") as first:
        first.begin({"a": 1}, [], 0)
        with pytest.raises(CheckpointError, match="is being written by another run"):
            write(tmp_path / "m")
        first.write_shard(WEIGHTS, units())
    assert (tmp_path / "m.partial").is_dir()  # interrupted: it waits for the same job
    with pytest.raises(CheckpointError, match="half of a conversion; finish that one"):
        write(tmp_path / "m")
    write(tmp_path / "m", job={"a": 1})
    assert not (tmp_path / "m.partial").exists()


# an output that is an input


def test_the_source_is_never_the_output_however_it_is_spelled(tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(saved("qwen3_moe"), source)
    before = tree(tmp_path)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "up").symlink_to(tmp_path)
    spelled = ["src", "x/../src", "link", "up/src", "src/sub", "src/sub/deeper", ".", "up"]
    for name in spelled:
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=r"needs a directory of its own"):
            convert(source, os.path.join(tmp_path, name), overwrite=True)
        with pytest.raises(CheckpointError, match=r"needs a directory of its own"):
            convert(tmp_path / "link", os.path.join(tmp_path, name), overwrite=True)
    assert {k: v for k, v in tree(tmp_path).items() if k not in ("link", "up")} == before


def test_weights_that_are_links_into_the_output(tmp_path: Path) -> None:
    source, real = tmp_path / "src", tmp_path / "real"
    shutil.copytree(saved("qwen3_moe"), source)
    real.mkdir()
    shutil.move(source / WEIGHTS, real / WEIGHTS)
    (source / WEIGHTS).symlink_to(real / WEIGHTS)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a link to .*real/model\.safetensors, in the output directory"):
        convert(source, real, overwrite=True)
    assert tree(tmp_path) == before


# what lies in a directory


STRANGERS = [
    "data.pkl", "best.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin",
    "adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "notes.tmp", "model.safetensors.bak",
    "global_step5/mp_rank_00.pt", "consolidated.safetensors",
]  # fmt: skip


def test_save_pretrained_into_a_trainers_checkpoint_leaves_the_rest(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-500"
    shutil.copytree(saved("qwen3_moe"), target)
    for name in STRANGERS:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(name)
    (target / "model-00001-of-00002.safetensors").write_bytes(b"an older shard")
    inode = target.stat().st_ino
    model = mxfp4_compile.optimize(loaded("qwen3_moe"))
    model.save_pretrained(target)
    for name in STRANGERS:
        assert (target / name).read_text() == name
    assert target.stat().st_ino == inode  # who stands in it still does
    assert not (target / "model-00001-of-00002.safetensors").exists()  # as transformers does
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-500"]
    (target / "adapter_config.json").unlink()  # transformers would look for its base model
    assert_same(model, mxfp4_compile.load(target, dtype=torch.bfloat16))


def test_the_converter_writes_into_its_own_checkpoints_and_empty_directories_only(tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(saved("qwen3_moe"), source)
    (source / "tokenizer.json").write_text("{}")
    other = tmp_path / "bf16"
    shutil.copytree(saved("qwen3_moe"), other)
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in (*STRANGERS, "tokenizer.json"):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(name)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"bf16 holds a model that .*--overwrite, which replaces config.json"):
        convert(source, other)
    with pytest.raises(CheckpointError, match=r"mine is not empty and holds no model \(adapter_config.json, .*\)"):
        convert(source, mine)
    assert tree(tmp_path) == before
    done = convert(source, mine, overwrite=True)
    assert done.replaced == ["tokenizer.json"] and (mine / "tokenizer.json").read_text() == "{}"
    assert {name: (mine / name).read_text() for name in STRANGERS} == {name: name for name in STRANGERS}
    # An older output of its own is replaced; a file beside it that is another one is not.
    assert convert(source, mine).replaced == []
    (mine / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is there already and differs"):
        convert(source, mine)
    assert (mine / "tokenizer.json").read_text() == "[]"


def test_a_configuration_that_is_no_models(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text('{"port": 80}')
    with pytest.raises(CheckpointError, match=r"config\.json is no model's configuration; it is not replaced"):
        write(tmp_path / "app")
    assert tree(tmp_path) == {"app/config.json": b'{"port": 80}'}


def test_directories_called_partial_or_replaced_of_somebody_else(tmp_path: Path) -> None:
    for name in ("m.partial", "m.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"m\.partial exists and is no interrupted run of ours .*thesis\.tex"):
        write(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m\.partial exists and is no interrupted run of ours"):
        convert(saved("qwen3_moe"), tmp_path / "m")
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "m.partial")
    write(tmp_path / "m")
    assert (tmp_path / "m.replaced" / "thesis.tex").read_text() == "mine"


NAMES = st.sampled_from([
    "m", "m.partial", "m.replaced", "m.tmp", "out", "notes.txt", "model.safetensors.tmp", "optimizer.pt", "lock", "tmp",
    "files", "records", "job.json", "mxfp4_compile.lock", "install.json", "tokenizer.json", "best.safetensors",
    "model.safetensors", "model-00001-of-00003.safetensors", "config.json", ".mxfp4_compile.partial",
])  # fmt: skip
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@example(files={"m/m": b"", "m.partial/mxfp4_compile.lock": b""}, shards=False, link=False, fails=None)
@settings(max_examples=25, deadline=None)
@given(files=st.dictionaries(PATHS, st.binary(max_size=6), max_size=8), shards=st.booleans(), link=st.booleans(),
       fails=st.sampled_from([None, "write_shard", "write_index", "staged", "install"]))  # fmt: skip
def test_every_byte_around_and_inside_the_output_is_found_afterwards(
    files: dict[str, bytes], shards: bool, link: bool, fails: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        for name, data in files.items():
            with_parents(top / name, data)
        if link and not (top / "by-link").exists():
            (top / "by-link").symlink_to(top / "m")
        before = tree(top)
        with pytest.MonkeyPatch.context() as patch:
            if fails:
                patch.setattr(Output, fails, raising)
            try:
                write(top / ("by-link" if link else "m"), shards=shards)
                wrote = True
            except CheckpointError:
                wrote = False
            except Stop:
                wrote = False
        after = tree(top)
        theirs = {k: v for k, v in before.items() if not (wrote and k in CHECKPOINT)}
        assert {k: after.get(k) for k in theirs} == theirs
        new = {k for k in after if k not in before}
        assert new <= CHECKPOINT if wrote else not new


CHECKPOINT = {"m/config.json", "m/model.safetensors", "m/model.safetensors.index.json"} | {
    f"m/model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
}


class Stop(Exception):
    """The run ends here."""


def raising(*args: Any, **kwargs: Any) -> Any:
    raise Stop


def with_parents(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError:  # a file where a folder would be
        pass


# installing


@pytest.mark.parametrize("kind", ["exception", "crash"])
def test_a_run_that_ends_while_it_installs_leaves_the_old_checkpoint(tmp_path: Path, kind: str) -> None:
    """At every single rename. After a crash the next run brings the old one back before it does anything."""
    write(tmp_path / "m", 1.0, shards=True)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    before = tree(tmp_path / "m")
    ended = 0
    for step in range(100):
        with interrupted(step, kind) as happened, suppress(Stop):
            write(tmp_path / "m", 2.0)
        if not happened:
            break
        ended += 1
        if kind == "exception":
            assert tree(tmp_path) == {f"m/{k}": v for k, v in before.items()}
            continue
        now = tree(tmp_path / "m")
        assert now["tokenizer.json"] == b"{}"
        complete = {k for k in before if now.get(k) == before[k]} == set(before)
        assert complete or "config.json" not in now  # the old one, or none: never a mixture that loads
        assert complete or (tmp_path / "m.partial" / JOURNAL).is_file()
        with pytest.raises(Stop), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Output, "write_shard", raising)
            write(tmp_path / "m", 2.0)
        assert tree(tmp_path) == {f"m/{k}": v for k, v in before.items()}
    assert ended >= 6
    assert set(tree(tmp_path / "m")) == {"config.json", "model.safetensors", "tokenizer.json"}


@contextmanager
def interrupted(step: int, kind: str) -> Iterator[list[int]]:
    """End the run before its rename number ``step`` while it installs; a crash also does none of the mending."""
    happened: list[int] = []
    real, undo, clean = output._move, Output._undo, Output._clean
    count = 0

    def move(path: Path, to: Path) -> None:
        nonlocal count
        if count == step and not happened:
            happened.append(step)
            raise Stop
        count += 1
        real(path, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_move", move)
        if kind == "crash":
            patch.setattr(Output, "_undo", lambda self: None if happened else undo(self))
            patch.setattr(Output, "_clean", lambda self: None if happened else clean(self))
        yield happened


def test_a_finished_shard_that_was_damaged_since_is_made_again(tmp_path: Path) -> None:
    for number, damage in enumerate((b"", b"\0" * 50, None)):
        target = tmp_path / f"m{number}"
        with pytest.raises(Stop), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Output, "install", raising)
            write(target, shards=True, job={"a": 1})
        shard = output.working_directories(target)[0] / "files" / "model-00002-of-00003.safetensors"
        data = shard.read_bytes()
        if damage is None:  # one bit of a value
            shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            shard.write_bytes(data[: len(data) // 2] + damage)
        inodes = {p.name: p.stat().st_ino for p in shard.parent.iterdir()}
        write(target, shards=True, job={"a": 1})
        made = [p.name for p in target.glob("*.safetensors") if p.stat().st_ino != inodes[p.name]]
        assert made == [shard.name]  # and no other
        assert (target / shard.name).read_bytes() == data


@pytest.mark.parametrize("what", ["job.json", "record"])
def test_a_broken_record_is_a_clear_error(tmp_path: Path, what: str) -> None:
    with pytest.raises(Stop), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "install", raising)
        write(tmp_path / "m", job={"a": 1})
    partial = tmp_path / "m.partial"
    for path in (partial / "records").iterdir() if what == "record" else [partial / what]:
        path.write_text('{"size": ')
    with pytest.raises(CheckpointError, match=r"\.json is broken .*remove .*m\.partial and begin again"):
        write(tmp_path / "m", job={"a": 1})
    assert not (tmp_path / "m").exists()


# places that would fail after the work is done, and strangers


def test_links_and_mount_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "m")  # leads nowhere yet
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "m" / CONFIG).is_file()
    write(tmp_path / "out", 2.0)
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["m"]
    # Nothing can be renamed into a mount point from beside it: the work is done inside.
    rename = os.rename

    def across(a: Any, b: Any) -> None:
        if (tmp_path / "disk" / "m" in Path(a).parents) != (tmp_path / "disk" / "m" in Path(b).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(a, b)

    monkeypatch.setattr(os, "rename", across)
    write(tmp_path / "out", 3.0, shards=True)
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["m"]
    assert len(list((tmp_path / "disk" / "m").iterdir())) == 5
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk" / "m")
    write(tmp_path / "out", 4.0)
    assert sorted(p.name for p in (tmp_path / "disk" / "m").iterdir()) == [CONFIG, WEIGHTS]


def test_what_cannot_work_at_the_end_is_found_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pipe", "folder"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / WEIGHTS)
    (tmp_path / "folder" / "model-00007-of-00009.safetensors").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.setattr(Output, "write_shard", lambda *a: pytest.fail("it began to work"))
    for name, message in {
        "pipe": "pipe/model.safetensors is no file",
        "folder": "model-00007-of-00009.safetensors is no file",
        "fifo": "is a file; a directory is needed",
        "circle": "cannot be resolved",
        "a" * 300: "cannot be resolved: File name too long",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            write(tmp_path / name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB more and its disk has 0\.00 GB free; nothing was"):
        write(tmp_path / "small")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["circle", "fifo", "folder", "pipe"]


def test_partial_directories_of_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "m.partial").symlink_to(victim)
    with pytest.raises(CheckpointError, match=r"m\.partial is a link"):
        write(tmp_path / "m")
    assert not list(victim.iterdir())
    (tmp_path / "m.partial").unlink()
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial").chmod(0o777)
    with pytest.raises(CheckpointError, match="belongs to somebody else, or others may write to it"):
        write(tmp_path / "m")
    (tmp_path / "m.partial").chmod(0o700)
    uid = os.geteuid()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="belongs to somebody else"):
        real = os.lstat

        def lstat(path: Any) -> Any:
            found = real(path)
            foreign = Path(path) == tmp_path / "m.partial"
            return os.stat_result([*found[:4], uid + 1 if foreign else found.st_uid, *found[5:]])

        patch.setattr(os, "lstat", lstat)
        write(tmp_path / "m")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("planted", ["link", "file", "hard link"])
def test_planted_files_are_neither_followed_nor_installed(tmp_path: Path, planted: str) -> None:
    with pytest.raises(Stop), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "install", raising)
        write(tmp_path / "m", job={"a": 1})
    secret = tmp_path / "secret"
    secret.write_text("secret")
    name = "model.safetensors" if planted != "file" else "evil.py"
    there = tmp_path / "m.partial" / "files" / name
    there.unlink(missing_ok=True)
    {"link": there.symlink_to, "file": lambda s: shutil.copy(s, there), "hard link": lambda s: os.link(s, there)}[
        planted
    ](secret)
    with pytest.raises(CheckpointError, match=rf"holds 'files/{name}'"):
        write(tmp_path / "m", job={"a": 1})
    assert secret.read_text() == "secret" and not (tmp_path / "m").exists()


# what comes along


def test_copied_files_follow_links_only_within_the_source_and_keep_their_modes(tmp_path: Path) -> None:
    source, secret = tmp_path / "src", tmp_path / "secret"
    source.mkdir()
    secret.write_text("secret")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer.json").chmod(0o600)
    (source / "again.json").symlink_to("tokenizer.json")
    (source / "vocab.txt").symlink_to(secret)
    (source / "etc").symlink_to("/etc")
    (source / "chat_templates").mkdir()
    (source / "chat_templates" / "tools.jinja").write_text("x")
    (source / ".git").mkdir()
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"x")
    for name in (CONFIG, WEIGHTS):
        (source / name).write_text("")
    os.mkfifo(source / "pipe")
    found, left = other_files(source)
    assert sorted(found) == ["again.json", "chat_templates/tools.jinja", "tokenizer.json"]
    assert [line.split(" is ")[0] for line in left] == [
        ".git/", "etc/", "pipe", "vocab.txt", "original/consolidated.00.pth"
    ]  # fmt: skip
    with Output(tmp_path / "out") as out:
        out.begin(None, found, 0)
        for name, path in found.items():
            out.copy(path, name)
        out.install()
    assert tree(tmp_path / "out") == {"again.json": b"{}", "tokenizer.json": b"{}", "chat_templates/tools.jinja": b"x"}
    assert stat.S_IMODE((tmp_path / "out" / "tokenizer.json").stat().st_mode) == 0o600


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("{}")
    (repository / "token").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "vocab.json").symlink_to("../../token")
    found, left = other_files(snapshot)
    assert list(found) == ["tokenizer.json"] and left == [
        "vocab.json is a link that leads out of the source, and is not copied"
    ]


# signals


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_leave_what_can_be_continued(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    real, sent = Output.write_shard, []

    def signalled(self: Output, file: str, *args: Any) -> Any:
        if sent:
            os.kill(os.getpid(), getattr(signal, name))
        sent.append(file)
        return real(self, file, *args)

    monkeypatch.setattr(Output, "write_shard", signalled)
    # Tests that are started in the background ignore SIGINT, and so would the command.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
    before = signal.getsignal(signal.SIGTERM)
    command = ["optimize", str(saved("qwen3_moe")), "--out", str(tmp_path / "m"), "--max-shard-size", "60KB", "--json"]
    assert main(command) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].endswith("; the same command goes on with the files that are finished") and len(error) == 1
    assert not (tmp_path / "m").exists() and signal.getsignal(signal.SIGTERM) is before
    sent.clear()
    monkeypatch.setattr(Output, "write_shard", real)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# two processes


@pytest.mark.slow
def test_two_processes_side_by_side_killed_and_continued(tmp_path: Path) -> None:
    """Whoever gets the lock writes, the other is refused; after any kill the next run gives the same bytes."""
    source = saved("qwen3_moe")
    total = convert(source, tmp_path / "whole", max_shard_bytes=SHARD).bytes_after
    want, rng, ends = tree(tmp_path / "whole"), random.Random(0), set()
    for number in range(6):
        target = tmp_path / f"m{number}"
        children = [child(source, target, rng.randrange(total) if number % 3 else None) for _ in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert set(codes) <= {0, REFUSED, -signal.SIGKILL}
        ends |= set(codes)
        if 0 in codes:
            assert tree(target) == want
        convert(source, target, max_shard_bytes=SHARD)
        assert tree(target) == want and not (tmp_path / f"m{number}.partial").exists()
    assert ends == {0, REFUSED, -signal.SIGKILL}


REFUSED = 3


def child(source: Path, target: Path, killed_after: int | None) -> int:
    """A process that converts, and kills itself after some bytes."""
    pid = os.fork()
    if pid:
        return pid
    try:
        tqdm.set_lock(threading.RLock())  # tqdm's own is one semaphore for all processes

        def progress(done: int, _: int) -> None:
            if killed_after is not None and done >= killed_after:
                os.kill(os.getpid(), signal.SIGKILL)

        convert(source, target, max_shard_bytes=SHARD, progress=progress)
        os._exit(0)
    except CheckpointError as error:
        os._exit(REFUSED if "is being written by another run" in str(error) else 1)
    finally:
        os._exit(1)
