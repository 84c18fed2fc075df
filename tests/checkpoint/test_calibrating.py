"""Calibration of checkpoints: loading and converting agree bit for bit, killed or not; what the files say of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import codes, saved
from tqdm import tqdm

import mxfp4_compile
from mxfp4_compile import CheckpointError, OptimizeError
from mxfp4_compile.calibration.driver import Options
from mxfp4_compile.checkpoint import calibrating
from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.tools.main import main

WINDOW, COUNT = 40, 8
FAMILY = "qwen3_moe"


def options(**changes: Any) -> Options:
    ids = torch.randint(3, 100, (COUNT * WINDOW,), generator=torch.Generator().manual_seed(0))
    return Options(**{"text": ids, "tokens": COUNT * WINDOW, "window": WINDOW, **changes})


def note_in(directory: Path) -> dict[str, Any]:
    """What config.json says of the calibration, whatever the form."""
    config = json.loads((directory / "config.json").read_text())
    beside = config.get("mxfp4_compile") or config["quantization_config"]
    return beside["calibration"]


def listing(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "m"
    convert(saved(FAMILY), out, calibration=options(), max_shard_bytes=40_000)
    return out


def test_loading_and_converting_agree(converted: Path) -> None:
    loaded = mxfp4_compile.load(saved(FAMILY), calibration=options())
    again = mxfp4_compile.load(converted)
    ours, theirs = codes(loaded), codes(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    plain = codes(mxfp4_compile.load(saved(FAMILY)))
    assert not all(torch.equal(ours[n], plain[n]) for n in ours)
    report = loaded.mxfp4_report
    assert all(s.calibrated and s.weight_error_mean > 0.014 for s in report.rewritten)
    assert all(s.held_error <= s.nearest_held_error for s in report.calibration.sites)


def test_what_the_checkpoint_says(converted: Path, tmp_path: Path) -> None:
    note = note_in(converted)
    assert (note["tokens"], note["window"], note["seed"], note["sequential"]) == (280, WINDOW, 0, False)
    assert note["text"] == "token ids" and len(note["text_hash"]) == 64 and "torch" in note["versions"]
    model = mxfp4_compile.load(converted)
    assert f"calibrated when it was made, on 280 tokens of token ids (SHA-256 {note['text_hash']})" in str(
        model.mxfp4_report
    )
    model.save_pretrained(tmp_path / "again")  # a copy of a copy still says so
    assert note_in(tmp_path / "again") == note
    assert not [p for p in converted.iterdir() if p.name.startswith("calibration")]


@pytest.mark.slow
def test_the_note_lies_beside_what_other_readers_read(tmp_path: Path) -> None:
    convert(saved(FAMILY), tmp_path / "m", format="compressed_tensors", calibration=options())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "calibration" not in config["quantization_config"]
    assert config["mxfp4_compile"]["calibration"]["tokens"] == 280


@pytest.mark.slow
@pytest.mark.parametrize("sites_before", [0, 1])
def test_interrupted_and_resumed(
    converted: Path, sites_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the text, or after one site: what is there is not made again, and the files are the same."""
    put, made = calibrating.DiskShelf.put, []

    def stops(self: Any, report: Any, found: Any) -> None:
        if len(made) == sites_before:
            raise KeyboardInterrupt
        made.append(report.names)
        put(self, report, found)

    monkeypatch.setattr(calibrating.DiskShelf, "put", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(saved(FAMILY), tmp_path / "m", calibration=options(), max_shard_bytes=40_000)
    monkeypatch.setattr(
        calibrating.DiskShelf, "put", lambda self, report, found: (made.append(report.names), put(self, report, found))
    )
    assert not (tmp_path / "m").exists()
    other = pytest.raises(CheckpointError, match=r"half of another conversion \(calibration differ\)")
    with other:
        convert(saved(FAMILY), tmp_path / "m", calibration=options(seed=3), max_shard_bytes=40_000)
    convert(saved(FAMILY), tmp_path / "m", calibration=options(), max_shard_bytes=40_000)
    assert len(made) == 2
    assert listing(tmp_path / "m") == listing(converted)


def _in_a_child(work: Callable[[], Any]) -> int:
    """Run ``work`` in a fork of this process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            # tqdm's own lock is one semaphore for both processes: killed with it, the child leaves its parent waiting.
            tqdm.set_lock(threading.RLock())
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.slow
def test_killed_at_twenty_points_and_resumed(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before a step that makes something durable (a file's bytes, or its name), at 20 places of a whole run."""
    steps = 0
    last: int | None = None

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if steps == last:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            return real(*args, **kwargs)

        return step

    def make(target: Path) -> None:
        convert(saved(FAMILY), target, calibration=options(), max_shard_bytes=40_000)

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    make(tmp_path / "whole")
    want, whole = listing(converted), steps
    assert listing(tmp_path / "whole") == want and whole >= 20
    target = tmp_path / "killed"
    for point in range(20):
        steps, last = 0, point * whole // 20
        assert os.WIFSIGNALED(_in_a_child(lambda: make(target))) and not target.exists()
        last = None
        make(target)
        assert listing(target) == want, f"killed before step {point * whole // 20} of {whole}"
        shutil.rmtree(target)


def test_what_cannot_be_calibrated(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is MXFP4 already: its original weights"):
        convert(converted, tmp_path / "m", calibration=options())
    with pytest.raises(OptimizeError, match="is MXFP4 in the checkpoint: its original weights"):
        mxfp4_compile.load(converted, calibration=options())
    with pytest.raises(OptimizeError, match="which load"):
        mxfp4_compile.load(saved(FAMILY), calibration=options(sequential=True))
    with pytest.raises(ValueError, match="less than one window"):
        convert(saved(FAMILY), tmp_path / "m", calibration=options(text=torch.arange(30)))
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


@pytest.mark.slow
def test_layer_after_layer_in_the_converter(converted: Path, tmp_path: Path) -> None:
    done = convert(saved(FAMILY), tmp_path / "m", calibration=options(sequential=True))
    assert "layer after layer" in str(done.report.calibration)
    model = mxfp4_compile.load(tmp_path / "m")
    ours, theirs = codes(model), codes(mxfp4_compile.load(converted))
    assert not all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "m")
    assert main(["optimize", str(saved(FAMILY)), "--out", out, "--sequential"]) == 1
    assert "--sequential says how to calibrate" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("some text")
    assert main(["optimize", str(saved(FAMILY)), "--out", out, "--calibrate", str(text)]) == 1
    assert "no tokenizer to read a text with" in capsys.readouterr().err
    numbers = ["--calibration-tokens", "80", "--calibration-window", "20", "--seed", "1"]
    assert main(["optimize", str(saved(FAMILY)), "--out", out, "--calibrate-self", *numbers]) == 0
    said = capsys.readouterr().out
    assert "calibrated on 60 tokens of text that the model wrote itself (windows of 20, seed 1)" in said
    assert note_in(tmp_path / "m")["text"] == "text that the model wrote itself"
    with pytest.raises(SystemExit):
        main(["optimize", "m", "--out", out, "--calibrate", "a", "--calibrate-self"])
