"""Every row of the table of activations: its derivative against autograd, and that kernels can spell it."""

from __future__ import annotations

import pytest
import torch

from mxfp4_compile.activations import FUNCTIONS, function
from mxfp4_compile.spec import ACTIVATION_KINDS, Activation

ALPHAS = {"silu": (1.0, 1.702)}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_derivative(kind: str) -> None:
    g = torch.randn(257, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).mul(4).requires_grad_()
    for alpha in ALPHAS.get(kind, (1.0,)):
        value = function(kind).value(g, alpha)
        (wanted,) = torch.autograd.grad(value.sum(), g)
        again, derivative = function(kind).derivative(g.detach(), alpha)
        torch.testing.assert_close(again, value.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(derivative, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_row_can_be_compiled(kind: str) -> None:
    """humming's C++ takes its argument, and triton_kernels has an epilogue with and without a second half."""
    pytest.importorskip("triton")
    from mxfp4_compile.ops.backends.triton_kernels.epilogue import EPILOGUES

    text = function(kind).cpp.format(a="gate", alpha="1.5")
    assert "gate" in text and text.count("(") == text.count(")") and ("1.5f" in text) == (kind == "silu")
    assert (kind, True) in EPILOGUES and (kind, False) in EPILOGUES


def test_kinds_are_the_rows() -> None:
    assert ACTIVATION_KINDS == tuple(FUNCTIONS) == ("silu", "gelu", "gelu_tanh", "relu", "relu2")
    with pytest.raises(ValueError, match="unknown activation kind 'swish'; known: silu, gelu"):
        Activation("swish")(torch.zeros(1))
