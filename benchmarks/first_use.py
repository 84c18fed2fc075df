"""Seconds until the native kernels of one model are compiled, in an empty Triton cache.

    python benchmarks/first_use.py [--shape 128,8,2048,768] [--tokens 1,8,64,512,4096]

Times the first call at each number of tokens and what a call takes afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="128,8,2048,768")
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # before triton is imported
        import torch

        from mxfp4_compile.ops.synthetic import parse_shape
        from mxfp4_compile.tools.benchmark import Layer, device_of

        device = device_of(None)
        layer = Layer(parse_shape(args.shape), device)
        at = layer.backend("triton")
        cases = {int(t): layer.inputs(int(t)) for t in args.tokens.split(",")}
        torch.cuda.synchronize()
        first, second = {}, {}
        for found in (first, second):
            for t, case in cases.items():
                start = time.perf_counter()
                at(*case)()
                torch.cuda.synchronize()
                found[t] = time.perf_counter() - start
        kernels = len(list(Path(folder).rglob("*.cubin"))) + len(list(Path(folder).rglob("*.hsaco")))
    print(f"{layer.shape}: {kernels} kernels, {sum(first.values()):.1f} s in all;", end=" ")
    print("first call", {t: f"{s:.1f} s" for t, s in first.items()}, end=", ")
    print("later", {t: f"{s * 1e6:.0f} us" for t, s in second.items()})
    if args.out:
        args.out.write_text(json.dumps({"shape": args.shape, "kernels": kernels, "first": first, "later": second}))


if __name__ == "__main__":
    main()
