"""The native backward in Triton's interpreter, on the CPU, against the reference in fp64.

The interpreter is chosen when triton is first imported, so everything runs in one subprocess: this file is also the
program that it runs. What nobody wrote is NaN there.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from interpreter import interpret
from model_activations import OF_ALL_KINDS
from random_weights import random_weight

from mxfp4_compile.ops.arguments import MoEInputs, Slot
from mxfp4_compile.spec import Activation, MoEParams

# One process runs all cases, so one worker has all tests.
pytestmark = pytest.mark.xdist_group("triton interpreter backward")
# Limits that half of random values meet.
ACTIVATIONS = {**OF_ALL_KINDS, "clamped_silu": Activation("silu", gate_limit=0.5, up_limit=0.5)}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-9))


def case(**overrides) -> float:
    """The larger relative error of the two gradients; infinite where a zero is not one."""
    from mxfp4_compile.ops.backends.triton import BACKEND
    from mxfp4_compile.ops.backends.triton.backward import moe_backward
    from mxfp4_compile.ops.backends.triton.select import BackwardChoice, Tiles
    from mxfp4_compile.ops.registry import get_backend

    o = {
        "e": 4, "top_k": 2, "h": 64, "i": 48, "t": 5, "act": "silu", "layout": "halves", "half": 0, "bias": False,
        "on_input": False, "ids": "uniform", "bits": "nibbles", "strided": False, "first": None, "tiles": (64, 16, 32),
    }  # fmt: skip
    o.update(overrides)
    act = ACTIVATIONS[o["act"]]
    g = torch.Generator().manual_seed(11)
    layout, half = (o["layout"], o["half"]) if act.gated else ("none", 0)
    params = MoEParams(o["e"], o["h"], o["i"], act, layout, half, o["on_input"], torch.float32, torch.float32)
    exact = replace(params, round_dtype=torch.float64, accum_dtype=torch.float64)
    canonical, prepared, biases, prepared_biases = [], [], [None, None], [None, None]
    for at, role in enumerate(("up", "down")):
        e, n, k = params.shape(role)
        slot = Slot(role, params, o["bits"])
        canonical.append(random_weight(e, n, k, g))
        prepared.append(BACKEND.prepare(*canonical[-1], slot, k=k))
        if o["bias"]:
            biases[at] = torch.randn((e, n), generator=g)
            prepared_biases[at] = BACKEND.prepare_bias(biases[at], slot)
    x, grad = (torch.randn((o["t"], o["h"]), generator=g) for _ in range(2))
    ids = torch.rand((o["t"], o["e"]), generator=g).topk(o["top_k"], -1).indices
    weights = torch.rand(ids.shape, generator=g) + 0.1
    if o["ids"] == "even":
        ids = ids // 2 * 2
    elif o["ids"] == "one":
        ids = torch.full_like(ids, o["e"] - 1)
    elif o["ids"] == "none":
        ids = torch.full_like(ids, o["e"])
    elif o["ids"] == "some":
        ids[::2, 0] = o["e"] + 3
    known = ids < o["e"]
    weights[~known] = math.nan
    if o["strided"]:
        x, grad, ids, weights = (torch.stack((t, t + 1), -1)[..., 0] for t in (x, grad, ids, weights))
    choice = None
    if o["first"] is not None:
        bm, bt, bn = o["tiles"]
        sizes = {"FIRST": o["first"], "BM": bm, "BT": bt, "BN": bn, "WAIT": 0, "GROUP": 2}
        choice = BackwardChoice(*(Tiles(4, 1, tuple(sizes.items())),) * 2)
    dx, dw = moe_backward(grad, MoEInputs(x, ids, weights, *prepared, *prepared_biases, params, o["bits"]), choice)
    assert dx.shape == x.shape and dw.shape == weights.shape
    assert not dw[~known].any()
    zeroed = torch.where(known, weights, 0.0)
    inputs = MoEInputs(x.double(), ids, zeroed.double(), *canonical, *biases, exact, "canonical")
    want = get_backend("reference").moe_backward(grad.double(), inputs)
    return max(relative(a, b) for a, b in zip((dx, dw), want, strict=True))


def adapted_case(**overrides) -> float:
    """The largest relative error of a layer with adapters: output and all gradients, against the default steps."""
    from mxfp4_compile.ops.adapted import Adapted
    from mxfp4_compile.ops.backends.triton import BACKEND
    from mxfp4_compile.ops.low_rank import Term
    from mxfp4_compile.ops.registry import get_backend

    o = {
        "e": 4,
        "h": 64,
        "i": 48,
        "t": 7,
        "act": "silu",
        "layout": "halves",
        "half": 0,
        "bias": True,
        "on_input": False,
    }
    o.update(overrides)
    act, g = ACTIVATIONS[o["act"]], torch.Generator().manual_seed(5)
    layout, half = (o["layout"], o["half"]) if act.gated else ("none", 0)
    params = MoEParams(o["e"], o["h"], o["i"], act, layout, half, o["on_input"], torch.float32, torch.float32)
    exact = replace(params, round_dtype=torch.float64, accum_dtype=torch.float64)
    canonical, prepared, biases, prepared_biases, terms = [], [], [None, None], [None, None], []
    for at, role in enumerate(("up", "down")):
        e, n, k = params.shape(role)
        slot = Slot(role, params, "nibbles")
        canonical.append(random_weight(e, n, k, g))
        prepared.append(BACKEND.prepare(*canonical[-1], slot, k=k))
        if o["bias"]:
            biases[at] = torch.randn((e, n), generator=g)
            prepared_biases[at] = BACKEND.prepare_bias(biases[at], slot)
        whole = Term(torch.randn((e, 3, k), generator=g) / 8, torch.randn((e, n, 3), generator=g), 0.5)
        half = Term(torch.randn((e, 2, k), generator=g) / 8, torch.randn((e, n // 2, 2), generator=g), 2.0, n - n // 2)
        terms.append([whole, half] if role == "up" else [whole])
    x, grad = (torch.randn((o["t"], o["h"]), generator=g) for _ in range(2))
    ids = torch.rand((o["t"], o["e"]), generator=g).topk(2, -1).indices // 2 * 2
    ids[::3, 0] = o["e"] + 1
    weights = torch.rand(ids.shape, generator=g) + 0.1
    weights[ids >= o["e"]] = math.nan
    ours = Adapted(BACKEND, MoEInputs(x, ids, weights, *prepared, *prepared_biases, params, "nibbles"), *terms)
    double = [[Term(t.a.double(), t.b.double(), t.scaling, t.start) for t in of] for of in terms]
    biases = [b if b is None else b.double() for b in biases]
    inputs = MoEInputs(x.double(), ids, weights.double(), *canonical, *biases, exact, "canonical")
    theirs = Adapted(get_backend("reference"), inputs, *double)
    parts = lambda layer, g: (layer.forward(), *(b := layer.backward(g))[:2], *(t for pair in b[2] for t in pair))
    return max(relative(a, b) for a, b in zip(parts(ours, grad), parts(theirs, grad.double()), strict=True))


def linear_case(rows: int, n: int, k: int, ends: list[int]) -> float:
    from mxfp4_compile.ops.backends.triton import BACKEND
    from mxfp4_compile.ops.registry import get_backend

    g = torch.Generator().manual_seed(1)
    w = random_weight(len(ends), n, k, g)
    prepared = BACKEND.prepare(*w, Slot(None, None, "nibbles"), k=k)
    offsets, grad = torch.tensor(ends, dtype=torch.int32), torch.randn((rows, n), generator=g)
    got = BACKEND.grouped_linear_backward(grad, offsets, prepared, k, torch.float32, "nibbles")
    want = get_backend("reference").grouped_linear_backward(grad.double(), offsets, w, k, torch.float64, "canonical")
    assert not got[ends[-1] :].any()
    return relative(got, want)


QUICK = {
    "gpt-oss, interleaved, biases": {"act": "gpt_oss", "layout": "interleaved", "half": 1, "bias": True},
    "on input, some ids of no expert": {"on_input": True, "ids": "some", "bias": True},
    "ragged sizes, strided": {"h": 72, "i": 40, "e": 3, "t": 4, "strided": True, "first": 1},
}
SLOW = {
    "silu": {},
    **{f"{act}, {half}": {"act": act, "half": half, "bias": True} for act in ACTIVATIONS for half in (0, 1)},
    **{f"first {o}, {b}": {"first": o, "bits": b} for o in (0, 1) for b in ("nibbles", "sm89_fp8")},
    **{
        f"first {o}, tiles {t}, ragged": {"first": o, "tiles": t, "h": 200, "i": 72, "t": 40, "act": "gpt_oss"}
        for o in (0, 1)
        for t in ((128, 16, 64), (256, 32, 16), (64, 32, 128))
    },
    **{f"ids {kind}": {"ids": kind, "first": 1} for kind in ("even", "one", "none", "some")},
    "plain, on input": {"act": "plain_gelu", "on_input": True, "bias": True, "first": 1},
    "no whole group of 8": {"h": 33, "i": 21, "first": 1, "bias": True},
    "no tokens": {"t": 0},
    "many rows": {"t": 40, "e": 2},
    "interleaved": {"layout": "interleaved", "first": 1},
}


def run(kind: str) -> None:
    # What is allocated and not written is NaN.
    torch.use_deterministic_algorithms(True)
    errors = {name: case(**o) for name, o in (QUICK if kind == "quick" else SLOW).items()}
    if kind == "quick":
        errors["linear"] = linear_case(9, 40, 72, [3, 3, 7])
        errors["adapters"] = adapted_case(act="gpt_oss", layout="interleaved", half=1, i=20, e=3, t=4)
    else:
        errors["adapters, plain"] = adapted_case(act="plain_gelu", bias=False)
        errors["adapters, on input"] = adapted_case(on_input=True)
        errors["adapters, halves, ragged"] = adapted_case(h=72, i=44, half=1)
    print(json.dumps(errors))


def check(kind: str) -> None:
    errors = json.loads(interpret(__file__, kind))
    assert len(errors) >= len(QUICK)
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def test_gradients() -> None:
    check("quick")


@pytest.mark.slow
def test_gradients_of_all_kinds() -> None:
    check("slow")


if __name__ == "__main__":
    run(sys.argv[1])
