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
    "compile_and_inspect.py": r"index\.md: .*compiled against plain: relative difference \S+\n.*\S+ from these",
}


@pytest.mark.slow
def test_all_scripts_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = sorted(COOKBOOK.glob("*.py"))
    assert {script.name for script in scripts} == set(PRINTED)
    listed = re.findall(r"\]\((\w+\.py)\)", (COOKBOOK / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(PRINTED)
    for script in scripts:
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 40, script.name
        monkeypatch.setattr(sys, "argv", [str(script)])
        runpy.run_path(str(script), run_name="__main__")
        out = capsys.readouterr().out
        assert re.search(PRINTED[script.name], out, re.DOTALL), (script.name, out)
        differences = re.findall(r"(?:relative difference|backend:) (\d\S+)", out)
        assert all(float(difference) < 0.02 for difference in differences), out
