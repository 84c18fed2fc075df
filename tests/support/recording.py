"""Recorded decode steps on a CPU: a stand-in calls the step where a graph would be replayed.

Everything but the recording itself runs: padding, choice of sizes, rings past the window, reset, and the loops.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.runtime.graphs import EagerRecorder
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, TEXT_FILE
from mxfp4_compile.tools.families import tiny_model


class CountingRecorder(EagerRecorder):
    """The stand-in, with a count of recordings and replays."""

    def __init__(self, free: int | None = None, compiles: bool = False) -> None:
        self.recorded = self.replayed = 0
        self.free, self.compiles = free, compiles

    def record(self, run, warmups):
        self.recorded += 1
        recording = super().record(run, warmups)
        replay = recording.replay

        def counted() -> None:
            self.replayed += 1
            replay()

        recording.replay = counted
        return recording

    def free_bytes(self) -> int | None:
        return self.free


def recorded(model: nn.Module, **kwargs: Any) -> CountingRecorder:
    runtime = runtime_of(model)
    runtime.drop()
    runtime.report.notes.clear()
    runtime.record_prompts = True
    runtime.recorder = CountingRecorder(**kwargs)
    return runtime.recorder


def plain(model: nn.Module) -> None:
    runtime_of(model).recorder = None  # on a CPU: no graphs


def prompts(batch: int, length: int = 24, mixed: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """Held-out text, left-padded to ``length``."""
    text = (MODEL_DIRECTORY / TEXT_FILE).read_bytes()
    ids, mask = torch.zeros(2, batch, length, dtype=torch.int64)
    for i in range(batch):
        n = length - (5 * i % (length - 3) if mixed else 0)
        start = 997 * (i + 1) + 101 * seed
        ids[i, length - n :] = torch.tensor(list(text[start : start + n]))
        mask[i, length - n :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def both(model: nn.Module, inputs: dict[str, Any], seed: int = 3, **options: Any) -> tuple[Any, Any, CountingRecorder]:
    """What transformers' loop gives, and what recorded steps give."""
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0} | options
    out = []
    for use in (False, True):
        if use:
            recorder = recorded(model)
        else:
            plain(model)
        torch.manual_seed(seed)
        out.append((model.generate(**inputs, **options), torch.get_rng_state()))
    assert torch.equal(out[0][1], out[1][1]), "the random state afterwards differs"
    return out[0][0], out[1][0], recorder


class Streamer:
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Another backend in Inductor's place."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **kwargs: real(f, backend=backend, **kwargs))


def counting_backend(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs that Dynamo hands over, which then run as they are: its own backend in Inductor's place."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_with(monkeypatch, backend)
    return graphs


def windowed(layers: int = 6) -> nn.Module:
    """gpt_oss with both kinds of layers, optimized."""
    config = AutoConfig.for_model(**tiny_model("gpt_oss").config.to_dict())
    config.num_hidden_layers, config.layer_types = layers, ["sliding_attention", "full_attention"] * (layers // 2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return mxfp4_compile.optimize(model, verify=False)
