"""inspect() leaves every stage as a file, with depyf and without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import mxfp4_compile
from mxfp4_compile.inspection import INDEX, STAGES
from mxfp4_compile.passes.observe import observers
from mxfp4_compile.tools.families import tiny_inputs, tiny_model


def _text(paths: list[Path]) -> str:
    return "\n".join(p.read_text() for p in paths)


@pytest.mark.slow
def test_every_stage_of_both_ways(tmp_path: Path) -> None:
    pytest.importorskip("depyf")
    model = tiny_model("qwen3_moe", dtype=torch.float32, layers=1)
    inputs = tiny_inputs(model)
    with mxfp4_compile.inspect(tmp_path / "new" / "dump") as seen, torch.no_grad():
        torch.compile(model, backend="mxfp4_compile")(**inputs)
        torch._dynamo.reset()
        torch.compile(mxfp4_compile.optimize(model))(**inputs)
    assert not observers
    for stage in STAGES:
        assert seen.files[stage], stage
    grouped, fused = "grouped_mm", "mxfp4.moe"
    assert grouped in _text(seen.files["traced"][:1]) and fused not in _text(seen.files["traced"][:1])
    for stage in ("site_rewritten", "rewritten", "before_lowering", "after_lowering", "final", "kernels"):
        assert fused in _text(seen.files[stage]) and grouped not in _text(seen.files[stage]), stage
    assert grouped in _text(seen.files["site_traced"])
    names = {p.name for p in seen.directory.iterdir()}
    for part in ("__transformed_code_", "full_code_for_", "BEFORE_PRE_GRAD", "AFTER_POST_GRAD", "kernel"):
        assert any(part in n for n in names), part
    index = (seen.directory / INDEX).read_text()
    for name in names - {INDEX}:
        assert f"`{name}`" in index, name
    assert "depyf: other" not in index


def test_without_depyf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "depyf", None)
    model = tiny_model("qwen3_moe", dtype=torch.float32, layers=1)
    inputs = tiny_inputs(model)
    compiled = torch.compile(model, backend="mxfp4_compile", options={"inner": "eager"})
    with torch.no_grad():
        compiled(**inputs)  # compiled before: it is compiled again inside
        with mxfp4_compile.inspect(tmp_path) as seen:
            compiled(**inputs)
    assert len(seen.files["traced"]) == len(seen.files["rewritten"]) == 1
    assert "mxfp4.moe" in _text(seen.files["rewritten"])
    index = (tmp_path / INDEX).read_text()
    assert "depyf is not installed" in index and "**kernels**" in index
    with pytest.raises(FileExistsError, match="directory of its own"), mxfp4_compile.inspect(tmp_path):
        pass


def test_a_failing_block_still_leaves_its_files(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), mxfp4_compile.inspect(tmp_path):
        raise RuntimeError("mine")
    assert (tmp_path / INDEX).exists() and not observers
