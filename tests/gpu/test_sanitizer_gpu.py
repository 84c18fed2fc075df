"""The native kernels under compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# One small layer for every kernel: regimes by number of tokens, sizes that fill no tile, ids that are no expert.
SCRIPT = """
import torch
from mxfp4_compile.ops.triton import BACKEND
from mxfp4_compile.spec import Activation, MoEParams

torch.manual_seed(0)
ran = 0
for e, k, h, i, gated in ((6, 2, 200, 72, True), (5, 3, 128, 100, False)):
    act = Activation("silu" if gated else "relu2", gated)
    params = MoEParams(e, h, i, act, "halves" if gated else "none", 0, False, torch.bfloat16, torch.bfloat16)
    layout = "sm80"
    tensors, biases = {}, {}
    for role in ("up", "down"):
        _, n, width = params.shape(role)
        packed = torch.randint(0, 256, (e, n, (width + 1) // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randint(118, 124, (e, n, -(-width // 32)), dtype=torch.uint8, device="cuda")
        tensors[role] = BACKEND.prepare(packed, scales, k=width, role=role, params=params, layout=layout)
        bias = torch.randn(e, n, device="cuda", dtype=torch.bfloat16)
        biases[role] = BACKEND.prepare_bias(bias, role=role, params=params, layout=layout)
    for tokens in (1, 2, 7, 40, 70, 300):
        x = torch.randn(tokens, h, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(tokens, e, device="cuda").topk(k, -1).indices
        ids[-1, 0] = e
        weights = torch.rand(tokens, k, device="cuda")
        args = (x, ids, weights, tensors["up"], tensors["down"], biases["up"], biases["down"], params, layout)
        assert BACKEND.moe(*args).isfinite().all()
        ran += 1
torch.cuda.synchronize()
print("ran", ran)
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str, tmp_path: Path) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "layers.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    # The caching allocator would hide an access beyond a tensor inside its own block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": root}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=300)  # compiles the kernels
    done = subprocess.run(
        [program, "--tool", tool, sys.executable, script],
        env=environment, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    out = done.stdout + done.stderr
    if "Device not supported" in out:
        pytest.skip("compute-sanitizer does not support this device")
    assert "ran 12" in out, out[-3000:]
    assert "ERROR SUMMARY: 0 errors" in out or "RACECHECK SUMMARY: 0 hazards" in out, out[-3000:]
