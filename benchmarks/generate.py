"""``model.generate`` end to end: transformers eager, transformers with its static cache and compilation, ours.

A real configuration with random weights, made on the GPU in bf16; ``optimize`` then changes that same model.

    python benchmarks/generate.py --modes ours --batches 1,8,64
    python benchmarks/generate.py --modes hf_eager,hf_static,ours --batches 1 --prefill 512,4096
    python benchmarks/generate.py --model gpt-oss-20b --new 256        # past its window of 128
    python benchmarks/generate.py --new 256 --vllm vllm-qwen3-mxfp4.json --profile --plot rates.png
    python benchmarks/generate.py --new 256 --variants plain,packed,packed+reduced,packed+reduced+rows --seconds 230

Decode rate: wall time of ``generate`` with ``--new`` tokens minus that with 2, best of three each. Prefill: wall time
of ``generate`` for one token. Cold: the first call of a mode at a batch size, compilation and capture included.

``--variants``: our steps with matrix products made in several ways, one after the other on one model in one process;
packed: those of one input as one; reduced: those with a bias as sums where there is one row; rows: a kernel of ours for
few rows. What makes no difference at a batch size is left out there.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import step_profile
import torch


def config_of(name: str, layers: int | None) -> Any:
    """The configuration of a published model."""
    if name == "qwen3-30b-a3b":
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers or 48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=40960, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        )  # fmt: skip
    if name == "gpt-oss-20b":
        from transformers import GptOssConfig

        return GptOssConfig(num_hidden_layers=layers or 24, num_local_experts=32, eos_token_id=None, pad_token_id=0)
    if name == "qwen3-next-80b-a3b":  # the class's own defaults are this model's sizes; 48 layers in bf16 are 160 GB
        from transformers import Qwen3NextConfig

        return Qwen3NextConfig(num_hidden_layers=layers or 12)
    if name == "glm-4.7-flash":
        from transformers import Glm4MoeLiteConfig

        return Glm4MoeLiteConfig(num_hidden_layers=layers or 47)
    if name == "tiny":  # for trying this file
        from mxfp4_compile.tools.families import tiny_model

        return tiny_model("qwen3_moe").config
    raise SystemExit(f"unknown model {name!r}")


def build(config: Any, device: str) -> Any:
    """The model with random weights in bf16, on the device."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def timed(run: Any) -> float:
    """Seconds of one call, the device's work included."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best(run: Any, repeats: int = 3) -> float:
    """The least of several."""
    return min(timed(run) for _ in range(repeats))


class Counter:
    """Graphs that Dynamo compiled and CUDA graphs that were recorded."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self) -> tuple[int, int]:
        from torch._dynamo.utils import counters

        report = getattr(self.model, "mxfp4_report", None)
        recorded = len(report.runtime.captures) + len(report.runtime.prefills) if report is not None else 0
        return counters["stats"]["unique_graphs"], recorded


def decode(model: Any, batch: int, prompt: int, new: int, options: dict[str, Any], repeats: int = 3) -> dict[str, Any]:
    """Cold call, decode rate, time to the first token at one batch size."""
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(1, vocabulary, (batch, prompt), device=device)
    count = Counter(model)

    def run(tokens: int) -> Any:
        return model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    cold = timed(lambda: run(new))
    before = count()
    long, short, first = (best(lambda n=n: run(n), repeats) for n in (new, 2, 1))
    after = count()
    step = (long - short) / (new - 2)
    return {
        "batch": batch,
        "prompt": prompt,
        "new_tokens": new,
        "cold_seconds": cold,
        "first_token_ms": first * 1e3,
        "ms_per_step": step * 1e3,
        "tokens_per_second": batch / step,
        "compiled_after_first_call": after[0] - before[0],
        "captured_after_first_call": after[1] - before[1],
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


SETTINGS = {"packed": "pack_linears", "reduced": "reduce_biased", "rows": "linear_rows"}


def settings_of(variant: str, batch: int, biased: bool) -> dict[str, bool]:
    """The runtime's attributes of a variant such as "packed+rows", as far as they matter at a batch size."""
    named = set(variant.split("+")) - {"plain"}
    if named - SETTINGS.keys():
        raise SystemExit(f"variants are plain or {', '.join(SETTINGS)}, joined by +")
    matter = {"packed"} | ({"reduced"} if batch == 1 and biased else set()) | ({"rows"} if batch > 1 else set())
    return {attribute: name in named & matter for name, attribute in SETTINGS.items()}


def run_variants(model: Any, args: argparse.Namespace, out: dict[str, Any], save: Any) -> None:
    """Every variant at every batch size, into ``out``: {rows: [{variant, batch, ..., step_us, profile}]}."""
    from mxfp4_compile.runtime import runtime_of

    runtime: Any = runtime_of(model)
    biased = any("bias" in name and "expert" not in name for name, _ in model.named_parameters())
    out["rows"] = []
    started = time.perf_counter()
    for batch in args.batches:
        tried: list[dict[str, bool]] = []
        for variant in args.variants.split(","):
            settings = settings_of(variant, batch, biased)
            if settings in tried:
                continue
            tried.append(settings)
            if time.perf_counter() - started > args.seconds:
                print(f"batch {batch}, {variant}: no time left", flush=True)
                continue
            for name, value in settings.items():
                setattr(runtime, name, value)
            runtime.forget_steps()
            noted = len(runtime.report.notes)
            row = {"variant": variant, **decode(model, batch, args.prompt, args.new, {}, repeats=2)}
            row["made"] = [f"{c.made} ({c.products})" for c in runtime.report.captures]
            row["notes"] = runtime.report.notes[noted:]
            made = step_profile.profile(model, batch)
            row["step_us"], row["profile"] = (made["step_us"], made) if made is not None else (None, None)
            out["rows"].append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "profile"}), flush=True)
            save()
    print("\n".join(variant_table(out["rows"])), flush=True)


