"""The layer in its parts with low-rank terms, against autograd through dense sums; canonical and other layouts."""

from __future__ import annotations

import pytest
import torch
from model_activations import GPT_OSS
from torch import Tensor

from mxfp4_compile import mx
from mxfp4_compile.adapters.products import Term, moe
from mxfp4_compile.ops.arguments import Slot
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.spec import MoEParams, moe_scalars

E, H, INNER, R, T, K = 4, 64, 32, 3, 9, 2


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_terms_are_a_dense_sum(name: str, weight_on_input: bool) -> None:
    """With biases, interleaved rows, an expert without tokens, and ids that are no expert."""
    wide = torch.float64 if name == "reference" else torch.float32
    layout = "canonical" if name == "reference" else "nibbles"
    params = MoEParams(E, H, INNER, GPT_OSS, "interleaved", 0, weight_on_input, wide, wide)
    backend, generator = get_backend(name), torch.Generator().manual_seed(3)
    new = lambda *shape: torch.randn(*shape, generator=generator, dtype=wide)
    given, dense, biases = {}, {}, {}
    for role in ("up", "down"):
        _, n, k = params.shape(role)
        packed, scales = mx.quantize(new(E, n, k).float() / 8, "floor")
        slot = Slot(role, params, layout)
        given[role] = backend.prepare(packed, scales, slot, k=k)
        dense[role], biases[role] = mx.dequantize(packed, scales, k, wide), new(E, n)
        given[f"{role}_bias"] = backend.prepare_bias(biases[role], slot)
    ids = torch.randint(0, E - 1, (T, K), generator=generator)
    ids[0, 1], ids[4, 0] = E, E + 2
    leaves = [new(T, H), new(T, K), new(E, R, H), new(E, 2 * INNER, R), new(E, R, INNER), new(E, H, R)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, w, a1, b1, a2, b2 = leaves
    scalars = moe_scalars(params)
    arguments = (x, ids, w, given["up"], given["down"], given["up_bias"], given["down_bias"], *scalars, name, layout)
    ours = moe(arguments, {"up": [Term(a1, b1, 0.5)], "down": [Term(a2, b2, 2.0)]})
    expected = torch.zeros(T, H, dtype=wide)
    up, down = dense["up"] + 0.5 * b1 @ a1, dense["down"] + 2.0 * b2 @ a2
    for t in range(T):
        for j in range(K):
            e = int(ids[t, j])
            if e < E:
                seen = x[t] * w[t, j] if weight_on_input else x[t]
                h = params.activate(up[e] @ seen + biases["up"][e])
                out = down[e] @ h + biases["down"][e]
                expected = expected.index_add(
                    0, torch.tensor([t]), (out if weight_on_input else out * w[t, j]).unsqueeze(0)
                )
    tolerance = 1e-12 if wide == torch.float64 else 2e-5
    assert relative(ours, expected) <= tolerance
    grad = new(T, H)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert relative(mine, theirs) <= tolerance
