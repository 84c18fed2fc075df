"""Every call of another library, bound to its real signature and checked for what it is given.

Signatures come from wheels (signatures/extract.py): most of these libraries do not import without a GPU.
The stand-ins below take exactly those parameters, check what they get and compute the layer in plain torch
from the weights as *recovered*, so that routing, padding, sentinels, constants and biases are run too.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from typing import Any

import pytest
import torch
from model_activations import GPT_OSS, SILU
from signatures.extract import RESULT
from test_ops import make_inputs, oracle, relative

from mxfp4_compile.ops import schema
from mxfp4_compile.ops.arguments import MoEInputs, Slot
from mxfp4_compile.ops.backends import flashinfer, humming, marlin
from mxfp4_compile.ops.backends.triton_kernels import api as tk
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.spec import Activation, MoEParams

SIGNATURES = json.loads(RESULT.read_text())["signatures"]
BF16 = torch.bfloat16


def signature(wheel: str, name: str) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(p, getattr(inspect.Parameter, kind), default=None if default else inspect.Parameter.empty)
            for p, kind, default in sorted(
                SIGNATURES[wheel][name], key=lambda x: (getattr(inspect.Parameter, x[1]), x[2])
            )
        ]
    )


class Recorder:
    """A function with a library's signature: binds every call, then computes."""

    def __init__(self, wheel: str, name: str, compute: Any) -> None:
        self.signature, self.compute, self.calls = signature(wheel, name), compute, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        self.calls.append(dict(bound.arguments))
        return self.compute(**bound.arguments)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> types.ModuleType:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            made = types.ModuleType(path)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
    found = sys.modules[name]
    for key, value in members.items():
        monkeypatch.setattr(found, key, value, raising=False)
    return found


def params(activation: Activation, *, h: int = 200, i: int = 72, half: int = 0, layout: str = "halves") -> MoEParams:
    gated = activation.gated
    return MoEParams(5, h, i, activation, layout if gated else "none", half if gated else 0, False, BF16, BF16)


def layer_of(backend: Any, p: MoEParams, layout: str):
    """The layer in plain torch, from what the library was handed: recovered weights and biases."""

    def compute(x, ids, weights, up, down, up_bias, down_bias):
        dense = []
        for role, tensors in (("up", up), ("down", down)):
            _, n, k = p.shape(role)
            packed, scales = backend.recover(tensors, Slot(role, p, layout), n=n, k=k)
            dense.append((packed, scales))
        biases = [
            None if b is None else backend.recover_bias(b, Slot(r, p, layout), n=p.shape(r)[1]).to(BF16)
            for r, b in (("up", up_bias), ("down", down_bias))
        ]
        assert int(ids.max()) < p.num_experts and int(ids.min()) >= 0
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        assert not x[:, p.hidden :].any()
        out = get_backend("reference").moe(MoEInputs(x[:, : p.hidden], ids, weights, *dense, *biases, p, "canonical"))
        return torch.nn.functional.pad(out, (0, x.shape[1] - p.hidden))

    return compute


def run(name: str, layout: str, p: MoEParams, bias: bool, tokens: int = 9) -> None:
    """One call with sentinels through the op, against the definition in fp64."""
    x, ids, weights, packed, biases, dense = make_inputs(p, tokens, 2, bias=bias)
    backend = get_backend(name)
    prepared, ready = [], []
    for role, (w, s), b in zip(("up", "down"), packed, biases, strict=True):
        slot = Slot(role, p, layout)
        prepared.append(backend.prepare(w, s, slot, k=p.shape(role)[2]))
        ready.append(None if b is None else backend.prepare_bias(b, slot))
    ids[0, 1], ids[3, 0] = p.num_experts, p.num_experts + 9
    weights[0, 1] = float("nan")
    with torch.no_grad():
        out = schema.moe(x, ids, weights, *prepared, *ready, *schema.moe_scalars(p), name, layout)
    want = oracle(p, x, ids, weights, dense, biases)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert relative(out, want) < 1e-2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [SILU, GPT_OSS], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "mxfp8"])
