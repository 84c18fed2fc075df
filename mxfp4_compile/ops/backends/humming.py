"""humming-kernels: MXFP4 weights times bf16 activations on NVIDIA GPUs from Ampere on, compiled at first use.

A Marlin-class kernel in a package of its own. Its products take rows sorted by expert; routing, the top-k
sum and the weighting are ours, the activation is a C++ expression that it compiles. Importing it starts a
process that builds kernels ahead (``HUMMING_DISABLE_PARALLEL_BUILD=1`` keeps it from that, at the price of
minutes at first use), so it is imported in a call, never for a plan on a GPU below sm_100.

Prepared weights, with N filled up to 256 and K to 128::

    codes  int32 [e, K/16, 2N]  a tensor-core tile of 64 rows and 16 columns after the other
    scales uint8 [e, K/32, N]   columns permuted in blocks of 64 rows

"interleaved" has even codes of a word before odd ones, "native" (GPUs that convert FP4 by themselves) not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_last

from ...activations import function
from ...spec import Activation
from ..arguments import LinearInputs, MoEInputs, Slot
from ..backend import Backend, Requirement, check_activation_dtype, check_parallel, current, known_layout
from ..library import find
from ..permutations import (
    RowOrder,
    arrange_rows,
    bias_of_marlin,
    fold,
    marlin_bias,
    marlin_codes,
    packed_of_marlin,
    pad,
    recover_rows,
    round_up,
    unfold,
)
from ..ragged import combine, gathered, sort_pairs
from ..target import Request, Target

INSTALL = "pip install humming-kernels"
LAYOUTS = ("interleaved", "native")

# Rows and columns of an activation, and what its weights are filled up to beyond that.
_MULTIPLE = 32
_PAD_N, _PAD_K = 256, 128
_ONE = 127  # the scale byte of 1.0, with which the library fills up
_GEMM = "grouped_contiguous"
_ROWS = RowOrder("halves", 0)


class HummingBackend(Backend):
    """humming's grouped products."""

    name = "humming"

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        """humming-kernels, an NVIDIA GPU, bf16 tokens."""
        found = find("humming", "humming-kernels")
        right = found.has("forward.py", "transform.py", "schema/mxfp4.py", "tune/__init__.py")
        new = found.version is None or found.at_least(0, 1, 19)
        reason = str(found) if right or found.folder is None else f"{found} is another package of that name"
        sm = target.sm
        requirements = [
            Requirement(
                "library",
                right and new,
                reason if new else f"{reason}, needs 0.1.19 or newer",
                "" if right and new else INSTALL if found.folder is None else f"{INSTALL} -U" if right else "",
            ),
            Requirement("device", sm is not None and sm >= 80, f"{target.arch}, needs sm_80 or newer for bf16"),
            check_activation_dtype(request, "bf16"),
            check_parallel(request),
        ]
        p = request.params
        if p is not None:
            requirements.append(
                Requirement(
                    "dtype",
                    p.round_dtype == torch.bfloat16,
                    f"{p.round_dtype}; offered for bf16, since its fp16 layout cannot hold every scale",
                )
            )
        return requirements

    def plan(self, request: Request, target: Target) -> str:
        """ "native" where the GPU and the library's compiler convert FP4 to bf16, which the library knows."""
        if target.sm is None or target.sm < 100 or target.device is None:
            return "interleaved"
        return "native" if _config(512, 128, 1, False, target.device.index or 0).use_native_dequant else "interleaved"

    def prepare(self, packed: Tensor, scales: Tensor, slot: Slot, *, k: int) -> list[Tensor]:
        """[codes int32 [e, K/16, 2N], scales uint8 [e, K/32, N]], N and K filled up."""
        packed = arrange_rows(packed, slot, _ROWS, _MULTIPLE)
        scales = arrange_rows(scales, slot, _ROWS, _MULTIPLE, _ONE)
        n, k = round_up(packed.shape[1], _PAD_N), round_up(round_up(k, _MULTIPLE), _PAD_K)
        packed = pad(pad(packed, 1, n), 2, k // 2)
        scales = pad(pad(scales, 1, n, _ONE), 2, k // 32, _ONE)
        return [marlin_codes(packed, native=_native(slot.layout)), _swizzle_scales(scales)]

    def recover(self, tensors: Sequence[Tensor], slot: Slot, *, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Prepared -> canonical, bit for bit."""
        rows = _rows(n, slot)
        n_full, k_full = round_up(rows, _PAD_N), round_up(round_up(k, _MULTIPLE), _PAD_K)
        packed = packed_of_marlin(tensors[0], n_full, k_full, native=_native(slot.layout))
        packed = packed[:, :rows, : (k + 1) // 2]
        scales = _unswizzle_scales(tensors[1], n_full, k_full)[:, :rows, : -(-k // 32)]
        return recover_rows(packed, n, slot, _ROWS), recover_rows(scales, n, slot, _ROWS)

    def prepare_bias(self, bias: Tensor, slot: Slot) -> Tensor:
        """[e, N] -> [e, N filled up], permuted in blocks of 32."""
        bias = arrange_rows(bias, slot, _ROWS, _MULTIPLE)
        bias = pad(bias, 1, round_up(bias.shape[1], _PAD_N))
        return marlin_bias(bias)

    def recover_bias(self, bias: Tensor, slot: Slot, *, n: int) -> Tensor:
        """Inverse of ``prepare_bias``."""
        return recover_rows(bias_of_marlin(bias)[:, : _rows(n, slot)], n, slot, _ROWS)

    def moe(self, inputs: MoEInputs) -> Tensor:
        """x [T, H] bf16 -> [T, H]; no host synchronization once the kernels are compiled."""
        x, params = inputs.x, inputs.params
        if inputs.topk_ids.numel() == 0:
            return torch.zeros_like(x)
        e, h = params.num_experts, params.hidden
        h_in, inner = round_up(h, _MULTIPLE), round_up(params.intermediate, _MULTIPLE)
        gated = params.activation.gated
        up_bias, down_bias = inputs.biases(torch.bfloat16)
        with current(x.device):
            pairs = sort_pairs(inputs.topk_ids, e)
            rows, weights = gathered(inputs, pairs, h_in)
            y = _multiply(rows, inputs.up, up_bias, pairs.offsets, 2 * inner if gated else inner)
            hidden = _activate(y, params.activation, inner, h_in, e, x.device)
            out = _multiply(hidden, inputs.down, down_bias, pairs.offsets, h_in)
            result = combine(out, pairs, inputs.topk_ids, weights, e, x.dtype)
        return result if h_in == h else result[:, :h].contiguous()

    def grouped_linear(self, inputs: LinearInputs) -> Tensor:
        """x [S, K] sorted by expert -> [S, N]."""
        x, n = inputs.x, inputs.n
        s, k = x.shape
        n_out = round_up(n, _MULTIPLE)
        # Rows beyond the last expert's are not written.
        out = torch.zeros((s, n_out), dtype=torch.bfloat16, device=x.device)
        if s:
            with current(x.device):
                padded = pad_last(x, (0, round_up(k, _MULTIPLE) - k)).to(torch.bfloat16).contiguous()
                starts = pad_last(inputs.offsets.int(), (1, 0))
                _multiply(padded, inputs.weight, None, starts, n_out, out)
        return out[:, :n].to(inputs.round_dtype).contiguous()


def _native(layout: str) -> bool:
    return known_layout(layout, "humming", LAYOUTS) == "native"


def _rows(n: int, slot: Slot) -> int:
    """Rows of a projection as arranged, before they are filled up to _PAD_N."""
    return 2 * round_up(n // 2, _MULTIPLE) if slot.gated else round_up(n, _MULTIPLE)


# permutations


def _swizzle_scales(scales: Tensor) -> Tensor:
    e, n, groups = scales.shape
    return fold(scales, (n // 64, 8, 8, groups), (3, 0, 2, 1)).view(e, groups, n)


def _unswizzle_scales(scales: Tensor, n: int, k: int) -> Tensor:
    return unfold(scales, (n // 64, 8, 8, k // 32), (3, 0, 2, 1)).view(scales.shape[0], n, k // 32)


# the library


@lru_cache(maxsize=256)
def _config(n: int, k: int, num_experts: int, bias: bool, device: int) -> Any:
    """The library's LayerConfig of a projection with ``n`` rows and ``k`` columns (multiples of 32)."""
    from humming import dtypes
    from humming.schema import HummingInputSchema
    from humming.schema.mxfp4 import Mxfp4WeightSchema
    from humming.transform import prepare_layer_config

    return prepare_layer_config(
        shape_n=n,
        shape_k=k,
        weight_schema=Mxfp4WeightSchema().to_humming_schema(torch.bfloat16),
        input_schema=HummingInputSchema(a_dtype=dtypes.bfloat16),
        num_experts=num_experts,
        pad_n_to_multiple=_PAD_N,
        pad_k_to_multiple=_PAD_K,
        has_bias=bias,
        torch_dtype=torch.bfloat16,
        device=torch.device("cuda", device),
    )


@lru_cache(maxsize=256)
def _tuning(n: int, k: int, num_experts: int, bias: bool, device: int) -> tuple[str, str]:
    """(compute config, tuning config) as JSON: which kernel for how many rows, by the library's heuristics."""
    import json

    from humming.tune import get_heuristics_config

    config = _config(n, k, num_experts, bias, device)
    tuning = get_heuristics_config(layer_config=config, gemm_type=_GEMM, device=torch.device("cuda", device))
    return json.dumps({"gemm_type": _GEMM}), json.dumps(tuning)


def _multiply(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, offsets: Tensor, n: int, out: Tensor | None = None
) -> Tensor:
    """x [S, K] sorted by expert, bias [E, n] in bf16 or None, offsets int32 [E+1] -> [S, n]."""
    from humming.forward import humming_forward

    words, scales = weight
    key = (n, x.shape[1], words.shape[0], bias is not None, x.device.index or 0)
    compute, tuning = _tuning(*key)
    return humming_forward(  # type: ignore[no-any-return]
        _config(*key),
        x,
        words,
        scales.view(torch.float8_e8m0fnu),
        bias=bias,
        outputs=out,
        expert_layout=offsets,
        # Zeroed for every call: layers on several streams must not share them, nor graphs own them.
        locks=torch.zeros(_locks(x.device.index or 0), dtype=torch.int32, device=x.device),
        valid_shape_m=x.shape[0],
        compute_config=compute,
        tuning_config=tuning,
    )


@lru_cache(maxsize=16)
def _locks(device: int) -> int:
    return max(2048, 8 * torch.cuda.get_device_properties(device).multi_processor_count)


def _activate(
    y: Tensor, activation: Activation, inner: int, out_features: int, num_experts: int, device: torch.device
) -> Tensor:
    """y [S, 2*inner] or [S, inner] -> [S, inner], by the library's own elementwise kernel."""
    from humming.forward import may_process_input

    config = _config(out_features, inner, num_experts, False, device.index or 0)
    kind = "binary_split" if activation.gated else "unary"
    hidden, _, _ = may_process_input(config, y, activation_type=kind, activation_impl=expression(activation))
    return hidden  # type: ignore[no-any-return]


def expression(activation: Activation) -> str:
    """The activation as a C++ expression of the floats ``a`` (activated) and ``b`` (the other half)."""
    act = activation
    # Not fminf: NaN must pass through.
    a = "a" if math.isinf(act.gate_limit) else f"(a > {act.gate_limit!r}f ? {act.gate_limit!r}f : a)"
    out = function(act.kind).cpp.format(a=a, alpha=repr(act.alpha))
    if not act.gated:
        return out
    limit = f"{act.up_limit!r}f"
    b = "b" if math.isinf(act.up_limit) else f"(b > {limit} ? {limit} : (b < -{limit} ? -{limit} : b))"
    return f"{out} * ({b} + {act.beta!r}f)"


BACKEND = HummingBackend()
