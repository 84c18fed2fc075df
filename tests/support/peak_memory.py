"""Optimize a 16-layer, 1 GiB synthetic MoE and print its bytes, one site's bytes, and the peak above the baseline.

Run by test_memory.py in a process of its own: peak resident memory (VmHWM) is reset just before optimize().
With the argument "loop", the experts are modules in a ModuleList, called in a loop (8 layers, half a GiB).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import nn

import mxfp4_compile
from mxfp4_compile.tools.families import tiny_model

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


def build_loop(layers: int, intermediate: int) -> nn.Module:
    import loop_models

    loop_models.E, loop_models.H, loop_models.MI = EXPERTS, HIDDEN, intermediate

    class Block(loop_models.LoopMoE):
        def __init__(self) -> None:
            super().__init__(lambda: loop_models.GatedMLP(intermediate))

    return loop_models.Model(Block, layers=layers)


def main() -> None:
    loop = "loop" in sys.argv[1:]
    options = {"example_inputs": (torch.zeros(2, 9, HIDDEN, dtype=torch.bfloat16),)} if loop else {}
    make, layers = (build_loop, LAYERS // 2) if loop else (build, LAYERS)
    mxfp4_compile.optimize(make(1, 64), **options)  # imports, compiled regexes, export's own caches
    model = make(layers, INTERMEDIATE)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    experts = sum(p.numel() * 2 for n, p in model.named_parameters() if ".experts." in n)
    Path("/proc/self/clear_refs").write_text("5")
    base = status("VmRSS")
    mxfp4_compile.optimize(model, **options)
    print(weights, experts // layers, weights + status("VmHWM") - base)


if __name__ == "__main__":
    main()
