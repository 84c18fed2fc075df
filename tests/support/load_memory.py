"""Load a model in a directory with MXFP4 experts; print the peak of anonymous memory meanwhile, what stays, and how
much of that all living tensors hold.

``load_memory.py DIR``: run by test_remote_code.py in a process of its own; bytes above those of the imports.
"""

from __future__ import annotations

import sys
import threading
import time

import torch
from memory import anonymous, live_bytes

import mxfp4_compile
from mxfp4_compile.checkpoint import loading  # noqa: F401  (before the measurement, with transformers)


def main() -> None:
    torch.set_num_threads(1)
    before, peak, done = anonymous(), [0], [False]

    def watch() -> None:
        while not done[0]:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = mxfp4_compile.load(sys.argv[1], trust_remote_code=True, progress=False)
        final = anonymous()
    finally:
        done[0] = True
        watcher.join()
    assert model.mxfp4_report.rewritten
    print(max(peak[0], final) - before, final - before, live_bytes())


if __name__ == "__main__":
    main()
