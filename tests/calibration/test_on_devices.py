"""What calibration does otherwise on a CUDA device, run on the CPU: the same sums, the same codes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mxfp4_compile
from mxfp4_compile.calibration import driver, recording, solver
from mxfp4_compile.calibration import rows as rows_
from mxfp4_compile.calibration.driver import plain_target
from mxfp4_compile.calibration.precision import fp32_products, products_of
from mxfp4_compile.calibration.recording import Recorder
from mxfp4_compile.calibration.rows import Rows, hessian
from mxfp4_compile.planning import plan_model
from mxfp4_compile.report import Report
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

WINDOW, COUNT = 40, 16


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", pytest.param("llama4", marks=pytest.mark.slow)])
def test_all_experts_in_one_product(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases, weights on the input, ids that are nobody's."""
    model = tiny_model(family)
    planned = plan_model(model, Report("mse", "bf16", 0, False), None, (), True, None, [])
    calls = []

    def both(inputs: Any) -> Tensor:
        ids = inputs.topk_ids.clone()
        ids[::3, 0] = inputs.params.num_experts
        for some in (inputs, replace(inputs, topk_ids=ids)):
            expected = recording._moe_by_expert(some)
            torch.testing.assert_close(recording._moe_grouped(some), expected, rtol=1e-5, atol=1e-6)
        calls.append(len(ids))
        return recording._moe_by_expert(inputs)

    monkeypatch.setattr(recording, "_moe", both)
    target = plain_target(model, [site for site in planned if site.structure is not None])
    with torch.no_grad(), target.recording(Recorder()):
        model(**tiny_inputs(model))
    assert len(calls) == len(planned)


def test_sums_in_the_order_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=g)
    ids = torch.randint(0, 5, (200, 2), generator=g)
    ids[ids == 1] = 4  # an expert without rows, and counts that rise with the number
    rows = Rows.of_pairs(x, ids, torch.rand(200, 2, generator=g), 5)
    monkeypatch.setattr(rows_, "_ROWS_MOST", 16)
    some = slice(1, 5)
    other = lambda tile: rows.inputs(tile, 2 * x)
    expected = hessian(rows, some, rows.inputs, 12, other)
    monkeypatch.setattr(rows_, "IN_PLACE", ("cpu",))
    for got, right in zip(hessian(rows, some, rows.inputs, 12, other), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
        assert got.shape == (4, 12, 12) and not got[0].any()


def test_inputs_that_stay_on_the_device_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 100, (COUNT * WINDOW,), generator=torch.Generator().manual_seed(0))
    model = tiny_model("qwen3_moe")
    passes = []

    def run(room: float) -> list[Tensor]:
        monkeypatch.setattr(driver, "free_device_memory", lambda _: room + driver._SOLVING_BYTES)
        passes.append(0)
        some = copy.deepcopy(model)
        mxfp4_compile.calibrate(some, ids, tokens=COUNT * WINDOW, window=WINDOW)
        return [p.detach() for p in some.parameters()]

    one_pass = driver._Run._pass

    def counted(self: Any, keys: Any) -> None:
        passes[-1] += 1
        assert self.recorder.stays == (len(passes) > 1)
        one_pass(self, keys)

    monkeypatch.setattr(driver._Run, "_pass", counted)
    on_host = run(-driver._SOLVING_BYTES)
    site = 4.0 * COUNT * WINDOW * (model.config.hidden_size + 16)  # an upper bound of what one site keeps
    for found in (run(1e9), run(site)):
        assert all(torch.equal(a, b) for a, b in zip(found, on_host, strict=True))
    assert passes == [1, 1, 2]


def test_products_are_put_back_as_they_were() -> None:
    matmul = torch.backends.cuda.matmul
    started = matmul.fp32_precision
    for before in ("none", "ieee", "tf32"):
        matmul.fp32_precision = before
        try:
            for kind in ("tf32", "ieee"):
                with pytest.raises(KeyError), fp32_products(kind):
                    assert matmul.fp32_precision == kind
                    raise KeyError
                assert matmul.fp32_precision == before
        finally:
            matmul.fp32_precision = started
    assert torch.get_float32_matmul_precision() == "highest"


def test_sums_are_of_the_models_precision_and_the_solver_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(*_: Any) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        raise KeyError

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = Rows.of_pairs(torch.ones(4, 32, dtype=dtype), torch.zeros(4, 1), torch.ones(4, 1), 1)
        with pytest.raises(KeyError):
            hessian(rows, slice(0, 1), note, 32)
    assert seen == [products_of(torch.ones(1, dtype=torch.bfloat16)), "tf32", "ieee"] == ["tf32", "tf32", "ieee"]
    monkeypatch.setattr(solver, "_attempt", note)
    with pytest.raises(KeyError), fp32_products("tf32"):
        solver.solve(torch.ones(1, 32, 32), solver.shrunk(torch.eye(32)[None], torch.ones(1)), torch.bfloat16)
    assert seen[-1] == "ieee"
