"""The native backend: Triton kernels on weights in a layout of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ....spec import MoEParams
from ...adapted import Parts
from ...arguments import LinearInputs, MoEInputs, MoETypes, Slot
from ...backend import Backend, Requirement, check_activation_dtype, check_parallel, known_layout
from ...library import find
from ...target import Request, Target
from . import layout as layouts

# Relative error that e4m3 activations of both products add to a layer's output: each rounds its input by 2.6% in the
# root mean square, which comes to 4.5% of the outputs of normal inputs and 5% with outliers; the rest is for real ones.
FP8_SLACK = 0.08

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _triton() -> tuple[bool, str]:
    try:
        import triton
    except Exception as error:  # a broken installation raises what it likes
        return False, f"import triton: {type(error).__name__}: {error}"
    return True, f"triton {triton.__version__}"


def _device(target: Target) -> Requirement:
    if target.sm is not None:
        return Requirement("device", target.sm >= 80, f"{target.arch}, needs sm_80 or newer")
    if target.rocm:
        return Requirement("device", True, f"{target.arch}")
    simulated = target.device is None
    return Requirement(
        "device", _interpreted() and not simulated, f"{target.arch}: needs a GPU, or TRITON_INTERPRET=1 on a CPU"
    )


def _interpreted() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class TritonBackend(Backend):
    """MXFP4 experts in Triton: NVIDIA GPUs from Ampere on, AMD CDNA, or Triton's interpreter on the CPU."""

    name = "triton"
    native_gradients = True

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        """Triton, a device it compiles for, and a dtype that the kernels round to."""
        met, reason = _triton()
        install = "" if met or find("triton").folder is not None else "pip install triton"
        requirements = [Requirement("triton", met, reason, install), _device(target)]
        # Few tokens are multiplied as bf16 all the same; projections that are split from each other always are.
        fp8 = request.params is not None or not request.shapes
        fp8 &= _interpreted() if target.arch == "cpu" else (target.sm or 0) >= 89
        requirements.append(check_activation_dtype(request, "bf16", *(("fp8",) if fp8 else ())))
        requirements.append(check_parallel(request))
        params = request.params
        if params is not None:
            requirements.append(
                Requirement("round_dtype", params.round_dtype in _DTYPES, f"{params.round_dtype}; one of {_DTYPES}")
            )
            requirements.append(
                Requirement("num_experts", params.num_experts <= 4096, f"{params.num_experts}, at most 4096")
            )
        return requirements

    def plan(self, request: Request | MoEParams | None, target: Target | torch.device) -> str:
        """ "sm89_fp8" for fp8 activations, else "sm80" where the kernels may use PTX, or "nibbles" (layout.py)."""
        if isinstance(request, Request) and request.activation_dtype == "fp8":
            return "sm89_fp8"
        sm = target.sm if isinstance(target, Target) else Target.of(target).sm
        return "sm80" if sm is not None else "nibbles"

    def slack(self, layout: str) -> float:
        """What e4m3 activations add."""
        return FP8_SLACK if layout == "sm89_fp8" else 0.0

    def quantizes_from(self, layout: str, params: MoEParams, top_k: int, device: torch.device) -> int | None:
        """From where many tokens begin to pay for being quantized (configs/*.json)."""
        from .select import architecture, fp8_from

        if layout != "sm89_fp8":
            return None
        return fp8_from(architecture(device), params.num_experts, top_k, params.hidden, params.intermediate)

    def prepare(self, packed: Tensor, scales: Tensor, slot: Slot, *, k: int) -> list[Tensor]:
        """[codes int32 [e, SLABS, STEPS, 128], scales int32 [e, SLABS, STEPS, 8], ...] (layout.py)."""
        return layouts.prepare(packed, scales, k, _known(slot))

    def recover(self, tensors: Sequence[Tensor], slot: Slot, *, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Prepared -> canonical, bit for bit."""
        return layouts.recover(tensors, n, k, _known(slot))

    def prepare_bias(self, bias: Tensor, slot: Slot) -> Tensor:
        """[e, N] -> [e, SLABS*16] in the prepared order, same dtype."""
        return layouts.prepare_bias(bias, slot)

    def recover_bias(self, bias: Tensor, slot: Slot, *, n: int) -> Tensor:
        """Inverse of ``prepare_bias``."""
        return layouts.recover_bias(bias, n, slot)

    def compile_ahead(self, layers: Iterable[MoETypes], device: torch.device) -> str:
        """In processes of their own, where there is a GPU."""
        if device.type != "cuda" or torch.version.hip or _interpreted():
            return ""
        from .ahead import VARIABLE, begin

        processes = begin(layers, device)
        if not processes:
            return ""
        return f"{processes} processes compile native kernels of other numbers of tokens meanwhile ({VARIABLE}=1)"

    def moe(self, inputs: MoEInputs) -> Tensor:
        """x [T, H] -> [T, H]; no host synchronization, safe under CUDA-graph capture."""
        from .moe import moe

        return moe(inputs)

    def grouped_linear(self, inputs: LinearInputs) -> Tensor:
        """x [S, K] sorted by expert, offsets int32 [E] -> [S, N]."""
        from .moe import grouped_linear

        return grouped_linear(inputs)

    def moe_backward(self, grad: Tensor, inputs: MoEInputs) -> tuple[Tensor, Tensor]:
        """On the prepared weights as they lie; no host synchronization."""
        from .backward import moe_backward

        return moe_backward(grad, inputs)

    def parts(self, inputs: MoEInputs) -> Parts:
        """On the prepared weights as they lie; no host synchronization."""
        from .adapted import NativeParts

        return NativeParts(self, inputs)

    def grouped_linear_backward(
        self, grad: Tensor, offsets: Tensor, weight: Sequence[Tensor], k: int, dtype: torch.dtype, layout: str
    ) -> Tensor:
        """grad [S, N] -> [S, K], alike."""
        from .backward import grouped_linear_backward

        return grouped_linear_backward(grad, offsets, weight, k, dtype, layout)


def _known(slot: Slot) -> Slot:
    known_layout(slot.layout, "triton", layouts.LAYOUTS)
    return slot


BACKEND = TritonBackend()
