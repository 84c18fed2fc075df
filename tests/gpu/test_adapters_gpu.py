"""LoRA on experts on a GPU against fp32 and against PEFT on ordinary experts (``pytest -m gpu``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_checkpoints import gradient_checkpointing
from test_backward_gpu import BF16, Case, relative
from torch import Tensor, nn

from mxfp4_compile.mx import dequantize
from mxfp4_compile.ops import adapted
from mxfp4_compile.ops.adapted import Adapted
from mxfp4_compile.ops.arguments import MoEInputs
from mxfp4_compile.ops.low_rank import Term

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class AdaptedCase(Case):
    """A layer with random weights and an adapter on either projection, whose parameters are fp32 as PEFT has them."""

    def __init__(self, name: str, r: int = 16) -> None:
        super().__init__(name)
        g = torch.Generator("cuda").manual_seed(r)
        self.terms = []
        for role in ("up", "down"):
            e, n, k = self.params.shape(role)
            a = torch.randn((e, r, k), generator=g, device="cuda") / k**0.5
            b = torch.randn((e, n, r), generator=g, device="cuda") / r**0.5
            self.terms.append([Term(a, b, 0.5)])

    def layer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Adapted:
        inputs = MoEInputs(x, ids, weights, *self.prepared, *self.prepared_biases, self.params, self.layout)
        return Adapted(self.backend, inputs, *self.terms)

    def native(self, grad: Tensor, *call: Tensor) -> list[Tensor]:
        """The output, then the gradients of x, the routing weights, and both adapters' a and b."""
        layer = self.layer(*call)
        dx, dw, of_terms = layer.backward(grad)
        return [layer.forward(), dx, dw, *(t for pair in of_terms for t in pair)]

    def dense(self, dtype: torch.dtype, grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
        """The same by autograd through dense sums in ``dtype``, a loop over experts."""
        p = self.params
        leaves = [x.to(dtype), weights.to(dtype), *(t for (term,) in self.terms for t in (term.a, term.b))]
        x, weights, a1, b1, a2, b2 = leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        biases = [None if b is None else b.to(dtype) for b in self.biases]
        out = torch.zeros_like(x)
        for e in range(p.num_experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            up, down = (
                dequantize(packed[e], scales[e], p.shape(role)[2], dtype) + 0.5 * (b[e] @ a[e]).to(dtype)
                for role, (packed, scales), a, b in zip(("up", "down"), self.canonical, (a1, a2), (b1, b2), strict=True)
            )
            w = weights[token, slot].unsqueeze(1)
            y = (x[token] * w if p.weight_on_input else x[token]) @ up.T
            y = y if biases[0] is None else y + biases[0][e]
            z = p.activate(y) @ down.T
            z = z if biases[1] is None else z + biases[1][e]
            out = out.index_add(0, token, z if p.weight_on_input else z * w)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "on input", "not gated", "awkward", "tiny"])
def test_output_and_gradients(name: str) -> None:
    case = AdaptedCase(name, r=5 if name in ("awkward", "tiny") else 16)
    for tokens, kind in ((1, "uniform"), (40, "some"), (300, "one"), (1024, "uniform")):
        call = case.inputs(tokens, kind)
        for i, (a, b) in enumerate(zip(case.native(*call), case.dense(torch.float32, *call), strict=True)):
            assert a.isfinite().all() and relative(a, b) < (2e-2 if i < 3 else 3e-2), (tokens, kind, i)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_as_near_to_fp32_as_dense_sums_in_bf16_are(name: str) -> None:
    """PEFT's dense sums keep the adapters' factors in fp32; here they are multiplied as bf16, too."""
    case = AdaptedCase(name)
    call = case.inputs(1024)
    ours, usual, exact = case.native(*call), case.dense(BF16, *call), case.dense(torch.float32, *call)
    for i, (a, b, c) in enumerate(zip(ours, usual, exact, strict=True)):
        assert relative(a, c) <= (1.25 if i < 3 else 1.6) * relative(b, c), i


