"""The scripts of examples/cookbook run as they are, and print what they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

COOKBOOK = Path(__file__).parents[1] / "examples" / "cookbook"
PRINTED = {
    "first_use.py": r"4 of 4 MoE modules rewritten.*experts: 6,291,456 -> 1,671,168 bytes.*TIMON:",
    "generate_and_chat.py": r"\[0 tokens were in the cache, \d+ are\]\n\[[1-9]\d+ tokens were in.*APEMANTUS",
    "load_big.py": r"4 of 4 MoE modules rewritten.*form compressed_tensors.*bit for bit: True",
    "save_for_others.py": r"auto: quant_method compressed-tensors.*mxfp4_compile: .*bit for bit: True",
    "calibrate.py": r"calibrated on 7168 tokens.*rounded to nearest 5\.\d+, calibrated [23]\.\d+ thousandths",
    "several_gpus.py": r"2 ranks: experts split by whole experts \(8 of 16 each\).*'TIMON:.*; one checkpoint",
    "compile_and_inspect.py": r"index\.md: .*compiled against plain: relative difference \S+\n.*\S+ from these",
}


def test_all_scripts_are_listed() -> None:
    assert {script.name for script in COOKBOOK.glob("*.py")} == set(PRINTED)
    listed = re.findall(r"\]\((\w+\.py)\)", (COOKBOOK / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(PRINTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRINTED))
def test_script_runs(name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    script = COOKBOOK / name
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    out = capfd.readouterr().out
    assert re.search(PRINTED[name], out, re.DOTALL), out
    differences = re.findall(r"(?:relative difference|backend:) (\d\S+)", out)
    assert all(float(difference) < 0.02 for difference in differences), out
