"""The native kernels of one layer under several releases of Triton, side by side on one GPU.

    python benchmarks/tritons.py --triton 3.6.0= --triton 3.9.0=/folder/of/triton [--shapes qwen3-30b-a3b]

NAME=PATH puts PATH before everything else that a process imports; several folders are joined by ":", and an older
checkout of this library there is measured instead of this one. Every (name, shape) has a process of its own. All
compile and verify first; then they take turns, one at a time, for several rounds, so that what changes on the card
meanwhile meets all alike. The figure is the least of the rounds' medians (CUDA-graph replay, L2 flushed); the table
gives it as a share of the first name's. Writes <out>/<gpu>-<date>-tritons.json, with registers and instructions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 4096)
SHAPES = ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b")


def worker(shape: str, tokens: list[int]) -> None:
    """Answers each line of the standard input with a line: what was compiled first, then times."""
    # After PYTHONPATH, so that a checkout there is taken.
    sys.path.append(str(HERE.parent))
    sys.path.append(str(HERE))
    out, sys.stdout = sys.stdout, sys.stderr
    import torch

    import mxfp4_compile  # before moe_layer, which puts its own checkout first
    from mxfp4_compile.ops.backends.triton import launch
    from mxfp4_compile.timing import median_us, median_wall_us
    from mxfp4_compile.tools.benchmark import Layer, relative_error

    from moe_layer import HIT, shape_of  # isort: skip

    gpu = torch.cuda.is_available()
    steps: list[Any] = []
    make = launch.Step.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        steps.append(self)

    launch.Step.__init__ = watched  # type: ignore[method-assign]
    start = time.perf_counter()
    of, skew = shape_of(shape)
    layer = Layer(of, torch.device("cuda" if gpu else "cpu"))
    at = layer.backend("triton" if gpu else "cpu")
    runs, about = {}, {}
    for t in tokens:
        case = layer.inputs(t, skew, HIT.get((shape, t)))
        seen = len(steps)
        run = at(*case)
        got = run()
        same = all(torch.equal(got, run()) for _ in range(5))
        kernels = [_about(step) for step in steps[seen:] if gpu]
        about[t] = {"error": relative_error(got, layer.reference(*case)), "repeats": same, "kernels": kernels}
        runs[t] = run
    layer.canonical.clear()
    versions = {"torch": torch.__version__, "library": str(Path(mxfp4_compile.__file__).parent)}
    if gpu:
        import triton

        versions["triton"] = triton.__version__
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    ready = {"seconds": time.perf_counter() - start, "about": about, "versions": versions}
    print(json.dumps(ready), file=out, flush=True)
    timer = median_us if gpu else median_wall_us
    for _ in sys.stdin:
        times = {t: timer(run) for t, run in runs.items()}
        print(json.dumps(times), file=out, flush=True)


def _about(step: Any) -> dict[str, Any]:
    compiled = next(iter(step._compiled.values()), None)
    if compiled is None:
        return {"kernel": step.kernel.__name__}
    ptx = compiled.asm["ptx"]
    product = "wgmma" if "wgmma.mma" in ptx else "mma.sync" if "mma.sync" in ptx else ""
    sizes = {name: value for name, value in step.constants.items() if name in ("BM", "BT", "QUADS", "WAIT")}
    return {
        "kernel": step.kernel.__name__, "registers": compiled.n_regs, "spills": compiled.n_spills,
        "shared": compiled.metadata.shared, "product": product, **sizes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", action="append", default=[], metavar="NAME=PATH", help="the first is the measure")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", default="", help="file name, instead of <gpu>-<date>-tritons")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tokens = [int(t) for t in args.tokens.split(",")]
    if args.worker:
        worker(args.worker, tokens)
        return
    names = dict(entry.partition("=")[::2] for entry in args.triton)
    shapes = args.shapes.split(",")
    running = {}
    for shape in shapes:
        for name, path in names.items():
            path = ":".join(filter(None, (path, os.environ.get("PYTHONPATH", ""))))
            command = [sys.executable, __file__, "--worker", shape, "--tokens", args.tokens]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            running[shape, name] = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)
    about: dict[str, Any] = {}
    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (shape, name), process in list(running.items()):
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            print(f"{name}, {shape}: ended before it had compiled", flush=True)
            del running[shape, name]
            continue
        about[f"{name} {shape}"] = ready = json.loads(line)
        times[shape, name] = {str(t): [] for t in tokens}
        wrong = [t for t, a in ready["about"].items() if not (a["error"] < 2e-2 and a["repeats"])]
        print(f"{name}, {shape}: {ready['versions']}, {ready['seconds']:.0f} s; wrong or unsteady: {wrong}", flush=True)
    for _ in range(args.rounds):
        for key, process in running.items():
            process.stdin.write("time\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            for t, us in json.loads(process.stdout.readline()).items():  # type: ignore[union-attr]
                times[key][t].append(us)
    for process in running.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait(30)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    rows = []
    print(gpu, "microseconds of", next(iter(names)), "and the others' share of them")
    print("shape", "tokens", *names)
    for shape in shapes:
        for t in map(str, tokens):
            us = {name: min(times[shape, name][t]) for name in names if (shape, name) in times}
            rows.append({"shape": shape, "tokens": int(t), "us": us, "rounds": {n: times[shape, n][t] for n in us}})
            first = next(iter(us.values()), 0.0)
            shares = [f"{us[n] / first:.3f}" if n in us else "-" for n in names]
            print(shape, t, f"{first:.1f}", *shares[1:], flush=True)
    unit = "microseconds, CUDA-graph replay, L2 flushed, median of 20"
    table = {"gpu": gpu, "date": date, "unit": unit, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / ((args.name or gpu.replace(" ", "_").lower() + f"-{date}-tritons") + ".json")
    file.write_text(json.dumps({**table, "about": about}, indent=1))


if __name__ == "__main__":
    main()
