"""Loading on a GPU: peak memory, the same bits as on a CPU, experts offloaded to CPU memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same, codes, loaded, saved

import mxfp4_compile
from mxfp4_compile import Mxfp4CompileConfig
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 6, 32, 1024, 768


def test_peak_memory_is_the_final_one_and_a_layer(tmp_path: Path) -> None:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}
    tiny_model("qwen3_moe", dtype=torch.bfloat16, layers=LAYERS, **sizes).save_pretrained(tmp_path / "bf16")
    mxfp4_compile.load(saved("qwen3_moe"), device_map="cuda")  # what the first use of a GPU leaves
    layer = 3 * EXPERTS * HIDDEN * INTERMEDIATE * 2
    for source in ("bf16", "mxfp4"):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        model = mxfp4_compile.load(tmp_path / source, device_map="cuda")
        final, peak = torch.cuda.memory_allocated() - base, torch.cuda.max_memory_allocated() - base
        assert final < 0.5 * LAYERS * layer
        assert peak <= final + layer, f"{(peak - final) / layer:.2f} layers over the final model"
        if source == "bf16":
            model.save_pretrained(tmp_path / "mxfp4")
        del model


def test_same_bits_as_on_a_cpu(tmp_path: Path) -> None:
    ours = mxfp4_compile.load(saved("gpt_oss"), device_map="cuda", dtype=torch.bfloat16)
    theirs = mxfp4_compile.load(saved("gpt_oss"), dtype=torch.bfloat16)
    first, second = codes(ours), codes(theirs)
    assert first.keys() == second.keys() and all(torch.equal(first[n].cpu(), second[n]) for n in first)
    mxfp4_compile.save(ours, tmp_path / "m", "gpt_oss")  # from a kernel's own layout back to the canonical one
    assert_same(theirs, mxfp4_compile.load(tmp_path / "m", dtype=torch.bfloat16))


@pytest.mark.parametrize("device_map", ["auto", "offloaded"])
def test_device_maps(device_map: str) -> None:
    pytest.importorskip("accelerate")
    places: Any = device_map
    if device_map == "offloaded":
        names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
        places = dict.fromkeys(names, 0) | {"model.layers.1": "cpu"}
    cls = type(loaded("qwen3_moe"))

    def load(where: Any) -> Any:
        config = Mxfp4CompileConfig(progress=False)
        return cls.from_pretrained(
            saved("qwen3_moe"), quantization_config=config, device_map=where, dtype=torch.bfloat16
        )

    whole, model = load({"": 0}), load(places)
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in tiny_inputs(whole).items()}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)  # weights went home in between
    kinds = {site.device.type for site in mxfp4_sites(model).values()}
    assert kinds == ({"cuda"} if device_map == "auto" else {"cuda", "cpu"})
