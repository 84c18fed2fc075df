"""Running a test file as a program in Triton's interpreter: a process that has imported Triton cannot switch to it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import REPO, SUPPORT


def interpret(script: str, *arguments: str, **environment: str) -> str:
    """What ``script`` prints; skips the test where the interpreter cannot run."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    version = lambda package: tuple(map(int, package.__version__.split(".")[:2]))
    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytest.skip("Triton 3.6's interpreter cannot loop to a run-time bound with numpy 2.4")
    # The package under test, installed or not.
    path = os.pathsep.join(filter(None, (str(REPO), str(SUPPORT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    run = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout
