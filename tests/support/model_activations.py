"""Activations that several tests compute with: of models, and one of each kind."""

from __future__ import annotations

from mxfp4_compile.spec import Activation

SILU = Activation("silu")
# gpt-oss: a gate with a factor, clamped, and one added to the other half.
GPT_OSS = Activation("silu", alpha=1.702, beta=1.0, gate_limit=7.0, up_limit=7.0)

OF_ALL_KINDS = {
    "silu": SILU,
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu": Activation("relu"),
    "relu2": Activation("relu2"),
    "gpt_oss": GPT_OSS,
    "clamped_silu": Activation("silu", gate_limit=1.0, up_limit=0.5),
    "plain_relu2": Activation("relu2", gated=False),
    "plain_gelu": Activation("gelu", gated=False, gate_limit=0.75),
}
