"""``push_to_hub`` of an optimized model: its checkpoint with a model card that says what was done.

Contract: the card states what the report and the files state, and nothing else; no license is guessed. Without a
connection the same files are left in a directory, and a warning says where and what uploads them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..passes.build.module import mxfp4_sites
from ..report import Report
from ..text import printable
from .directories import CONFIG
from .files import DEFAULT_SHARD_BYTES, CheckpointError
from .forms import AUTO, COMPRESSED_TENSORS, GPT_OSS, MXFP4, OWN, declared_form
from .note import facts_of
from .writing import parse_size, save

CARD = "README.md"
TAGS = ("mxfp4", "mixture-of-experts", "mxfp4_compile")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MOST = 8
_READERS = {
    COMPRESSED_TENSORS: "vLLM, SGLang, transformers (with the package compressed-tensors) and mxfp4_compile",
    GPT_OSS: "whatever reads gpt-oss as published, and mxfp4_compile",
    MXFP4: "transformers' own MXFP4 quantizer where it serves this family, and mxfp4_compile",
    OWN: "mxfp4_compile alone",
}


def model_card(model: nn.Module, directory: Path, name: str, tags: Sequence[str] = ()) -> str:
    """The card of the checkpoint that ``save`` wrote to ``directory``; ``name``: what it will be called on the hub."""
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    declared = config["quantization_config"]
    form, _ = declared_form(declared, CONFIG)
    assert form is not None
    facts = facts_of(declared if form.name == OWN else config.get(OWN))
    report = getattr(model, "mxfp4_report", None)
    sites = report.sites if isinstance(report, Report) else []
    origin = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    base = origin if _HUB_ID.fullmatch(origin) and not Path(origin).exists() else ""
    head = ["---", "library_name: transformers"]
    head += [f"base_model: {base}"] if base else []
    head += ["tags:", *[f"- {json.dumps(tag)}" for tag in dict.fromkeys((*TAGS, *tags))], "---"]
    size = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
    rewritten = [s for s in sites if s.rewritten]
    lines = [
        f"# {name}",
        "",
        f"{base or config.get('model_type', 'A model')} with its experts in MXFP4 (4.25 bits a weight: 4-bit floats in "
        "blocks of 32 with one scale), made by "
        f"mxfp4_compile {__version__}. Everything else is as it was; the weights are {size / 1e9:.2f} GB.",
        "",
        f"- Form: `{form.name}`, read by {_READERS[form.name]}.",
        f"- Scale rule: `{facts.get('scale_rule', 'unknown')}`.",
        f"- Modules with MXFP4 experts: {sum(len(s.names) for s in rewritten) or len(mxfp4_sites(model))}.",
    ]
    errors = [e for e in facts.get("weight_errors", {}).values() if {"mean", "max"} <= e.keys()]
    if errors:
        mean, most = sum(e["mean"] for e in errors) / len(errors), max(e["max"] for e in errors)
        lines.append(f"- Relative squared error of the weights: {mean:.4f} on average, {most:.4f} at most, by expert.")
    if any(s.calibrated for s in rewritten):
        lines.append("- The codes were calibrated on data.")
    left = [s for s in sites if s.outcome in ("skipped", "unmatched", "failed")]
    for site in left[:_MOST]:
        lines.append(
            f"- Left as it was: `{site.names[0]}` ({site.outcome}{': ' + site.reason if site.reason else ''})."
        )
    lines += [f"- Left as they were, too: {len(left) - _MOST} others."] if len(left) > _MOST else []
    versions = ", ".join(f"{package} {version}" for package, version in facts.get("versions", {}).items())
    lines += [f"- Made with {versions}."] if versions else []
    lines += [
        "",
        "```python",
        "import mxfp4_compile  # fused kernels; keeps the bits",
        "",
        f'model = mxfp4_compile.load({name!r}, device_map="auto")',
        "```",
        "",
        "The license is that of the model it was made from.",
    ]
    return "\n".join(printable(line) for line in (*head, "", *lines)) + "\n"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    tags: Sequence[str] | None = None,
    format: str = AUTO,
) -> Any:
    """Upload an optimized model with a model card; transformers' own parameters, and ``format`` as for ``save``.

    Returns what ``huggingface_hub.HfApi.upload_folder`` does. Without a connection (or under HF_HUB_OFFLINE) the files
    are left in a folder called as the repository, a warning says so, and its Path is returned. Raises CheckpointError
    as ``save`` does, and what the hub answers.
    """
    from huggingface_hub import HfApi

    limit = parse_size(max_shard_size)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:
        if not _no_connection(error):
            raise
        folder = Path(repo_id.rpartition("/")[2]).absolute()
        if os.path.lexists(folder):
            raise CheckpointError(f"no connection, and {folder} is there already: nothing was written") from error
        _write(model, folder, repo_id, tags or (), format, limit)
        warnings.warn(
            f"mxfp4_compile: the hub cannot be reached; the model and its card are in {folder}. With a connection: "
            f"hf upload {repo_id} {folder}",
            stacklevel=3,
        )
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _write(model, folder, repo_id, tags or (), format, limit)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(model).__name__} with MXFP4 experts",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _write(model: nn.Module, folder: Path, name: str, tags: Sequence[str], format: str, limit: int) -> None:
    save(model, folder, format, max_shard_bytes=limit)
    (folder / CARD).write_text(model_card(model, folder, name, tags), encoding="utf-8")


def _no_connection(error: BaseException) -> bool:
    """Whether the hub was not reached at all: by the names of its clients' errors, as it changes clients."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"ConnectionError", "TransportError", "OfflineModeIsEnabled"})


def wrap_push_to_hub(modeling_utils: Any) -> None:
    """Have transformers' ``push_to_hub`` hand models with MXFP4 experts to ours, and all others to its own."""
    original = modeling_utils.PreTrainedModel.push_to_hub

    @functools.wraps(original)
    def dispatch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return push_to_hub(self, *args, **kwargs) if mxfp4_sites(self) else original(self, *args, **kwargs)

    modeling_utils.PreTrainedModel.push_to_hub = dispatch
