"""The models that arguments name: directories, hub ids, tiny random instances of families."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def tiny(family: str) -> tuple[nn.Module, Any]:
    """A tiny random instance of a family in bf16 and inputs for it; ValueError lists the known families."""
    import torch

    from ..demo import quiet
    from ..families import tiny_inputs, tiny_model

    with quiet():
        model = tiny_model(family, dtype=torch.bfloat16)
    return model, tiny_inputs(model)


def _found(model: str) -> Path | None:
    """The directory of that name; None for a hub id; OSError in words for anything else."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{model} is a file; a model directory or a hub id is needed")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        # A hub id is owner/name; a path that is not there should not become a question to the hub.
        raise FileNotFoundError(f"there is no directory {model}, and a hub id has the form owner/name")
    return None


def model_name(model: str) -> str:
    """A model directory or hub id as transformers takes it; OSError in words for anything else."""
    path = _found(model)
    if path is None:
        return model
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no config.json: not a Hugging Face model directory")
    return str(path)


def load(args: argparse.Namespace) -> nn.Module:
    """The model in a directory or on the hub, in the dtype of its checkpoint, on a GPU if there is one."""
    model = model_name(args.model)
    import torch

    from ...hf_models import load_plain
    from ..demo import quiet

    with quiet():
        loaded = load_plain(model, trust_remote_code=args.trust_remote_code)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def directory(model: str) -> Path:
    """A model directory; that of a hub id is downloaded or found in the cache; OSError in words for anything else."""
    path = _found(model)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "original/*"]))
