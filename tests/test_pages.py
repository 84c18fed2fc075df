"""README and docs/: their code runs, what they name exists, and their figures are those of the committed results."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mxfp4_compile.tools.families import tiny_model
from mxfp4_compile.tools.main import COMMANDS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.smoke
def test_readme_is_short_and_its_commands_stay() -> None:
    assert len(README.splitlines()) <= 90
    for command in ('pip install -e ".[demo]" && mxfp4-compile demo', 'pip install -e ".[test]" && pytest'):
        assert command in README


@pytest.mark.slow
def test_readme_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first block, on a CPU and a tiny model."""
    tiny_model("qwen3_moe", layers=1).save_pretrained(tmp_path)
    vocabulary = {"<unk>": 0, "Experts": 1, "are": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    code = README.split("```python\n")[1].split("```")[0]
    changed = code.replace('"Qwen/Qwen3-30B-A3B"', repr(str(tmp_path))).replace('"cuda"', '"cpu"')
    assert len(code.splitlines()) <= 9 and changed.count(str(tmp_path)) == 1 and changed.count('"cpu"') == 2
    exec(compile(changed, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "1 of 1 MoE modules rewritten" in out and "tensor(" in out


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    named = re.findall(r"`((?:mxfp4_compile|tests|benchmarks|docs|examples)/[\w./-]*)`", text)
    named += [f"benchmarks/results/{name}" for name in re.findall(r"`([\w-]+\d{4}-\d{2}-\d{2}[\w-]*\.\w+)`", text)]
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.smoke
def test_the_map_has_every_room() -> None:
    text = page("architecture.md")
    package = ROOT / "mxfp4_compile"
    rooms = [p.parent for p in package.rglob("*.py")] + [p for p in package.glob("*.py") if not p.name.startswith("_")]
    inner = {"backends", "triton", "triton_kernels", "forms", "commands"}  # named with the room that holds them
    for room in set(rooms) - {package}:
        name = room.relative_to(ROOT).as_posix()
        assert name in text or (room.name in inner and f"`{room.name}/`" in text), name


def test_every_command_is_on_its_page() -> None:
    text = page("command-line.md")
    for command in COMMANDS:
        assert f"| `{command.__name__.rpartition('.')[2]}" in text


def decode(name: str, mode: str) -> dict[int, dict[str, Any]]:
    data = json.loads((RESULTS / f"generate-qwen3-30b-a3b-nvidia_{name}.json").read_text(encoding="utf-8"))
    return {row["batch"]: row for row in data["modes"][mode]["decode"]}


@pytest.mark.parametrize(
    ("line", "name", "mode"),
    [
        ("| H100, tokens/s |", "h100-2026-11-26", "ours"),
        ("| the same, transformers' eager loop, bf16 | 20 | 158 |", "h100-2026-11-26", "hf_eager"),
        ("| H200, kernels of 2026-11-23, tokens/s |", "h200-2026-11-23", "ours"),
        ("| the same, transformers' compiled static cache, bf16 |", "h200-2026-11-23", "hf_static"),
        ("| the same, transformers' eager loop, bf16 | 20 | 167 |", "h200-2026-11-23", "hf_eager"),
    ],
)
def test_figures_are_those_of_the_files(line: str, name: str, mode: str) -> None:
    (row,) = [text for text in page("figures.md").splitlines() if text.startswith(line)]
    rows = decode(name, mode)
    cells = [cell.strip() for cell in row.split("|")[2:5]]
    for batch, cell in zip((1, 8, 64), cells, strict=True):
        assert cell == (f"{rows[batch]['tokens_per_second']:.0f}" if batch in rows else "")


def test_layer_times_are_those_of_the_file() -> None:
    text = (RESULTS / "nvidia_h100_80gb_hbm3-2026-11-26.txt").read_text(encoding="utf-8")
    table = page("figures.md").split("| microseconds |")[1].split("\n\n")[0]
    times = re.findall(r"(?<=\| )\d+\.\d(?= \|)", table)
    assert len(times) == 24
    for time in times:
        assert re.search(rf"(?<![\d.]){re.escape(time)}(?!\d)", text), time


def test_the_page_of_versions_is_as_its_script_writes_it() -> None:
    """But for the files of measurements, of which more may come: their versions are there."""
    spec = importlib.util.spec_from_file_location("generate_versions", ROOT / "docs" / "generate_versions.py")
    assert spec is not None and spec.loader is not None
    versions: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    written, made = page("versions.md"), versions.render()
    assert written.partition(versions.MEASURED)[0] == made.partition(versions.MEASURED)[0], "docs/generate_versions.py"
    for key in versions.measured():
        assert f"| {' | '.join(key)} |" in written, "docs/generate_versions.py"
    script = "fresh a\n pip install -q x==1\nf() {\n  fresh b\n  pytest -m slow\n}\nmypy\n"
    assert list(versions.environments(script)) == [("a", ["x==1"], ["`mypy`"]), ("b", [], ["`pytest -m slow`"])]
