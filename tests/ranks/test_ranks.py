"""``optimize`` of models that lie on two ranks: gloo on the CPU, in two processes that serve all tests here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ranks_models as models
import torch
from ranks_models import checkpoint
from ranks_pool import Pool
from torch import Tensor

import mxfp4_compile
from mxfp4_compile.passes.build.module import mxfp4_sites

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

EXPERT, TENSOR = {"tp_size": 2, "ep_size": 2}, {"tp_size": 2}


# what runs on each rank


def optimized(
    rank: int, path: Path, split: dict[str, int], dtype: torch.dtype, out: Path, limit: int
) -> dict[str, Any]:
    model = mxfp4_compile.optimize(models.load(path, dtype, **split), progress=False)
    sites = mxfp4_sites(model)
    logits = models.logits(model)
    model.save_pretrained(out, is_main_process=rank == 0, max_shard_size=limit)
    return {
        "logits": logits,
        "tokens": models.answer(model),
        "sampled": sampled(model, seed=rank),
        "shards": {n: s.plan.shard for n, s in sites.items()},
        "report": {**model.mxfp4_report.to_dict(), "seconds": 0},
        "ops": {
            n: [str(x.target) for x in s.rewritten.graph.nodes if "mxfp4" in str(x.target)] for n, s in sites.items()
        },
        "state": mxfp4_compile.gathered_state_dict(model),
        "graphs": layer_graphs(model, logits) if dtype == torch.float32 else [],
    }


def sampled(model: Any, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return model.generate(models.tokens(), max_new_tokens=6, do_sample=True, pad_token_id=0, eos_token_id=None)


def layer_graphs(model: Any, eager: Tensor) -> list[list[str]]:
    """The mxfp4 ops of each graph that a layer is compiled to; the graphs compute what the layers do."""
    graphs: list[list[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([str(n.target) for n in graph.graph.nodes if "mxfp4" in str(n.target)])
        return graph.forward

    layer = model.model.layers[-1]
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend=backend)
    assert torch.equal(models.logits(model), eager)
    return graphs


@pytest.mark.parametrize(
    ("family", "split", "kind", "dtype", "limit"),
    [
        ("qwen3_moe", EXPERT, "expert", torch.float32, 10**9),
        ("qwen3_moe", TENSOR, "tensor", torch.bfloat16, 100_000),
        ("gpt_oss", EXPERT, "expert", torch.float32, 60_000),
        ("gpt_oss", TENSOR, None, torch.float32, 10**9),  # its plan splits the output layer only
        ("deepseek_v3", TENSOR, "tensor", torch.float32, 10**9),
        ("mixtral", EXPERT, "expert", torch.bfloat16, 10**9),
    ],
)
def test_ranks_do_what_one_process_does(
    pool: Pool,
    folder: Path,
    tmp_path: Path,
    family: str,
    split: dict[str, int],
    kind: str | None,
    dtype: torch.dtype,
    limit: int,
) -> None:
    """Logits, tokens, state, saved files and report."""
    path = checkpoint(folder, family)
    whole = mxfp4_compile.optimize(models.load(path, dtype), progress=False)
    logits, report = models.logits(whole), whole.mxfp4_report
    whole.save_pretrained(tmp_path / "one", max_shard_size=limit)
    first, second = pool.run(optimized, path, split, dtype, tmp_path / "two", limit)
    assert torch.equal(first["logits"], second["logits"])
    assert float((first["logits"] - logits).norm() / logits.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(first["tokens"], second["tokens"]) and torch.equal(first["sampled"], second["sampled"])
    if dtype == torch.float32:
        assert torch.equal(first["tokens"], models.answer(whole))
    ops = ["mxfp4.moe.default"] + ["mxfp4.reduce.default"] * (kind is not None)
    for name, found in first["ops"].items():
        assert found == ops
        shard = second["shards"][name]
        assert (shard and (shard.kind, shard.rank)) == (kind and (kind, 1))
    assert all(graph == ops for graph in first["graphs"])
    assert first["report"] == second["report"]
    assert first["report"]["bytes_after"] == report.bytes_after
    ours = [(s["weight_error_mean"], s["weight_error_max"]) for s in first["report"]["sites"]]
    assert ours == [pytest.approx((s.weight_error_mean, s.weight_error_max), rel=1e-9) for s in report.sites]
    assert second["state"] == {}
    assert first["state"].keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(first["state"][name], value), name
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


# refused, or failing


def failures(rank: int, path: Path, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """The words of optimize() for each (how it is split, arguments on rank 1 or on both)."""
    said = []
    for split, arguments in cases:
        own = {k: v[rank] if isinstance(v, tuple) else v for k, v in arguments.items()}
        model = models.load(path, **split)
        try:
            mxfp4_compile.optimize(model, progress=False, **own)
            said.append("")
        except mxfp4_compile.OptimizeError as error:
            said.append(str(error))
        assert not mxfp4_sites(model)
    return said


def test_what_is_not_served_is_refused_by_name(pool: Pool, folder: Path) -> None:
    path = checkpoint(folder, "qwen3_moe", columns=48)
    cases = [
        (TENSOR, {}),
        ({**EXPERT, "ep_implementation": "all_to_all"} if models.ep_sizes() else TENSOR, {}),
        (EXPERT, {"scale_rule": ("mse", "floor")}),
        (EXPERT, {"skip": ("*layers.0*", ())}),
    ]
    first, second = pool.run(failures, path, cases)
    assert first == second
    cut, dispatch, rule, skip = first
    assert "48 intermediate columns" in cut and "at 24" in cut and 'experts="tensor"' in cut
    if models.ep_sizes():
        assert "AllToAllEP" in dispatch and "ep_size equal to tp_size" in dispatch
    assert "scale_rule is 'mse' on rank 0 and 'floor' on rank 1" in rule
    assert "skip is" in skip


def skipped(rank: int, path: Path) -> tuple[Tensor, Tensor, list[str]]:
    model = models.load(path, **EXPERT)
    before = models.logits(model)
    mxfp4_compile.optimize(model, progress=False, skip="*layers.0*")
    return (
        before,
        models.logits(model),
        [n for n, m in model.named_modules() if "forward" in vars(m) and n.endswith("experts")],
    )


def test_skipped_experts_stay_as_transformers_split_them(pool: Pool, folder: Path) -> None:
    for before, after, split in pool.run(skipped, checkpoint(folder, "qwen3_moe")):
        assert split == ["model.layers.0.mlp.experts"]
        assert 0 < float((after - before).norm() / before.norm()) < 0.3


PLACES = [
    "ranks.session.check_model_plan", "ranks.session.local_experts", "ranks.session.forward_runs", "in a forward",
    "planning.match_all", "planning.check_matches", "pipeline.try_sites", "pipeline.build_site",
    "ranks.session.distribute", "installing.build_site",
]  # fmt: skip


def planted(rank: int, path: Path, places: list[str]) -> list[tuple[str, float, bool]]:
    """What optimize() says when it fails at each place on rank 1, after how long, and if the model is as before."""
    import importlib
    from unittest import mock

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    model = models.load(path, **EXPERT)
    before = models.logits(model)
    said = []
    for place in places:
        started, words = time.monotonic(), ""
        if place == "in a forward":
            hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail) if rank == 1 else None
            patch: Any = mock.patch("time.sleep")
        else:
            hook, (module, _, name) = None, place.rpartition(".")
            home = importlib.import_module(f"mxfp4_compile.{module}")
            # the site is installed by a function that verification calls as well: fail there only when it is installed
            wrapped = _second(getattr(home, name), fail) if place == "installing.build_site" else fail
            patch = mock.patch.object(home, name, wrapped if rank == 1 else getattr(home, name))
        with patch:
            try:
                mxfp4_compile.optimize(model, progress=False)
            except mxfp4_compile.OptimizeError as error:
                words = str(error)
        if hook is not None:
            hook.remove()
        took = time.monotonic() - started
        said.append((words, took, not mxfp4_sites(model) and torch.equal(models.logits(model), before)))
    return said


def _second(function: Any, fail: Any) -> Any:
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return fail() if len(calls) > 2 else function(*args, **kwargs)

    return wrapped


def test_a_failure_on_one_rank_is_one_on_all(pool: Pool, folder: Path) -> None:
    first, second = pool.run(planted, checkpoint(folder, "qwen3_moe"), PLACES)
    for place, (words, took, same), (other, _, other_same) in zip(PLACES, first, second, strict=True):
        assert words == other and "rank 1: " in words and "planted" in words, place
        assert same and other_same, place
        assert took < 60, place  # nobody waited for a timeout of minutes


def alone(rank: int, path: Path) -> tuple[str, float]:
    """A failure on rank 1 in the midst of a forward, without the agreement; the model's group waits 5 seconds."""
    from datetime import timedelta
    from unittest import mock

    from mxfp4_compile.ranks.agree import Agreement

    model = models.load(path, **EXPERT)
    for mesh in ("tp", "ep"):
        group = model._mesh_manager.get_mesh(mesh).get_group()
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=5), group)

    def fail(*args: Any) -> None:
        raise RuntimeError("planted")

    if rank == 1:
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    started = time.monotonic()
    with mock.patch.object(Agreement, "exchange", lambda self, message: [message] * self.size):
        try:
            mxfp4_compile.optimize(model, progress=False)
        except Exception as error:
            words = str(error)
    took = time.monotonic() - started
    time.sleep(8 * rank)  # the failing rank stays alive
    return words, took


def test_without_the_agreement_the_other_rank_waits(folder: Path) -> None:
    pool = Pool(2)
    try:
        (waiting, took), (failing, _) = pool.run(alone, checkpoint(folder, "qwen3_moe"))
    finally:
        pool.stop()
    assert "planted" in failing
    assert "planted" not in waiting and took >= 5


def test_a_process_without_a_group_is_told_to_start_one(folder: Path) -> None:
    model = models.load(checkpoint(folder, "qwen3_moe"))
    model._tp_size = 2
    with pytest.raises(mxfp4_compile.OptimizeError, match=r"tensor-parallel.*torchrun"):
        mxfp4_compile.optimize(model, progress=False)
