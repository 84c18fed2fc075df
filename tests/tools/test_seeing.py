"""How commands show things: aligned and wrapped tables, sizes, nearest names, progress in a pipe."""

from __future__ import annotations

import argparse
import io
import re
import sys

import pytest

from mxfp4_compile.ops.registry import known_backends
from mxfp4_compile.text import nearest, size
from mxfp4_compile.tools.commands import tune
from mxfp4_compile.tools.commands.output import Lines, byte_progress, columns, progress_lines, whole
from mxfp4_compile.tools.main import build_parser, main


def test_columns_are_aligned_and_the_last_is_wrapped() -> None:
    command = "pip install one two three"
    text = columns([("a", "no", "word " * 12), ("longer", "yes", f"x; {whole(command)}"), ("b", "-", "")], width=50)
    lines = text.splitlines()
    assert {line.index("word") for line in lines if "word" in line} == {15}
    assert lines[0].startswith("  a       no   word") and sum(line.count("word") for line in lines) == 12
    assert max(map(len, lines)) <= 50
    assert any(command in line for line in lines), "a command stays in one line, with plain spaces"
    assert lines[-1] == "  b       -" and columns([]) == ""


def test_env_stays_within_its_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    backends = lines[lines.index("Backends") + 1 : lines.index("Optional parts") - 1]
    firsts = [match for line in backends if (match := re.match(r"  (\S+ +)(\S+ +)(available|no)\b", line))]
    assert len(firsts) == len(known_backends()) and len({match.end(2) for match in firsts}) == 1
    assert all(len(line) <= 90 for line in lines if "pip install" not in line)


def test_sizes() -> None:
    counts = (0, 1023, 1536, 20 << 20, (1 << 30) - (1 << 20), 1 << 30, 18_190_000_000)
    assert [*map(size, counts)] == ["0 B", "1023 B", "1.5 KiB", "20.0 MiB", "1023.0 MiB", "1.00 GiB", "16.94 GiB"]


def test_a_misspelt_name_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert nearest("Qwen3-MoE", ["qwen3_moe", "qwen2_moe", "mixtral"])[0] == "qwen3_moe"
    assert nearest("zzz", ["qwen3_moe"]) == []
    assert main(["explain", "--family", "mixtrall"]) == 1
    error = capsys.readouterr().err
    assert "unknown family 'mixtrall'; the nearest: mixtral" in error and "gpt_oss" not in error
    for argv, word in (
        (["optimise", "m"], "optimize"),
        (["optimize", "m", "--out", "o", "--scale-rule", "flor"], "floor"),
    ):
        with pytest.raises(SystemExit) as done:
            main(argv)
        assert done.value.code == 2
        assert f"is not known; the nearest: {word}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "invalid choice" in capsys.readouterr().err


def arguments(*options: str) -> argparse.Namespace:
    return build_parser().parse_args(["optimize", "m", "--out", "o", *options])


def test_long_work_says_a_line_every_ten_seconds() -> None:
    now = [0.0]
    said: list[str] = []
    lines = Lines(lambda: now[0], said.append)
    for second in range(0, 41):
        now[0] = float(second)
        lines((second + 60) << 20, 160 << 20)  # 60 MiB were there from before
    assert len(said) == 4
    assert said[0] == "70.0 MiB of 160.0 MiB (44%), about 90 s left"
    assert said[-1] == "100.0 MiB of 160.0 MiB (62%), about 60 s left"


def test_progress_in_a_pipe_and_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lines, "EVERY", 0.0)
    for options, wanted in ((), True), (("--quiet",), False), (("--json",), False):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        args = arguments(*options)
        progress_lines(args)("a step")
        with byte_progress(args) as progress:
            progress(1 << 20, 4 << 20)
        with tune._bar(args, "a layer") as bar:
            for done in range(3):
                bar("compiling", done, 3)
        said = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
        assert said == (
            ["... a step", "... 1.0 MiB of 4.0 MiB (25%)", "... compiling a layer, 3 candidates"] if wanted else []
        )


def test_every_command_is_quiet_on_request() -> None:
    for argv in ["demo"], ["env"], ["explain", "m"], ["compare", "m", "--text", "t"], ["tune"], ["bench"], ["backends"]:
        assert build_parser().parse_args([*argv, "--quiet"]).quiet
