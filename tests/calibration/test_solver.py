"""The solver against dense references in fp64, on random weights and activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxfp4_compile import mx
from mxfp4_compile.calibration import solver
from mxfp4_compile.calibration.grid import exponent_range, nearest, on_grid, round_codes, weighted_exponents
from mxfp4_compile.calibration.solver import DRIFT, Hessians, damped, descend, gptq, loss, shrunk, solve, undoing

E, N, K, T = 3, 24, 64, 400
LIMITS = exponent_range(torch.bfloat16)


def draw(seed: int, experts: int = E, n: int = N, k: int = K, tokens: int = T) -> tuple[Tensor, Tensor]:
    """Weights [E, N, K] in bf16 precision and correlated inputs [E, T, K], as layers have them."""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(experts, n, k, generator=g) * 0.05).bfloat16().float()
    mixing = torch.randn(experts, k, k, generator=g) / k**0.5
    power = 0.1 + torch.rand(experts, 1, k, generator=g)
    return weight, torch.randn(experts, tokens, k, generator=g) @ mixing * power


def hessians_of(x: Tensor) -> Hessians:
    return shrunk(x.mT @ x, torch.full((x.shape[0],), x.shape[1]))


def gptq_reference(weight: Tensor, hessian: Tensor, exponents: Tensor) -> Tensor:
    """One expert, column after column in fp64, by the textbook: the inverse of what is left of H, no factorization."""
    w, h = weight.double().clone(), hessian.double()
    scale = torch.exp2(exponents.double()).repeat_interleave(mx.BLOCK, -1)
    left = sorted(range(w.shape[1]), key=lambda j: -float(h[j, j]))
    while left:
        j, rest = left[0], left[1:]
        inverse = torch.linalg.inv(h[left][:, left])
        value = round_codes((w[:, j] / scale[:, j]).float()).double() * scale[:, j]
        error = (w[:, j] - value) / inverse[0, 0]
        w[:, j] = value
        if rest:
            w[:, rest] -= error[:, None] * inverse[0, 1:]
        left = rest
    return w


def test_gptq_is_the_textbooks() -> None:
    weight, x = draw(0)
    h = hessians_of(x)
    hessian = damped(h.mean, h.damping, K)
    values, exponents = gptq(weight, hessian, LIMITS)
    for e in range(E):
        expected = gptq_reference(weight[e], hessian[e], exponents[e])
        differ = (values[e].double() != expected).float().mean()
        assert differ < 0.01  # a tie within fp32's rounding may go the other way, and what follows it
    assert torch.equal(values, on_grid(values, exponents))


def test_what_undoes_an_error() -> None:
    _, x = draw(1)
    h = hessians_of(x)
    hessian = damped(h.mean, h.damping, K)
    upper = undoing(hessian).double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.mT @ upper, torch.linalg.inv(hessian.double()), rtol=1e-4, atol=1e-4)


def test_each_step_takes_loss_away() -> None:
    weight, x = draw(2)
    h = hessians_of(x)
    hessian = damped(h.mean, h.damping, K)
    plain = loss(weight, nearest(weight, "mse"), hessian)
    values, exponents = gptq(weight, hessian, LIMITS)
    one = loss(weight, values, hessian)
    assert (one < 0.8 * plain).all()
    before = one
    for sweeps in (1, 2, 3):
        better, at = descend(weight, values, exponents, hessian, LIMITS, sweeps)
        assert torch.equal(better, on_grid(better, at))
        after = loss(weight, better, hessian)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert (before < 0.97 * one).all()


def test_descent_ends_where_no_single_code_is_better() -> None:
    weight, x = draw(3, experts=1, n=4, k=32)
    h = hessians_of(x)
    hessian = damped(h.mean, h.damping, 32)
    values, exponents = gptq(weight, hessian, LIMITS)
    values, exponents = descend(weight, values, exponents, hessian, LIMITS, 30)
    codes = torch.tensor(sorted(set(mx.CODES)))
    step = torch.exp2(exponents)[0, :, 0]
    others = values[0, :, None, None, :].repeat(1, 32, len(codes), 1)  # [row, changed column, code, K]
    for j in range(32):
        others[:, j, :, j] = codes * step[:, None]

    def row_losses(rows: Tensor) -> Tensor:
        d = (rows - weight[0].view(4, *[1] * (rows.dim() - 2), 32)).double()
        return ((d @ hessian[0].double()) * d).sum(-1)

    assert (row_losses(others) >= row_losses(values[0])[:, None, None] * (1 - 1e-6)).all()


@pytest.mark.parametrize("rule", mx.SCALE_RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_stay_through_every_rule_and_dtype(rule: str, dtype: torch.dtype) -> None:
    weight, x = draw(4)
    values = solve(weight.to(dtype).float(), hessians_of(x), dtype).values
    assert torch.equal(values.to(dtype).float(), values)
    assert torch.equal(nearest(values.to(dtype), rule).float(), values)


def test_values_on_the_grid_stay() -> None:
    weight, x = draw(5)
    weight = nearest(weight, "mse")
    assert torch.equal(solve(weight, hessians_of(x), torch.bfloat16).values, weight)


def test_outputs_change_less_than_with_nearest() -> None:
    weight, both = draw(6, tokens=2 * T)
    x, fresh = both.split(T, 1)  # the second half is not seen
    found = solve(weight, hessians_of(x), torch.bfloat16)
    assert not found.failed.any()

    def error(values: Tensor, inputs: Tensor) -> Tensor:
        return (inputs @ (values - weight).mT).double().square().sum((1, 2))

    for inputs in (x, fresh):
        assert (error(found.values, inputs) < 0.75 * error(nearest(weight, "mse"), inputs)).all()


def test_experts_are_solved_each_for_itself() -> None:
    weight, x = draw(7)
    h = hessians_of(x)
    together = solve(weight, h, torch.bfloat16).values
    order = torch.tensor([2, 0, 1, 0])
    permuted = solve(weight[order], h[order], torch.bfloat16).values
    assert torch.equal(permuted, together[order])
    assert torch.equal(solve(weight, h, torch.bfloat16).values, together)


@pytest.mark.parametrize("k", [20, 32, 45, 96])
def test_widths_that_are_no_multiple_of_a_block(k: int) -> None:
    weight, x = draw(8, k=k)
    h = hessians_of(x)
    found = solve(weight, h, torch.bfloat16)
    assert torch.equal(nearest(found.values, "mse"), found.values)
    assert (loss(weight, found.values, h.mean) < loss(weight, nearest(weight, "mse"), h.mean)).all()


def test_a_dead_column_and_one_expert_alone() -> None:
    weight, x = draw(9, experts=1)
    x[:, :, 5] = 0
    found = solve(weight, hessians_of(x), torch.bfloat16)
    assert found.values.isfinite().all() and not found.failed.any()
    assert found.drift[0] < DRIFT


def test_without_any_hessian_there_is_no_solution() -> None:
    weight, x = draw(10)
    sums = x.mT @ x
    found = solve(weight, shrunk(torch.zeros_like(sums), torch.zeros(E)), torch.bfloat16)
    assert found.failed.all() and torch.equal(found.values, weight)


def test_drift_is_bounded_by_more_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw(11)
    h = hessians_of(x)
    free = solve(weight, h, torch.bfloat16)
    assert (free.drift < DRIFT).all() and torch.equal(free.damping, h.damping)
    middle = float(free.drift.sort().values[1])
    monkeypatch.setattr(solver, "DRIFT", middle)
    found = solve(weight, h, torch.bfloat16)
    over = free.drift > middle
    assert not found.failed.any() and (found.drift <= middle).all()
    assert (found.damping[over] > h.damping[over]).all() and torch.equal(found.values[~over], free.values[~over])
    power = weight.square().sum((1, 2))
    torch.testing.assert_close(found.drift, (found.values - weight).square().sum((1, 2)) / power)
    monkeypatch.setattr(solver, "DRIFT", 1e-4)  # below what the format can do
    assert solve(weight, h, torch.bfloat16).failed.all()


def test_prior_and_damping_by_token_counts() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2000, K, generator=g)
    counts = torch.tensor([2000, 4 * K, 0])
    x[1, 4 * K :], x[2] = 0, 0
    sums = x.mT @ x
    h = shrunk(sums, counts)
    pool = sums.sum(0) / counts.sum()
    assert h.on_prior.tolist() == [False, True, True]
    torch.testing.assert_close(h.mean[0], sums[0] / 2000)
    torch.testing.assert_close(h.mean[1], (sums[1] + K * pool) / (5 * K))
    torch.testing.assert_close(h.mean[2], pool)
    torch.testing.assert_close(h.damping, torch.tensor([0.0125 if e == 1 else (0.01, 0, 1.0)[e] for e in range(3)]))


def test_few_tokens_do_no_harm() -> None:
    """Half a token a column: what the plain recipe makes worse than nearest, on inputs that it did not see."""
    weight, x = draw(12, experts=8, tokens=1000)
    x = x[:1].reshape(1, 1000, K) + 0.5 * x  # experts of a layer get inputs of one kind
    seen = x[:, : K // 2]
    h = hessians_of(seen)
    plain = Hessians(seen.mT @ seen / (K // 2), torch.full((8,), 0.01), h.on_prior)

    def error(values: Tensor) -> float:
        return float((x @ (values - weight).mT).double().square().sum())

    rounded = error(nearest(weight, "mse"))
    assert error(solve(weight, h, torch.bfloat16).values) < rounded
    assert error(solver._attempt(weight, plain, LIMITS, 3)) > rounded


def test_targets_follow_inputs_that_differ_from_the_originals() -> None:
    """Layer after layer: W x_original is sought, not W x."""
    weight, original = draw(13)
    x = original + 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(2))
    sums, cross = x.mT @ x, (original - x).mT @ x
    counts = torch.full((E,), T)
    told = solve(weight, shrunk(sums, counts, cross), torch.bfloat16).values
    untold = solve(weight, shrunk(sums, counts), torch.bfloat16).values

    def error(values: Tensor) -> Tensor:
        return (x @ values.mT - original @ weight.mT).double().square().sum((1, 2))

    assert (error(told) < error(untold)).all()


def test_exponents_are_the_better_of_two() -> None:
    weight, _ = draw(14)
    exponents = weighted_exponents(weight, torch.ones(E, K), LIMITS)
    assert torch.equal(on_grid(weight, exponents), nearest(weight, "mse"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_and_huge_weights_stay_in_their_dtype(dtype: torch.dtype) -> None:
    weight, x = draw(15)
    for factor in (3e4, 1e-4) if dtype == torch.float16 else (1e37, 1e-36):
        scaled = (weight / weight.abs().max() * factor).to(dtype).float()
        values = solve(scaled, hessians_of(x), dtype).values
        assert values.isfinite().all() and torch.equal(values.to(dtype).float(), values)
