"""The loops of the kernels for few tokens, compiled for sm_90 with the installed Triton: what they hold, and how much.

Decoded weights stay in the registers they were decoded in, the products are mma.sync, and no loop has grown by a tenth
against triton_loops.json, which holds the counts of releases that were timed on a GPU; another is
compared with the nearest before it. ``python tests/ops/test_triton_loops.py`` adds those of the installed one.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from cross_compile import compiled_loop, loop_kernels, release

from mxfp4_compile.ops.backends.triton.tiles import tiles_of

RECORDED = Path(__file__).with_name("triton_loops.json")


def numbers(version):
    return tuple(map(int, version.split(".")[:3]))


def nearest(recorded):
    """The recorded release at or before the installed one; the first where all are newer."""
    versions = sorted(recorded, key=numbers)
    return max((v for v in versions if numbers(v) <= numbers(release())), key=numbers, default=versions[0])


def loops(cubin, tmp_path):
    """Instructions of each innermost loop with products, and the bytes of stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no cuobjdump")
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    run = lambda *of: subprocess.run([tool, *of, file], capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), text.split()) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", run("-sass"))]
    spans = []
    for at, words in code:
        target = re.search(r"BRA.*0x([0-9a-f]+)", " ".join(words))
        if target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    bodies = [[w[1] if w[0].startswith("@") else w[0] for at, w in code if low <= at <= high] for low, high in inner]
    bodies = [body for body in bodies if any("MMA" in op for op in body)]
    stack = max(map(int, re.findall(r"STACK:(\d+)", run("--dump-resource-usage"))))
    return bodies, stack


def count(bodies, stack):
    """What triton_loops.json holds of a kernel: instructions, those that store to shared memory, bytes of stack."""
    return [sum(map(len, bodies)), sum(op.startswith("STS") for body in bodies for op in body), stack]


# In registers with and without scales, of 64 rows and of more: each of the orders of K that Triton 3.8 chooses.
QUICK = ("down scan BM=64 BT=1 QUADS=1 UNROLL=1 WAIT=0 SPLIT_K=2", "down scan BM=128 BT=8")


