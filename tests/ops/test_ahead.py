"""Kernels compiled ahead: other processes fill Triton's cache with exactly what is launched afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cross_compile import HopperDriver
from torch import nn

import mxfp4_compile
from mxfp4_compile.ops.arguments import MoEInputs, MoETypes
from mxfp4_compile.ops.backends.reference import BACKEND as REFERENCE
from mxfp4_compile.ops.backends.triton.backend import BACKEND
from mxfp4_compile.spec import Activation, MoEParams
from mxfp4_compile.tools.families import tiny_model

BF16 = torch.bfloat16


def types(**changes: Any) -> MoETypes:
    params = MoEParams(4, 128, 64, Activation("silu"), "halves", 0, False, BF16, BF16)
    return MoETypes(**{
        "params": params, "top_k": 2, "x": BF16, "ids": torch.int64, "weights": BF16, "up_bias": None,
        "down_bias": BF16, "layout": "sm80", **changes,
    })  # fmt: skip


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, on a cache of its own and for one token only."""
    pytest.importorskip("triton")
    from mxfp4_compile.ops.backends.triton import ahead

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "_FIRST", (1,))
    monkeypatch.setattr(ahead, "_LARGEST", 1)
    monkeypatch.setattr(ahead, "_running", [])
    return ahead


@pytest.mark.slow
def test_a_launch_finds_what_other_processes_compiled(
    ahead: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.runtime import driver

    from mxfp4_compile.ops.backends.triton import moe, tuned
    from mxfp4_compile.ops.backends.triton.launch import Step

    target = HopperDriver().get_current_target()
    assert ahead.start([types()], None, "sm90", target) == 1
    assert [process.wait() for process in ahead._running] == [0]
    (mark,) = tmp_path.glob("mxfp4_compile-*")
    kernels = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")}
    assert sorted(file.name for file in kernels) == ["vector_down.cubin", "vector_up.cubin"]

    # What this process would launch for real tensors of these types is there.
    launched: list[str] = []

    def compiled(step: Step, _grid: Any, *args: Any) -> None:
        step.compile(*args)
        launched.append(step.kernel.__name__)

    monkeypatch.setattr(driver, "_active", HopperDriver())
    monkeypatch.setattr(Step, "__call__", compiled)
    monkeypatch.setattr(tuned, "meta_device", "sm90")
    tuned.architecture.cache_clear()
    moe.launch_plan.cache_clear()
    new = lambda *size, dtype=BF16: torch.empty(size, dtype=dtype, device="meta")
    weight = [new(1, dtype=torch.int32)] * 2
    routing = new(1, 2, dtype=torch.int64), new(1, 2)
    moe.moe(MoEInputs(new(1, 128), *routing, weight, weight, None, new(1), types().params, "sm80"))  # the rules choose
    tuned.architecture.cache_clear()
    moe.launch_plan.cache_clear()
    assert launched == ["vector_up", "vector_down"]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")} == kernels

    # No process the second time; other types are other kernels.
    assert ahead.start([types()], None, "sm90", target) == 0
    assert ahead.start([types(weights=torch.float32)], None, "sm90", target) == 1
    ahead.stop()
    assert ahead._running == [] and mark.exists()


def test_calls_differ_in_kernels_and_begin_with_what_is_met_first() -> None:
    pytest.importorskip("triton")
    from mxfp4_compile.ops.backends.triton.ahead import calls_of

    params = MoEParams(128, 2048, 768, Activation("silu"), "halves", 0, False, BF16, BF16)
    calls = calls_of(types(params=params, top_k=8, down_bias=None), "sm90", None)
    assert [call.tokens for call in calls[:5]] == [1, 512, 8, 64, 4096]
    assert len({call.kernels for call in calls}) == len(calls) > 8
    inputs = calls[1].inputs()
    assert inputs.x.shape == (512, 2048) and inputs.topk_ids.shape == inputs.topk_weights.shape == (512, 8)
    assert inputs.up_bias is None and inputs.x.device.type == "meta"


def test_it_has_to_be_turned_on(ahead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ahead.VARIABLE, raising=False)
    assert ahead.begin([types()], torch.device("cuda", 0)) == 0
    assert BACKEND.compile_ahead([types()], torch.device("cpu")) == ""


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_optimize_tells_the_backend_what_will_be_called(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[list[MoETypes], torch.device]] = []

    def compile_ahead(layers: Any, device: torch.device) -> str:
        told.append((list(layers), device))
        return "kernels are compiled meanwhile"

    monkeypatch.setattr(REFERENCE, "compile_ahead", compile_ahead)
    model: nn.Module = tiny_model(family, layers=2, dtype=BF16)
    config = model.config
    mxfp4_compile.optimize(model, backend="reference")
    ((layers, device),) = told
    (said,) = layers  # once for all layers
    assert device == torch.device("cpu") and model.mxfp4_report.notes.count("kernels are compiled meanwhile") == 1
    assert said.top_k == config.num_experts_per_tok and said.params.hidden == config.hidden_size
    bias = torch.bfloat16 if family == "gpt_oss" else None
    assert (said.x, said.ids, said.up_bias, said.down_bias) == (torch.bfloat16, torch.int64, bias, bias)