def variant_table(rows: list[dict[str, Any]]) -> list[str]:
    """Tokens a second, a step's milliseconds in generate and its replay's alone, the layers' products in it."""
    out = [f"{'batch':>5s} {'variant':22s} {'tokens/s':>9s} {'ms/step':>8s} {'replay us':>10s} {'products us':>12s}"]
    for r in rows:
        groups = {g["group"]: g["us"] for g in (r["profile"] or {"groups": []})["groups"]}
        out.append(
            f"{r['batch']:5d} {r['variant']:22s} {r['tokens_per_second']:9.0f} {r['ms_per_step']:8.3f} "
            f"{r['step_us'] or 0:10.0f} {groups.get(step_profile.PRODUCTS, 0):12.0f}"
        )
    return out


def prefill(model: Any, length: int, options: dict[str, Any]) -> dict[str, Any]:
    """Time to the first token of a long prompt, batch 1."""
    device = next(model.parameters()).device
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (1, length), device=device)
    run = lambda: model.generate(ids, max_new_tokens=1, do_sample=False, **options)
    return {"prompt": length, "cold_seconds": timed(run), "first_token_ms": best(run) * 1e3}


MODES = ("hf_eager", "hf_static", "ours")


def run_mode(model: Any, mode: str, args: argparse.Namespace, out: dict[str, Any], save: Any) -> None:
    """Everything asked of one mode, into ``out``; the model is what the mode needs."""
    options: dict[str, Any] = {"cache_implementation": "static"} if mode == "hf_static" else {}
    out.update({"decode": [], "prefill": [], "profiles": {}})
    new = args.new if mode == "ours" else args.hf_new or args.new
    for batch in args.batches if mode == "ours" else args.hf_batches:
        save()
        try:
            out["decode"].append(decode(model, batch, args.prompt, new, options))
            print(f"{mode:10s}", json.dumps(out["decode"][-1]), flush=True)
        except torch.OutOfMemoryError as error:
            out["decode"].append({"batch": batch, "failed": str(error).splitlines()[0]})
            print(f"{mode:10s} batch {batch}: out of memory", flush=True)
        made = step_profile.profile(model, batch) if mode == "ours" and args.profile else None
        if made is not None:
            out["profiles"][str(batch)] = made
            print(f"  batch {batch}:", *step_profile.lines(made), sep="\n  ", flush=True)
    for length in args.prefill:
        save()
        out["prefill"].append(prefill(model, length, {} if mode == "hf_static" else options))
        print(f"{mode:10s}", json.dumps(out["prefill"][-1]), flush=True)
    save()


FULL_LAYERS = {"qwen3-30b-a3b": 48, "gpt-oss-20b": 24, "qwen3-next-80b-a3b": 48, "glm-4.7-flash": 47}
LABELS = {"hf_eager": "transformers", "hf_static": "transformers, compiled", "ours": "mxfp4_compile"}


def vllm_rows(path: Path) -> tuple[str, dict[str, Any]]:
    """The name and the rows of a JSON file of vLLM's: {variant, vllm, gpu, rows: [{batch, tokens_per_second, ...}]}."""
    read = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: read.get(k) for k in ("variant", "vllm", "torch", "gpu")}
    return f"vLLM {read['vllm']}, {read['variant']}", {"decode": read["rows"], "prefill": [], **kept}


def table(result: dict[str, Any]) -> list[str]:
    """Decode rate and first token of every mode, by batch size."""
    batches = sorted({r["batch"] for m in result["modes"].values() for r in m["decode"]})
    out = ["tokens/s (ms to the first token)".ljust(34) + "".join(f"{f'batch {b}':>18s}" for b in batches)]
    for mode, measured in result["modes"].items():
        rows = {r["batch"]: r for r in measured["decode"] if "tokens_per_second" in r}
        cells = [
            f"{rows[b]['tokens_per_second']:.0f} ({rows[b]['first_token_ms']:.0f})" if b in rows else ""
            for b in batches
        ]
        out.append(LABELS.get(mode, mode).ljust(34) + "".join(f"{c:>18s}" for c in cells))
    return out


