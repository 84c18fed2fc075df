"""Checkpoints and two ranks: what is saved, gathered and loaded is bit for bit what one process has."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_models as models
import torch
from ranks_models import checkpoint
from ranks_pool import Pool

import mxfp4_compile
from mxfp4_compile.checkpoint import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

EXPERT, TENSOR = {"tp_size": 2, "ep_size": 2}, {"tp_size": 2}


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def assert_same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


# saving


def saved(rank: int, path: Path, out: Path, split: dict[str, int], limit: int) -> dict[str, torch.Tensor]:
    model = mxfp4_compile.optimize(models.load(path, **split), progress=False)
    model.save_pretrained(out, is_main_process=rank == 0, max_shard_size=limit)
    return mxfp4_compile.gathered_state_dict(model)


@pytest.mark.parametrize(
    ("family", "split", "limit"),
    [
        ("qwen3_moe", EXPERT, 10**9),
        ("qwen3_moe", TENSOR, 100_000),
        ("gpt_oss", EXPERT, 60_000),
        ("gpt_oss", TENSOR, 10**9),
        ("deepseek_v3", TENSOR, 10**9),
    ],
)
def test_files_and_state_are_those_of_one_process(
    pool: Pool, folder: Path, tmp_path: Path, family: str, split: dict[str, int], limit: int
) -> None:
    path = checkpoint(folder, family)
    whole = mxfp4_compile.optimize(models.load(path), progress=False)
    whole.save_pretrained(tmp_path / "one", max_shard_size=limit)
    first, second = pool.run(saved, path, tmp_path / "two", split, limit)
    assert second == {}
    assert_same_state(first, dict(whole.state_dict()))
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name], name


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
