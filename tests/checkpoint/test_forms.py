"""Which form a checkpoint gets when none is asked for, and that everybody reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same, loaded, saved
from transformers import AutoModelForCausalLM

import mxfp4_compile
from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.checkpoint.forms import AUTO, FORMATS, FORMS, PREFERRED, ExpertWeight, written
from mxfp4_compile.tools.families import tiny_model

# The tied head of qwen3_moe is no tensor of the checkpoint, and no layer that is quantized either; hy_v3 and axk2 call
# other layers otherwise in their checkpoints than in the model.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"tie_word_embeddings": True}, "mixtral": {}, "deepseek_v3": {}, "glm4_moe": {}, "olmoe": {},
    "hy_v3": {}, "axk2": {}, "gpt_oss": {},
}  # fmt: skip


def quantization(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


def test_the_names_of_formats() -> None:
    assert FORMATS[0] == AUTO and set(FORMATS[1:]) == {form.name for form in FORMS if form.written}
    assert PREFERRED[0].name == "compressed_tensors" and PREFERRED[-1].name == "mxfp4_compile"
    with pytest.raises(ValueError, match="unknown format 'quark'; known: auto, "):
        written("quark", torch.nn.Module(), [], [])


def test_the_default_is_what_every_reader_reads(tmp_path: Path) -> None:
    model = mxfp4_compile.optimize(loaded("qwen3_moe"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "saved")
    assert quantization(tmp_path / "saved")["quant_method"] == "compressed-tensors"
    assert not any("saved in the form" in note for note in model.mxfp4_report.notes)
    done = convert(saved("qwen3_moe"), tmp_path / "converted")
    assert done.format == done.to_dict()["format"] == "compressed_tensors" and done.report.notes == []
    assert quantization(tmp_path / "converted") == quantization(tmp_path / "saved")
    assert_same(model, mxfp4_compile.load(tmp_path / "converted", dtype=torch.bfloat16))


def test_gpt_oss_is_written_as_published(tmp_path: Path) -> None:
    done = convert(saved("gpt_oss"), tmp_path / "m")
    assert done.format == "gpt_oss" and quantization(tmp_path / "m")["quant_method"] == "mxfp4"
    (note,) = [n for n in done.report.notes if n.startswith("saved in the form gpt_oss")]
    assert "is a bias of experts" in note and "compressed_tensors cannot express it" in note


def test_what_only_our_form_expresses_is_said(tmp_path: Path) -> None:
    model: Any = mxfp4_compile.optimize(
        tiny_model("qwen3_moe", dtype=torch.bfloat16, layers=1, moe_intermediate_size=48, decoder_sparse_step=1)
    )
    with pytest.warns(UserWarning, match=r"in the form mxfp4_compile, as compressed_tensors cannot .* K = 48, no mult"):
        model.save_pretrained(tmp_path / "m")
    assert quantization(tmp_path / "m")["format"] == "mxfp4_compile"
    assert sum("saved in the form mxfp4_compile" in note for note in model.mxfp4_report.notes) == 1
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16))


def test_reasons_are_kept_by_form() -> None:
    def never(_: slice) -> Any:
        raise AssertionError("nothing is read to choose a form")

    odd = ExpertWeight("a.b", ("a.b",), False, 2, 8, 40, False, never, {})
    chosen = written(AUTO, torch.nn.Module(), [odd], [])
    assert chosen.form.name == "mxfp4_compile"
    assert set(chosen.reasons.values()) == {"a.b has K = 40, no multiple of 32"}
    assert [entry.shape for unit in chosen.units for entry in unit.entries] == [(2, 8, 20), (2, 8, 2)]


@pytest.mark.slow
def test_a_process_that_never_imported_us_reads_the_default(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    for family, overrides in FAMILIES.items():
        model: Any = mxfp4_compile.optimize(tiny_model(family, dtype=torch.bfloat16, layers=2, **overrides))
        model.save_pretrained(tmp_path / family)
        torch.save(mxfp4_compile.restore(model).state_dict(), tmp_path / f"{family}.pt")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "for number, name in enumerate(sys.argv[1:]):\n"
        "    placed = [{}, {'device_map': 'auto'}, {'device_map': {'': 'cpu'}}][number % 3]\n"
        "    placed |= {'output_loading_info': True, 'dtype': 'auto'}\n"
        "    model, told = AutoModelForCausalLM.from_pretrained(name, **placed)\n"
        "    assert not any(told.values()), (name, told)\n"
        "    found, wanted = model.state_dict(), torch.load(name + '.pt')\n"
        "    assert found.keys() == wanted.keys(), name\n"
        "    for key in wanted: assert torch.equal(found[key], wanted[key]), (name, key)\n"
        "assert 'mxfp4_compile' not in sys.modules\n"
    )
    names = [str(tmp_path / family) for family in FAMILIES]
    subprocess.run([sys.executable, "-c", script, *names], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