def cases():
    names = list(loop_kernels())
    quick = [next(name for name in names if name.startswith(start)) for start in QUICK]
    return [pytest.param(n, id=n.replace(" ", "-"), marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", cases())
def test_loops(name, tmp_path):
    recorded = json.loads(RECORDED.read_text())
    kernel, again, rows = compiled_loop(name)
    assert release() not in recorded or not again, "another order of K than instruction.py expects of this release"
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    # Not through the assertion's message: the texts are long.
    assert ".target sm_90a" in ptx
    used = set(re.findall(r"mma\.sync|wgmma", ptx))
    assert used == {"mma.sync"}
    through_shared = re.findall(rf"local_(?:alloc|store) %\S+.*?tensor<{rows}x64xbf16", ttgir)
    assert not through_shared
    bodies, stack = loops(kernel.asm["cubin"], tmp_path)
    assert bodies
    assert not [op for body in bodies for op in body if op.startswith("SHFL")]
    instructions, stores, bytes_of_stack = recorded[nearest(recorded)][name]
    seen = count(bodies, stack)
    assert seen[0] <= 1.1 * instructions
    assert seen[1] <= stores
    # Rules count registers; a few that do not fit cost less than another program on each SM gains.
    assert seen[2] <= max(bytes_of_stack, 64)


def test_every_rule_is_recorded():
    recorded = json.loads(RECORDED.read_text())
    assert list(recorded) == sorted(recorded, key=numbers)
    assert all(set(counts) == set(loop_kernels()) for counts in recorded.values())


def step_on(arch, **constants):
    """A step of the scanning kernel that rules give mma.sync and 96 registers."""
    from mxfp4_compile.ops.backends.triton.matmul import scan_matmul
    from mxfp4_compile.ops.backends.triton.moe import product_step

    sizes = {"BM": 64, "BT": 8, "QUADS": 1, "UNROLL": 1, "WAIT": 0, "SPLIT_K": 1, "AHEAD": 0, "PDL": 0}
    tiles = tiles_of({"kernel": "scan", **sizes, "warps": 4, "stages": 2, "registers": 96})
    names = scan_matmul.arg_names
    others = {name: 0 for name in names[names.index("E") :] if name not in sizes}
    return product_step(scan_matmul, tiles, arch, **{**others, "K": 64, **constants})


DOT = "%a = tt.dot %w, %x, %c : tensor<64x64xbf16, #ttg.dot_op<{{opIdx = 0, parent = #mma, kWidth = {}}}>> * tensor"
WGMMA = "%a = ttng.warp_group_dot %w, %x, %c"


def test_the_order_of_k_follows_the_compiler():
    from mxfp4_compile.ops.backends.triton.instruction import Product, chosen, expected

    assert chosen(DOT.format(4)) == Product(True, False)
    assert chosen(DOT.format(2)) == Product(False, False)
    assert chosen(WGMMA) == Product(False, True)
    # Both in one kernel, or neither: nothing to follow.
    assert chosen(DOT.format(4) + "\n" + DOT.format(2)) is None
    assert chosen("tt.store") is None
    step = step_on("sm90")
    assert (step.constants["QUADS"], step.constants["WAIT"]) == (expected(64, 8, 0).quads, 0)
    other = {True: 2, False: 4}[expected(64, 8, 0).quads]
    assert not step.settle(DOT.format(6 - other))
    assert step.settle(DOT.format(other))
    assert step.constants["QUADS"] == int(other == 4)
    assert step._tail == tuple(step.constants.values())
    # Once: the compiler might choose the first again.
    assert not step.settle(DOT.format(6 - other))
    # AMD's compiler has an order of its own, which configurations give.
    assert not step_on("gfx942").settle(DOT.format(2))


def test_mma_sync_is_asked_for_where_wgmma_would_be_chosen():
    arches = {arch: step_on(arch).options.get("arch") for arch in ("sm80", "sm90", "sm100", "gfx942", "interpreter")}
    assert arches == {"sm80": None, "sm90": "sm80", "sm100": None, "gfx942": None, "interpreter": None}
    # Where it is chosen all the same, the kernel is compiled anew as wgmma needs it.
    step = step_on("sm90")
    assert step.settle(WGMMA)
    assert (step.constants["QUADS"], step.constants["WAIT"]) == (0, 1)


def test_options_are_said_rather_than_left_to_defaults():
    assert step_on("sm90").options["enable_fp_fusion"] is True
    # Registers are counted for bf16 and whole steps.
    assert step_on("sm90").options["maxnreg"] == 96
    assert "maxnreg" not in step_on("sm90", SPLIT=True).options
    assert "maxnreg" not in step_on("sm90", K=72).options


def test_env_says_which_triton_figures_are_from():
    from mxfp4_compile.ops.backends.triton.instruction import TIMED
    from mxfp4_compile.tools.commands.env import _note

    assert all(_note("triton", version) == _note("torch", "2.11") == "" for version in (*TIMED, TIMED[0] + "+git1"))
    assert TIMED[0] in _note("triton", "3.99.0") and "not timed" in _note("triton", "3.99.0")
    assert set(json.loads(RECORDED.read_text())) <= set(TIMED)


if __name__ == "__main__":
    import tempfile

    all_recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        counts = {name: count(*loops(compiled_loop(name)[0].asm["cubin"], Path(folder))) for name in loop_kernels()}
    all_recorded[release()] = counts
    lines = lambda counts: ",\n".join(f"  {json.dumps(name)}: {json.dumps(c)}" for name, c in counts.items())
    texts = [f' "{version}": {{\n{lines(all_recorded[version])}\n }}' for version in sorted(all_recorded, key=numbers)]
    RECORDED.write_text("{\n" + ",\n".join(texts) + "\n}\n")
