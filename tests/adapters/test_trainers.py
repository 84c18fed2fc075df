"""transformers' Trainer and TRL's trainers with adapters on MXFP4 experts, on the small model of the package."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora import TARGETS, fill
from torch import nn

import mxfp4_compile
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, TEXT_FILE

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow


def loaded() -> nn.Module:
    return mxfp4_compile.load(MODEL_DIRECTORY, dtype=torch.float32, progress=False)


def config(**more: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=TARGETS, **more)


def rows(count: int, length: int = 32) -> list[dict[str, list[int]]]:
    text = list((MODEL_DIRECTORY / TEXT_FILE).read_bytes())
    parts = [text[i * length : (i + 1) * length] for i in range(count)]
    return [{"input_ids": part, "labels": part} for part in parts]


def losses(model: nn.Module, directory: Path, **more: Any) -> list[float]:
    """Of three steps of Trainer."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    options = {
        "output_dir": str(directory), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no",
    } | more  # fmt: skip
    arguments = TrainingArguments(**options)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(8), data_collator=default_data_collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path: Path, checkpointing: bool) -> None:
    """Three steps give the losses that they give on ordinary experts of the same weights."""
    model = loaded()
    assert model.hf_quantizer.is_trainable
    ordinary = mxfp4_compile.restore(loaded())
    pair = [peft.get_peft_model(m, config()) for m in (model, ordinary)]
    fill(pair[0])
    peft.set_peft_model_state_dict(pair[1], peft.get_peft_model_state_dict(pair[0]))
    mine = losses(pair[0], tmp_path, gradient_checkpointing=checkpointing)
    theirs = losses(pair[1], tmp_path)
    assert len(mine) == 3 and mine == pytest.approx(theirs, rel=1e-3)
    assert abs(mine[2] - mine[0]) > 1e-2


def byte_tokenizer() -> Any:
    """The model's tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    more = [b for b in range(256) if b not in kept]
    of = {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(more)}
    tokenizer = Tokenizer(models.BPE(vocab={of[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=of[0], pad_token=of[0])


def test_grpo(tmp_path: Path) -> None:
    """One model generates with its adapters and takes gradients."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, use_cpu=True,
        max_completion_length=8, learning_rate=5e-3, logging_steps=1, report_to="none", bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=loaded(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["TIMON:", "Poet"] * 4}),
        peft_config=config(),
        reward_funcs=lambda completions, **_: [float(sum(c in " e" for c in text)) for text in completions],
        processing_class=byte_tokenizer(),
    )
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    trainer.train()
    assert any("experts" in n for n in trained)
    assert all(not torch.equal(p, before[n]) for n, p in trained.items())


def test_the_example_with_trl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with an error unless the held-out loss falls by 1 and the adapter read back gives the same logits."""
    pytest.importorskip("trl")
    script = Path(__file__).parents[2] / "examples" / "finetune" / "sft.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 80
    monkeypatch.setattr("sys.argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert "gives the same logits: True" in capsys.readouterr().out
