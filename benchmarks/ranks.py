"""Models on several GPUs: memory of each rank, ``generate`` from recorded steps, and what a sum costs in one.

Published configurations with random weights, made on the devices: one layer of each kind is split over the ranks as
transformers splits it, optimized, and copied (``copy_layers``), so that no rank ever holds a layer in bf16 beside its
own part, and the model is never whole anywhere. Codes are the same in every layer; addresses, and so what is read from
memory, are not. What ``load`` needs while it reads a checkpoint is not measured here (tests/ranks).

    torchrun --nproc_per_node 2 benchmarks/ranks.py --model MiniMax-M2 --out benchmarks/results
    torchrun --nproc_per_node 2 benchmarks/ranks.py --model Qwen3-235B-A22B --layers 24 --out benchmarks/results
    torchrun --nproc_per_node 2 benchmarks/ranks.py --model none --out benchmarks/results   # the cost of a sum alone
    torchrun --nproc_per_node 2 benchmarks/ranks.py --model Qwen3-30B-A3B --tiny            # on CPUs, to try this file

With ``--layers`` the time of the whole model is extrapolated: that of its head, and of a layer times their number;
the figures say so. One card's speed is measured on rank 0 with ``--card-layers`` layers that are not split, while the
others wait. A sum: recorded graphs of many sums, less those of none. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from generate_ranks import MODELS as PUBLISHED

# Set before the first communicator is made.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}

# Of the table of docs/several-gpus.md; what is not there is the default of the configuration's class.
NAMES = ("Qwen3-30B-A3B", "gpt-oss-120b", "Mixtral-8x22B", "MiniMax-M2", "Qwen3-235B-A22B")
# What says nothing about sizes.
BESIDE: dict[str, dict[str, Any]] = {"Qwen3MoeConfig": {"norm_topk_prob": True}}

TINY = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 128, "num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 64, "intermediate_size": 64,
    "num_experts_per_tok": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def config_of(name: str, layers: int, tiny: bool) -> tuple[Any, int]:
    """A configuration with ``layers`` layers, and how many the model has."""
    import transformers

    kind, sizes = PUBLISHED[name]
    sizes = {**sizes, **BESIDE.get(kind, {})}
    sizes = {**sizes, **{k: v for k, v in TINY.items() if k in sizes or k == "num_experts_per_tok"}} if tiny else sizes
    whole = sizes["num_hidden_layers"]
    sizes = {**sizes, "num_hidden_layers": layers, "tie_word_embeddings": False}
    config = getattr(transformers, kind)(**sizes, eos_token_id=None, pad_token_id=0)
    return config, whole


def period(config: Any) -> int:
    """How many kinds of layers alternate."""
    return len(set(getattr(config, "layer_types", None) or [""]))


def split_config(model: Any, ranks: int) -> Any:
    """How transformers is to split the model, in its version's words: attention by its plan, whole experts."""
    from transformers.distributed import DistributedConfig

    if hasattr(DistributedConfig, "ep_size"):
        return DistributedConfig(tp_size=ranks, ep_size=ranks)
    # 5.17: one plan, of both sets of rules
    rules = {name: style for name, style in model._tp_plan.items() if ".experts" not in name and ".gate" not in name}
    return DistributedConfig(tp_size=ranks, tp_plan={**rules, **model._ep_plan})


def built(config: Any, device: torch.device, ranks: int) -> Any:
    """The model with random bf16 weights, split over the ranks if there are several."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if ranks > 1:
        cls = type(model)
        distributed, _, mesh = cls.prepare_distribute_model(split_config(model, ranks))
        model = cls.maybe_distribute_model(model, distributed, mesh)
    for number, (name, module) in enumerate(model.named_modules()):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                torch.manual_seed(number)  # what is not split is the same on all ranks
                module._parameters[leaf] = nn.Parameter(filled(f"{name}.{leaf}", parameter, device), False)
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            refill(module, config, device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def filled(name: str, parameter: Any, device: torch.device) -> Tensor:
    """Random values in the place of a parameter on the meta device; of a split one, this rank's part."""
    own = getattr(parameter, "_local_tensor", parameter)
    values = torch.empty(own.shape, dtype=own.dtype, device=device)
    values.fill_(1.0) if "norm" in name else values.normal_(0, 0.02)
    if own is parameter:
        return values
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        values, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def refill(module: nn.Module, config: Any, device: torch.device) -> None:
    """Buffers that were made on the meta device: those of rotary embeddings as their class makes them, zeros else."""
    if "inv_freq" in module._buffers:
        made = type(module)(config=config, device=device)
        module._buffers.update(made._buffers)
        module.__dict__.update({k: v for k, v in made.__dict__.items() if isinstance(v, Tensor)})
        return
    for leaf, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)


