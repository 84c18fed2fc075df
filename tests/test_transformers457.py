"""Families whose experts transformers 4.57 keeps in module lists; run in an environment of its own (.ci/run)."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
if not transformers.__version__.startswith("4.57."):
    pytest.skip("for transformers 4.57", allow_module_level=True)

import mxfp4_compile  # noqa: E402
from mxfp4_compile.families import tiny_inputs, tiny_model  # noqa: E402

FUSED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FUSED)
def test_rewritten_verified_and_put_back(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16, layers=1)
    inputs = tiny_inputs(model)
    keys = set(model.state_dict())
    mxfp4_compile.optimize(model, example_inputs=inputs)
    assert {s.outcome for s in model.mxfp4_report.sites} == {"fused"}
    assert all(s.error <= 1.5 * s.original_error + 2e-3 for s in model.mxfp4_report.sites)
    with torch.no_grad():
        ours = model(**inputs).logits
        theirs = mxfp4_compile.restore(model)(**inputs).logits
    assert set(model.state_dict()) == keys
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()
