"""Optimize a 16-layer, 1 GiB synthetic MoE and print its bytes, one site's bytes, and the peak above the baseline.

Run by test_memory.py in a process of its own: peak resident memory (VmHWM) is reset just before optimize().
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import mxfp4_compile
from mxfp4_compile.families import tiny_model

EXPERTS, HIDDEN, INTERMEDIATE, LAYERS = 16, 1024, 680, 16


def status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def build(layers: int, intermediate: int) -> nn.Module:
    return tiny_model(
        "qwen3_moe",
        dtype=torch.bfloat16,
        layers=layers,
        hidden_size=HIDDEN,
        moe_intermediate_size=intermediate,
        num_experts=EXPERTS,
    )


def main() -> None:
    mxfp4_compile.optimize(build(1, 64))  # imports, compiled regexes, export's own caches
    model = build(LAYERS, INTERMEDIATE)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    experts = sum(p.numel() * 2 for n, p in model.named_parameters() if ".experts." in n)
    Path("/proc/self/clear_refs").write_text("5")
    base = status("VmRSS")
    mxfp4_compile.optimize(model)
    print(weights, experts // LAYERS, weights + status("VmHWM") - base)


if __name__ == "__main__":
    main()
