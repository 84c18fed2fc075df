"""Seconds until the native kernels of one model are compiled, in an empty Triton cache.

    python benchmarks/first_use.py [--shape 128,8,2048,768] [--tokens 1,8,64,512,4096]
    python benchmarks/first_use.py --model qwen3-30b-a3b --layers 24 --out FILE

Times the first call at each number of tokens and what a call takes afterwards. With --model: what is waited for in the
first forwards of a model of that configuration (random weights) after ``optimize`` returned, where kernels are compiled
ahead and where they are not, each in a process and a cache of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def of_model(args: argparse.Namespace) -> None:
    """One line of JSON: seconds of ``optimize`` and of the first forward at each number of tokens."""
    import torch
    from generate import build, config_of

    import mxfp4_compile

    model = build(config_of(args.model, args.layers), args.device)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long, device=args.device))  # what torch itself starts at its first use
        wait()
        start = time.perf_counter()
        mxfp4_compile.optimize(model)
        wait()
        found: dict[str, Any] = {"optimize": time.perf_counter() - start, "first": {}, "later": {}}
        for when in ("first", "later"):
            for tokens in (int(t) for t in args.tokens.split(",")):
                ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=args.device)
                start = time.perf_counter()
                model(ids)
                wait()
                found[when][tokens] = time.perf_counter() - start
    print(json.dumps(found))


def both(args: argparse.Namespace) -> None:
    """A process for each; a table, and everything in ``--out``."""
    from mxfp4_compile.tools.environment import hardware, versions

    results: dict[str, Any] = {"model": args.model, "layers": args.layers, "versions": versions()}
    results["hardware"] = asdict(hardware())
    for name, ahead in (("compiled when launched", "0"), ("compiled ahead", "1")):
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "TRITON_CACHE_DIR": folder, "MXFP4_COMPILE_AHEAD": ahead}
            done = subprocess.run([sys.executable, *sys.argv], env=env, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = found = json.loads(done.stdout.splitlines()[-1])
        waited = {t: found["first"][t] - found["later"][t] for t in found["first"]}
        found["waited"] = sum(waited.values())
        times = ", ".join(f"{t}: {s:.2f}" for t, s in waited.items())
        print(f"{name}: optimize {found['optimize']:.1f} s; waited {found['waited']:.2f} s in first forwards ({times})")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="128,8,2048,768")
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", help="a configuration of generate.py")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.model and "MXFP4_COMPILE_AHEAD" in os.environ:
        of_model(args)
        return
    if args.model:
        both(args)
        return
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
