"""Who reads what is saved: from_pretrained keeps the bits where we were imported, and elsewhere reads all or raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same, loaded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.quantizers.auto import AutoHfQuantizer

import mxfp4_compile
from mxfp4_compile import CheckpointError, mx
from mxfp4_compile.checkpoint.forms import own_config
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.families import tiny_model

SIX = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "olmoe"]


def test_transformers_alone_refuses_the_own_form(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no `quant_method` attribute"):
        AutoHfQuantizer.supports_quant_method(own_config({}))
    config = mxfp4_compile.Mxfp4CompileConfig().to_dict()
    with pytest.raises(ValueError, match="no `quant_method` attribute"):
        AutoHfQuantizer.supports_quant_method(config)


@pytest.mark.slow
def test_a_process_that_never_imported_us_gets_an_error(tmp_path: Path) -> None:
    for family in SIX:
        mxfp4_compile.optimize(loaded(family)).save_pretrained(tmp_path / family, format="mxfp4_compile")
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "for name in sys.argv[1:]:\n"
        "    try: AutoModelForCausalLM.from_pretrained(name)\n"
        "    except ValueError as error: assert 'quant_method' in str(error), error\n"
        "    else: raise SystemExit(f'{name} became a model')\n"
        "assert 'mxfp4_compile' not in sys.modules\n"
    )
    names = [str(tmp_path / family) for family in SIX]
    subprocess.run([sys.executable, "-c", script, *names], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("form", ["mxfp4_compile", "compressed_tensors", "mxfp4"])
def test_a_plain_from_pretrained_keeps_the_bits_of_every_form(form: str, tmp_path: Path) -> None:
    model = mxfp4_compile.optimize(loaded("qwen3_moe"), scale_rule="floor")
    mxfp4_compile.save(model, tmp_path / "m", form)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert_same(model, again)
    assert again.mxfp4_report.scale_rule == "floor"
    # With a configuration of the user's, too, which says how and not what.
    config = mxfp4_compile.Mxfp4CompileConfig(backend="reference")
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, quantization_config=config)
    assert {site.backend for site in chosen.mxfp4_report.rewritten} == {"reference"}


def test_a_checkpoint_of_the_first_version_is_read(tmp_path: Path) -> None:
    model = mxfp4_compile.optimize(loaded("qwen3_moe"))
    mxfp4_compile.save(model, tmp_path / "m", "mxfp4_compile")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    said = config["quantization_config"]
    del said["format"]
    config["quantization_config"] = {**said, "quant_method": "mxfp4_compile", "format_version": 1}
    path.write_text(json.dumps(config))
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16))


@pytest.mark.parametrize("tied", [False, True])
def test_compressed_tensors_in_stock_transformers(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    model: Any = mxfp4_compile.optimize(
        tiny_model("qwen3_moe", dtype=torch.bfloat16, layers=1, tie_word_embeddings=tied)
    )
    mxfp4_compile.save(model, tmp_path / "m", "compressed_tensors")
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in said["ignore"]
    ((name, site),) = mxfp4_sites(model).items()
    expected = {k: v for p in site.projections for k, v in site.dequantized(p).items()}
    # transformers' own way, which our hook stands before.
    monkeypatch.setattr(modeling_utils, "get_hf_quantizer", modeling_utils.get_hf_quantizer.__wrapped__)
    from transformers import CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    stock = type(model).from_pretrained(tmp_path / "m", dtype=torch.bfloat16, quantization_config=config)
    assert not hasattr(stock, "mxfp4_report")
    theirs = stock.get_submodule(name)
    for which in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(theirs, which), expected[which])
    assert torch.equal(stock.lm_head.weight, model.lm_head.weight)


def test_the_mxfp4_form_of_any_family(tmp_path: Path) -> None:
    """``*_blocks`` [E, N, K/32, 16] and ``*_scales`` [E, N, K/32], as transformers' quantizer names and shapes them."""
    model: Any = mxfp4_compile.optimize(tiny_model("mixtral", dtype=torch.bfloat16, layers=1))
    mxfp4_compile.save(model, tmp_path / "m", "mxfp4")
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mxfp4" and "lm_head" in said["modules_to_not_convert"]
    assert not any("experts" in name for name in said["modules_to_not_convert"])
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    ((name, site),) = mxfp4_sites(model).items()
    for projection in site.projections:
        (source,) = projection.source.parameters
        blocks, scales = tensors[f"{name}.{source}_blocks"], tensors[f"{name}.{source}_scales"]
        e, n, k = projection.shape
        assert blocks.shape == (e, n, k // 32, 16) and scales.shape == (e, n, k // 32)
        assert torch.equal(
            mx.dequantize(blocks.flatten(-2), scales, k, torch.bfloat16), site.dequantized(projection)[source]
        )
    left = mxfp4_compile.optimize(tiny_model("mixtral", dtype=torch.bfloat16), skip=["*.layers.0.*"])
    with pytest.raises(CheckpointError, match="is not in MXFP4, as all experts must be: the mxfp4 form"):
        mxfp4_compile.save(left, tmp_path / "left", "mxfp4")
