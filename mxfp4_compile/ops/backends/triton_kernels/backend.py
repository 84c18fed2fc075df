"""triton_kernels' ragged products with our routing, activations and combination."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_last

from ...arguments import LinearInputs, MoEInputs, Slot
from ...backend import Backend, Requirement, check_activation_dtype, check_parallel, current, known_layout
from ...library import find
from ...permutations import arrange_rows, recover_rows, round_up
from ...ragged import combine, gathered, sort_pairs
from ...target import Parallel, Request, Target
from . import api as library
from . import layout as layouts

# Above this many tokens at a time a shard of experts is swizzled for eight warps, like a whole layer.
_FEW_TOKENS = 512


def scale_warps(parallel: Parallel, tokens: int) -> int:
    """The warps that Hopper's scales are laid out for: 4 for small batches under expert parallelism, else 8."""
    return 4 if parallel.expert > 1 and tokens <= _FEW_TOKENS else 8


class TritonKernelsBackend(Backend):
    """OpenAI's triton_kernels, wherever it is installed or vendored."""

    name = "triton_kernels"

    def supports(self, request: Request, target: Target) -> list[Requirement]:
        """The library in a generation that is known, a GPU it compiles for, bf16 tokens."""
        found = library.locate()
        requirements = [
            Requirement("library", found.generation is not None, found.reason, library.INSTALL * found.installable)
        ]
        triton = find("triton", "triton")
        fits = triton.folder is not None
        reason = str(triton)
        if fits and found.generation is not None and triton.version is not None:
            fits = library.triton_fits(found.generation, triton.version)
            reason += "" if fits else f"; generation {found.generation} needs triton >= 3.7"
        install = "" if fits else "pip install triton" if triton.folder is None else "pip install -U triton"
        requirements.append(Requirement("triton", fits, reason, install))
        requirements.append(_device(target, found.generation))
        requirements.append(check_activation_dtype(request, "bf16"))
        requirements.append(check_parallel(request))
        p = request.params
        if p is not None:
            requirements.append(
                Requirement("dtype", p.round_dtype == torch.bfloat16, f"{p.round_dtype}; its layouts take bf16 tokens")
            )
        return requirements

    def plan(self, request: Request, target: Target) -> str:
        """The layout that the library's own defaults choose for an architecture."""
        sm = target.sm
        if sm is not None and sm >= 100:
            return "blackwell"
        if sm is not None and sm >= 90:
            rows = "256" if library.locate().generation == "3.8" else ""
            return f"hopper{rows}-w{scale_warps(request.parallel, request.max_capture_size)}"
        return "cdna4" if target.arch == "gfx950" else "strided"

    def prepare(self, packed: Tensor, scales: Tensor, slot: Slot, *, k: int) -> list[Tensor]:
        """[values, scales] (layout.py)."""
        return layouts.prepare(packed, scales, k, _known(slot))

    def recover(self, tensors: Sequence[Tensor], slot: Slot, *, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Prepared -> canonical, bit for bit."""
        return layouts.recover(tensors[0], tensors[1], n, k, _known(slot))

    def prepare_bias(self, bias: Tensor, slot: Slot) -> Tensor:
        """[e, N] -> [e, N padded], gate and up in turns; cast to fp32 in the call."""
        return arrange_rows(bias, slot, layouts.ROWS, layouts.multiples(slot.layout)[0])

    def recover_bias(self, bias: Tensor, slot: Slot, *, n: int) -> Tensor:
        """Inverse of ``prepare_bias``."""
        return recover_rows(bias, n, slot, layouts.ROWS)

    def moe(self, inputs: MoEInputs) -> Tensor:
        """x [T, H] bf16 -> [T, H]; no host synchronization."""
        x, params, topk_ids = inputs.x, inputs.params, inputs.topk_ids
        if topk_ids.numel() == 0:
            return torch.zeros_like(x)
        e, h = params.num_experts, params.hidden
        rows, columns = layouts.multiples(inputs.layout)
        h_in, h_out = round_up(h, columns), round_up(h, rows)
        inner = round_up(params.intermediate, rows)
        inner_in = round_up(params.intermediate, columns)
        up_rows = 2 * inner if params.activation.gated else inner
        up_bias, down_bias = inputs.biases(torch.float32)
        call = library.load()
        with current(x.device):
            pairs = sort_pairs(topk_ids, e)
            groups = call.groups(pairs.counts, topk_ids.numel())
            gather: Tensor | None = None
            weights: Tensor | None = inputs.topk_weights
            if params.weight_on_input:
                seen, weights = gathered(inputs, pairs, h_in)
            else:
                seen = pad_last(x, (0, h_in - h)).to(torch.bfloat16)
                gather = torch.div(pairs.order, topk_ids.shape[1], rounding_mode="trunc")
            up = call.weight(inputs.up[0], inputs.up[1], inputs.layout, up_rows, h_in)
            down = call.weight(inputs.down[0], inputs.down[1], inputs.layout, h_out, inner_in)
            activation = call.activation(params.activation)
            hidden = call.multiply(seen.contiguous(), up, up_bias, groups, gather, activation)
            y = call.multiply(pad_last(hidden, (0, inner_in - inner)), down, down_bias, groups)
            out = combine(y, pairs, topk_ids, weights, e, x.dtype)
        return out if h_out == h else out[:, :h].contiguous()

    def grouped_linear(self, inputs: LinearInputs) -> Tensor:
        """x [S, K] sorted by expert -> [S, N]."""
        x, n, layout, round_dtype = inputs.x, inputs.n, inputs.layout, inputs.round_dtype
        offsets, weight = inputs.offsets, inputs.weight
        s, k = x.shape
        out = torch.zeros((s, n), dtype=round_dtype, device=x.device)
        if s == 0:
            return out
        rows, columns = layouts.multiples(layout)
        k_in, n_out = round_up(k, columns), round_up(n, rows)
        call = library.load()
        with current(x.device):
            counts = offsets.diff(prepend=offsets.new_zeros(1)).int()
            y = call.multiply(
                pad_last(x, (0, k_in - k)).to(torch.bfloat16).contiguous(),
                call.weight(weight[0], weight[1], layout, n_out, k_in),
                None,
                call.groups(counts, s),
            )
        # Rows beyond the last expert's were not computed.
        mine = torch.arange(s, device=x.device) < offsets[-1]
        return torch.where(mine.unsqueeze(1), y[:, :n].to(round_dtype), out)


def _device(target: Target, generation: str | None) -> Requirement:
    sm = target.sm
    if sm is not None:
        note = "; below sm_90 its products are slow" if sm < 90 else ""
        if sm >= 100:
            note = "; reported to crash there with NVIDIA drivers from 595 on"
        return Requirement("device", sm >= 80, f"{target.arch}, needs sm_80 or newer{note}")
    if target.rocm:
        met = target.arch in ("gfx942", "gfx950") and generation in (None, "3.7", "3.8")
        return Requirement("device", met, f"{target.arch}, needs gfx942 or gfx950 and generation 3.7 or newer")
    return Requirement("device", False, f"{target.arch}, needs a GPU")


def _known(slot: Slot) -> Slot:
    known_layout(slot.layout, "triton_kernels", layouts.LAYOUTS)
    return slot


BACKEND = TritonKernelsBackend()
