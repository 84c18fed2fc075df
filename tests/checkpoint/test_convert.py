"""The converter: the same bits as optimize() and save(), killed or not, in little memory."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same, loaded, saved
from paths import SUPPORT
from safetensors.torch import load_file
from tqdm import tqdm

import mxfp4_compile
from mxfp4_compile import CheckpointError
from mxfp4_compile.checkpoint import files
from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.tools import main as cli

SHARD = 30_000


def _listing(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_same_bits_as_optimize_and_save(family: str, tmp_path: Path) -> None:
    optimized = mxfp4_compile.optimize(loaded(family))
    form = {"qwen3_moe": "compressed_tensors", "gpt_oss": "gpt_oss"}[family]
    done = convert(saved(family), tmp_path / "own", max_shard_bytes=SHARD, format="mxfp4_compile")
    assert done.files > 2 and done.bytes_after < 0.6 * done.bytes_before
    assert_same(optimized, mxfp4_compile.load(tmp_path / "own", dtype=torch.bfloat16))
    # To another form and back, through codes only.
    convert(tmp_path / "own", tmp_path / "other", format=form)
    convert(tmp_path / "other", tmp_path / "back", max_shard_bytes=SHARD, format="mxfp4_compile")
    assert _listing(tmp_path / "back") == _listing(tmp_path / "own")
    optimized.save_pretrained(tmp_path / "saved", format="mxfp4_compile")
    ours = json.loads((tmp_path / "own" / "config.json").read_text())["quantization_config"]
    theirs = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert ours["weight_errors"].keys() == theirs["weight_errors"].keys()
    for name, error in ours["weight_errors"].items():
        assert error == pytest.approx(theirs["weight_errors"][name], rel=1e-4)


def _killed(target: Path, *, after: int | None, seconds: float | None = None, form: str = "auto") -> bool:
    """Convert in a child process that is killed after some bytes, or seconds after its first; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            # tqdm's own lock is one semaphore for both processes: killed with it, the child leaves its parent waiting.
            tqdm.set_lock(threading.RLock())

            def progress(done: int, total: int) -> None:
                if after is not None and done >= after:
                    os.kill(os.getpid(), signal.SIGKILL)
                if seconds is not None and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
                    # Nobody handles its signal: it ends the process wherever it is.
                    signal.setitimer(signal.ITIMER_REAL, seconds)

            convert(saved("qwen3_moe"), target, max_shard_bytes=SHARD, format=form, progress=progress)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _check_kills(tmp_path: Path, points: int, form: str) -> None:
    whole = convert(saved("qwen3_moe"), tmp_path / "whole", max_shard_bytes=SHARD, format=form)
    want = _listing(tmp_path / "whole")
    rng = random.Random(0)
    resumed = 0
    for point in range(points):
        target = tmp_path / f"killed{point}"
        assert _killed(target, after=rng.randrange(whole.bytes_after), form=form)
        assert not target.exists()
        with pytest.raises(CheckpointError):  # nothing that loads is left
            files.weight_files(target)
        done = convert(saved("qwen3_moe"), target, max_shard_bytes=SHARD, format=form)
        resumed += done.resumed
        assert _listing(target) == want
        assert not target.with_name(target.name + ".partial").exists()
    assert resumed  # finished files were not made again


def test_killed_and_resumed(tmp_path: Path) -> None:
    _check_kills(tmp_path, 2, "mxfp4_compile")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mxfp4_compile", "compressed_tensors"])
def test_killed_at_twenty_random_points_and_resumed(form: str, tmp_path: Path) -> None:
    _check_kills(tmp_path, 20, form)


@pytest.mark.slow
def test_killed_again_and_again_at_random_times(tmp_path: Path) -> None:
    told: list[float] = []
    now = lambda *_: told.append(time.perf_counter())
    convert(saved("qwen3_moe"), tmp_path / "whole", max_shard_bytes=SHARD, progress=now)
    writing = time.perf_counter() - told[0]
    want, killed = _listing(tmp_path / "whole"), tmp_path / "killed"
    rng, kills = random.Random(1), 0
    for _ in range(20):
        if _killed(killed, after=None, seconds=rng.uniform(0, 0.8) * writing):
            kills += 1
        else:  # done before: begin again, and sooner, should the machine have been slower when it was timed
            assert _listing(killed) == want
            shutil.rmtree(killed)
            writing *= 0.8
    convert(saved("qwen3_moe"), killed, max_shard_bytes=SHARD)
    assert kills and _listing(killed) == want


