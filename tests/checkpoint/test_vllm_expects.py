"""What vLLM's loader asks of a compressed-tensors checkpoint, by its source: facts, held against what is written here.

Read in vLLM's repository, November 2026; nothing of it is run or copied:

- ``model_executor/layers/quantization/compressed_tensors/compressed_tensors.py``: weights are MXFP4 that are symmetric
  4-bit floats in groups of 32; ``utils.py`` beside it: a layer that vLLM fuses is ignored if all its parts are, and an
  error if only some are;
- ``.../compressed_tensors_moe/compressed_tensors_moe_w4a4_mxfp4.py``, commit 008823144e5d: the parameters of experts,
  their shapes and dtype; commit cd5f1c27323b: activations are MXFP4 as well where the GPU has FP4 arithmetic;
- ``model_executor/layers/fused_moe/layer.py``: which tensor goes into which part of them, by name: the gate's rows (w1)
  stand before those of up (w3).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mxfp4_compile import mx
from mxfp4_compile.checkpoint.convert import convert

# Names of a linear layer of one expert in a checkpoint -> vLLM's shard.
SHARDS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "w1": "w1", "w2": "w2", "w3": "w3"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(\w+)")
# What vLLM makes one layer of.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def assembled(tensors: dict[str, Tensor], hidden: int, inner: int, experts: int) -> dict[str, dict[str, Tensor]]:
    """vLLM's parameters by layer: filled as its loader does; what does not fit, or leaves a hole, is an error."""
    shapes = {
        "w13_weight_packed": (experts, 2 * inner, hidden // 2),
        "w2_weight_packed": (experts, hidden, inner // 2),
        "w13_weight_scale": (experts, 2 * inner, hidden // 32),
        "w2_weight_scale": (experts, hidden, inner // 32),
    }
    layers: dict[str, dict[str, Tensor]] = {}
    filled: dict[tuple[str, str], int] = {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            assert not name.endswith(("_packed", "_scale")), name
            continue
        layer, expert, linear, kind = match.groups()
        shard = SHARDS[linear]
        parameter = f"{'w2' if shard == 'w2' else 'w13'}_{kind}"
        parts = layers.setdefault(layer, {n: torch.empty(s, dtype=torch.uint8) for n, s in shapes.items()})
        rows = {"w1": slice(0, inner), "w3": slice(inner, 2 * inner), "w2": slice(None)}[shard]
        target = parts[parameter][int(expert), rows]
        assert (target.shape, target.dtype) == (tensor.shape, tensor.dtype), name
        target.copy_(tensor)
        filled[layer, parameter] = filled.get((layer, parameter), 0) + tensor.numel()
    assert filled == {(layer, n): parts[n].numel() for layer, parts in layers.items() for n in shapes}
    return layers


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_names_shapes_and_values(family: str, tmp_path: Path) -> None:
    convert(saved(family), tmp_path / "m", format="compressed_tensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    tensors = {k: v for file in sorted((tmp_path / "m").glob("*.safetensors")) for k, v in load_file(file).items()}

    declared = config["quantization_config"]
    ((_, group),) = declared["config_groups"].items()
    wanted = {"strategy": "group", "symmetric": True, "group_size": 32, "type": "float", "num_bits": 4}
    assert wanted.items() <= group["weights"].items()
    assert declared["quant_method"] == "compressed-tensors" and group["targets"] == ["Linear"]
    assert declared["format"] == group["format"] == "mxfp4-pack-quantized" and group["input_activations"] is None

    ignored = set(declared["ignore"])
    plain = {n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2}
    assert plain <= ignored, "every layer that has a weight of its own"
    assert not any(".experts." in name for name in ignored)
    for parts in FUSED.values():
        for name in ignored:
            head, _, last = name.rpartition(".")
            if last in parts:
                there = {part for part in parts if f"{head}.{part}.weight" in tensors}
                assert {part for part in parts if f"{head}.{part}" in ignored} >= there

    model: Any = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.bfloat16)
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")}
    experts = {n: m for n, m in modules.items() if isinstance(m.gate_up_proj, torch.nn.Parameter)}
    (first, *_) = experts.values()
    count, hidden, inner = first.down_proj.shape
    layers = assembled(tensors, hidden, inner, count)
    assert len(layers) == len(experts) > 0
    for parts, module in zip(
        (layers[name] for name in sorted(layers)), (experts[n] for n in sorted(experts)), strict=True
    ):
        for parameter, weight in (("w13", module.gate_up_proj), ("w2", module.down_proj)):
            got = mx.dequantize(parts[f"{parameter}_weight_packed"], parts[f"{parameter}_weight_scale"])
            rounded = mx.dequantize(*mx.quantize(weight.float(), config["mxfp4_compile"]["scale_rule"]))
            assert torch.equal(got.float(), rounded.float()), parameter
