"""Calibration on a GPU: the solver's kernels against its loops in torch, sums over activations, the same bits twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import mxfp4_compile
from mxfp4_compile.calibration import driver, recording, solver
from mxfp4_compile.calibration.grid import exponent_range, nearest, on_grid
from mxfp4_compile.calibration.rows import Rows, hessian
from mxfp4_compile.calibration.solver import descend, gptq, loss, solve, undoing
from mxfp4_compile.tools.families import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LIMITS = exponent_range(torch.bfloat16)


def draw(experts: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights [e, n, k] and damped Hessians [e, k, k] on the GPU."""
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(experts, n, k, generator=g) * 0.05).bfloat16().float()
    x = torch.randn(experts, 4 * k, k, generator=g) @ (torch.randn(k, k, generator=g) / k**0.5)
    h = x.mT @ x / (4 * k)
    h.diagonal(dim1=1, dim2=2).add_(0.01 * h.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    return weight.cuda(), h.cuda()


@pytest.mark.parametrize("shape", [(3, 100, 160), (2, 512, 768)])
def test_kernels_do_what_the_loops_do(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian_ = draw(*shape)
    wide = undoing(hessian_).double()
    eye = torch.eye(shape[2], device="cuda", dtype=torch.float64)
    assert (wide.mT @ wide @ hessian_.double() - eye).abs().max() < 1e-2
    assert torch.equal(wide, wide.triu())
    rounded, exponents = gptq(weight, hessian_, LIMITS)
    moved, at = descend(weight, rounded, exponents, hessian_, LIMITS, 2)
    assert torch.equal(moved, on_grid(moved, at))
    assert torch.equal(descend(weight, rounded, exponents, hessian_, LIMITS, 2)[0], moved)
    monkeypatch.setattr(solver, "_kernels", lambda _: None)
    plain, _ = gptq(weight, hessian_, LIMITS)
    further, _ = descend(weight, plain, exponents, hessian_, LIMITS, 2)
    base = loss(weight, nearest(weight, "mse"), hessian_).sum()
    for ours, theirs in ((rounded, plain), (moved, further)):
        a, b = loss(weight, ours, hessian_).sum(), loss(weight, theirs, hessian_).sum()
        assert a < 0.9 * base and abs(a - b) < 0.01 * b
    if shape[2] < 256:  # in a long row one tie that goes the other way changes what follows it
        assert (rounded != plain).float().mean() < 0.05


def test_sums_of_a_half_precision_model() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 256, generator=g).bfloat16()
    ids, weights = torch.randint(0, 6, (5000, 2), generator=g), torch.rand(5000, 2, generator=g)
    rows = Rows.of_pairs(x.cuda(), ids.cuda(), weights.cuda(), 6)
    sums, _ = hessian(rows, slice(1, 6), rows.inputs, 256)
    for e in range(1, 6):
        token, slot = torch.where(ids == e)
        own = x[token].double() * weights[token, slot].double()[:, None]
        error = (sums[e - 1].cpu().double() - own.mT @ own).norm() / (own.mT @ own).norm()
        assert error < 1e-3
    assert torch.equal(hessian(rows, slice(1, 6), rows.inputs, 256)[0], sums)


def test_a_model_gets_better_and_each_time_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded inputs stay on the device, or pass through pinned memory; both give the same bits."""
    before = tiny_model("qwen3_moe", dtype=torch.bfloat16).cuda()
    ids = torch.randint(3, 100, (4096,), generator=torch.Generator().manual_seed(0))
    found = []
    for stays in (True, True, False):
        if not stays:
            monkeypatch.setattr(driver, "free_device_memory", lambda _: 0.0)
        model = copy.deepcopy(before)
        report = mxfp4_compile.calibrate(model, ids, tokens=4096, window=64)
        found.append([p.detach().cpu() for p in model.parameters()])
        assert all(site.held_error < 0.9 * site.nearest_held_error for site in report.sites)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_all_experts_in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt_oss", dtype=torch.bfloat16).cuda()
    ids = torch.randint(3, 100, (2, 64), device="cuda")
    errors = []
    ours = recording._moe_grouped

    def both(inputs: object) -> Tensor:
        out, right = ours(inputs), recording._moe_by_expert(inputs)  # type: ignore[arg-type]
        errors.append(float((out.double() - right.double()).norm() / right.double().norm()))
        return out

    monkeypatch.setattr(recording, "_moe_grouped", both)
    mxfp4_compile.calibrate(model, ids.flatten().cpu(), tokens=128, window=64)
    assert errors and max(errors) < 1e-2


def test_solving_leaves_products_as_they_were() -> None:
    weight, hessian_ = draw(2, 64, 96)
    before = torch.backends.cuda.matmul.fp32_precision
    found = solve(weight, solver.shrunk(hessian_, torch.full((2,), 1000)), torch.bfloat16)
    assert not found.failed.any() and torch.backends.cuda.matmul.fp32_precision == before