def test_chunks_same_bits_and_no_synchronization(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AdaptedCase("gpt-oss")
    call = case.inputs(2048)
    want = case.native(*call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = case.native(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    monkeypatch.setattr(adapted, "MAX_ROWS_BYTES", 64 << 20)
    assert all(relative(a, b) < 2e-2 for a, b in zip(case.native(*call), want, strict=True))


def test_nothing_but_inputs_is_kept() -> None:
    """Between forward and backward a layer holds its inputs, its output and nothing of the size of y."""
    from mxfp4_compile.ops import schema
    from mxfp4_compile.spec import moe_scalars

    case = AdaptedCase("qwen3")
    _, x, ids, weights = case.inputs(2048)
    (up,), (down,) = case.terms
    a, b = [up.a.requires_grad_(), down.a.requires_grad_()], [up.b.requires_grad_(), down.b.requires_grad_()]
    rest = (*case.prepared, *case.prepared_biases, a, b, [0.5, 0.5], [0, 0], 1, *moe_scalars(case.params))
    run = lambda: schema.adapted_moe(x.requires_grad_(), ids, weights, *rest, "triton", case.layout)
    run().sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = run()
    assert torch.cuda.memory_allocated() - before <= 2 * out.nbytes


# models

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def gradients(model: nn.Module, inputs: dict[str, Tensor], call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    logits = (model if call is None else call)(**inputs | {"use_cache": False}).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
    (logits.float() * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """An optimized model with an adapter on attention and experts, and the restored one with the same, bf16."""
    import mxfp4_compile
    from mxfp4_compile.tools.families import tiny_model

    peft = pytest.importorskip("peft")
    # One layer: of two, rounding in the first could send tokens of the second to other experts.
    model = tiny_model(request.param, dtype=BF16, layers=1).cuda()
    mxfp4_compile.optimize(model, verify=False, backend="triton")
    ordinary = mxfp4_compile.restore(copy.deepcopy(model))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=TARGETS)
    ours, theirs = (peft.get_peft_model(m, copy.deepcopy(config)) for m in (model, ordinary))
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.2)
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    return ours, theirs


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def far(mine: dict[str, Tensor], exact: dict[str, Tensor], what: str) -> float:
    """The relative distance of the gradients of ``what``, all together."""
    names = [n for n in exact if what in n]
    assert names
    join = lambda of: torch.cat([of[n].float().flatten() for n in names])
    return relative(join(mine), join(exact))


def as_near(mine: dict[str, Tensor], usual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """``mine`` are about as near to ``exact`` as ``usual`` are."""
    distances = {what: (far(mine, exact, what), far(usual, exact, what)) for what in ("experts", "self_attn")}
    assert all(a <= 1.5 * b + 5e-3 for a, b in distances.values()), distances


def test_gradients_of_a_model(models: tuple[nn.Module, nn.Module]) -> None:
    from mxfp4_compile.tools.families import tiny_inputs

    ours, theirs = models
    inputs = on_gpu(tiny_inputs(theirs.get_base_model()))
    exact = gradients(copy.deepcopy(theirs).float(), inputs)
    mine, usual = gradients(ours, inputs), gradients(theirs, inputs)
    assert set(mine) == set(usual) == set(exact)
    as_near(mine, usual, exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(models: tuple[nn.Module, nn.Module], reentrant: bool) -> None:
    from mxfp4_compile.tools.families import tiny_inputs

    ours, _ = models
    base = ours.get_base_model()
    inputs = on_gpu(tiny_inputs(base))
    plain = gradients(ours, inputs)
    with gradient_checkpointing(base, reentrant):
        again = gradients(ours, inputs)
    assert set(again) == set(plain)
    other = {n: relative(g, plain[n]) for n, g in again.items() if not torch.equal(g, plain[n])}
    assert not other, other


def test_compiled(models: tuple[nn.Module, nn.Module]) -> None:
    """Forward and backward in one graph each, by Inductor; its own kernels round otherwise."""
    from mxfp4_compile.tools.families import tiny_inputs

    ours, theirs = models
    inputs = on_gpu(tiny_inputs(ours.get_base_model()))
    exact, plain = gradients(copy.deepcopy(theirs).float(), inputs), gradients(ours, inputs)
    as_near(gradients(ours, inputs, torch.compile(ours, fullgraph=True)), plain, exact)
