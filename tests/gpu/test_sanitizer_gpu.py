"""The native kernels under compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sanitize.py"
UNAVAILABLE = 77


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tools", tool, "--seconds", "500", "--log", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stdout.strip())
    log = tmp_path / f"{tool}.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
