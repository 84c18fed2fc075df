"""Activations of models that several tests compute with."""

from __future__ import annotations

from mxfp4_compile.spec import Activation

SILU = Activation("silu")
# gpt-oss: a gate with a factor, clamped, and one added to the other half.
GPT_OSS = Activation("silu", alpha=1.702, beta=1.0, gate_limit=7.0, up_limit=7.0)
