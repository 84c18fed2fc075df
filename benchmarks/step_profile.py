"""One recorded decode step, its kernels in groups, each beside the time that its bytes take at the device's bandwidth.

Groups are told by the names of kernels. The router's product is among the layers' products, as one kernel may be both.
A floor counts weights (experts: those that are expected to be chosen, if each is equally likely) and keys and values.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch

EXPERTS = ("vector_up", "vector_down", "scan_matmul", "sorted_matmul", "combine", "sort_pairs", "quantize_rows")
ATTENTION = ("partial", "merge")
ROUTER = ("route_rows", "gatherTopK", "bitonicSort", "radixSort", "topk")
PRODUCTS = "layers' products"
GROUPS = ("experts", PRODUCTS, "attention", "head", "router's choice", "norms and rest")
SEEN = 150  # tokens in the cache of the step


def is_product(kernel: str) -> bool:
    """Whether a kernel multiplies matrices: cuBLAS's, or a reduction of Inductor's made from one."""
    if kernel == "linear_rows":
        return True
    if kernel.startswith("triton_"):
        return kernel.startswith("triton_red") and "mm" in kernel.split("_")
    return bool(re.search(r"nvjet|gemm|gemv|gemvx|cutlass|splitK|dot_kernel", kernel))


def group_of(kernel: str, count: int, layers: int, head: str | None) -> str:
    """The group of a kernel that a step of ``layers`` layers runs ``count`` times; head: the head's kernel."""
    if kernel in EXPERTS:
        return "experts"
    if kernel in ATTENTION:
        return "attention"
    if any(word in kernel for word in ROUTER):
        return "router's choice"
    if kernel == head:
        return "head"
    return PRODUCTS if is_product(kernel) and 2 * count >= layers else "norms and rest"


def grouped(rows: list[dict[str, Any]], layers: int, floors: dict[str, float]) -> list[dict[str, Any]]:
    """Rows {kernel, count, us} of a step by group; floors: microseconds."""
    single = [r for r in rows if r["count"] <= 2 < layers and is_product(r["kernel"])]
    head = max(single, key=lambda r: r["us"])["kernel"] if single else None
    found = {name: {"group": name, "us": 0.0, "kernels": 0, "floor_us": floors.get(name)} for name in GROUPS}
    for row in rows:
        group: Any = found[group_of(row["kernel"], row["count"], layers, head)]
        group["us"] += row["us"]
        group["kernels"] += row["count"]
    return list(found.values())


def floors_of(model: Any, batch: int, bandwidth: float) -> dict[str, float]:
    """Microseconds that a step of ``batch`` rows takes to read its weights, at ``bandwidth`` bytes a second."""
    from mxfp4_compile.passes.build.module import mxfp4_sites

    config = model.config.get_text_config(decoder=True)
    sites = mxfp4_sites(model)
    packed = 0.0
    inside: set[int] = set()
    for site in sites.values():
        tensors = [*site.parameters(), *site.buffers()]
        inside |= {id(t) for t in tensors}
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        experts = experts or getattr(config, "n_routed_experts", 1)
        chosen = experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)
        # Scales and codes only: a router or shared expert inside of a site is read whole, and small.
        codes = sum(t.numel() * t.element_size() for t in tensors if t.dtype == torch.uint8)
        packed += codes * chosen / experts + sum(
            t.numel() * t.element_size() for t in tensors if t.dtype != torch.uint8 and t.dim() == 2
        )
    head = model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    others = {id(p): p for p in model.parameters() if p.dim() == 2 and id(p) not in inside}
    layers = sum(p.numel() * p.element_size() for p in others.values() if p is not head and p is not table)
    seconds = {
        "experts": packed / bandwidth,
        PRODUCTS: layers / bandwidth,
        "head": head.numel() * head.element_size() / bandwidth,
    }
    return {name: value * 1e6 for name, value in seconds.items()}


def bandwidth_of(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) / 4)
    return 2 * source.numel() * source.element_size() / min(times)


def step_for(model: Any, batch: int) -> Any:
    """The recorded step that serves ``batch`` rows, or None."""
    from mxfp4_compile.runtime import runtime_of

    runtime = runtime_of(model)
    found = [s for k, s in runtime.steps.items() if k.rows >= batch] if runtime is not None else []
    return min(found, key=lambda s: s.key.rows) if found else None


def state_bytes(step: Any) -> int:
    """Keys and values that a step of SEEN tokens reads, of all rows."""
    total = 0
    for view in step.cache.views:
        for name in ("keys", "values"):
            tensor = getattr(view, name, None)
            if tensor is not None:
                total += tensor.numel() * tensor.element_size() // tensor.shape[2] * min(SEEN, tensor.shape[2])
    return total


@torch.no_grad()
def profile(model: Any, batch: int) -> dict[str, Any] | None:
    """A replay by kernel and by group: {step_us, sum_us, bandwidth, groups, kernels}; None if nothing is recorded."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    step = step_for(model, batch)
    if step is None:
        return None
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    step.cache.position.fill_(SEEN)
    step.replay()
    started = time.perf_counter()
    if cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
    for _ in range(20):
        step.replay()
    if cuda:
        end.record()
        torch.cuda.synchronize()
        each = begin.elapsed_time(end) * 1e3 / 20
    else:
        each = (time.perf_counter() - started) * 1e6 / 20
    step.cache.position.fill_(SEEN)
    with record(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as events:
        step.replay()
        if cuda:
            torch.cuda.synchronize()
    spent = lambda e: e.self_device_time_total if cuda else e.self_cpu_time_total
    rows = [{"kernel": e.key[:160], "count": e.count, "us": spent(e)} for e in events.key_averages()]
    rows.sort(key=lambda r: -r["us"])
    bandwidth = bandwidth_of(device) if cuda else 1e10
    floors = floors_of(model, batch, bandwidth)
    floors["attention"] = state_bytes(step) / bandwidth * 1e6
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return {
        "step_us": each,
        "sum_us": sum(r["us"] for r in rows),
        "bandwidth": bandwidth,
        "groups": grouped(rows, layers, floors),
        "kernels": rows,
    }


def lines(made: dict[str, Any], kernels: int = 16) -> list[str]:
    """A readable account."""
    out = [
        f"one step: {made['step_us']:.0f} us, its kernels {made['sum_us']:.0f} us; "
        f"{made['bandwidth'] / 1e12:.2f} TB/s by a copy"
    ]
    out.append(f"{'group':18s} {'kernels':>8s} {'us':>9s} {'floor us':>9s}")
    for g in made["groups"]:
        floor = "" if g["floor_us"] is None else f"{g['floor_us']:9.0f}"
        out.append(f"{g['group']:18s} {g['kernels']:8d} {g['us']:9.1f} {floor}")
    return out + [f"{r['us']:9.1f} us {r['count']:5d} x  {r['kernel'][:100]}" for r in made["kernels"][:kernels]]


__all__ = ["bandwidth_of", "floors_of", "group_of", "grouped", "lines", "profile"]
