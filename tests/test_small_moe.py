"""The recipe of examples/small_moe: its pack of text, and a run of it at a tiny size, to the table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from array import array
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "small_moe"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"small_moe_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pack_is_read_as_it_was_written(tmp_path: Path) -> None:
    pack = script("pack")
    splits = {"code": array("H", range(0, 65536, 7)), "held-code": array("H", [3, 65535])}
    file = tmp_path / "text.xz"
    pack.pack(file, splits, "a tokenizer", {"vocabulary": 65536})
    found, header = pack.unpack(file)
    assert (
        found == splits and header["tokenizer"] == "a tokenizer" and header["tokens"] == {"code": 9363, "held-code": 2}
    )
    with pytest.raises(EOFError):
        file.write_bytes(file.read_bytes()[:-40])
        pack.unpack(file)


@pytest.mark.slow
def test_training_goes_on_and_the_table_is_written(tmp_path: Path) -> None:
    chain = array("H", [0])
    for i in range(6000):  # the next token follows from the last, but for one of two steps
        chain.append((5 * chain[-1] + 7 + 3 * (i * i % 7 > 3)) % 97)
    sizes = {name: 2 * len(chain) for name in ("held-code", "held-prose", "code", "prose")}
    facts = {"vocabulary": 97, "end": 0, "bytes": sizes}
    script("pack").pack(tmp_path / "text.xz", dict.fromkeys(sizes, chain), "", facts)
    tiny = (
        "--device cpu --layers 1 --hidden 64 --experts 4 --width 32 --top-k 2 --window 32 --batch 128 --warmup 5 "
        "--calibration-tokens 512 --own-tokens 128 --judged-windows 2 --show-seconds 1 --lr 3e-3"
    ).split()

    def run(train: float, judge: float) -> None:
        command = [sys.executable, str(FOLDER / "train.py"), "--text", str(tmp_path / "text.xz")]
        command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), *tiny]
        command += ["--train-seconds", str(train), "--judge-seconds", str(judge)]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(FOLDER.parents[1]), os.environ.get("PYTHONPATH")))),
        }
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    run(1.0, 0.0)
    first = json.loads((tmp_path / "out" / "model.json").read_text())
    assert first["steps"] > 0 and not (tmp_path / "out" / "results.json").exists()
    run(first["train_seconds"] + 1.0, 1e6)
    second = json.loads((tmp_path / "out" / "model.json").read_text())
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert second["steps"] > first["steps"] and curve[-1]["step"] == second["steps"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not results["failed"] and not results["not_reached"]
    rows = {row["name"]: row for row in results["rows"]}
    assert len(rows) == 13
    for text in ("code", "prose"):
        assert rows["nearest, mse"][text]["of_nearest"] == 1.0
        halves = [
            rows[f"nearest, {part}"][text]["of_nearest"] for part in ("gate_up alone (K = 64)", "down alone (K = 32)")
        ]
        assert all(0 < half < 1 for half in halves)
        assert rows["calibrated on training text"][text]["of_nearest"] < 1.0
    table = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert len(table) == 2 + len(rows) and all(line.count("|") == 8 for line in table)