def plot(result: dict[str, Any], path: Path) -> None:
    """Decode rate: a panel for each batch size, a bar for each mode, its value on it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {m: {r["batch"]: r for r in d["decode"] if "tokens_per_second" in r} for m, d in result["modes"].items()}
    batches = sorted({b for found in rows.values() for b in found})
    figure, panels = pyplot.subplots(1, len(batches), figsize=(3.4 * len(batches), 4), squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        shown = [m for m, found in rows.items() if batch in found]
        bars = axes.bar(range(len(shown)), [rows[m][batch]["tokens_per_second"] for m in shown])
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.set_xticks(range(len(shown)), [LABELS.get(m, m) for m in shown], rotation=25, ha="right", fontsize=8)
        axes.set(title=f"batch {batch}", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("tokens per second (higher is better)")
    figure.suptitle(result["title"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def first_calls(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The first call of two processes with a compilation cache of their own on disk, empty before the first."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{directory}/inductor", "TRITON_CACHE_DIR": f"{directory}/triton"}
        for state in ("cold", "warm"):
            out = Path(directory) / f"{state}.json"
            command = [
                sys.executable,
                __file__,
                "--model",
                args.model,
                "--batches",
                "1",
                "--new",
                "8",
                "--out",
                str(out),
            ]
            command += ["--layers", str(args.layers)] if args.layers else []
            started = time.perf_counter()
            subprocess.run([*command, "--device", args.device], env={**os.environ, **caches}, check=True)
            row = json.loads(out.read_text())["modes"]["ours"]["decode"][0]
            whole = time.perf_counter() - started
            found.append({"caches": state, "first_call_seconds": row["cold_seconds"], "process_seconds": whole})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Command line."""
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--modes", default="ours", help=",".join(MODES))
    parser.add_argument("--batches", type=numbers, default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--hf-batches", type=numbers, help="batches of the hf modes, which are slow")
    parser.add_argument("--hf-new", type=int, help="--new of the hf modes")
    parser.add_argument("--prefill", type=numbers, default=[])
    parser.add_argument("--record-prompts", action="store_true", help="of ours, record the forward of short prompts")
    parser.add_argument("--profile", action="store_true", help="one step of ours by group of kernels")
    parser.add_argument("--variants", default="", help="of our steps, e.g. plain,packed,packed+reduced")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no variant is begun")
    parser.add_argument("--vllm", type=Path, action="append", default=[], help="JSON of vLLM's rows; may be repeated")
    parser.add_argument("--first-call", action="store_true", help="time first calls on empty and on full disk caches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    modes = args.modes.split(",")
    if args.hf_batches is None:
        args.hf_batches = args.batches
    if set(modes) - set(MODES):
        parser.error(f"modes are {', '.join(MODES)}")

    import transformers

    import mxfp4_compile
    from mxfp4_compile.runtime.state import RECORD_PROMPTS

    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    config = config_of(args.model, args.layers)
    layers, full = config.num_hidden_layers, FULL_LAYERS.get(args.model)
    layers = f"{layers} of {full}" if full is not None and layers != full else layers
    result: dict[str, Any] = {
        "title": f"{args.model}, {layers} layers, {name}, prompt {args.prompt}",
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "modes": {},
    }
    model: Any = None

    def save() -> None:
        """After every measurement: a run that is cut short keeps what it has."""
        if hasattr(model, "mxfp4_report"):
            runtime = model.mxfp4_report.runtime
            result["report"] = runtime.lines()
            # What was compiled and used, with its error in the check; rejected ways are among the notes.
            result["captures"] = [dataclasses.asdict(c) for c in (*runtime.captures, *runtime.prefills)]
            result["notes"] = list(runtime.notes)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1))

    started = time.perf_counter()
    model = build(config, args.device)
    synchronize()
    print(f"{result['title']}: built in {time.perf_counter() - started:.1f} s", flush=True)
    for mode in sorted(modes, key=MODES.index):
        if mode == "ours":
            gc.collect()
            torch._dynamo.reset()
            if args.record_prompts:
                os.environ[RECORD_PROMPTS] = "1"
            # The scale rule does not matter to speed; floor is the quickest to compute.
            result["optimize_seconds"] = timed(lambda: mxfp4_compile.optimize(model, verify=False, scale_rule="floor"))
            print(f"optimize (verify=False, floor): {result['optimize_seconds']:.1f} s", flush=True)
        if args.variants and mode == "ours":
            run_variants(model, args, result.setdefault("variants", {}), save)
        else:
            run_mode(model, mode, args, result["modes"].setdefault(mode, {}), save)
    print("\n".join(result.get("report", [])), flush=True)
    save()
    model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if args.first_call:
        result["first_calls"] = first_calls(args)
    for path in args.vllm:
        mode, rows = vllm_rows(path)
        result["modes"][mode] = rows
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    if result["modes"]:
        print("\n".join(table(result)), flush=True)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
