"""What the checkpoint tests share: models on disk, and a comparison of two models bit for bit."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.families import tiny_inputs, tiny_model


@functools.lru_cache(maxsize=8)
def saved(family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A directory with a tiny model of ``family`` as transformers saves it; not to be written to."""
    directory = Path(tempfile.mkdtemp(prefix=f"{family}-"))
    tiny_model(family, dtype=dtype).save_pretrained(directory)
    return directory


@functools.cache
def _class(family: str) -> Any:
    return type(tiny_model(family))


def loaded(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The same model, loaded by transformers alone."""
    return _class(family).from_pretrained(saved(family, dtype), dtype=dtype).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(**tiny_inputs(model))
    return getattr(out, "logits", out[0]).float()


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Every code, scale and bias of a model's experts by name."""
    found = {}
    for name, site in mxfp4_sites(model).items():
        for projection in site.projections:
            packed, scales = site.canonical(projection)
            found[f"{name}.{projection.slot}.packed"], found[f"{name}.{projection.slot}.scales"] = packed, scales
        found.update({f"{name}.{n}": b for n, b in site.dequantized_biases().items()})
    return found


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Same experts, bit for bit, same other parameters, same logits."""
    first, second = codes(a), codes(b)
    assert first and first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(logits(a), logits(b))  # first: some forwards cast their routers for good
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
