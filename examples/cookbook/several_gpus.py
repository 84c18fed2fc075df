"""Experts over several processes, one a GPU: torchrun --nproc_per_node 2 several_gpus.py MODEL; else two on a CPU."""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import mxfp4_compile

NAME = sys.argv[1] if len(sys.argv) > 1 else str(Path(mxfp4_compile.__file__).parent / "demo_model")


def run(rank: int, folder: str) -> None:
    """What every process runs, with the same arguments."""
    model = mxfp4_compile.load(NAME, tp_plan="auto", progress=False)  # reads and quantizes its part of each layer
    prompt = torch.tensor([list(b"TIMON:\n")], device=next(model.parameters()).device)
    with torch.no_grad():
        text = model.generate(prompt, max_new_tokens=24, do_sample=False)[0]
    model.save_pretrained(folder)  # on every rank; one checkpoint of the whole model
    dist.barrier()
    if rank == 0:
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(model.mxfp4_report, f"\n{bytes(text.tolist()).decode()!r}; one checkpoint of {size:,} bytes", flush=True)


def start(rank: int, ranks: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    run(rank, f"{folder}/model")


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun; load() starts the group, on GPUs where there are any
        run(int(os.environ["RANK"]), "mxfp4_of_all_ranks")
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(start, (2, folder), nprocs=2)
