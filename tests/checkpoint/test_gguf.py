"""GGUF files, read back by the gguf package: the same codes, scales and other values, under llama.cpp's names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import loaded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import mxfp4_compile
from mxfp4_compile import CheckpointError, mx
from mxfp4_compile.checkpoint.gguf_export import blocks
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.families import tiny_model

gguf = pytest.importorskip("gguf")


def canonical(model: Any, layer: int, leaf: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of one parameter of a layer's experts."""
    site = mxfp4_sites(model)[f"model.layers.{layer}.mlp.experts"]
    (projection,) = [p for p in site.projections if p.source.parameters == (leaf,)]
    packed, scales = site.canonical(projection)
    return packed, scales


def test_blocks_are_those_of_ggml() -> None:
    rng = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 256, (2, 5, 48), dtype=torch.uint8, generator=rng)
    scales = torch.randint(0, 254, (2, 5, 3), dtype=torch.uint8, generator=rng)
    scales[0, 0, 0] = 0  # ggml's smallest scales are subnormal
    found = gguf.quants.dequantize(blocks(packed, scales).numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(torch.from_numpy(found), mx.dequantize(packed, scales, 96, torch.float32))


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_what_is_read_back_is_equal_to_the_bit(family: str, tmp_path: Path) -> None:
    model = mxfp4_compile.optimize(loaded(family))
    with pytest.warns(UserWarning, match=r"model.gguf has no vocabulary"):
        mxfp4_compile.save(model, tmp_path, "gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    arch = {"gpt_oss": gguf.MODEL_ARCH.GPT_OSS, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}[family]
    assert reader.fields["general.architecture"].contents() == gguf.MODEL_ARCH_NAMES[arch]
    kinds = {name.removesuffix(".weight").removesuffix(".bias") for name in found}
    layers = model.config.num_hidden_layers
    assert kinds == {gguf.TENSOR_NAMES[t].format(bid=i) for t in gguf.MODEL_TENSORS[arch] for i in range(layers)}
    for layer in range(layers):
        packed, scales = canonical(model, layer, "gate_up_proj")
        down, half = canonical(model, layer, "down_proj"), packed.shape[1] // 2
        # gpt-oss interleaves gate and up, Qwen has one after the other.
        gate, up = (
            (slice(0, None, 2), slice(1, None, 2)) if family == "gpt_oss" else (slice(0, half), slice(half, None))
        )
        for name, want in (
            ("gate", (packed[:, gate], scales[:, gate])),
            ("up", (packed[:, up], scales[:, up])),
            ("down", down),
        ):
            tensor = found[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert tensor.tensor_type is gguf.GGMLQuantizationType.MXFP4
            k = 2 * want[0].shape[-1]
            assert tensor.shape.tolist() == [k, *reversed(want[0].shape[:-1])]
            assert torch.equal(torch.from_numpy(tensor.data.copy()), blocks(*want))
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(values, mx.dequantize(*want, k, torch.float32))
    state = model.state_dict()
    for name, source in {
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }.items():
        assert found[name].tensor_type is gguf.GGMLQuantizationType.BF16
        raw = torch.from_numpy(found[name].data.copy()).view(torch.bfloat16)
        assert torch.equal(raw, state[source])
    small = {"output_norm.weight": "model.norm.weight"}
    if family == "gpt_oss":
        small |= {
            "blk.0.attn_sinks.weight": "model.layers.0.self_attn.sinks",
            "blk.0.ffn_down_exps.bias": "model.layers.0.mlp.experts.down_proj_bias",
        }
        both = mxfp4_sites(model)["model.layers.1.mlp.experts"].dequantized_biases()["gate_up_proj_bias"].float()
        assert torch.equal(torch.from_numpy(found["blk.1.ffn_up_exps.bias"].data.copy()), both[:, 1::2])
        assert reader.fields["gpt-oss.attention.sliding_window"].contents() == model.config.sliding_window
    for name, source in small.items():
        assert found[name].tensor_type is gguf.GGMLQuantizationType.F32
        assert torch.equal(torch.from_numpy(found[name].data.copy()), state[source].float())
    with pytest.raises(CheckpointError, match=r"model.gguf is there already; it is not replaced"):
        mxfp4_compile.save(model, tmp_path, "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_the_vocabulary_lies_beside_the_file(tmp_path: Path) -> None:
    model: Any = mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=torch.bfloat16, layers=1))
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    words.train_from_iterator(["experts are experts"] * 3, trainers.BpeTrainer(vocab_size=40, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mxfp4_compile.save(model, tmp_path, "gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == model.config.vocab_size == fields["qwen3moe.vocab_size"]
    for token, number in tokenizer.get_vocab().items():
        assert tokens[number] == token
    end = tokenizer.eos_token_id
    assert fields["tokenizer.ggml.eos_token_id"] == end
    assert fields["tokenizer.ggml.token_type"][end] == gguf.TokenType.CONTROL
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert fields["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in json.loads(words.to_str())["model"]["merges"]]
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    mixtral = mxfp4_compile.optimize(tiny_model("mixtral", dtype=torch.bfloat16, layers=1))
    with pytest.raises(CheckpointError, match="written for gpt_oss, qwen3_moe, and this is a mixtral model"):
        mxfp4_compile.save(mixtral, tmp_path / "m", "gguf")
    part = mxfp4_compile.optimize(loaded("qwen3_moe"), skip=["model.layers.0.*"])
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.experts is not in MXFP4, as all experts must be"):
        mxfp4_compile.save(part, tmp_path / "m", "gguf")
    assert not (tmp_path / "m").exists()
