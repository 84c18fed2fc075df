"""The layer with low-rank terms, against autograd through dense sums; other layouts; the ops' contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_activations import GPT_OSS
from torch import Tensor

from mxfp4_compile import mx
from mxfp4_compile.ops import adapted, schema
from mxfp4_compile.ops.arguments import Slot
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.spec import MoEParams, moe_scalars

E, H, INNER, R, T, K = 4, 64, 32, 3, 9, 2


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


class Layer:
    """With biases, interleaved rows, an expert without tokens, and ids that are no expert."""

    def __init__(self, name: str, layout: str, wide: torch.dtype, weight_on_input: bool = False) -> None:
        self.params = params = MoEParams(E, H, INNER, GPT_OSS, "interleaved", 0, weight_on_input, wide, wide)
        backend, generator = get_backend(name), torch.Generator().manual_seed(3)
        self.new = new = lambda *shape: torch.randn(*shape, generator=generator, dtype=wide)
        self.given: dict[str, Any] = {}
        self.dense, self.biases = {}, {}
        for role in ("up", "down"):
            _, n, k = params.shape(role)
            packed, scales = mx.quantize(new(E, n, k).float() / 8, "floor")
            slot = Slot(role, params, layout)
            self.given[role] = backend.prepare(packed, scales, slot, k=k)
            self.dense[role], self.biases[role] = mx.dequantize(packed, scales, k, wide), new(E, n)
            self.given[f"{role}_bias"] = backend.prepare_bias(self.biases[role], slot)
        self.ids = torch.randint(0, E - 1, (T, K), generator=generator)
        self.ids[0, 1], self.ids[4, 0] = E, E + 2
        sizes = [(T, H), (T, K), (E, R, H), (E, 2 * INNER, R), (E, R, INNER), (E, H, R)]
        self.leaves = [new(*size).requires_grad_() for size in sizes]
        self.rest = (*moe_scalars(params), name, layout)

    def arguments(self) -> tuple[Any, ...]:
        x, w, a1, b1, a2, b2 = self.leaves
        weights = [self.given[name] for name in ("up", "down", "up_bias", "down_bias")]
        return (x, self.ids, w, *weights, [a1, a2], [b1, b2], [0.5, 2.0], [0, 0], 1, *self.rest)

    def expected(self) -> Tensor:
        """One token and expert at a time, dense sums."""
        x, w, a1, b1, a2, b2 = self.leaves
        out = torch.zeros_like(x)
        up, down = self.dense["up"] + 0.5 * b1 @ a1, self.dense["down"] + 2.0 * b2 @ a2
        for t in range(T):
            for j in range(K):
                e = int(self.ids[t, j])
                if e < E:
                    on_input = self.params.weight_on_input
                    seen = x[t] * w[t, j] if on_input else x[t]
                    h = self.params.activate(up[e] @ seen + self.biases["up"][e])
                    y = down[e] @ h + self.biases["down"][e]
                    out = out.index_add(0, torch.tensor([t]), (y if on_input else y * w[t, j]).unsqueeze(0))
        return out


@pytest.mark.parametrize(("name", "layout"), [("reference", "canonical"), ("triton", "nibbles")])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_terms_are_a_dense_sum(name: str, layout: str, weight_on_input: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of few tokens; canonical weights, and a layout whose weights are recovered."""
    monkeypatch.setattr(adapted, "MAX_ROWS_BYTES", 4 * K * (3 * H + 6 * INNER) * 8)
    layer = Layer(name, layout, torch.float64, weight_on_input)
    backend = get_backend(name)
    monkeypatch.setattr(backend, "parts", lambda inputs: adapted.Parts(backend, inputs))  # its own need a GPU
    ours, expected = schema.adapted_moe(*layer.arguments()), layer.expected()
    assert relative(ours, expected) <= 1e-12
    grad = layer.new(T, H)
    mine, theirs = (torch.autograd.grad(out, layer.leaves, grad) for out in (ours, expected))
    assert max(relative(a, b) for a, b in zip(mine, theirs, strict=True)) <= 1e-12


def grouped_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, the last of which no expert has, ends, a and b."""
    x, ends = torch.randn(7, 6, dtype=torch.float64), torch.tensor([2, 2, 6], dtype=torch.int32)
    a, b = (torch.randn(size, dtype=torch.float64) for size in ((3, 2, 6), (3, 5, 2)))
    return x.requires_grad_(), ends, a.requires_grad_(), b.requires_grad_()


def test_low_rank_products() -> None:
    x, ends, a, b = grouped_rows()
    assert torch.autograd.gradcheck(lambda x, a, b: schema.add_low_rank(x, ends, a, b, 2.0), (x, a, b))
    assert not schema.add_low_rank(x, ends, a, b, 2.0)[6:].any()


@pytest.mark.slow
def test_opcheck() -> None:
    arguments = Layer("reference", "canonical", torch.float64).arguments()
    torch.library.opcheck(schema.adapted_moe, arguments)
    with torch.no_grad():
        torch.library.opcheck(schema.adapted_moe_backward, (torch.randn(T, H, dtype=torch.float64), *arguments))
    torch.library.opcheck(schema.add_low_rank, (*grouped_rows(), 2.0))
