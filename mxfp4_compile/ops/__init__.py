"""The ops (``torch.ops.mxfp4.*``) and their backends. Imports nothing of ``passes``."""

from .backends import aiter, cpu, flashinfer, humming, marlin, reference, triton, triton_kernels
from .registry import register_backend

for _backend in (
    reference.BACKEND,
    cpu.BACKEND,
    triton.BACKEND,
    triton_kernels.BACKEND,
    humming.BACKEND,
    flashinfer.TRTLLM,
    flashinfer.CUTLASS,
    marlin.BACKEND,
    aiter.BACKEND,
):
    register_backend(_backend)

from . import schema  # noqa: E402  (registers the ops; backends come first, as its fakes may ask for them)

__all__ = ["schema"]
