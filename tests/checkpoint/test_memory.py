"""Memory: what is left after optimize, and the peak while it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory import live_bytes
from paths import SUPPORT

import mxfp4_compile
from mxfp4_compile.tools.families import tiny_inputs, tiny_model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "muse_spark"])
def test_experts_are_gone_after_optimize_and_after_a_forward(family: str) -> None:
    options = {"layers": 8}
    mxfp4_compile.optimize(tiny_model(family, dtype=torch.bfloat16))  # tables and caches of the library itself
    model = tiny_model(family, dtype=torch.bfloat16, **options)
    experts = sum(p.numel() * 2 for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3)
    before = live_bytes()
    mxfp4_compile.optimize(model)
    slack = 1 << 16
    assert live_bytes() <= before - experts + 0.28 * experts + slack
    with torch.no_grad():
        model(**tiny_inputs(model))
    assert live_bytes() <= before - experts + 0.28 * experts + slack


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
@pytest.mark.parametrize(("kind", "least"), [("packed", 1 << 30), ("loop", 1 << 28)])
def test_peak_of_a_large_model(kind: str, least: int) -> None:
    # A process of its own: its peak resident memory is the kernel's own count of every byte, not only tensors.
    # What oneDNN keeps of each shape it has met (some 40 MB here, whatever the weights' size) is not the sites' memory.
    counted = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **counted}
    script = SUPPORT / "peak_memory.py"
    command = [sys.executable, str(script), kind]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    model, site, peak = (int(n) for n in result.stdout.split()[-3:])
    assert model >= least
    assert peak <= model + 1.5 * site, f"peak {(peak - model) / site:.2f} sites over the model"
