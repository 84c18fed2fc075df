"""Linear modules of one input as one product: fewer products, the same model in every other respect."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import compile_with, recorded
from safetensors.torch import load_file, save_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import mxfp4_compile
from mxfp4_compile.runtime import packing, runtime_of
from mxfp4_compile.runtime.graph_pass import share
from mxfp4_compile.runtime.packing import Siblings, pack
from mxfp4_compile.tools.families import tiny_model

OPTIONS = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}


def shared_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Matrix products of each graph that is compiled, after the pass, which then runs as it is."""
    products: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        share(graph.graph)
        graph.recompile()
        names = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        products.append(sum(n.target in names for n in graph.graph.nodes))
        return graph

    compile_with(monkeypatch, aot_autograd(fw_compiler=compiler))
    return products


def optimized(family: str) -> nn.Module:
    return mxfp4_compile.optimize(tiny_model(family, layers=2), verify=False)


def attention_bytes(model: nn.Module) -> int:
    """Bytes of all storages that parameters lie in, each counted once; that they have storages of their own."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    return sum(storages.values())


def generate_steps(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    recorded(model, compiles=True)
    runtime_of(model).record_prompts = False
    runtime_of(model).prefill = lambda batch, mask: None  # prompts are not what this is about
    return model.generate(ids, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_one_product_and_the_same_model(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without and with biases: tokens, names, values, bytes; copies, files, loading, restoring."""
    model = optimized(family)
    ids = torch.randint(3, 60, (2, 7))
    expected = model.generate(ids, **OPTIONS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    size, identities = attention_bytes(model), [id(p) for p in model.parameters()]

    counts = {}
    products = shared_graphs(monkeypatch)
    for packed in (False, True):
        products.clear()
        runtime_of(model).pack_linears = packed
        assert torch.equal(generate_steps(model, ids), expected)
        report = runtime_of(model).report
        assert [c.made for c in report.captures] == ["compiled layers, own attention"], str(report)
        assert not report.notes, str(report)
        assert bool(report.packed) == packed
        counts[packed] = products[0]
    assert counts[True] == counts[False] - 2  # q, k and v

    assert attention_bytes(model) == size
    assert [id(p) for p in model.parameters()] == identities
    assert not any(isinstance(m, packing._Part) for m in model.modules())
    attention = model.model.layers[0].self_attn
    q, k = attention.q_proj.weight, attention.k_proj.weight
    assert k.data_ptr() == q.data_ptr() + q.numel() * q.element_size()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())

    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.equal(attention.q_proj.weight, before["model.layers.0.self_attn.q_proj.weight"])
    model.save_pretrained(tmp_path / "saved")
    again = mxfp4_compile.load(tmp_path / "saved", device_map="cpu", dtype=torch.float32)
    for name, value in again.state_dict().items():
        if ".self_attn." in name:
            assert torch.equal(value, before[name]), name

    # Written to in place: read by the next step, which is recorded anew.
    with torch.no_grad():
        attention.v_proj.weight.mul_(1.5)
    runtime_of(model).max_capture_size = 0
    changed = model.generate(ids, **OPTIONS)
    runtime_of(model).max_capture_size = 512
    assert torch.equal(model.generate(ids, **OPTIONS), changed)
    model.load_state_dict(before)
    assert torch.equal(model.generate(ids, **OPTIONS), expected)
    assert torch.equal(mxfp4_compile.restore(model).model.layers[0].self_attn.q_proj.weight, attention.q_proj.weight)


def trio(bias: bool = False) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(16, n, bias=bias) for n in (8, 4, 4))


class Layer(nn.Module):
    """Three products of one input, one of another, and one module that is called twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 4), nn.Linear(16, 4)
        self.o, self.twice = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(x)) + self.o(torch.cat([self.q(x), self.k(x), self.v(x)], -1))


def test_siblings_are_found_and_compiled_as_one_product_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer(0), Layer(1)]
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        groups = packing.find_siblings(layers, lambda: [layer(x + i) for i, layer in enumerate(layers)])
        assert [g.linears for g in groups] == [(m.q, m.k, m.v) for m in layers]
        assert [pack(g) for g in groups] == [None, None]
        products = shared_graphs(monkeypatch)
        run: Any = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=False, options={})
        for _ in range(2):
            with packing.packed_forwards(groups):
                for layer, want in zip(layers, expected, strict=True):
                    torch.testing.assert_close(run(layer, x), want)
                    assert torch.equal(layer(x), want)  # not compiled, as another thread would
    assert products == [4]


def test_what_is_not_packed() -> None:
    """Each for its reason, with nothing moved."""
    held, wrapped, hooked, tied, odd, two = (trio() for _ in range(6))
    state = held.state_dict()  # its tensors share storage with the parameters
    wrapped[1] = type("Adapter", (nn.Linear,), {})(16, 4, bias=False)
    hooked[1].register_forward_hook(lambda module, args, out: out * 2)
    tied[2].weight = tied[1].weight
    odd[1].weight = nn.Parameter(torch.randn(16, 4).t())
    two[1].weight = nn.Parameter(two[0].weight.detach()[:4])
    for modules, reason in (
        (held, "held by something else"), (wrapped, "more than a product"), (hooked, "more than a product"),
        (tied, "one weight"), (odd, "row by row"), (two, "held by something else"),
    ):  # fmt: skip
        places = [m.weight.data_ptr() for m in modules]
        found = pack(Siblings(tuple(modules)))
        assert found is not None
        assert reason in found
        assert [m.weight.data_ptr() for m in modules] == places
    del state
    assert pack(Siblings(tuple(held))) is None
    assert pack(Siblings(tuple(held))) is None  # a second time: they lie as they should
    place = held[0].weight.data_ptr()
    assert [m.weight.data_ptr() - place for m in held] == [0, 8 * 16 * 4, 12 * 16 * 4]


def test_parts_are_saved_and_let_go_as_others(tmp_path: Path) -> None:
    """Those who save find nothing shared; the packed memory lives as long as one of its parts."""
    modules = trio(True)
    values = {name: p.detach().clone() for name, p in modules.named_parameters()}
    assert pack(Siblings(tuple(modules))) is None
    save_model(modules, str(tmp_path / "m.safetensors"))
    read = load_file(tmp_path / "m.safetensors")
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], value) for name, value in values.items())
    torch.save(modules[1].weight.detach(), tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4 * 16 * 4 + 2000
    held = packing._packed[modules[0].weight]
    for module in modules:
        assert not held.expired()
        module.weight.data = module.weight.data.clone()
    assert held.expired()
    assert packing._whole([m.weight for m in modules]) is None
    assert pack(Siblings(tuple(modules))) is None
    assert all(torch.equal(p, values[name]) for name, p in modules.named_parameters())


def test_parts_train_as_before() -> None:
    """Gradients, an optimizer's steps, and moving apart by a cast."""
    one, other = trio(True), trio(True)
    assert pack(Siblings(tuple(one))) is None
    for modules in (one, other):
        optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-2)
        for seed in range(3):
            x = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
            sum(m(x).square().mean() for m in modules).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    one.double()
    places = tuple((one, str(i), i) for i in range(3))
    for modules, inside in ((one, False), (other, True)):
        siblings = Siblings(tuple(modules), tuple((modules, name, i) for _, name, i in places))
        assert not inside or pack(siblings) is None
        with packing.packed_forwards([siblings]):
            assert [isinstance(m, packing._Part) for m in modules] == [inside] * 3
        assert all(type(m) is nn.Linear for m in modules)
