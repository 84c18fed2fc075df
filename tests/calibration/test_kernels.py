"""The solver's kernels in Triton's interpreter, on the CPU, against its loops in torch; that they compile for GPUs.

This file is also the program that runs in the interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from interpreter import interpret
from torch import Tensor

E, N, K, T = 2, 40, 160, 700  # rows that fill no program, columns past a first group of four blocks


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Weights [E, N, K] and Hessians [E, K, K] of correlated inputs, damped."""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(E, N, K, generator=g) * 0.05).bfloat16().float()
    x = torch.randn(E, T, K, generator=g) @ (torch.randn(E, K, K, generator=g) / K**0.5)
    hessian = x.mT @ x / T
    hessian.diagonal(dim1=1, dim2=2).add_(0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    return weight, hessian


def main() -> None:
    from mxfp4_compile.calibration import kernels, solver
    from mxfp4_compile.calibration.grid import exponent_range, on_grid
    from mxfp4_compile.calibration.solver import Hessians, descend, gptq, loss, solve, undoing

    torch.set_num_threads(1)
    limits = exponent_range(torch.bfloat16)
    weight, hessian = draw(0)
    found = {}

    def both(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        plain = run()
        normal, solver._kernels = solver._kernels, lambda _: kernels
        try:
            return plain, run()
        finally:
            solver._kernels = normal

    (_,), (undo,) = both(lambda: (undoing(hessian),))
    wide = undo.double()
    found["undoing"] = float((wide.mT @ wide @ hessian.double() - torch.eye(K)).abs().max())
    found["upper"] = torch.equal(undo, undo.triu())
    broken = hessian.clone()
    broken[1, 70, 70] = -1.0
    some = kernels.undoing(broken)
    found["indefinite"] = [bool(some[0].isfinite().all()), bool(some[1].isfinite().all())]

    plain, ours = both(lambda: gptq(weight, hessian, limits))
    found["gptq"] = float((plain[0] != ours[0]).float().mean())
    found["gptq exponents"] = torch.equal(plain[1], ours[1])
    start = plain
    plain, ours = both(lambda: descend(weight, *start, hessian, limits, 2))
    found["descend"] = float((plain[0] != ours[0]).float().mean())
    found["descend exponents"] = float((plain[1] != ours[1]).float().mean())
    found["exponents moved"] = float((plain[1] != start[1]).float().mean())
    found["on grid"] = torch.equal(ours[0], on_grid(ours[0], ours[1]))
    before, after = (loss(weight, q, hessian).sum() for q in (start[0], ours[0]))
    found["gain"] = [float(before), float(loss(weight, plain[0], hessian).sum()), float(after)]

    cross = torch.randn(E, K, K, generator=torch.Generator().manual_seed(1)) * 1e-3
    narrow = slice(None), slice(150), slice(150)  # no multiple of a block
    h = Hessians(hessian[narrow], torch.full((E,), 0.01), torch.zeros(E, dtype=torch.bool), cross[narrow])
    plain, ours = both(lambda: (solve(weight[..., :150], h, torch.bfloat16, sweeps=1).values,))
    found["solve"] = float((plain[0] != ours[0]).float().mean())
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    return json.loads(interpret(__file__).splitlines()[-1])


@pytest.mark.slow
def test_kernels_do_what_the_loops_do(found: dict) -> None:
    assert found["undoing"] < 1e-3 and found["upper"]
    assert found["indefinite"] == [True, False]  # the experts beside it are none the worse
    # A tie within fp32's rounding may go the other way, and what follows it.
    assert found["gptq"] < 0.01 and found["gptq exponents"]
    assert found["descend"] < 0.01 and found["descend exponents"] < 0.01 and found["on grid"]
    assert found["exponents moved"] > 0.01
    before, plain, ours = found["gain"]
    assert ours < 0.98 * before and abs(ours - plain) < 1e-3 * plain
    assert found["solve"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile(arch: int) -> None:
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mxfp4_compile.calibration import kernels

    sizes = {"ROWS": 32, "BLOCK": 32, "WIDTH": 128}
    for kernel in (kernels._gptq, kernels._descend, kernels._undoing):
        numbers = {"start", "first", "n", "k", "batch_in", "row_in", "batch_out", "row_out"}
        signature = {
            name: "constexpr" if name in sizes else "i32" if name in numbers else "fp32" if name in ("low", "high")
            else "*fp32"
            for name in kernel.arg_names
        }  # fmt: skip
        constants = {name: size for name, size in sizes.items() if name in signature}
        built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", arch, 32))
        assert "cubin" in built.asm


if __name__ == "__main__":
    main()
