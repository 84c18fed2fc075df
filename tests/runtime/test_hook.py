"""``model.generate`` put in place and taken away; ``capture``."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from recording import (
    recorded,
)

import mxfp4_compile
from mxfp4_compile.runtime import runtime_of
from mxfp4_compile.tools.families import tiny_model


def test_switched_off() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False, max_capture_size=0)
    recorder = recorded(model)
    model.generate(torch.randint(3, 60, (2, 5)), max_new_tokens=4, pad_token_id=0)
    assert recorder.recorded == 0
    assert "max_capture_size=0" in str(model.mxfp4_report)


def test_without_graphs_it_says_so() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    model.generate(torch.randint(3, 60, (2, 5)), max_new_tokens=4, pad_token_id=0)
    assert "there are no CUDA graphs on cpu" in str(model.mxfp4_report)
    mxfp4_compile.capture(model)
    assert not model.mxfp4_report.runtime.captures


def test_capture_ahead() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False, max_capture_size=8)
    recorder = recorded(model)
    report = mxfp4_compile.capture(model, max_length=600)
    assert [(c.batch, c.length) for c in report.captures] == [(8, 1024), (4, 1024), (2, 1024), (1, 1024)]
    model.generate(torch.randint(3, 60, (3, 5)), max_new_tokens=4, pad_token_id=0)
    assert recorder.recorded == 4
    addresses = {s.cache.views[0].keys.data_ptr() for s in runtime_of(model).steps.values()}
    assert len(addresses) == 1, "sizes captured from the largest down share one cache"
    with pytest.raises(TypeError, match="optimized model"):
        mxfp4_compile.capture(tiny_model("qwen3_moe"))


def test_the_model_stays_what_it_was() -> None:
    model = tiny_model("qwen3_moe")
    signature, names = inspect.signature(model.generate), set(vars(model))
    mxfp4_compile.optimize(model, verify=False)
    recorded(model)
    ids = torch.randint(3, 60, (2, 5))
    model.generate(ids, max_new_tokens=4, pad_token_id=0)
    assert inspect.signature(model.generate) == signature
    assert "generate" in vars(model)
    assert model.config._attn_implementation != "mxfp4_decode"
    assert not any("forward" in vars(module) for module in model.modules())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        runtime = runtime_of(twin)
        assert runtime.model is twin
        assert not runtime.steps
        assert not twin.mxfp4_report.runtime.captures
        assert torch.equal(
            twin.generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False),
            model.generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False),
        )
    mxfp4_compile.restore(model)
    assert set(vars(model)) == names
    assert inspect.signature(model.generate) == signature


def test_hooks_of_the_user_are_called() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), verify=False)
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    recorder = recorded(model)
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    model.generate(torch.randint(3, 60, (2, 5)), **options)
    assert len(calls) == 6
    assert recorder.recorded == 0
    assert "forward hooks" in str(model.mxfp4_report)
    handle.remove()
    model.generate(torch.randint(3, 60, (2, 5)), **options)
    assert recorder.recorded == 1
