"""Calibration on a trained model, the demo's: what it takes of the divergence, and text that it does not know.

Fewer tokens than ``benchmarks/calibration.py`` uses, which has the figures on all of the held-out text.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mxfp4_compile
from mxfp4_compile.tools import demo

TEXT = demo.MODEL_DIRECTORY / demo.TEXT_FILE
WINDOW = 256


@pytest.fixture(scope="module")
def judged() -> Any:
    """Log-probabilities of a model (which becomes fp32) on the first 32 KiB of the held-out text."""
    ids = torch.tensor(list(TEXT.read_bytes()[: 32 * 1024])).view(-1, WINDOW)

    def log_probabilities(model: Any) -> Tensor:
        with torch.no_grad():
            parts = [model.float()(input_ids=some, use_cache=False).logits[:, :-1] for some in ids.split(16)]
        return torch.cat(parts).log_softmax(-1)

    return log_probabilities


def divergence(truth: Tensor, other: Tensor) -> float:
    return float((truth.exp() * (truth - other)).sum(-1).mean())


@pytest.mark.slow
def test_half_of_the_divergence_is_gone_without_any_text(judged: Any) -> None:
    truth = judged(demo.load(demo.MODEL_DIRECTORY))
    nearest = judged(mxfp4_compile.restore(mxfp4_compile.optimize(demo.load(demo.MODEL_DIRECTORY), verify=False)))
    model = demo.load(demo.MODEL_DIRECTORY)
    report = mxfp4_compile.calibrate(model, tokens=32768, window=WINDOW)
    assert divergence(truth, judged(model)) < 0.52 * divergence(truth, nearest)
    assert 1.0 < report.nll < 1.5 and not report.warnings  # nats per byte, as on the text it was trained on


@pytest.mark.slow
def test_text_that_the_demo_does_not_know() -> None:
    model = demo.load(demo.MODEL_DIRECTORY)
    before = [p.clone() for p in model.parameters()]
    noise = torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="these token ids are no text of this model"):
        mxfp4_compile.calibrate(model, noise, tokens=4096, window=WINDOW)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    foreign = "def f(x: int) -> dict[str, Any]:\n    return {k_0: v[3] for k_0, v in enumerate(x)}\n" * 20
    report = mxfp4_compile.calibrate(model, foreign, tokens=1024, window=WINDOW)
    assert len(report.warnings) == 1 and "does not know" in report.warnings[0]