def test_a_half_of_another_conversion_is_not_continued(tmp_path: Path) -> None:
    assert _killed(tmp_path / "m", after=SHARD + 1)
    with pytest.raises(CheckpointError, match=r"m.partial is half of another conversion \(scale_rule differ\)"):
        convert(saved("qwen3_moe"), tmp_path / "m", max_shard_bytes=SHARD, scale_rule="even")
    (tmp_path / "n.partial").mkdir()
    (tmp_path / "n.partial" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no interrupted run of ours"):
        convert(saved("qwen3_moe"), tmp_path / "n")
    assert (tmp_path / "n.partial" / "notes.txt").read_text() == "mine"


def test_a_full_disk_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m"
    convert(saved("qwen3_moe"), target, scale_rule="floor")
    before = _listing(target)
    taken = 0

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        nonlocal taken
        taken += size
        if taken > 3 * SHARD:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fallocate)
        with pytest.raises(CheckpointError, match=r"m\.partial/files/model-.*cannot be written: the disk is full"):
            convert(saved("qwen3_moe"), target, max_shard_bytes=SHARD)
    assert _listing(target) == before
    assert convert(saved("qwen3_moe"), target, max_shard_bytes=SHARD).resumed >= 1
    assert _listing(target) != before


def test_other_files_come_along_and_skipped_modules_stay(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved("qwen3_moe"), source)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"old")
    done = convert(source, tmp_path / "out", skip=["model.layers.0.*"])
    assert [s.outcome for s in done.report.sites] == ["skipped"]
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / "pytorch_model.bin").exists()
    optimized = mxfp4_compile.optimize(loaded("qwen3_moe"), skip=["model.layers.0.*"])
    again: Any = type(optimized).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert_same(optimized, again)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dbrx", "longcat_flash", "nllb_moe", "switch_transformers"])
def test_experts_that_lie_apart_or_flattened(family: str, tmp_path: Path) -> None:
    convert(saved(family), tmp_path / "out", max_shard_bytes=SHARD)
    optimized = mxfp4_compile.optimize(loaded(family))
    assert_same(optimized, mxfp4_compile.load(tmp_path / "out"))
    mxfp4_compile.save(optimized, tmp_path / "saved")
    ours, theirs = (
        {name: value for file in (tmp_path / of).glob("*.safetensors") for name, value in load_file(file).items()}
        for of in ("out", "saved")
    )
    packed = {name for name in ours if name.endswith(("_packed", "_scales"))}
    assert packed and packed == {name for name in theirs if name.endswith(("_packed", "_scales"))}
    assert all(torch.equal(ours[name], theirs[name]) for name in packed)


def test_nothing_is_converted_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(saved("qwen3_moe"), saved("qwen3_moe"))
    with pytest.raises(CheckpointError, match="gate_up_proj_bias is a bias"):
        convert(saved("gpt_oss"), tmp_path / "out", format="compressed_tensors")
    broken = tmp_path / "broken"
    shutil.copytree(saved("qwen3_moe"), broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"broken/model\.safetensors cannot be read"):
        convert(broken, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["optimize", str(saved("qwen3_moe")), "--out", str(tmp_path / "m")]
    assert cli.main([*arguments, "--json", "--max-shard-size", "30KB", "--format", "compressed_tensors"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert cli.main([*arguments]) == 0  # an older output is replaced
    assert re.search(r"KiB -> .* KiB in 1 file,", capsys.readouterr().out)
    assert_same(mxfp4_compile.optimize(loaded("qwen3_moe")), mxfp4_compile.load(tmp_path / "m", dtype=torch.bfloat16))
    assert cli.main(["optimize", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--format", "gguf"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of anonymous memory")
def test_anonymous_memory(tmp_path: Path) -> None:
    # 1 GiB of weights; experts of the size that Qwen3-30B-A3B has. 8 GiB were measured by the same script.
    command = [sys.executable, str(SUPPORT / "convert_memory.py"), str(tmp_path), "1"]
    result = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    size, base, peak = (int(n) for n in result.stdout.split()[-3:])
    assert size >= 1 << 30
    assert peak <= 1.5 * 2**30 and peak - base <= 400 << 20, f"{(peak - base) >> 20} MiB over {base >> 20} MiB"
