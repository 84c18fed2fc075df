"""The native kernels compiled for GPUs that need not be here: instructions, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from cross_compile import FP8_TARGETS, FP8_TOKENS, SHAPES, TARGETS, TOKENS, compiled, layers

pytest.importorskip("triton")


def spilled(kernel, target: str, tmp_path: Path) -> int:
    """Bytes (NVIDIA) or registers (AMD) that did not fit."""
    if target.startswith("gfx"):
        return sum(map(int, re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])))
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    out = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", out)))


def spills_allowed(kernel) -> int:
    """Where a rule counts registers, a few bytes that do not fit cost less than another program on each SM gains."""
    return 64 if getattr(kernel.metadata, "maxnreg", None) else 0


def cases():
    for target, shape, tokens in layers(TARGETS, TOKENS):
        marks = () if target == "sm90" and shape == "qwen3" and tokens <= 40 else pytest.mark.slow
        yield pytest.param(target, shape, tokens, id=f"{target}-{shape}-{tokens}", marks=marks)


@pytest.mark.parametrize(("target", "shape", "tokens"), cases())
def test_kernels(target, shape, tokens, tmp_path):
    _, _, shared, instruction = TARGETS[target]
    for part in ("up", "down"):
        kernel, regime = compiled(target, shape, tokens, part)
        assert kernel.metadata.shared <= shared
        assert spilled(kernel, target, tmp_path) <= spills_allowed(kernel), part
        if regime != "vector":
            text = kernel.asm["amdgcn" if TARGETS[target][0] == "hip" else "ptx"]
            assert re.search(instruction, text), part


def fp8_cases():
    for target, shape, tokens in layers(FP8_TARGETS, FP8_TOKENS):
        yield pytest.param(target, shape, tokens, id=f"{target}-{shape}-{tokens}")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "shape", "tokens"), fp8_cases())
def test_fp8_kernels(target, shape, tokens, tmp_path):
    """e4m3 products of many tokens, and bf16 products of few on the same weights."""
    from mxfp4_compile.ops.backends.triton.select import fp8_from

    _, _, shared, instruction = FP8_TARGETS[target]
    parts = ["up", "down"]
    for part in parts:
        kernel, regime = compiled(target, shape, tokens, part, fp8=True)
        assert kernel.metadata.shared <= shared
        assert spilled(kernel, target, tmp_path) <= spills_allowed(kernel), part
        assert (regime == "fp8") == (tokens >= fp8_from(target, *SHAPES[shape][:4]))
        if regime == "fp8" and part in ("up", "down"):
            # Not through the assertion's message: the text is long.
            assert bool(re.search(instruction, kernel.asm["ptx"])), part
            if part == "up":
                parts += ["quantize_x", "quantize_h"]


@pytest.mark.parametrize("target", ["sm90", *(pytest.param(t, marks=pytest.mark.slow) for t in TARGETS if t != "sm90")])
def test_routing_and_combination(target, tmp_path):
    for part in ("sort", "combine"):
        kernel, _ = compiled(target, "qwen3", 512, part)
        assert spilled(kernel, target, tmp_path) == 0


@pytest.mark.slow
def test_many_tokens_use_wgmma_from_registers():
    kernel, _ = compiled("sm90", "qwen3", 4096, "up")
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    # Decoded weights go to the tensor cores as they are: no trip through shared memory.
    ttgir = kernel.asm["ttgir"]
    assert not re.search(r"local_alloc %\S+ .*bf16", ttgir[: ttgir.find("warp_group_dot_wait")])


def test_registers_of_wgmma_are_free_before_reuse():
    """Triton leaves wgmma reading registers in flight from one iteration to the next; WAIT must hold it."""
    from mxfp4_compile.ops.backends.triton.select import load_config

    for entry in load_config("sm90")["moe"]:
        for part in ("up", "down"):
            if "BT" in entry[part]:
                assert entry[part]["WAIT"] == 1 - entry[part]["QUADS"]


def test_one_token_reads_weights_past_the_cache():
    """They are read once, into registers: what else lies in L2 stays there."""
    for part in ("up", "down"):
        kernel, regime = compiled("sm90", "gpt_oss", 1, part)
        assert regime == "scan"
        loads = re.findall(r"ld\.global\S*v4\.b32", kernel.asm["ptx"])
        assert loads and all("L2::cache_hint" in load for load in loads)
        assert "evict_first" in kernel.asm["ptx"]


def test_kernels_that_start_early_wait():
    """With PDL every kernel waits for the one before it, and only architectures that can are told to."""
    from mxfp4_compile.ops.backends.triton.select import load_config

    for tokens in (1, 64):
        for part in ("up", "down", "combine", *(("sort",) if tokens == 64 else ())):
            kernel, _ = compiled("sm90", "gpt_oss", tokens, part)
            ptx = kernel.asm["ptx"]
            assert ptx.count("griddepcontrol.wait") == 1, part
            assert kernel.metadata.launch_pdl
            # Nothing is stored before the wait.
            assert ptx.find("griddepcontrol.wait") < ptx.find("st.global")
    for arch in ("default", "gfx942", "gfx950", "interpreter"):
        for entry in load_config(arch)["moe"]:
            assert entry["up"]["PDL"] == entry["down"]["PDL"] == 0


@pytest.mark.smoke
def test_targets_shapes_and_tokens_meet():
    for targets, tokens in ((TARGETS, TOKENS), (FP8_TARGETS, FP8_TOKENS)):
        found, common = layers(targets, tokens), set(SHAPES) - {"narrow"}
        assert {(t, s) for t, s, _ in found} >= {(t, s) for t in targets for s in common} | {("sm90", "narrow")}
        assert {(t, n) for t, _, n in found} == {(t, n) for t in targets for n in tokens}
        assert {(s, n) for _, s, n in found} >= {(s, n) for s in common for n in tokens}


@pytest.mark.parametrize("layout", ["nibbles", "sm80", "sm89_fp8"])
def test_twiddle_is_a_permutation_of_bits(layout):
    from mxfp4_compile.ops.backends.triton.layout import twiddle, untwiddle

    words = torch.cat([1 << torch.arange(31, dtype=torch.int32), torch.randint(-(2**31), 2**31 - 1, (1000,)).int()])
    assert torch.equal(untwiddle(twiddle(words, layout), layout), words)
    assert [bin(int(w)).count("1") for w in twiddle(words[:31], layout)] == [1] * 31
