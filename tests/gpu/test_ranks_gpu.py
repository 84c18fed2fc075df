"""Two ranks on two GPUs, with NCCL: what one process computes, and recorded steps with the sums inside.

Needs two devices. The processes are those of ``ranks_pool``, which keep NVLink multicast off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks_models as models
import torch
from ranks_models import checkpoint
from ranks_pool import Pool

import mxfp4_compile
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.runtime.graphs import CudaGraphRecorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
    pytest.mark.xdist_group("ranks_gpu"),
]

EXPERT = {"tp_size": 2, "ep_size": 2}
SIZES = {"hidden_size": 256, "columns": 128, "experts": 8}


@pytest.fixture(scope="module")
def nccl() -> Iterator[Pool]:
    ranks = Pool(2, "nccl")
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks_gpu")


def made(path: Path, dtype: torch.dtype, how: dict[str, Any]) -> Any:
    """By ``load``, each rank reading its part; or by ``optimize`` of what transformers split."""
    if "split" in how:
        return mxfp4_compile.optimize(models.load(path, dtype, **how["split"]), progress=False)
    return mxfp4_compile.load(path, progress=False, dtype=dtype, tp_plan="auto", **how)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in state.items()}


def computed(rank: int, path: Path, dtype: torch.dtype, how: dict[str, Any], out: Path) -> dict[str, Any]:
    model = made(path, dtype, how)
    runtime = runtime_of(model)
    runtime.max_capture_size = 0
    logits, eager = models.logits(model), models.answer(model, new=24)
    runtime.max_capture_size = 512
    found = models.answer(model, new=24)
    torch.manual_seed(rank)
    sampled = models.answer(model, new=24, do_sample=True)
    model.save_pretrained(out, is_main_process=rank == 0)
    return {
        "logits": logits,
        "eager": eager,
        "tokens": found,
        "sampled": sampled,
        "shards": [s.plan.shard.kind for s in mxfp4_sites(model).values() if s.plan.shard],
        "state": on_cpu(mxfp4_compile.gathered_state_dict(model)),
        "captures": [(c.batch, c.replay, c.made) for c in model.mxfp4_report.runtime.captures],
        "notes": model.mxfp4_report.runtime.notes,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "how", "kind"),
    [
        ("qwen3_moe", {"experts": "expert"}, "expert"),
        ("qwen3_moe", {"experts": "tensor"}, "tensor"),
        ("gpt_oss", {"experts": "expert"}, "expert"),
        ("gpt_oss", {"experts": "tensor"}, "tensor"),
        ("qwen3_moe", {"split": EXPERT}, "expert"),
        ("gpt_oss", {"split": EXPERT}, "expert"),
    ],
    ids=["qwen3-expert", "qwen3-tensor", "gpt_oss-expert", "gpt_oss-tensor", "qwen3-split", "gpt_oss-split"],
)
def test_two_gpus_do_what_one_does(
    nccl: Pool, folder: Path, tmp_path: Path, family: str, how: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    path = checkpoint(folder, family, **SIZES)
    whole: Any = mxfp4_compile.load(path, progress=False, dtype=dtype, device_map={"": 0})
    logits = models.logits(whole)
    whole.save_pretrained(tmp_path / "one")
    first, second = nccl.run(computed, path, dtype, how, tmp_path / "two")
    assert first["shards"] and set(first["shards"]) == {kind}
    assert torch.equal(first["logits"], second["logits"])
    if dtype == torch.float32:
        assert distance(first["logits"], logits) < 1e-5
    else:  # in half precision both are rounded: two ranks are as far from the same weights in fp32 as one process is
        wide: Any = mxfp4_compile.load(tmp_path / "one", progress=False, dtype=torch.float32, device_map={"": 0})
        full = models.logits(wide)
        assert distance(first["logits"], full) < 1.25 * distance(logits, full) + 1e-3
        assert distance(first["logits"], logits) < 2e-2
    for name in ("eager", "tokens", "sampled"):
        assert torch.equal(first[name], second[name]), name
    assert first["captures"], first["notes"]
    assert {c[1:] for c in first["captures"]} == {("CUDA graphs", "compiled layers, own attention")}, first["notes"]
    if dtype == torch.float32:
        assert torch.equal(first["tokens"], first["eager"])
        assert torch.equal(first["tokens"], models.answer(whole, new=24))
    state = on_cpu(whole.state_dict())
    assert first["state"].keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(first["state"][name], value), name
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


# recorded steps


def replays(rank: int, path: Path, dtype: torch.dtype, how: dict[str, Any], times: int) -> dict[str, Any]:
    """The recorded step against the same step unrecorded, bit by bit, for two sizes in turns."""
    model = made(path, dtype, how)
    runtime = runtime_of(model)
    runtime.begin()
    with torch.no_grad():
        steps = [runtime.step(batch, 400) for batch in (1, 4)]
    if None in steps:
        return {"notes": runtime.report.notes, "logits": []}
    generator = torch.Generator().manual_seed(3)
    wrong: list[tuple[int, int]] = []
    last: list[torch.Tensor] = []
    with torch.no_grad():
        for turn in range(times):
            step = steps[turn % 2]
            tokens = torch.randint(3, 120, (step.key.rows, 1), generator=generator)
            place = 10 + turn // 2 % 490  # behind the tokens of the probe, the first of which one row has as padding
            checked = turn < 20 or turn % 100 < 2
            seen = []
            for run in (step.run_unrecorded, step.replay) if checked else (step.replay,):
                step.tokens.copy_(tokens)
                step.position_ids.fill_(place)
                step.cache.position.fill_(place)
                run()
                seen.append(step.logits.clone())
            if checked and not torch.equal(*seen):
                wrong.append((turn, step.key.rows))
            last = [seen[-1].cpu()]
    torch.cuda.synchronize()
    return {
        "notes": runtime.report.notes,
        "made": [c.made for c in runtime.report.captures],
        "wrong": wrong,
        "logits": last,
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_thousand_replays_of_two_sizes_in_turns_are_the_eager_steps(nccl: Pool, folder: Path, family: str) -> None:
    first, second = nccl.run(replays, checkpoint(folder, family, **SIZES), torch.bfloat16, {}, 1000)
    assert first["logits"], first["notes"]
    assert set(first["made"]) == {"compiled layers, own attention"}, first["notes"]
    assert first["wrong"] == [] and second["wrong"] == []
    assert torch.equal(first["logits"][0], second["logits"][0])


class Short(CudaGraphRecorder):
    """Says that little memory is free."""

    def free_bytes(self) -> int | None:
        return 1 << 20


class OutOfMemory(CudaGraphRecorder):
    """Runs out of memory in the midst of a capture."""

    def record(self, run: Any, warmups: int) -> Any:
        def short() -> None:
            run()
            if torch.cuda.is_current_stream_capturing():
                raise torch.OutOfMemoryError("no memory")

        return super().record(short, warmups)


def one_short(rank: int, path: Path) -> list[dict[str, Any]]:
    """The second rank is short of memory before a capture, then in one; then both record."""
    model = made(path, torch.float32, {})
    runtime = runtime_of(model)
    device = torch.device("cuda", rank)
    runtime.max_capture_size = 0
    plain = models.answer(model)
    runtime.max_capture_size = 512
    outcomes = []
    for kind in (Short, OutOfMemory, CudaGraphRecorder):
        runtime.drop()
        runtime.report.notes.clear()
        runtime.recorder = kind(device) if rank == 1 else CudaGraphRecorder(device)
        started = time.monotonic()
        runtime.begin()
        step = runtime.step(2, 20)
        took = time.monotonic() - started
        same = torch.equal(models.answer(model), plain)
        outcomes.append({"took": took, "step": step is not None, "notes": list(runtime.report.notes), "same": same})
    return outcomes


def test_one_rank_short_of_memory_puts_both_back(nccl: Pool, folder: Path) -> None:
    first, second = nccl.run(one_short, checkpoint(folder, "qwen3_moe", **SIZES))
    assert [o["step"] for o in first] == [o["step"] for o in second] == [False, False, True], first
    assert all(o["same"] for o in (*first, *second))
    assert any("its cache takes" in note for note in first[0]["notes"])
    assert any("out of memory (rank 1: OutOfMemoryError" in note for note in first[1]["notes"])