def test_flashinfer_trtllm(monkeypatch: pytest.MonkeyPatch, activation: Activation, bias: bool, dtype: str) -> None:
    p, layout = params(activation, half=1), f"{dtype}-384"
    compute = layer_of(flashinfer.TRTLLM, p, layout)

    def layer(topk_ids, hidden_states, gemm1_weights, gemm1_weights_scale, gemm1_bias, gemm2_weights, **rest):
        assert isinstance(topk_ids, tuple) and rest["routing_bias"] is None
        assert rest["tune_max_num_tokens"] == 384 and rest["intermediate_size"] == 256
        assert (rest["num_experts"], rest["local_num_experts"], rest["local_expert_offset"]) == (5, 5, 0)
        assert gemm1_weights_scale.dtype == rest["gemm2_weights_scale"].dtype == torch.float8_e4m3fn
        constants = [rest["gemm1_alpha"], rest["gemm1_beta"], rest["gemm1_clamp_limit"]]
        if activation == SILU:
            assert constants == [None] * 3
        else:  # per expert
            assert [c.tolist() for c in constants] == [[torch.tensor(v).item()] * 5 for v in (1.702, 1.0, 7.0)]
        if dtype == "mxfp8":
            assert rest["hidden_states_scale"].shape == (9, 256 // 32)
            hidden_states = hidden_states.to(BF16)
        else:
            assert rest["hidden_states_scale"] is None
        assert gemm1_bias is None or gemm1_bias.dtype == torch.float32
        up, down = [gemm1_weights, gemm1_weights_scale], [gemm2_weights, rest["gemm2_weights_scale"]]
        up, down = ([w, s.view(torch.uint8)] for w, s in (up, down))
        return [compute(hidden_states, *topk_ids, up, down, gemm1_bias, rest["gemm2_bias"])]

    quantize = Recorder(
        "flashinfer_python-0.7.2",
        "mxfp8_quantize",
        # The stand-in leaves the values; only the hand-over is looked at.
        lambda input, *_, **__: (input, torch.zeros(input.shape[0] * input.shape[1] // 32, dtype=torch.uint8)),
    )
    recorder = Recorder("flashinfer_python-0.7.2", "trtllm_fp4_block_scale_routed_moe", layer)
    module(monkeypatch, "flashinfer", mxfp8_quantize=quantize)
    module(monkeypatch, "flashinfer.fused_moe", trtllm_fp4_block_scale_routed_moe=recorder)
    run("flashinfer_trtllm", layout, p, bias)
    assert len(recorder.calls) == 1


def test_tile_of_tokens_is_handed_to_builds_that_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def older(topk_ids, hidden_states, tile_tokens_dim, **rest):
        seen.append(tile_tokens_dim)
        return [torch.zeros_like(hidden_states)]

    module(monkeypatch, "flashinfer.fused_moe", trtllm_fp4_block_scale_routed_moe=older)
    p = params(SILU)
    for tokens in (9, 40):
        x, ids, weights, packed, _, _ = make_inputs(p, tokens, 2, bias=False)
        prepared = [
            flashinfer.TRTLLM.prepare(*w, Slot(r, p, "bf16-64"), k=p.shape(r)[2])
            for r, w in zip(("up", "down"), packed, strict=True)
        ]
        flashinfer.TRTLLM.moe(MoEInputs(x, ids, weights, *prepared, None, None, p, "bf16-64"))
    # 9 tokens of 2 among 5 experts: 4.7 with the imbalance; 40: 20.8.
    assert seen == [8, 32]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [SILU, GPT_OSS], ids=str)
def test_flashinfer_cutlass(monkeypatch: pytest.MonkeyPatch, activation: Activation, bias: bool) -> None:
    p, layout = params(activation, layout="interleaved"), "sm90-64"
    compute = layer_of(flashinfer.CUTLASS, p, layout)

    def layer(input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights, **rest):
        assert rest["use_w4_group_scaling"] and rest["use_fused_finalize"] is False
        assert rest["tune_max_num_tokens"] == 64 and rest["output_dtype"] == BF16
        limit = rest["swiglu_limit"]
        assert (limit is None) == (activation == SILU) and (limit is None or limit.shape == (5,))
        assert rest["fc1_expert_biases"] is None or rest["fc1_expert_biases"].dtype == BF16
        up, down = zip((fc1_expert_weights, fc2_expert_weights), rest["quant_scales"], strict=True)
        return compute(
            input, token_selected_experts, token_final_scales, up, down, rest["fc1_expert_biases"],
            rest["fc2_expert_biases"],
        )  # fmt: skip

    recorder = Recorder("flashinfer_python-0.7.2", "cutlass_fused_moe", layer)
    module(monkeypatch, "flashinfer.fused_moe", cutlass_fused_moe=recorder)
    run("flashinfer_cutlass", layout, p, bias)
    assert len(recorder.calls) == 1


@pytest.mark.parametrize("wheel", ["vllm-0.18.0", "vllm-0.33.0"])
@pytest.mark.parametrize(
    "activation", [SILU, GPT_OSS, Activation("gelu_tanh"), Activation("relu2", gated=False)], ids=str
)
def test_marlin(monkeypatch: pytest.MonkeyPatch, wheel: str, activation: Activation) -> None:
    p = params(activation, half=1 if activation.gated else 0)
    backend = get_backend("marlin")
    compute = layer_of(backend, p, "marlin")

    def layer(hidden_states, w1, w2, bias1, bias2, w1_scale, w2_scale, topk_weights, topk_ids, quant_type_id, **rest):
        # What the library asserts.
        assert w1.shape[1] * 16 == hidden_states.shape[1] == w2.shape[2] // 2
        assert hidden_states.is_contiguous() and w1.is_contiguous() and w2.is_contiguous()
        assert quant_type_id == 7 and rest["global_num_experts"] == 5
        assert w1_scale.dtype == torch.float8_e8m0fnu and bias1.dtype == BF16
        # Its activation is handed to it: run on what it would be given.
        inner = 128
        y = torch.randn(6, 2 * inner if activation.gated else inner, dtype=BF16)
        h = torch.empty(6, inner, dtype=BF16)
        extra = {"topk_ids": topk_ids, "expert_map": None} if wheel == "vllm-0.33.0" else {}
        rest["activation_func"](rest["activation"], h, y, **extra)
        assert torch.equal(h, activation(y[:, :inner], y[:, inner:] if activation.gated else None))
        scales = [s.view(torch.uint8) for s in (w1_scale, w2_scale)]
        return compute(hidden_states, topk_ids, topk_weights, [w1, scales[0]], [w2, scales[1]], bias1, bias2)

    recorder = Recorder(wheel, "fused_marlin_moe", layer)
    library = types.SimpleNamespace(
        fused_marlin_moe=recorder,
        MoEActivation=types.SimpleNamespace(SILU="silu", SILU_NO_MUL="silu_no_mul"),
        scalar_types=types.SimpleNamespace(float4_e2m1f=types.SimpleNamespace(id=7)),
    )
    monkeypatch.setattr(marlin, "_library", lambda: library)
    run("marlin", "marlin", p, bias=True)
    assert len(recorder.calls) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_aiter(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    p = params(GPT_OSS, layout="interleaved")
    backend = get_backend("aiter")
    compute = layer_of(backend, p, "a16w4")

    def layer(hidden_states, w1, w2, topk_weight, topk_ids, w1_scale, w2_scale, activation, quant_type, **rest):
        assert (activation, quant_type) == ("swiglu", "per_1x32")
        assert w1.dtype == torch.float4_e2m1fn_x2 and w1.is_shuffled and w2.is_shuffled
        up, down = ([w.view(torch.uint8), s.view(5, -1, s.shape[-1])] for w, s in ((w1, w1_scale), (w2, w2_scale)))
        return compute(hidden_states, topk_ids, topk_weight, up, down, rest["bias1"], rest["bias2"])

    recorder = Recorder("amd_aiter", "fused_moe", layer)
    activations, types_ = types.SimpleNamespace(Swiglu="swiglu"), types.SimpleNamespace(per_1x32="per_1x32")
    module(monkeypatch, "aiter", ActivationType=activations, QuantType=types_)
    module(monkeypatch, "aiter.fused_moe", fused_moe=recorder)
    run("aiter", "a16w4", p, bias)
    assert len(recorder.calls) == 1


def grouped(x: torch.Tensor, dense: torch.Tensor, offsets: list[int], bias: torch.Tensor | None) -> torch.Tensor:
    """x [S, K] sorted by expert times dense [E, N, K]; rows beyond the last expert's hold NaN."""
    out = torch.full((x.shape[0], dense.shape[1]), float("nan"))
    for e, (start, end) in enumerate(zip([0, *offsets], offsets, strict=False)):
        out[start:end] = x[start:end].float() @ dense[e].T + (0 if bias is None else bias[e].float())
    return out


@pytest.mark.parametrize("activation", [SILU, GPT_OSS, Activation("relu2", gated=False)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_humming(monkeypatch: pytest.MonkeyPatch, activation: Activation, bias: bool) -> None:
    from mxfp4_compile import mx
    from mxfp4_compile.ops.permutations import bias_of_marlin, packed_of_marlin

    p = params(activation, half=1 if activation.gated else 0)
    wheel = "humming_kernels-0.1.19"

    def config(shape_n, shape_k, **rest):
        assert rest["torch_dtype"] == BF16 and rest["num_experts"] == 5
        assert (rest["pad_n_to_multiple"], rest["pad_k_to_multiple"]) == (256, 128)
        return types.SimpleNamespace(n=shape_n, k=shape_k, bias=rest["has_bias"])

    def product(config, inputs, weight, weight_scale, bias, expert_layout, locks, valid_shape_m, **rest):
        assert inputs.shape == (valid_shape_m, config.k) and inputs.dtype == BF16 and inputs.is_contiguous()
        assert expert_layout.shape == (6,) and expert_layout.dtype == torch.int32 and not locks.any()
        assert json.loads(rest["compute_config"]) == {"gemm_type": "grouped_contiguous"}
        assert (bias is not None) == config.bias
        k = weight.shape[1] * 16
        n = weight.shape[2] // 2
        packed = packed_of_marlin(weight, n, k)
        scales = humming._unswizzle_scales(weight_scale.view(torch.uint8), n, k)
        dense = mx.dequantize(packed, scales, k, torch.float32)[:, : config.n, : config.k]
        plain = None if bias is None else bias_of_marlin(bias)[:, : config.n]
        return grouped(inputs, dense, expert_layout[1:].tolist(), plain).to(BF16)

    def process(config, inputs, activation_type, activation_impl, **_):
        assert activation_type == ("binary_split" if activation.gated else "unary")
        assert activation_impl == humming.expression(activation)
        if not activation.gated:
            return activation(inputs), None, None
        return activation(*inputs.chunk(2, 1)), None, None

    monkeypatch.setattr(humming, "_config", humming._config.__wrapped__)
    monkeypatch.setattr(humming, "_tuning", humming._tuning.__wrapped__)
    monkeypatch.setattr(humming, "_locks", lambda device: 2048)
    schema_class = type("Mxfp4WeightSchema", (), {"to_humming_schema": lambda self, param_dtype: "schema"})
    module(monkeypatch, "humming", dtypes=types.SimpleNamespace(bfloat16="bf16"))
    module(monkeypatch, "humming.schema", HummingInputSchema=lambda a_dtype: a_dtype)
    module(monkeypatch, "humming.schema.mxfp4", Mxfp4WeightSchema=schema_class)
    module(monkeypatch, "humming.transform", prepare_layer_config=Recorder(wheel, "prepare_layer_config", config))
    heuristics = Recorder(wheel, "get_heuristics_config", lambda **_: [[0, 1, {}]])
    module(monkeypatch, "humming.tune", get_heuristics_config=heuristics)
    products = Recorder(wheel, "humming_forward", product)
    processes = Recorder(wheel, "may_process_input", process)
    module(monkeypatch, "humming.forward", humming_forward=products, may_process_input=processes)
    run("humming", "interleaved", p, bias)
    assert len(products.calls) == 2 and len(processes.calls) == 1
    assert signature(wheel, "Mxfp4WeightSchema.to_humming_schema").bind(None, BF16)


WHEELS = {
    "3.5.1": "sgl_kernel-0.3.21",
    "3.6": "vllm-0.18.0",
    "3.7": "tokenspeed_triton_kernels",
    "3.8": "sglang_kernel-0.4.10",
}


@pytest.mark.parametrize("generation", tk.GENERATIONS)
@pytest.mark.parametrize("activation", [SILU, GPT_OSS, Activation("gelu", gated=False)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_triton_kernels(monkeypatch: pytest.MonkeyPatch, generation: str, activation: Activation, bias: bool) -> None:
    """All four API generations: each call bound to that generation's signature, the product in plain torch."""
    pytest.importorskip("triton")
    from mxfp4_compile import mx
    from mxfp4_compile.ops.backends.triton_kernels import layout as layouts

    wheel, new = WHEELS[generation], generation in ("3.7", "3.8")
    p = params(activation, half=1 if activation.gated else 0)
    layout = "hopper-w8"

    def record(name: str) -> Recorder:
        return Recorder(wheel, name, lambda **given: types.SimpleNamespace(**given))

    def product(**given):
        x = given["a"] if new else given["x"]
        weight, groups = (given["b"], given["a_ragged_metadata"]) if new else (given["w"], given["routing_data"])
        config, fused = given["precision_config"], given.get("fused_activation")
        scale = config.b_mx_scale if new else config.weight_scale
        _, k, n = weight.shape
        assert weight.stride(-2) == 1 and x.dtype == BF16 and x.shape[1] == k
        values, scales = weight.storage.data.mT, scale.storage.data.mT
        packed = layouts.unswizzle_values(values, n, k // 2, layout)
        plain = layouts.unswizzle_scales(scales, n, k // 32, layout)
        gather = given.get("gather_indx")
        if gather is not None:
            x = x[(gather if new else gather.src_indx).long()]
        counts = groups.slice_sizes if new else groups.expt_hist
        if not new:
            assert groups.n_expts_act == 1 and groups.n_expts_tot == 5
        bias = given["bias"]
        assert bias is None or bias.dtype == torch.float32
        y = grouped(x, mx.dequantize(packed, plain, k, torch.float32), counts.cumsum(0).tolist(), bias)
        if fused is not None:
            specs = fused.specs
            assert tuple(specs.fn_arg_names) and fused.fn_args == (
                activation.alpha, activation.beta, activation.gate_limit, activation.up_limit
            )  # fmt: skip
            y = activation(y[:, 0::2], y[:, 1::2]) if activation.gated else activation(y)
            assert (fused.reduction_n if generation == "3.5.1" else specs.reduction_n) == 1 + activation.gated
        return y.to(BF16)

    class Tensor:
        def __init__(self, storage, dtype=None, shape=None):
            self.storage, self.dtype, self.shape = storage, dtype, shape

        def stride(self, i):
            return self.storage.data.stride(i)

    details = types.SimpleNamespace(
        HopperMXValueLayout=lambda *a, **k: "value", HopperMXScaleLayout=lambda *a, **k: "scale"
    )
    ragged = types.SimpleNamespace()
    if generation != "3.5.1":
        ragged.make_ragged_tensor_metadata = Recorder(
            wheel, "make_ragged_tensor_metadata", lambda slice_sizes, n_total_rows: types.SimpleNamespace(
                slice_sizes=slice_sizes, rows=n_total_rows
            )
        )  # fmt: skip
    name = "matmul" if new else "matmul_ogs"
    products = types.SimpleNamespace(**{name: Recorder(wheel, name, product)})
    products.PrecisionConfig = record("PrecisionConfig")
    fused = record("FusedActivation") if "FusedActivation" in SIGNATURES[wheel] else None
    products.FusedActivation = fused or (lambda specs, fn_args: types.SimpleNamespace(specs=specs, fn_args=fn_args))
    routing = types.SimpleNamespace()
    if not new:
        routing.RoutingData, routing.GatherIndx = record("RoutingData"), record("GatherIndx")
        if generation == "3.5.1":
            routing.compute_expt_data = record("compute_expt_data")
    specs = record("FnSpecs")
    products.FnSpecs = specs
    modules = {
        name: products,
        "tensor": types.SimpleNamespace(
            Tensor=Tensor, Storage=lambda data, layout: types.SimpleNamespace(data=data, layout=layout), FP4=4, UINT8=8
        ),
        "tensor_details.layout": details,
        "tensor_details.ragged_tensor": ragged,
        "specialize": types.SimpleNamespace(FnSpecs=specs),
        "routing": routing,
    }
    if generation == "3.6":
        products.RoutingData, products.GatherIndx = routing.RoutingData, routing.GatherIndx
    monkeypatch.setattr(tk, "_module", modules.__getitem__)
    monkeypatch.setattr(tk, "load", lambda: tk.Api(generation))
    run("triton_kernels", layout, p, bias)
    assert len(getattr(products, name).calls) == 2
