"""push_to_hub: files and a card that says what was done, with a connection and without; who else loads with ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from checkpoints import assert_same, codes, loaded, saved

import mxfp4_compile
from mxfp4_compile import CheckpointError, Mxfp4CompileConfig


class Hub:
    """Stands in for ``HfApi``: keeps what it was given."""

    given: dict[str, Any] = {}
    fails: Exception | None = None

    def __init__(self, token: Any = None) -> None:
        Hub.given = {"token": token}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if Hub.fails is not None:
            raise Hub.fails
        Hub.given |= {"created": options}
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path: Path, **options: Any) -> str:
        files = {p.name: p.read_bytes() for p in folder_path.iterdir()}
        Hub.given |= {"files": files, **options}
        return "commit"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "fails", None)
    return Hub


def card(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture(scope="module")
def optimized() -> Any:
    return mxfp4_compile.optimize(loaded("qwen3_moe"), scale_rule="floor", skip=["model.layers.0.*"])


def test_files_and_a_card_are_uploaded(hub: type[Hub], optimized: Any, tmp_path: Path) -> None:
    assert optimized.push_to_hub("me/tiny", token="t", private=True, max_shard_size="50GB", tags=["x: y"]) == "commit"
    given = hub.given
    assert given["token"] == "t" and given["created"] == {"private": True, "exist_ok": True}
    assert given["repo_id"] == "me/tiny" and "MXFP4" in given["commit_message"]
    assert {"config.json", "model.safetensors", "README.md"} <= set(given["files"])
    front, body = card(given["files"]["README.md"].decode())
    assert "base_model" not in front  # made from a directory
    assert front["tags"][0] == "mxfp4" and front["tags"][-1] == "x: y"
    assert "`compressed_tensors`, read by vLLM" in body and "Scale rule: `floor`" in body
    assert "Left as it was: `model.layers.0.mlp.experts` (skipped" in body
    errors = [s.weight_error_max for s in optimized.mxfp4_report.rewritten]
    assert f"{max(errors):.4f} at most" in body
    for name, data in given["files"].items():
        (tmp_path / name).write_bytes(data)
    again = mxfp4_compile.load(tmp_path, dtype=torch.bfloat16)
    ours, theirs = codes(optimized), codes(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_without_a_connection_the_files_stay_here(
    hub: type[Hub], optimized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimized.config, "_name_or_path", "Qwen/Qwen3-30B-A3B", raising=False)
    hub.fails = type("ConnectError", (type("TransportError", (Exception,), {}),), {})("Name or service not known")
    with pytest.warns(UserWarning, match=r"cannot be reached; .*hf upload me/tiny .*/tiny"):
        folder = optimized.push_to_hub("me/tiny", format="mxfp4_compile")
    assert folder == tmp_path / "tiny"
    front, body = card((folder / "README.md").read_text())
    assert front["base_model"] == "Qwen/Qwen3-30B-A3B" and "`mxfp4_compile`, read by mxfp4_compile alone" in body
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError, match="tiny is there already: nothing was written"):
        optimized.push_to_hub("me/tiny")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    hub.fails = PermissionError("401")  # what the hub answers is no lack of a connection
    with pytest.raises(PermissionError):
        optimized.push_to_hub("me/other")
    assert not (tmp_path / "other").exists()


def test_experts_on_disk_are_refused_with_a_way_out() -> None:
    pytest.importorskip("accelerate")
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1")
    placed = {"model.layers.0": "disk", **dict.fromkeys(parts, "cpu")}
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.experts on disk, .*: give it \"cpu\", from where they"):
        mxfp4_compile.load(saved("qwen3_moe"), device_map=placed)


@pytest.mark.slow
def test_a_sequence_to_sequence_model_with_a_configuration() -> None:
    from transformers import AutoModelForSeq2SeqLM

    config = Mxfp4CompileConfig()
    model = AutoModelForSeq2SeqLM.from_pretrained(
        saved("switch_transformers"), quantization_config=config, dtype=torch.bfloat16
    )
    assert_same(mxfp4_compile.optimize(loaded("switch_transformers")), model)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("placed", [{}, {"device_map": "auto"}])
def test_a_pipeline_with_a_configuration(placed: dict[str, Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    pytest.importorskip("accelerate")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Experts": 1, "are": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    options = {"quantization_config": Mxfp4CompileConfig(), "dtype": torch.bfloat16}
    generator = pipeline(
        "text-generation", model=str(saved("qwen3_moe")), tokenizer=tokenizer, model_kwargs=options, **placed
    )
    assert len(generator.model.mxfp4_report.rewritten) == 2
    (out,) = generator("Experts are", max_new_tokens=3)
    assert out["generated_text"].startswith("Experts are")
