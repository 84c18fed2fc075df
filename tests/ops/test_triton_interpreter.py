"""The native kernels in Triton's interpreter, on the CPU, against plain fp32 torch.

The interpreter is chosen when triton is first imported, so everything runs in one subprocess: this
file is also the program that it runs.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable

import pytest
import torch
from fp8_oracle import as_fp8
from interpreter import interpret
from model_activations import OF_ALL_KINDS as ACTIVATIONS
from random_weights import random_weight

import mxfp4_compile
from mxfp4_compile.ops.arguments import LinearInputs, MoEInputs, Slot
from mxfp4_compile.spec import MoEParams

# One process runs all cases, so one worker has all tests.
pytestmark = pytest.mark.xdist_group("triton interpreter")
BF16 = torch.bfloat16
INF = math.inf
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantize(packed: torch.Tensor, scales: torch.Tensor, k: int) -> torch.Tensor:
    codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)[..., :k].long()
    scale = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)[..., :k]
    return VALUES[codes] * scale


def reference(x, ids, weights, up, down, up_bias, down_bias, params, fp8=False):
    """The layer in fp32, expert by expert; with fp8 the activations of both products go through e4m3."""
    rounded = as_fp8 if fp8 else torch.Tensor.float
    up_weight, down_weight = dequantize(*up, params.hidden), dequantize(*down, params.intermediate)
    out = torch.zeros(x.shape[0], params.hidden)
    for t, k in itertools.product(*map(range, ids.shape)):
        e = int(ids[t, k])
        if not 0 <= e < params.num_experts:
            continue
        w = weights[t, k].float()
        y = (rounded(x[t]) * (w if params.weight_on_input else 1.0)) @ up_weight[e].T
        y = params.activate(y if up_bias is None else y + up_bias[e].float())
        y = rounded(y.to(params.round_dtype) if fp8 else y) @ down_weight[e].T
        if down_bias is not None:
            y = y + down_bias[e].float()
        out[t] += y if params.weight_on_input else y * w
    return out


def routing(tokens, top_k, e, kind, generator):
    """topk_ids [T, K] of a kind: uniform, all on one expert, every other expert empty, or some sentinels."""
    if kind == "one":
        return torch.full((tokens, top_k), e - 1)
    ids = torch.rand((tokens, e), generator=generator).topk(top_k, -1).indices
    if kind == "even":
        ids = ids // 2 * 2
    if kind == "sentinel" and ids.numel():
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, e + 3, ids)
    return ids


def case(**overrides):
    """One layer through the backend and the reference -> relative error."""
    from mxfp4_compile.ops.backends.triton import BACKEND
    from mxfp4_compile.ops.backends.triton.moe import moe
    from mxfp4_compile.ops.backends.triton.select import TileChoice, Tiles

    o = {
        "e": 6, "top_k": 2, "h": 64, "i": 48, "t": 5, "act": "silu", "layout": "halves", "half": 0,
        "bias": False, "on_input": False, "kind": "uniform", "dtype": "float32", "ids": "int64",
        "regime": None, "tiles": {}, "bits": "nibbles", "weights": "float32", "strided": False,
        "fp8": False, "spread": False,
    }  # fmt: skip
    o.update(overrides)
    act = ACTIVATIONS[o["act"]]
    g = torch.Generator().manual_seed(7)
    dtype = getattr(torch, o["dtype"])
    params = MoEParams(
        o["e"], o["h"], o["i"], act, o["layout"] if act.gated else "none", o["half"] if act.gated else 0,
        o["on_input"], dtype, dtype,
    )  # fmt: skip
    up, down = (random_weight(*params.shape(r), g) for r in ("up", "down"))
    if o["spread"]:
        # As far apart as e4m3 holds exactly, and blocks of zeros whose scales say nothing.
        for packed, scales in (up, down):
            scales -= torch.randint(0, 10, scales.shape, generator=g, dtype=torch.uint8)
            packed[:, ::3, :16], scales[:, ::3, 0] = 0, 160
    slot = lambda role: Slot(role, params, o["bits"])
    prepared = []
    for role, w in (("up", up), ("down", down)):
        e, n, k = params.shape(role)
        p = BACKEND.prepare(*w, slot(role), k=k)
        back = BACKEND.recover(p, slot(role), n=n, k=k)
        assert torch.equal(back[0], w[0]) and torch.equal(back[1], w[1])
        prepared.append(p)
    biases = [None, None]
    kernel_biases = [None, None]
    if o["bias"]:
        for at, role in enumerate(("up", "down")):
            e, n, k = params.shape(role)
            biases[at] = torch.randn((e, n), generator=g).to(dtype)
            kernel_biases[at] = BACKEND.prepare_bias(biases[at], slot(role))
            back = BACKEND.recover_bias(kernel_biases[at], slot(role), n=n)
            assert torch.equal(back, biases[at])
    x = torch.randn((o["t"], o["h"]), generator=g).to(dtype)
    if o["strided"]:
        x = torch.randn((o["t"], 2 * o["h"] + 3), generator=g).to(dtype)[:, 1 : 2 * o["h"] + 1 : 2]
    ids = routing(o["t"], o["top_k"], o["e"], o["kind"], g).to(getattr(torch, o["ids"]))
    weights = torch.rand(ids.shape, generator=g).to(getattr(torch, o["weights"]))
    if o["kind"] == "sentinel":
        weights = torch.where(ids < o["e"], weights, math.nan)
    choice = None
    if o["regime"]:
        product, rest = {"BM": 64, "WAIT": 0}, {"SPLIT_K": 1, "AHEAD": 0, "PDL": 0}
        tiles = {
            "vector": {"ROWS": 8, "BLOCK": 2, "PDL": 0},
            "scan": {**product, "BT": 16, "QUADS": o["half"], "UNROLL": 2 - o["half"], **rest},
            "sorted": {
                **product,
                "BT": 32,
                "QUADS": 0,
                "UNROLL": 1 + o["half"],
                "GROUP": 2,
                "TAIL": 16,
                "MERGE": 0,
                "FINE": 0,
                **rest,
            },
        }[o["regime"]]
        tiles = tuple({**dict(tiles), **o["tiles"]}.items())
        choice = TileChoice(o["regime"], Tiles(4, 1, tiles), o["regime"], Tiles(4, 1, tiles), o["fp8"])
    got = moe(MoEInputs(x, ids, weights, *prepared, *kernel_biases, params, o["bits"]), choice)
    assert got.dtype == x.dtype and got.shape == x.shape and got.is_contiguous()
    want = reference(x, ids, weights, up, down, *biases, params, o["fp8"])
    if not want.numel() or not want.any():
        return float(got.float().abs().sum())
    return float((got.float() - want).norm() / want.norm())


def linear_case(rows, e, n, k, ends):
    """grouped_linear against the reference -> relative error."""
    from mxfp4_compile.ops.backends.triton import BACKEND

    g = torch.Generator().manual_seed(1)
    w = random_weight(e, n, k, g)
    x = torch.randn((rows, k), generator=g)
    prepared = BACKEND.prepare(*w, Slot(None, None, "nibbles"), k=k)
    offsets = torch.tensor(ends, dtype=torch.int32)
    got = BACKEND.grouped_linear(LinearInputs(x, offsets, prepared, n, torch.float32, "nibbles"))
    want = torch.zeros(rows, n)
    start = 0
    for expert, end in enumerate(ends):
        want[start:end] = x[start:end] @ dequantize(*w, k)[expert].T
        start = end
    return float((got - want).norm() / max(float(want.norm()), 1e-9))


def optimize_case():
    """optimize(activation_dtype="fp8"): what its report says, and a forward of many tokens beside one of bf16's."""
    from mxfp4_compile.tools.families import tiny_model

    tokens = torch.arange(60).view(1, 60) % 50
    logits, few = {}, {}
    for dtype in ("bf16", "fp8"):
        torch.manual_seed(0)
        model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), backend="triton", activation_dtype=dtype)
        with torch.no_grad():
            logits[dtype] = model(tokens).logits
            few[dtype] = model(tokens[:, :20]).logits
        for site in model.mxfp4_report.sites:
            assert (site.quantized_from is None) == (site.quantized_error is None) == (dtype == "bf16")
        if dtype == "fp8":
            assert all(1e-3 < s.quantized_error < 0.08 and s.error < 1e-5 for s in model.mxfp4_report.sites)
            start = model.mxfp4_report.sites[0].quantized_from
            assert 20 < start <= 60
            assert f"activations of {start} tokens and more are quantized: error" in str(model.mxfp4_report)
    assert float((few["fp8"] - few["bf16"]).norm() / few["bf16"].norm()) < 1e-5
    return float((logits["fp8"] - logits["bf16"]).norm() / logits["bf16"].norm())


