"""The kernels of the native backward compiled for GPUs that need not be here: instructions, spills, shared memory."""

from __future__ import annotations

import re

import pytest
import torch
from cross_compile import SHAPES, TARGETS, compile_step
from test_triton_compile import spilled

from mxfp4_compile.spec import MoEParams

pytest.importorskip("triton")
_ARRAYS = {"g": "*bf16", "q": "*bf16", "dy": "*bf16", "grad": "*bf16", "rows": "*bf16", "dw": "*bf16"}


def compiled(target: str, shape: str, pairs: int, part: str):
    """A kernel of a backward of bf16 tokens, as a launch for so many pairs would compile it."""
    from triton.backends.compiler import GPUTarget

    from mxfp4_compile.ops.backends.triton.backward import BackwardPlan
    from mxfp4_compile.ops.backends.triton.select import choose_backward, choose_linear

    backend, arch = TARGETS[target][:2]
    e, top_k, h, i, act = SHAPES[shape]
    params = MoEParams(e, h, i, act, "halves", 0, False, torch.bfloat16, torch.bfloat16)
    choice = choose_backward(target, e, pairs, h * i)
    dtypes = (torch.bfloat16, torch.bfloat16, torch.int64, torch.float32, None, None)
    bits = int(backend == "cuda")
    plan = BackwardPlan(
        target, params, top_k, h, h, dtypes, bits, choose_linear(target, e, pairs), choice, 2048
    )  # fmt: skip
    gpu = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    return compile_step(getattr(plan, part), gpu, {"bias", "x_scales", "bases", "again"}, _ARRAYS)[0]


def cases():
    for target in TARGETS:
        for shape, pairs in (("qwen3", 16384), ("gpt_oss", 32768), ("ragged", 400), ("narrow", 4000)):
            quick = target == "sm90" and shape == "qwen3"
            if target == "sm90" or shape in ("gpt_oss", "ragged"):
                yield pytest.param(
                    target, shape, pairs, marks=() if quick else pytest.mark.slow, id=f"{target}-{shape}-{pairs}"
                )


@pytest.mark.parametrize(("target", "shape", "pairs"), cases())
def test_products(target, shape, pairs, tmp_path):
    _, _, shared, instruction = TARGETS[target]
    for part in ("down", "up"):
        kernel = compiled(target, shape, pairs, part)
        assert kernel.metadata.shared <= shared
        assert spilled(kernel, target, tmp_path) == 0, part
        text = kernel.asm["amdgcn" if TARGETS[target][0] == "hip" else "ptx"]
        assert bool(re.search(instruction, text)), part


def test_weights_of_few_rows_go_from_registers_to_wgmma():
    """Lanes hold what tensor cores want: nothing of the decoded weights passes through shared memory."""
    kernel = compiled("sm90", "qwen3", 5120, "up")
    ttgir = kernel.asm["ttgir"]
    loop = ttgir[ttgir.index("scf.for") :]
    loop = loop[: loop.index("scf.yield")]
    assert "warp_group_dot" in loop and "local_alloc" not in loop
    # What is stored to shared memory is the output alone, after the loop.
    ptx = kernel.asm["ptx"]
    assert "st.shared" not in ptx[ptx.index("wgmma.mma_async") : ptx.rindex("wgmma.mma_async")]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_kernels_between(target, tmp_path):
    for part in ("activation", "weights"):
        assert spilled(compiled(target, "gpt_oss", 32768, part), target, tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_kernels_of_a_layer_with_adapters(target, tmp_path):
    from triton.backends.compiler import GPUTarget

    from mxfp4_compile.ops.backends.triton import adapted
    from mxfp4_compile.ops.backends.triton.moe import linear_step
    from mxfp4_compile.ops.backends.triton.select import choose_linear

    e, top_k, h, i, act = SHAPES["gpt_oss"]
    bf16 = torch.bfloat16
    params = MoEParams(e, h, i, act, "interleaved", 0, False, bf16, bf16)
    gpu = GPUTarget(*TARGETS[target][:2], 64 if target.startswith("gfx") else 32)
    width = 2 * i
    linear = linear_step(
        target, e, width, h, h, (bf16, bf16, bf16), 1 - target.startswith("gfx"), choose_linear(target, e, 8192)
    )
    arrays = _ARRAYS | {"again": "*bf16", "h": "*bf16", "bias": "*bf16"}
    for step, absent in (
        (adapted._gradient_step(params, top_k, h, (bf16,) * 6), set()),
        (adapted._activate_step(params, bf16)[0], set()),
        (linear, {"order", "weights", "x_scales", "bases"}),
    ):
        assert spilled(compile_step(step, gpu, absent, arrays)[0], target, tmp_path) == 0, step.kernel
