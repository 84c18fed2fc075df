"""The scalars of ``mxfp4::moe``: one list, whose order programs that were exported rely on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mxfp4_compile import spec
from mxfp4_compile.ops import schema
from mxfp4_compile.spec import Activation, MoEParams, moe_params, moe_scalars

BF16 = torch.bfloat16
GPT_OSS = MoEParams(32, 2880, 2816, Activation("silu", True, 1.702, 1.0, 7.0, 7.0), "interleaved", 1, False, BF16, BF16)
PLAIN = MoEParams(8, 64, 32, Activation("relu2", False), "none", 0, True, torch.float16, torch.float32)
GPT_OSS_SCALARS = ("silu", True, 1.702, 1.0, 7.0, 7.0, "interleaved", 1, False, 32, 2880, 2816, BF16, BF16)
PLAIN_SCALARS = ("relu2", False, 1.0, 0.0, None, None, "none", 0, True, 8, 64, 32, torch.float16, torch.float32)


@pytest.mark.parametrize(("params", "scalars"), [(GPT_OSS, GPT_OSS_SCALARS), (PLAIN, PLAIN_SCALARS)])
def test_there_and_back(params: MoEParams, scalars: tuple[object, ...]) -> None:
    assert moe_scalars(params) == scalars
    assert moe_params(*scalars) == params


def test_too_many_or_too_few() -> None:
    for wrong in (PLAIN_SCALARS[:-1], (*PLAIN_SCALARS, 1)):
        with pytest.raises(ValueError, match="zip"):
            moe_params(*wrong)


def test_the_signature_of_the_op_stays() -> None:
    """Exported programs name their arguments by place."""
    assert str(schema.moe._schema) == (
        "mxfp4::moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] up, Tensor[] down, Tensor? up_bias, "
        "Tensor? down_bias, str activation, bool gated, float alpha, float beta, float? gate_limit, float? up_limit, "
        "str gate_layout, int activated_half, bool weight_on_input, int num_experts, int hidden, int intermediate, "
        "ScalarType round_dtype, ScalarType accum_dtype, str backend, str layout) -> Tensor"
    )


def test_every_field_is_a_scalar() -> None:
    assert {f.name for f in dataclasses.fields(Activation)} == set(spec._ACTIVATION_SCALARS)
    assert {f.name for f in dataclasses.fields(MoEParams)} - {"activation"} == set(spec._MOE_SCALARS)
