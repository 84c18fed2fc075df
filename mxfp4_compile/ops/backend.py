"""The interface a backend of ``mxfp4::moe`` and ``mxfp4::grouped_linear`` implements.

A backend is a stateless object registered by name. Everything it needs between calls lies in plain
tensors (the prepared weights) and in the layout id that ``plan`` chose, so that a call can be traced,
captured, saved and moved. Libraries' wrapper objects are rebuilt inside a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..spec import MoEParams, Role
from . import gradients
from .adapted import Parts
from .arguments import LinearInputs, MoEInputs, MoETypes, Slot
from .target import Request, Target


@dataclass(frozen=True)
class Requirement:
    """One thing a backend needs: its name, whether it is met, and the reason in words.

    ``install`` is a command that would meet it, "" where none would.
    """

    name: str
    met: bool
    reason: str
    install: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class BackendError(RuntimeError):
    """A backend's kernel failed in a call; the message names the backend, the op and the shapes."""


class Backend(ABC):
    """A way to compute MXFP4 experts. Subclasses import their library inside methods only."""

    name: str
    native_gradients: bool = False
    """Whether gradients have kernels of their own, that read prepared weights as they lie."""

    @abstractmethod
    def supports(self, request: Request, target: Target) -> list[Requirement]:
        """What this backend needs to serve ``request`` on ``target``, met or not.

        A requirement that can be judged without hardware must be, since ``target`` may be simulated.
        """

    def plan(self, request: Request, target: Target) -> str:
        """The id of the prepared layout for a site; "canonical" is packed [E,N,ceil(K/2)] and its scales."""
        return "canonical"

    def slack(self, layout: str) -> float:
        """Relative error that this layout's arithmetic adds to the model's own (activations of fewer bits)."""
        return 0.0

    def quantizes_from(self, layout: str, params: MoEParams, top_k: int, device: torch.device) -> int | None:
        """From how many tokens on activations are of fewer bits, which ``slack`` is about; None: never."""
        return 1 if self.slack(layout) else None

    def prepare(self, packed: Tensor, scales: Tensor, slot: Slot, *, k: int) -> list[Tensor]:
        """Canonical -> prepared weights of any number of experts.

        packed: uint8 [e, N, ceil(K/2)], scales: uint8 [e, N, ceil(K/32)], ``k`` = K. The first dimension of every
        result must be e: sites are prepared expert by expert and the results laid one after the other.
        """
        return [packed, scales]

    def recover(self, tensors: Sequence[Tensor], slot: Slot, *, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Prepared -> canonical (packed [e, N, ceil(K/2)], scales [e, N, ceil(K/32)]), bit for bit."""
        packed, scales = tensors
        return packed, scales

    def prepare_bias(self, bias: Tensor, slot: Slot) -> Tensor:
        """Bias [e, N] in the model's row order and dtype -> as the kernel reads it (first dimension e).

        A kernel that reads another dtype casts inside the call, or keeps one that holds every value exactly.
        """
        return bias

    def recover_bias(self, bias: Tensor, slot: Slot, *, n: int) -> Tensor:
        """Inverse of ``prepare_bias``, exact."""
        return bias

    def compile_ahead(self, layers: Iterable[MoETypes], device: torch.device) -> str:
        """Begin to compile what these layers will launch on ``device``, without waiting; in words, or ""."""
        return ""

    @abstractmethod
    def moe(self, inputs: MoEInputs) -> Tensor:
        """The layer of ``inputs``: a new tensor [T, H] in x's dtype."""

    @abstractmethod
    def grouped_linear(self, inputs: LinearInputs) -> Tensor:
        """The projection of ``inputs``: a new tensor [S,N] in ``round_dtype``; rows of no expert become zero."""

    def gradient_dtype(self, dtype: torch.dtype, round_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients are multiplied, for tokens of ``dtype``."""
        return round_dtype

    def moe_backward(self, grad: Tensor, inputs: MoEInputs) -> tuple[Tensor, Tensor]:
        """Gradients of ``moe`` with respect to x [T,H] and topk_weights [T,K], given that of its result [T,H].

        By default through the canonical weights, dequantized a few experts at a time (``gradients``).
        """
        params = inputs.params
        dtype = self.gradient_dtype(inputs.x.dtype, params.round_dtype)

        def dense(role: Role, tensors: Sequence[Tensor]) -> gradients.Dense:
            _, n, k = params.shape(role)
            recover = partial(self.recover, slot=inputs.slot(role), n=n, k=k)
            return gradients.dense_weights(recover, tensors, k, dtype)

        def plain(role: Role, bias: Tensor | None) -> Tensor | None:
            return None if bias is None else self.recover_bias(bias, inputs.slot(role), n=params.shape(role)[1])

        canonical = replace(
            inputs, up_bias=plain("up", inputs.up_bias), down_bias=plain("down", inputs.down_bias), layout="canonical"
        )
        return gradients.moe_backward(grad, canonical, dense("up", inputs.up), dense("down", inputs.down), dtype)

    def parts(self, inputs: MoEInputs) -> Parts:
        """The steps of the layer of ``inputs``, between which adapters add their products."""
        return Parts(self, inputs)

    def grouped_linear_backward(
        self, grad: Tensor, offsets: Tensor, weight: Sequence[Tensor], k: int, dtype: torch.dtype, layout: str
    ) -> Tensor:
        """Gradient of the rows of ``grouped_linear``, [S,K] in ``dtype``, given that of its result [S,N]."""
        products = self.gradient_dtype(dtype, grad.dtype)
        recover = partial(self.recover, slot=Slot(None, None, layout), n=grad.shape[1], k=k)
        return gradients.linear_backward(
            grad, offsets, gradients.dense_weights(recover, weight, k, products), k, dtype, products
        )


def known_layout(layout: str, backend: str, layouts: Sequence[str]) -> str:
    """``layout``; ValueError unless it is one of a backend's."""
    if layout not in layouts:
        raise ValueError(f"unknown layout {layout!r} of backend {backend}; known: {', '.join(layouts)}")
    return layout


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within it ``device`` is the current one, where kernels are launched; nothing for what is no GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_parallel(request: Request) -> Requirement:
    """Sharded experts, which no backend serves yet."""
    p = request.parallel
    asked = f"tensor-parallel {p.tensor}, expert-parallel {p.expert}"
    return Requirement("parallel", p.single, f"serves experts that lie whole in one process; asked for {asked}")


def check_activation_dtype(request: Request, *known: str) -> Requirement:
    """The dtype of the activations that the kernels multiply."""
    wanted = request.activation_dtype
    return Requirement("activation_dtype", wanted in known, f"{wanted}; offers {', '.join(known)}")
