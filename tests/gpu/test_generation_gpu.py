"""generate under real CUDA graphs: the eager loop's tokens, and nothing compiled or recorded a second time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import mxfp4_compile
from mxfp4_compile.runtime import attention, linear, runtime_of
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, TEXT_FILE, load
from mxfp4_compile.tools.families import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The demo's trained model in fp32, optimized, on the GPU."""
    return mxfp4_compile.optimize(load(MODEL_DIRECTORY).float().cuda())


def prompts(batch: int, length: int = 24) -> dict[str, torch.Tensor]:
    """Held-out text, left-padded to ``length``."""
    text = (MODEL_DIRECTORY / TEXT_FILE).read_bytes()
    ids, mask = torch.zeros(2, batch, length, dtype=torch.int64)
    for i in range(batch):
        n = length - 5 * i % (length - 3)
        ids[i, length - n :] = torch.tensor(list(text[997 * i + 50 : 997 * i + 50 + n]))
        mask[i, length - n :] = 1
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def both(model: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of transformers' eager loop and of recorded steps."""
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0} | options
    runtime = runtime_of(model)
    out = []
    for largest in (0, 512):
        runtime.max_capture_size = largest
        torch.manual_seed(1)
        out.append(model.generate(**inputs, **options))
    report = model.mxfp4_report.runtime
    assert report.captures, str(report)
    assert {c.replay for c in report.captures} == {"CUDA graphs"}
    assert {c.made for c in report.captures} == {"compiled layers, own attention"}, str(report)
    return out[0], out[1]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_greedy_200_tokens(trained: nn.Module, batch: int) -> None:
    expected, got = both(trained, prompts(batch), max_new_tokens=200)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20, "eos_token_id": [10, 46]},
        {"num_beams": 2},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        {"eos_token_id": 32},
    ],
    ids=["sample", "beam", "processors", "end"],
)
def test_options(trained: nn.Module, options: dict[str, Any]) -> None:
    expected, got = both(trained, prompts(4), **options)
    assert torch.equal(got, expected)


def test_streamer(trained: nn.Module) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.got.append(-1)

    streamer = Streamer()
    out = trained.generate(**prompts(1), max_new_tokens=30, do_sample=False, pad_token_id=0, streamer=streamer)
    assert streamer.got == [*out[0].tolist(), -1]


def test_nothing_is_compiled_or_recorded_again(trained: nn.Module) -> None:
    options = {"do_sample": False, "pad_token_id": 0}
    trained.generate(**prompts(4), max_new_tokens=8, **options)
    captures = trained.mxfp4_report.runtime.captures
    before = (counters["stats"]["unique_graphs"], len(captures))
    for batch, length, new in ((4, 24, 8), (3, 24, 30), (4, 60, 100), (3, 7, 5)):
        trained.generate(**prompts(batch, length), max_new_tokens=new, **options)
    assert (counters["stats"]["unique_graphs"], len(captures)) == before


@pytest.mark.parametrize("family", ["trained", "gpt_oss"])
def test_recorded_prompts(trained: nn.Module, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded on the right to 16, 64 or 256 tokens; gpt_oss past its window."""
    model = trained if family == "trained" else mxfp4_compile.optimize(tiny_model(family).cuda())
    monkeypatch.setattr(runtime_of(model), "record_prompts", True)
    generator = torch.Generator().manual_seed(2)
    for batch, length in ((1, 5), (3, 50), (1, 200), (1, 64)):
        ids = torch.randint(3, 100, (batch, length), generator=generator).cuda()
        expected, got = both(model, {"input_ids": ids}, eos_token_id=None)
        assert torch.equal(got, expected)
    made = [p for p in model.mxfp4_report.runtime.prefills if p.replay]
    assert {p.replay for p in made} == {"CUDA graphs"}
    assert len(made) == 4, str(model.mxfp4_report.runtime)
    assert max(p.error for p in made) < 1e-3


def test_inference_mode(trained: nn.Module) -> None:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        first = trained.generate(**prompts(3), **options)
    assert torch.equal(trained.generate(**prompts(3), **options), first)


def test_capture_ahead_and_copies() -> None:
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=torch.bfloat16).cuda(), max_capture_size=4)
    report = mxfp4_compile.capture(model)
    assert [c.batch for c in report.captures] == [4, 2, 1], str(report)
    assert max(c.error for c in report.captures) < 0.1
    twin = copy.deepcopy(model)
    assert not twin.mxfp4_report.runtime.captures
    ids = torch.randint(3, 60, (2, 5), device="cuda")
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(twin.generate(ids, **options), model.generate(ids, **options))
    model.cpu()
    model.generate(ids.cpu(), **options)
    assert not model.mxfp4_report.runtime.captures
    assert "weights or modules moved" in str(model.mxfp4_report)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_families(family: str) -> None:
    """Windows of 8: decoding runs far past them."""
    model = mxfp4_compile.optimize(tiny_model(family).cuda())
    ids = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    expected, got = both(model, {"input_ids": ids, "attention_mask": mask}, eos_token_id=None)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "length", "key_dim", "value_dim", "sinks", "softcap"),
    [
        (1, 4, 8, 512, 128, 128, False, None),
        (5, 8, 8, 300, 64, 64, True, None),
        (3, 16, 1, 1024, 192, 128, False, None),
        (70, 2, 3, 40, 96, 80, True, 20.0),
        (2, 1, 71, 130, 64, 64, False, 5.0),
    ],
)
def test_attention(dtype, rows, heads, groups, length, key_dim, value_dim, sinks, softcap) -> None:
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)
    query, keys = make(rows, heads * groups, 1, key_dim), make(rows, heads, length, key_dim)
    values = make(rows, heads, length, value_dim)
    mask = torch.rand(rows, 1, 1, length, device="cuda") < 0.3
    mask[..., 7] = True
    mask[0, ..., 8:] = False
    sink = make(heads * groups) if sinks else None
    arguments = (mask, sink, key_dim**-0.5, softcap)
    got = attention.triton_attention(query, keys, values, *arguments)
    expected = attention.reference(query.double(), keys.double(), values.double(), *arguments)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("shape", [(8, 5120, 2048), (64, 2048, 4096), (5, 96, 2880), (33, 40, 64), (2, 128, 2048)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_of_few_rows(shape: tuple[int, int, int], biased: bool) -> None:
    """Against fp64, and the same bits whichever program comes last."""
    rows, columns, depth = shape
    generator = torch.Generator("cuda").manual_seed(rows)
    draw = lambda *size: torch.randn(*size, generator=generator, device="cuda").bfloat16()
    x, weight, bias = draw(rows, depth), draw(columns, depth), draw(columns) if biased else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    first = linear.launch(x, weight, bias, linear.plan(*shape))
    assert float((first.double() - exact).norm() / exact.norm()) < 2e-3
    for _ in range(50):
        assert torch.equal(linear.launch(x, weight, bias, linear.plan(*shape)), first)


@pytest.mark.parametrize(("batch", "products"), [(1, "those with a bias as sums"), (8, "by a kernel for few rows")])
def test_products_in_half_precision_pass_the_check_of_layers(batch: int, products: str) -> None:
    model = mxfp4_compile.optimize(tiny_model("gpt_oss", layers=2).bfloat16().cuda())
    runtime = runtime_of(model)
    runtime.linear_rows = True
    model.generate(**prompts(batch), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert [c.products for c in runtime.report.captures] == [f"products: those of one input as one, {products}"]
    assert runtime.report.packed == "6 linear modules as 2 products, weights side by side"
    assert not runtime.report.notes, str(runtime.report)