REGIMES = ("vector", "scan", "sorted")


def cases():
    """name -> (arguments of ``case``, tolerance)."""
    out = {}
    for act, regime in itertools.product(ACTIVATIONS, REGIMES):
        out[f"{act}-{regime}"] = {"act": act, "regime": regime, "bias": act in ("gpt_oss", "plain_relu2")}
    for layout, half, regime in itertools.product(("halves", "interleaved"), (0, 1), REGIMES):
        out[f"{layout}{half}-{regime}"] = {
            "layout": layout,
            "half": half,
            "regime": regime,
            "t": 3,
            "bias": True,
        }
    for kind, regime in itertools.product(("one", "even", "sentinel"), REGIMES):
        out[f"{kind}-{regime}"] = {
            "kind": kind,
            "regime": regime,
            "t": 12 if kind == "one" else 7,
            "bias": True,
        }
    for regime in REGIMES:
        out[f"on_input-{regime}"] = {"on_input": True, "bias": True, "regime": regime}
        out[f"odd-{regime}"] = {"h": 10, "i": 6, "regime": regime, "bias": True, "act": "gpt_oss"}
        out[f"ragged-{regime}"] = {"h": 200, "i": 72, "regime": regime, "e": 3}
        out[f"plain_ragged-{regime}"] = {"h": 70, "i": 100, "regime": regime, "e": 3, "act": "plain_relu2"}
        out[f"bf16-{regime}"] = {"dtype": "bfloat16", "regime": regime, "weights": "bfloat16", "bias": True}
        out[f"fp16-{regime}"] = {"dtype": "float16", "regime": regime, "weights": "float16", "ids": "int32"}
        out[f"strided-{regime}"] = {"strided": True, "regime": regime}
        out[f"top1-{regime}"] = {"top_k": 1, "regime": regime}
        out[f"top3-{regime}"] = {"top_k": 3, "regime": regime}
    # Columns of blocks: few tokens, K split over programs, K not a multiple of a group of steps.
    for tokens, split, unroll in itertools.product((1, 2, 4), (1, 3), (1, 2)):
        tiles = {"BT": tokens, "QUADS": 1, "UNROLL": unroll, "SPLIT_K": split}
        wide = {"regime": "scan", "tiles": tiles, "e": 2, "t": 5, "kind": "sentinel", "bias": True}
        out[f"blocks{tokens}-{split}-{unroll}"] = {**wide, "h": 128, "i": 420, "act": "gpt_oss"}
        out[f"blocks{tokens}-{split}-{unroll}-short"] = {**wide, "h": 40, "i": 64, "on_input": True}
    for dtype in ("bfloat16", "float16"):
        tiles = {"BT": 2, "QUADS": 1, "SPLIT_K": 2}
        out[f"blocks-{dtype}"] = {"regime": "scan", "tiles": tiles, "dtype": dtype, "e": 2, "h": 256, "i": 192}
    for tokens in (1, 2, 4):
        tiles = {"BT": tokens, "QUADS": 1, "TAIL": 0}
        out[f"blocks{tokens}-sorted"] = {"regime": "sorted", "tiles": tiles, "e": 3, "t": 9, "h": 200, "i": 128}
    # Weights straight to registers, ahead of their use: K of fewer steps than that, of some more, not whole steps.
    for tokens, ahead in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4)):
        tiles = {"BT": tokens, "QUADS": 1, "UNROLL": 1, "AHEAD": ahead}
        wide = {"regime": "scan", "tiles": tiles, "e": 2, "bias": True}
        out[f"ahead{tokens}-{ahead}"] = {**wide, "t": 9, "kind": "one", "h": 320, "i": 40}
        out[f"ahead{tokens}-{ahead}-pairs"] = {**wide, "e": 40, "t": 3, "kind": "sentinel", "h": 40, "i": 200}
        wide = {"regime": "sorted", "tiles": {**tiles, "TAIL": 0}, "e": 2}
        out[f"ahead{tokens}-{ahead}-sorted"] = {**wide, "h": 200, "i": 64, "bias": True}
    out["ahead-bfloat16"] = {"regime": "scan", "tiles": {"BT": 8, "QUADS": 1, "AHEAD": 2}, "dtype": "bfloat16"}
    # K of a down-projection split over programs: more parts than steps, odd ones, with and without a tail.
    for split, unroll, i in itertools.product((2, 5), (1, 2), (200, 448)):
        tiles = {"BT": 16, "UNROLL": unroll, "SPLIT_K": split, "TAIL": 8, "MERGE": unroll - 1}
        wide = {"regime": "sorted", "tiles": tiles, "e": 3, "t": 17, "i": i, "bias": True, "kind": "sentinel"}
        out[f"split{split}-{unroll}-{i}"] = wide
    # The last tile in quarters: each of them, exactly full and one row more, also beside rows that join a tile.
    for t in (1, 8, 9, 16, 17, 24, 25, 32, 33, 41, 57, 64, 66):
        tiles = {"BT": 32, "TAIL": 4 * (t % 2), "MERGE": t % 2, "FINE": 1, "UNROLL": 1 + t // 3 % 2}
        wide = {"regime": "sorted", "tiles": tiles, "t": t, "bias": True, "h": 200 if t % 5 else 128}
        out[f"fine{t}"] = {**wide, "e": 3}
        out[f"fine{t}-one"] = {**wide, "kind": "one", "on_input": True}
    # Rows left over join the tile before: none, some, as many as TAIL, one more.
    for t in (3, 8, 12, 16, 17, 30, 41):
        tiles = {"BT": 8, "TAIL": 4, "MERGE": 1, "UNROLL": 1 + t % 2}
        wide = {"regime": "sorted", "tiles": tiles, "t": t, "bias": True, "h": 200 if t % 3 else 128}
        out[f"merge{t}"] = {**wide, "e": 3}
        out[f"merge{t}-one"] = {**wide, "kind": "one", "on_input": True}
    # Weights laid out for e4m3: multiplied as such, and by the kernels of few tokens.
    laid = {"bits": "sm89_fp8", "bias": True, "e": 3}
    for regime in REGIMES:
        out[f"fp8-layout-{regime}"] = {**laid, "regime": regime, "h": 200, "spread": True}
    for act, t in (("silu", 9), ("gpt_oss", 1), ("plain_relu2", 40)):
        wide = {**laid, "regime": "sorted", "fp8": True, "act": act, "t": t}
        out[f"fp8-{act}"] = {**wide, "h": 128, "i": 64}
        out[f"fp8-{act}-ragged"] = {**wide, "h": 200, "i": 72, "spread": True}
        out[f"fp8-{act}-odd"] = {**wide, "h": 10, "i": 6, "kind": "sentinel", "on_input": True}
        out[f"fp8-{act}-strided"] = {**wide, "strided": True, "dtype": "bfloat16", "layout": "interleaved", "half": 1}
        tiles = {"BT": 32, "TAIL": 8 * (t % 2), "MERGE": t % 2, "FINE": 1, "UNROLL": 1 + t % 2}
        out[f"fp8-{act}-fine"] = {**wide, "tiles": tiles, "h": 320, "dtype": "float16"}
    out["twiddled-vector"] = {"bits": "sm80", "regime": "vector", "h": 128}
    for t in (0, 1, 2, 5, 33):
        out[f"t{t}"] = {"t": t, "top_k": 4, "e": 16, "h": 64, "i": 32}
    for options in out.values():
        if options.get("regime") == "vector":  # a program for each pair: more of them are more of the same
            options["t"] = min(options.get("t", 5), 2)
    return out


def tolerance(options):
    if options.get("fp8"):
        # Sums in another order may fall on the other side of an e4m3 value, an eighth away at most, here and there.
        return 3e-2 if options.get("dtype") == "bfloat16" else 4e-3
    return {"bfloat16": 1e-2, "float16": 2e-3}.get(options.get("dtype", ""), 1e-5)


LINEAR = {
    "linear": (20, 4, 40, 72, [3, 3, 19, 20]),
    "linear_tail": (9, 3, 24, 64, [0, 4, 6]),
    "linear_none": (4, 2, 16, 10, [0, 0]),
    "linear_empty": (0, 2, 16, 64, [0, 0]),
}


# One case of each kind in the quick tier.
QUICK = {
    "plain_relu2-sorted", "interleaved1-scan", "on_input-vector", "odd-scan", "sentinel-sorted", "bf16-sorted",
    "blocks2-3-2-short", "ahead2-1-pairs", "merge12", "fp8-silu", "twiddled-vector", "t0",
}  # fmt: skip


def parameters(names: Iterable[str]) -> list[object]:
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in names]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, object]:
    """What this file prints when it runs, in one process, all the cases that this session asks for."""
    mine = [i for i in request.session.items if i.path == request.path and "results" in i.fixturenames]
    names = [i.callspec.params["name"] if hasattr(i, "callspec") else "optimize" for i in mine]
    return json.loads(interpret(__file__, *names).splitlines()[-1])


def test_the_quick_tier_has_cases_of_these_names() -> None:
    assert set(cases()) >= QUICK


@pytest.mark.parametrize("name", parameters(cases()))
def test_moe(results, name):
    assert isinstance(results[name], float), results[name]
    assert results[name] <= tolerance(cases()[name])


@pytest.mark.parametrize("name", LINEAR)
def test_grouped_linear(results, name):
    assert isinstance(results[name], float), results[name]
    assert results[name] <= 1e-5


@pytest.mark.slow
def test_optimize_with_fp8(results):
    """Quantized activations change the logits, but not by much."""
    assert isinstance(results["optimize"], float), results["optimize"]
    assert 1e-3 < results["optimize"] < 0.1


def main() -> None:
    import traceback

    torch.set_num_threads(1)
    only = sys.argv[1:]
    out: dict[str, object] = {}
    todo = [(n, lambda o=o: case(**o)) for n, o in cases().items()]
    todo += [(n, lambda a=a: linear_case(*a)) for n, a in LINEAR.items()]
    todo.append(("optimize", optimize_case))
    for name, run in todo:
        if only and name not in only:
            continue
        try:
            out[name] = run()
        except Exception:
            out[name] = traceback.format_exc()[-1500:]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
