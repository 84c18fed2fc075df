"""Convert a synthetic checkpoint and print its bytes, the anonymous memory before, and the peak of it meanwhile.

``convert_memory.py DIR GIBIBYTES``: run by checkpoint/test_convert.py in a process of its own. RssAnon leaves out
pages that belong to files, which the kernel takes back when it needs them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from memory import anonymous
from torch import Tensor

from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.checkpoint.files import INDEX, Entry, Unit, index_of, shards_of, write_shard

EXPERTS, HIDDEN, INTERMEDIATE = 64, 2048, 768


def make(directory: Path, gibibytes: int) -> int:
    """A Qwen3-MoE checkpoint, one tensor an expert, as published."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layer = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        num_hidden_layers=-(-(gibibytes << 30) // layer),
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8192,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], "bfloat16"
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    units = []
    some = torch.randn(HIDDEN * INTERMEDIATE).bfloat16() * 0.02

    def unit(name: str, shape: tuple[int, ...], seed: int) -> Unit:
        def produce() -> Iterator[tuple[str, Tensor]]:
            count = int(torch.Size(shape).numel())
            yield name, some.roll(seed * 7919)[torch.arange(count) % some.numel()].view(shape)

        return Unit((Entry(name, torch.bfloat16, shape),), produce)

    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for e in range(EXPERTS):
                for which in ("gate_proj", "up_proj"):
                    one = name.replace("gate_up_proj", f"{e}.{which}.weight")
                    units.append(unit(one, (INTERMEDIATE, HIDDEN), len(units)))
        elif name.endswith("experts.down_proj"):
            for e in range(EXPERTS):
                one = name.replace("down_proj", f"{e}.down_proj.weight")
                units.append(unit(one, (HIDDEN, INTERMEDIATE), len(units)))
        else:
            units.append(unit(name, tuple(parameter.shape), len(units)))
    shards = shards_of(units, 2 << 30)
    for file, group in shards.items():
        write_shard(directory / file, group)
    index = index_of(shards)
    if index is not None:
        (directory / INDEX).write_text(index)
    return sum(u.bytes for u in units)


def main() -> None:
    directory = Path(sys.argv[1])
    source = directory / "bf16"
    source.mkdir()
    size = make(source, int(sys.argv[2]))
    base = peak = anonymous()
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    done = convert(source, directory / "mxfp4")
    finished.set()
    thread.join()
    print(f"{time.perf_counter() - started:.0f} s, {done.bytes_after} bytes in {done.files} files")
    print(size, base, peak)


if __name__ == "__main__":
    main()