def copy_layers(model: Any, layers: int) -> None:
    """Grow an optimized model to ``layers`` layers: copies of those it has, in turns, with weights of their own."""
    from mxfp4_compile.processes import OneProcess, is_spread

    processes: Any = OneProcess()
    if is_spread(model):
        from mxfp4_compile.ranks.recorded import StepRanks

        processes = StepRanks()
    inner, config = model.model, model.config
    first = list(inner.layers)
    for index in range(len(first), layers):
        layer = first[index % len(first)]
        memo: dict[int, Any] = {id(config): config}
        for module in layer.modules():
            graph = getattr(module, "rewritten", None)
            if graph is not None:
                memo[id(graph)] = graph  # shared, as sites of one kind share it
        processes.copying(layer, memo)
        made = copy.deepcopy(layer, memo)
        processes.copied(made)
        for module in made.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        inner.layers.append(made)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % len(first)] for i in range(layers)]


# measuring


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def per_run(run: Callable[[], Any], device: torch.device, times: int = 20) -> float:
    """Seconds of one of several calls in a row, recorded where there are CUDA graphs; the best of three."""
    if device.type != "cuda":
        run()
        return min(timed(lambda: [run() for _ in range(3)], device) for _ in range(2)) / 3
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    graph.replay()  # it goes when this function ends: a sum in it holds its communicator
    return min(timed(lambda: [graph.replay() for _ in range(times)], device) for _ in range(3)) / times


