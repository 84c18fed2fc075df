"""The native kernels under NVIDIA's compute-sanitizer: no invalid, misaligned or leaking access, no race.

    python benchmarks/sanitize.py [--tools memcheck,racecheck] [--seconds 240]

Runs a small set of layers (every regime, odd sizes, biases, expert ids beyond the last) once per tool
and exits with 1 unless every summary is clean and every result right. Exits with 77, saying why, where
the tool is missing or does not support the device.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck")
UNAVAILABLE = 77
KERNELS = ("scan_matmul", "sorted_matmul", "vector_up", "vector_down", "sort_pairs", "combine", "quantize_rows")

# E, K, H, I; tokens; biases; ids that are no expert; and the activations' dtype where it is not bf16.
# The rules choose the kernels: 1 token is the vector kernels', a few the scan's, more the sorted ones', with other
# tiles for other rows per expert.
CASES = (
    ((6, 2, 1000, 1408), 1, True, False),
    ((6, 2, 1000, 1408), 5, True, True),
    ((6, 2, 1000, 1408), 40, True, True),
    ((6, 2, 1000, 1408), 150, True, False),
    ((6, 2, 1000, 1408), 700, True, True),
    ((12, 3, 200, 96), 1, False, True),
    ((12, 3, 200, 96), 9, False, False),
    ((12, 3, 200, 96), 30, False, True),
    ((12, 3, 200, 96), 300, False, True),
    ((6, 2, 1000, 1408), 40, True, True, "fp8"),
    ((6, 2, 1000, 1408), 100, True, True, "fp8"),
    ((6, 2, 1000, 1408), 350, True, False, "fp8"),
    ((6, 2, 1000, 1408), 700, True, True, "fp8"),
    ((12, 3, 200, 96), 300, False, True, "fp8"),
)


def find_tool() -> str | None:
    """compute-sanitizer on the path or in the toolkit."""
    found = shutil.which("compute-sanitizer")
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for folder in filter(None, folders):
        for place in ("bin", "compute-sanitizer"):
            path = Path(folder) / place / "compute-sanitizer"
            if found is None and path.is_file():
                found = str(path)
    return found


def run_cases() -> None:
    """All cases once, on the GPU (or in Triton's interpreter), against the fp32 product."""
    sys.path.insert(0, str(ROOT))
    import torch

    from mxfp4_compile.ops.arguments import MoEInputs, Slot
    from mxfp4_compile.ops.backends.triton.moe import architecture
    from mxfp4_compile.ops.backends.triton.select import choose
    from mxfp4_compile.ops.registry import get_backend
    from mxfp4_compile.ops.synthetic import LayerShape
    from mxfp4_compile.tools.benchmark import TOLERANCE_FP8, Layer, relative_error

    device = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
    backend = get_backend("triton")
    regimes = set()
    for sizes, tokens, bias, sentinels, *dtype in CASES:
        shape = LayerShape(*sizes)
        layer = Layer(shape, device)
        params = shape.params
        weights, layout = layer.prepared("triton", *dtype)
        x, ids, w = layer.inputs(tokens)
        if sentinels:
            ids = torch.where(torch.rand(ids.shape, device=device) < 0.25, shape.num_experts + 3, ids)
        biases = {}
        prepared: dict[str, torch.Tensor | None] = {"up": None, "down": None}
        if bias:
            for role in ("up", "down"):
                e, n, _ = params.shape(role)  # type: ignore[arg-type]
                biases[role] = torch.randn(e, n, device=device, dtype=torch.bfloat16)
                prepared[role] = backend.prepare_bias(biases[role], Slot(role, params, layout))  # type: ignore[arg-type]
        both = (weights["up"], weights["down"], prepared["up"], prepared["down"])
        got = backend.moe(MoEInputs(x, ids, w, *both, params, layout))
        error = relative_error(got, _reference(layer, x, ids, w, biases))
        choice = choose(architecture(device), *sizes, tokens, fp8=bool(dtype))
        regimes |= {choice.up_regime, choice.down_regime}
        print(
            f"case {shape} T={tokens} {'fp8 ' * choice.fp8}{choice.up_regime}/{choice.down_regime}: relative error "
            f"{error:.1e}",
            flush=True,
        )
        if not error <= (TOLERANCE_FP8 if choice.fp8 else 1e-2):
            raise SystemExit(f"wrong: relative error {error:.2g}")
    if len(regimes) < 3:
        raise SystemExit(f"only {', '.join(sorted(regimes))} ran: the cases must reach all three")
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reference(layer, x, ids, w, biases):
    import torch

    out = torch.zeros(x.shape, device=x.device)
    for e in ids[ids < layer.shape.num_experts].unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        y = x[token].float()
        for role in ("up", "down"):
            y = y @ layer.dequantized(role, e, torch.float32).T
            if role in biases:
                y = y + biases[role][e].float()
            if role == "up":
                y = layer.params.activate(y)
        out.index_add_(0, token, y * w[token, slot].float().unsqueeze(1))
    return out


def check(tool: str, log: str) -> str:
    """ "" if the log of ``tool`` is clean, else the line that is not; RuntimeError if it cannot tell."""
    if line := re.search(r"^=+.*(not supported|unsupported|unable to).*$", log, re.I | re.M):
        raise RuntimeError(line.group())
    pattern = r"ERROR SUMMARY: (\d+) error" if tool == "memcheck" else r"RACECHECK SUMMARY: (\d+) hazard"
    found = re.findall(pattern, log)
    if not found:
        raise RuntimeError(f"no summary of {tool} in its output: {log[-300:]}")
    return "" if all(n == "0" for n in found) else next(x for x in log.splitlines() if "SUMMARY" in x)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--seconds", type=float, default=240, help="limit of each tool")
    parser.add_argument("--log", type=Path, help="folder for the tools' output")
    parser.add_argument("--cases", action="store_true", help="run the cases in this process, without a tool")
    args = parser.parse_args()
    if args.cases:
        run_cases()
        return 0
    binary = find_tool()
    if binary is None:
        print("skipped: compute-sanitizer is not installed")
        return UNAVAILABLE
    # Every tensor its own allocation, so that a step beyond one is seen; compiled kernels come from the cache.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    warm = subprocess.run([sys.executable, __file__, "--cases"], env=env, capture_output=True, text=True, check=False)
    if warm.returncode:
        print(f"the cases fail without a tool already:\n{warm.stdout[-1000:]}{warm.stderr[-2000:]}")
        return 1
    code = 0
    for tool in args.tools.split(","):
        command = [binary, "--tool", tool, "--target-processes", "all", "--print-limit", "20"]
        # Only our kernels: torch's own would take most of the time.
        for kernel in KERNELS:
            command += ["--kernel-name", f"kernel_substring={kernel}"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch asks drivers for what they may not have
        try:
            done = subprocess.run(
                [*command, sys.executable, __file__, "--cases"],
                env=env,
                capture_output=True,
                text=True,
                check=False,
                timeout=args.seconds,
            )
        except subprocess.TimeoutExpired as expired:
            print(f"{tool}: not finished within {args.seconds:.0f} s")
            if args.log:
                (args.log / f"{tool}.txt").write_bytes(expired.stdout or b"")
            code = 1
            continue
        log = done.stdout + done.stderr
        if args.log:
            (args.log / f"{tool}.txt").write_text(log)
        try:
            problem = check(tool, log)
        except RuntimeError as error:
            print(f"{tool} skipped: {error}")
            code = code or UNAVAILABLE
            continue
        cases = log.count("case E")
        if problem or done.returncode:
            print(f"{tool}: {problem or f'exit code {done.returncode}'}; {cases} launches' results right")
            code = 1
        else:
            print(f"{tool}: clean, {cases} layers")
    return code


if __name__ == "__main__":
    sys.exit(main())
