"""The kernel for products of few rows, in Triton's interpreter and compiled for sm_90, and how it is launched."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpret

from mxfp4_compile.runtime import linear

# rows, columns, depth, block of K (None: by the rule), bias; every one of them cuts a block somewhere.
CASES = [(8, 200, 2048, None, True), (2, 64, 192, 64, False), (24, 130, 320, 128, True), (64, 40, 512, None, False)]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, depth, block_k, biased in CASES:
        shapes = (rows, depth), (columns, depth), (columns,)
        x, weight, bias = (torch.randn(*shape, generator=generator).half() for shape in shapes)
        given = bias if biased else None
        how = linear.plan(rows, columns, depth, block_k)
        for _ in range(2):  # the second finds the counters as the first left them
            out = linear.launch(x.t().contiguous().t(), weight, given, how)
        exact = F.linear(x.double(), weight.double(), given.double() if biased else None)
        torch.testing.assert_close(out.double(), exact, rtol=2**-10, atol=1e-3 * float(exact.std()))
    assert all(not c.any() for c in linear._counters().values())
    print(sum(linear.plan(*case[:4]).splits > 1 for case in CASES), "of them split")


@pytest.mark.slow
def test_against_a_product_in_fp64() -> None:
    assert interpret(__file__).strip() == "2 of them split"


@pytest.mark.parametrize("shape", [(8, 5120, 2048), (64, 2048, 4096), (8, 128, 2048), (2, 32, 2880), (16, 40, 48)])
def test_plans_cover_k_once(shape: tuple[int, int, int]) -> None:
    how = linear.plan(*shape)
    steps = -(-shape[2] // how.block_k)
    assert (how.splits - 1) * how.steps < steps <= how.splits * how.steps
    assert how.blocks * 64 >= shape[1] > (how.blocks - 1) * 64
    assert how.block_m >= shape[0]


@pytest.mark.slow
def test_compiled_for_sm90() -> None:
    """Tensor cores read weights from shared memory, where 16-byte copies put them steps ahead."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mxfp4_compile.runtime.linear_kernel import linear_rows

    pointers = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*bf16", "parts": "*fp32", "arrived": "*i32"}
    numbers = dict.fromkeys(("rows", "N", "K", "x_stride", "splits", "steps"), "i32")
    constants = {"BIAS": True, "SPLIT": True, "EVEN": True, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}
    aligned = {(linear_rows.arg_names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, "N", "K", "x_stride")}
    source = ASTSource(linear_rows, pointers | numbers | dict.fromkeys(constants, "constexpr"), constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    ptx = made.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg" in ptx
    assert made.metadata.shared <= 227 << 10
    # Parts are written, then every thread waits, then one of them counts; parts are read past the first cache.
    stored, counted = ptx.index("st.global"), ptx.index("atom.global.gpu.acq_rel")
    assert "bar.sync" in ptx[stored:counted]
    assert re.search(r"ld\.global\.cg", ptx[counted:])


if __name__ == "__main__":
    main()