def reductions(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Microseconds of one sum of bf16 values over the ranks, among many in one recorded graph, by its size."""
    from mxfp4_compile.ops import schema

    assert dist.group.WORLD is not None
    group, many = dist.group.WORLD.group_name, 4 if tiny else 64
    rows = []
    for kib in (4, 8, 16, 32, 64, 256, 512) if not tiny else (4, 64):
        start = torch.zeros(kib * 512, dtype=torch.bfloat16, device=device)
        buffer = start.clone()

        def in_place(buffer: Tensor = buffer) -> None:
            for _ in range(many):
                dist.all_reduce(buffer)

        def as_an_op(start: Tensor = start) -> None:
            x = start
            for _ in range(many):
                x = schema.reduce(x, group)

        def copies(start: Tensor = start) -> None:
            x = start
            for _ in range(many):
                x = x.clone()

        with torch.no_grad():
            found = {
                "kib": kib,
                "all_reduce_us": per_run(in_place, device) / many * 1e6,
                "mxfp4_reduce_us": per_run(as_an_op, device) / many * 1e6,  # it returns a new tensor
                "copy_us": per_run(copies, device) / many * 1e6,
            }
        rows.append(found)
    return rows


def head_seconds(model: Any, batch: int, device: torch.device) -> float:
    """The last norm and the output layer, for ``batch`` tokens: what a step has beside its layers."""
    hidden = torch.randn(batch, 1, model.config.hidden_size, dtype=torch.bfloat16, device=device)

    def run() -> None:
        torch.argmax(model.lm_head(model.model.norm(hidden)).float(), dim=-1)

    with torch.no_grad():
        return per_run(run, device)


def decode(model: Any, batch: int, new: int, prompt: int, device: torch.device, recorded: bool) -> dict[str, Any]:
    """Milliseconds of a step: ``generate`` of ``new`` tokens less that of two."""
    from mxfp4_compile.runtime import runtime_of

    runtime: Any = runtime_of(model)
    before, runtime.max_capture_size = runtime.max_capture_size, runtime.max_capture_size if recorded else 0
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    run = lambda tokens: model.generate(ids, max_new_tokens=tokens, do_sample=False)
    try:
        cold = timed(lambda: run(new), device)
        long, short = (min(timed(lambda n=n: run(n), device) for _ in range(2)) for n in (new, 2))
    finally:
        runtime.max_capture_size = before
    step = (long - short) / (new - 2)
    made = [c for c in runtime.report.captures if recorded and c.batch >= batch and c.replay == "CUDA graphs"]
    return {
        "batch": batch,
        "recorded": bool(made),
        "made": min(made, key=lambda c: c.batch).made if made else "",
        "cold_seconds": cold,
        "ms_per_step": step * 1e3,
    }


def measured(
    config: Any, whole: int, layers: int, ranks: int, device: torch.device, args: argparse.Namespace, save: Any
) -> dict[str, Any]:
    """Everything of one model: on all ranks, or (ranks=1) on this one alone."""
    import mxfp4_compile
    from mxfp4_compile.runtime import runtime_of

    found: dict[str, Any] = {"ranks": ranks, "layers": layers, "layers_of_the_model": whole, "decode": []}
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    model = built(config, device, ranks)
    model = mxfp4_compile.optimize(
        model, verify=False, scale_rule="floor", progress=False, max_capture_size=args.capture
    )
    found["sites"] = [s.to_dict() if hasattr(s, "to_dict") else str(s) for s in model.mxfp4_report.sites][:1]
    found["optimize_notes"] = list(model.mxfp4_report.notes)
    if on_gpu:
        found["optimize_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    copy_layers(model, layers)
    synchronize(device)
    found["build_seconds"] = time.perf_counter() - started
    if on_gpu:
        found["weights_gib"] = torch.cuda.memory_allocated(device) / 2**30
    save(found)
    for batch, recorded in [(b, True) for b in args.batches] + ([(args.batches[0], False)] if args.eager else []):
        if late(ranks, args):
            found["decode"].append({"batch": batch, "recorded": recorded, "left_out": "no time was left"})
            continue
        row = decode(model, batch, args.new, args.prompt, device, recorded)
        head = head_seconds(model, batch, device)
        layer = (row["ms_per_step"] / 1e3 - head) / layers
        step = head + layer * whole
        row |= {
            "head_us": head * 1e6,
            "us_per_layer": layer * 1e6,
            "extrapolated": layers != whole,
            "ms_per_step_of_the_model": step * 1e3,
            "tokens_per_second": batch / step,
        }
        if on_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["decode"].append(row)
        found["runtime"] = model.mxfp4_report.runtime.lines()
        save(found)
    runtime: Any = runtime_of(model)
    runtime.drop()
    del model, runtime
    torch._dynamo.reset()
    gc.collect()
    return found


def late(ranks: int, args: argparse.Namespace) -> bool:
    """Whether no more is to be measured of a model; the first rank says so for all."""
    said = [time.perf_counter() - args.started > args.seconds]
    if ranks > 1:
        dist.broadcast_object_list(said, 0, group=args.control)
    return said[0]


def versions() -> dict[str, Any]:
    """Of the packages that matter, and of the machine."""
    import importlib.metadata

    import transformers

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    on_gpu = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "peer_access": torch.cuda.can_device_access_peer(0, 1) if torch.cuda.device_count() > 1 else None,
    }


def main() -> None:
    """Command line; started by torchrun on every rank."""
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="none", help=f"none, or one or several of {', '.join(NAMES)}, by commas")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has: its own time is extrapolated")
    parser.add_argument("--card-layers", type=int, default=4, help="layers of the model on one card, 0 for none")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=66)
    parser.add_argument("--eager", action="store_true", help="the first batch without recorded steps as well")
    parser.add_argument("--seconds", type=float, default=90, help="no measurement of a model is begun after as many")
    parser.add_argument("--capture", type=int, default=512, help="max_capture_size")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on CPUs, to try this file")
    parser.add_argument("--out", type=Path, help="a folder for the JSON")
    args = parser.parse_args()
    names = [] if args.model == "none" else args.model.split(",")
    if set(names) - set(NAMES):
        parser.error(f"models are {', '.join(NAMES)}")
    os.environ.update(NO_MULTICAST)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if args.tiny else torch.device("cuda", local)
    if args.tiny:
        torch.set_num_threads(1)
        args.new, args.prompt, args.batches = 8, 8, args.batches[:2]
    else:
        torch.cuda.set_device(device)
    more = {} if args.tiny else {"device_id": device}
    dist.init_process_group("gloo" if args.tiny else "nccl", timeout=datetime.timedelta(minutes=5), **more)
    ranks = dist.get_world_size()
    options = {k: str(v) for k, v in vars(args).items()}
    args.control = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=10))

    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    table: list[str] = []
    for name in ["none", *names]:
        args.started = time.perf_counter()
        result: dict[str, Any] = {
            "model": name, "ranks": ranks, "date": day, "versions": versions(),
            "arguments": options,
        }  # fmt: skip

        def save(name: str = name, result: dict[str, Any] = result) -> None:
            """After every measurement: a run that is cut short keeps what it has."""
            if args.out and rank == 0:
                args.out.mkdir(parents=True, exist_ok=True)
                kind = result["versions"]["device"].lower().replace(" ", "_")
                what = "sums" if name == "none" else name.lower()
                (args.out / f"ranks-{what}-{ranks}x-{kind}-{day}.json").write_text(json.dumps(result, indent=1))

        if name == "none":
            result["sums"] = reductions(device, args.tiny)
            table += [
                f"sum of {r['kib']:4d} KiB over {ranks} ranks: all_reduce {r['all_reduce_us']:6.1f} us, mxfp4::reduce "
                f"{r['mxfp4_reduce_us']:6.1f} us, a copy {r['copy_us']:5.1f} us"
                for r in result["sums"]
            ]
            save()
            continue
        _, whole = config_of(name, 1, args.tiny)
        layers = min(args.layers or whole, whole)

        def run(kind: str, ranks: int, layers: int, result: dict[str, Any] = result, name: str = name) -> None:
            _, whole = config_of(name, 1, args.tiny)
            kinds = period(config_of(name, whole, args.tiny)[0])
            config, _ = config_of(name, kinds, args.tiny)

            def keep(found: dict[str, Any]) -> None:
                result[kind] = found
                save()

            keep(measured(config, whole, layers, ranks, device, args, keep))

        run("ranks_together", ranks, layers)
        every: list[Any] = [None] * ranks
        dist.all_gather_object(every, result["ranks_together"].get("weights_gib"), group=args.control)
        result["weights_gib_by_rank"] = every
        if args.card_layers and rank == 0:
            args.started = time.perf_counter()
            run("one_card", 1, min(args.card_layers, whole))
        dist.barrier(group=args.control)
        save()
        table += rows(name, result)
    if rank == 0:
        print("\n".join(table), flush=True)
    dist.destroy_process_group()


def rows(name: str, result: dict[str, Any]) -> list[str]:
    """Lines of a model's table."""
    together, alone = result["ranks_together"], result.get("one_card", {})
    single = {(r["batch"], r["recorded"]): r for r in alone.get("decode", []) if "us_per_layer" in r}
    out = [f"{name}: {together['layers']} of {together['layers_of_the_model']} layers, weights "
           f"{together.get('weights_gib', 0):.1f} GiB a rank, built in {together['build_seconds']:.0f} s"]  # fmt: skip
    for row in together["decode"]:
        how = f"recorded ({row['made']})" if row.get("made") else "recorded" if row["recorded"] else "eager"
        if "left_out" in row:
            out.append(f"  batch {row['batch']:3d} {how}: {row['left_out']}")
            continue
        guessed = " (extrapolated)" if row["extrapolated"] else ""
        one = single.get((row["batch"], row["recorded"]))
        beside = ""
        if one:
            beside = f"; one card {one['us_per_layer']:.1f}, ratio {one['us_per_layer'] / row['us_per_layer']:.2f}"
        out.append(
            f"  batch {row['batch']:3d} {how}: {row['tokens_per_second']:.1f} tokens/s{guessed}, "
            f"{row['us_per_layer']:.1f} us a layer{beside}; first call {row['cold_seconds']:.0f} s"
        )
    return out


if __name__ == "__main__":
    main()
