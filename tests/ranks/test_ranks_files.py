"""Checkpoints and two ranks: what is saved, gathered and loaded is bit for bit what one process has."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import ranks_models as models
import torch
from ranks_models import checkpoint
from ranks_pool import Pool

import mxfp4_compile
from mxfp4_compile.checkpoint import CheckpointError
from mxfp4_compile.ops import schema
from mxfp4_compile.passes.build.module import mxfp4_sites

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

EXPERT = {"tp_size": 2, "ep_size": 2}


def assert_same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


# saving


def unwritable(rank: int, path: Path, out: Path) -> str:
    from unittest import mock

    model = mxfp4_compile.optimize(models.load(path, **EXPERT), progress=False)
    patch = mock.patch("mxfp4_compile.checkpoint.output.Output.write_shard", side_effect=CheckpointError("disk full"))
    try:
        with patch:  # the other rank has codes to send by then
            model.save_pretrained(out)
    except mxfp4_compile.OptimizeError as error:
        return str(error)
    except CheckpointError as error:
        return f"itself: {error}"
    return ""


def test_a_disk_that_is_full_ends_all_ranks(pool: Pool, folder: Path, tmp_path: Path) -> None:
    assert pool.run(unwritable, checkpoint(folder, "qwen3_moe"), tmp_path / "out") == ["rank 0: disk full"] * 2
    assert not (tmp_path / "out").exists()


# loading


def loaded(rank: int, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    model = mxfp4_compile.load(path, progress=False, dtype=torch.float32, **options)
    return {
        "logits": models.logits(model),
        "tokens": models.answer(model),
        "state": mxfp4_compile.gathered_state_dict(model),
        "notes": model.mxfp4_report.notes,
        "bytes": model.mxfp4_report.bytes_after,
        "errors": [s.weight_error_mean for s in model.mxfp4_report.sites],
        "parts": [s.plan.shard.parts for s in mxfp4_sites(model).values() if s.plan.shard],
    }


@pytest.mark.parametrize(
    ("family", "sizes", "options", "parts"),
    [
        ("qwen3_moe", {}, {"tp_plan": "auto"}, ((0, 2), (2, 4))),
        ("qwen3_moe", {"columns": 48}, {"tp_plan": "auto", "experts": "tensor"}, ((0, 32), (32, 48))),
        (
            "qwen3_moe",
            {"columns": 32, "experts": 5},
            {"tp_plan": "auto"},
            ((0, 32), (32, 32)),
        ),  # a rank without columns
        ("gpt_oss", {"columns": 176}, {"tp_plan": "auto", "experts": "tensor"}, ((0, 96), (96, 176))),
        ("gpt_oss", {"experts": 6}, {"distributed_config": {"tp_size": 2, "ep_size": 2}}, ((0, 3), (3, 6))),
        ("mixtral", {"num_key_value_heads": 1}, {"tp_plan": "auto"}, ((0, 2), (2, 4))),
    ],
)
def test_loading_gives_what_one_process_loads(
    pool: Pool, folder: Path, family: str, sizes: dict[str, int], options: dict[str, Any], parts: tuple[Any, ...]
) -> None:
    path = checkpoint(folder, family, **sizes)
    whole = mxfp4_compile.load(path, progress=False, dtype=torch.float32)
    logits, tokens = models.logits(whole), models.answer(whole)
    first, second = pool.run(loaded, path, options)
    assert set(first["parts"]) == {parts}
    assert torch.equal(first["logits"], second["logits"])
    assert float((first["logits"] - logits).norm() / logits.norm()) < 1e-5
    assert torch.equal(first["tokens"], tokens) and torch.equal(second["tokens"], tokens)
    assert_same_state(first["state"], dict(whole.state_dict()))
    assert first["notes"] == second["notes"] and first["errors"] == second["errors"]
    assert first["errors"] == pytest.approx([s.weight_error_mean for s in whole.mxfp4_report.sites], rel=1e-9)
    if sizes.get("columns") != 32:  # a block of zeros, where a rank has none
        assert first["bytes"] == whole.mxfp4_report.bytes_after
    if "num_key_value_heads" in sizes:
        assert "attention lies whole on every rank: 1 key/value heads, 2 ranks" in first["notes"]


def test_an_mxfp4_checkpoint_is_cut_and_kept(pool: Pool, folder: Path, tmp_path: Path) -> None:
    path = checkpoint(folder, "qwen3_moe", columns=48)
    whole = mxfp4_compile.optimize(models.load(path), progress=False)
    whole.save_pretrained(tmp_path / "one")
    for experts in ("expert", "tensor"):
        first, _ = pool.run(loaded, tmp_path / "one", {"tp_plan": "auto", "experts": experts})
        assert_same_state(first["state"], dict(whole.state_dict()))


def used(rank: int, path: Path) -> dict[str, Any]:
    """What else one does with a site that holds a part of its experts."""
    model = mxfp4_compile.load(path, tp_plan="auto", progress=False, dtype=torch.float32)
    site = next(iter(mxfp4_sites(model).values()))
    generator = torch.Generator().manual_seed(0)
    call = (
        torch.randn(5, 64, generator=generator),
        torch.tensor([[0, 3], [1, 2], [3, 1], [0, 2], [2, 3]]),
        torch.ones(5, 2),
    )
    eager = site(*call)
    exported = torch.export.export(site, call)
    incompatible = model.load_state_dict(model.state_dict())
    said = []
    for work in (
        lambda: mxfp4_compile.restore(model),
        lambda: site(call[0].clone().requires_grad_(), *call[1:]).sum().backward(),
    ):
        try:
            work()
        except (mxfp4_compile.OptimizeError, NotImplementedError) as error:
            said.append(str(error))
    others = {"exported": exported.module()(*call), "copied": copy.deepcopy(site)(*call), "loaded again": site(*call)}
    return {
        "ops": [n.args[-1] for n in exported.graph.nodes if n.target is schema.reduce],
        "same": {name: torch.equal(value, eager) for name, value in others.items()},
        "keys": incompatible.missing_keys + incompatible.unexpected_keys,
        "said": said,
    }


def test_a_part_is_exported_copied_and_loaded_like_a_whole(pool: Pool, folder: Path) -> None:
    for found in pool.run(used, checkpoint(folder, "qwen3_moe")):
        assert len(found["ops"]) == 1 and isinstance(found["ops"][0], str)  # the group, by name
        assert all(found["same"].values()), found["same"]
        assert found["keys"] == []
        restoring, training = found["said"]
        assert "of 4 (rank" in restoring and "restore() does not serve experts on several ranks" in restoring
        assert "mxfp4::reduce has no backward" in training


def refused(rank: int, path: Path, cases: list[dict[str, Any]]) -> list[str]:
    said = []
    for case in cases:
        own = {k: v[rank] if isinstance(v, tuple) else v for k, v in case.items()}
        try:
            mxfp4_compile.load(path, progress=False, **own)
            said.append("")
        except (mxfp4_compile.OptimizeError, ValueError) as error:
            said.append(str(error))
    return said


def test_what_load_does_not_serve_is_refused_by_name(pool: Pool, folder: Path) -> None:
    path = checkpoint(folder, "qwen3_moe", columns=32, experts=5)
    cases: list[dict[str, Any]] = [
        {"tp_plan": "auto", "experts": "expert"},
        {"tp_plan": "auto", "device_map": "auto"},
        {"distributed_config": {"tp_size": 1, "fsdp_size": 2}},
        {"distributed_config": {"tp_size": 2, "ep_size": 2}, "experts": "tensor"},
        {"tp_plan": "auto", "experts": ("tensor", "auto")},
        {"tp_plan": "auto", "scale_rule": ("mse", "even")},
        {"experts": "tensor"},
    ]
    first, second = pool.run(refused, path, cases)
    assert first == second
    words = [
        "5 experts do not divide by 2 ranks", "device_map='auto'", "fsdp_size=2", "contradict each other",
        "experts is 'tensor' on rank 0 and 'auto' on rank 1", "scale_rule is 'mse' on rank 0 and 'even'",
        "is for several ranks",
    ]  # fmt: skip
    for said, wanted in zip(first, words, strict=True):
        assert wanted in said


LOAD_PLACES = [
    "checkpoint.quantizer.check_parameters", "checkpoint.quantizer.verify_structures",
    "checkpoint.reader.CheckpointReader.values",
    "checkpoint.quantizer.finish",
]  # fmt: skip


def load_planted(rank: int, path: Path, places: list[str]) -> list[str]:
    """What load() says when it fails at each place on rank 1."""
    from unittest import mock

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    said = []
    for place in places:
        with mock.patch(f"mxfp4_compile.{place}", fail) if rank == 1 else contextlib.nullcontext():
            try:
                mxfp4_compile.load(path, progress=False, tp_plan="auto")
            except mxfp4_compile.OptimizeError as error:
                said.append(str(error))
    return said


def test_a_failure_of_load_on_one_rank_is_one_on_all(pool: Pool, folder: Path) -> None:
    first, second = pool.run(load_planted, checkpoint(folder, "qwen3_moe"), LOAD_PLACES)
    assert first == second and len(first) == len(LOAD_PLACES)
    assert all("rank 1: " in words and "planted" in words for words in first), first
