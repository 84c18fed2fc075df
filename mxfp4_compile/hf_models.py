"""Models in directories and on the hub: the one place that asks transformers for configurations, classes and models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn


def read_config(path: str | os.PathLike[str], *, trust_remote_code: bool = False, **hub: Any) -> Any:
    """The configuration of a model directory or hub id; ``hub``: revision, cache_dir, token and the like."""
    import transformers

    return transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, **hub)


def class_of(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The class a configuration names: transformers' own, or an Auto class that finds it (in the model's own code)."""
    import transformers

    architectures = getattr(config, "architectures", None) or [""]
    architecture = architectures[0] if isinstance(architectures, list) and isinstance(architectures[0], str) else ""
    if trust_remote_code:
        own = {n: c for n, c in (getattr(config, "auto_map", None) or {}).items() if n.startswith("AutoModel")}
        named = [n for n, c in own.items() if isinstance(c, str) and c.rpartition(".")[2] == architecture]
        for name in (*named, "AutoModelForCausalLM", *own):
            if name in own:
                return getattr(transformers, name)
    found = getattr(transformers, architecture, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModelForCausalLM  # a configuration names what it likes


def load_plain(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> nn.Module:
    """A model as transformers loads it, in the dtype of its checkpoint, on the CPU.

    Whether code that comes with it runs is said by ``trust_remote_code``; nobody is asked.
    """
    cls = class_of(read_config(path, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)
    loaded = cls.from_pretrained(str(path), dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code)
    return cast(nn.Module, loaded.eval())


def is_auto(cls: Any) -> bool:
    """Whether a class of ``class_of`` finds the model's class by itself."""
    return bool(cls.__name__.startswith("AutoModel"))


def empty_model(
    config: Any, cls: Any = None, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """A model whose parameters have shapes and no data (on the meta device); ``cls``: by default ``class_of`` it."""
    cls = cls or class_of(config, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        if is_auto(cls):
            return cls.from_config(config, trust_remote_code=trust_remote_code, **options).eval()
        return cls._from_config(config, **options).eval()


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part; None if it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def tokenizer_of(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or hub id; None if there is none."""
    import transformers

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if Path(path).is_dir():
        if not any((Path(path) / name).is_file() for name in names):
            return None
        return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except OSError:  # neither on the hub nor in its cache
        return None
