"""Parts of experts and the graph pass that makes a part the whole site's, without processes."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import mxfp4_compile
from mxfp4_compile import mx
from mxfp4_compile.ops import schema
from mxfp4_compile.passes.build.rewrite import RewriteError
from mxfp4_compile.planning import OptimizeError
from mxfp4_compile.ranks.distribute import distribute
from mxfp4_compile.ranks.shards import choose, column_parts, expert_parts, whole_blocks
from mxfp4_compile.spec import Activation, MoEParams, Shard
from mxfp4_compile.tools.families import tiny_model

H = 32


def params(experts: int, columns: int, layout: str) -> MoEParams:
    gate: Any = layout
    activation = Activation("silu", layout != "none")
    return MoEParams(experts, H, columns, activation, gate, 0, False, torch.float32, torch.float32)


def rewritten(p: MoEParams, biases: bool) -> fx.GraphModule:
    """A site's graph as ``rewrite`` leaves it: x and ids are transformed on the way in, the output on the way out."""
    graph = fx.Graph()
    x, ids, w, up0, up1, down0, down1 = map(graph.placeholder, ("x", "ids", "w", "up_0", "up_1", "down_0", "down_1"))
    up_bias, down_bias = map(graph.placeholder, ("up_bias", "down_bias")) if biases else (None, None)
    weights = ([up0, up1], [down0, down1], up_bias, down_bias)
    moe = graph.call_function(schema.moe, (x, ids, w, *weights, *schema.moe_scalars(p), "reference", "canonical"))
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (moe, moe)))  # a sum behind it would be another
    return fx.GraphModule(torch.nn.Module(), graph)


class Sum(fx.Interpreter):
    """Runs one rank's graph; ``mxfp4::reduce`` gives ``total`` if that is known, and keeps what it was given."""

    total: Tensor | None = None
    part: Tensor | None = None

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is schema.reduce:
            assert args[1] == "the group"
            self.part = args[0]
            return args[0] if self.total is None else self.total
        return super().call_function(target, args, kwargs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_parts_make_the_whole(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["expert", "tensor"]))
    ranks = data.draw(st.integers(2, 4))
    experts = ranks * data.draw(st.integers(1, 2)) if kind == "expert" else data.draw(st.integers(2, 5))
    columns = data.draw(st.sampled_from([20, 32, 48, 96, 180]))
    layout = data.draw(st.sampled_from(["halves", "interleaved", "none"]))
    biases = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    random = lambda *shape: torch.randn(shape, generator=generator)
    p = params(experts, columns, layout)
    up, down, up_bias, down_bias = (
        random(experts, p.up_rows, H),
        random(experts, H, columns),
        random(experts, p.up_rows),
        random(experts, H),
    )
    x, w = random(5, H), random(5, 2).abs()
    ids = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(5)])
    extra = (up_bias, down_bias) if biases else ()
    codes_up, codes_down = mx.quantize(up, "mse"), mx.quantize(down, "mse")
    whole = rewritten(p, biases)(x, ids, w, *codes_up, *codes_down, *extra)

    parts = expert_parts(experts, ranks) if kind == "expert" else column_parts(columns, ranks)
    runs = []
    for rank in range(ranks):
        shard = Shard(kind, rank, parts, "the group")  # type: ignore[arg-type]
        if kind == "expert":
            own = [t[shard.start : shard.stop] for t in (up, down, *extra)]
            p_own = params(shard.count, columns, layout)
            assert all(
                torch.equal(a, b[shard.start : shard.stop])
                for a, b in zip(mx.quantize(own[1], "mse"), codes_down, strict=True)
            )
        elif shard.start == shard.stop:
            p_own = params(experts, shard.count, layout)
            own = [torch.zeros(experts, p_own.up_rows, H), torch.zeros(experts, H, shard.count)]
            own += [torch.zeros(experts, p_own.up_rows), torch.zeros(experts, H)] if biases else []
        else:
            rows = shard.rows(p)
            own = [torch.cat([up[:, r] for r in rows], 1), down[:, :, shard.start : shard.stop]]
            own += [torch.cat([up_bias[:, r] for r in rows], 1), down_bias * (rank == 0)] if biases else []
            p_own = params(experts, shard.count, layout)
            packed, scales = mx.quantize(own[1], "mse")  # every code of a part is the whole's
            assert torch.equal(packed, codes_down[0][..., shard.start // 2 : (shard.stop + 1) // 2])
            assert torch.equal(scales, codes_down[1][..., shard.start // 32 : -(-shard.stop // 32)])
        graph = distribute(rewritten(p_own, biases), shard)
        inputs = (x, ids, w, *mx.quantize(own[0], "mse"), *mx.quantize(own[1], "mse"), *own[2:])
        run = Sum(graph)
        run.run(*inputs)
        runs.append((run, inputs))
    total = torch.stack([run.part for run, _ in runs]).sum(0)  # type: ignore[misc]
    for run, inputs in runs:
        run.total = total
        torch.testing.assert_close(run.run(*inputs), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_cuts_of_columns() -> None:
    assert column_parts(48, 2) == ((0, 32), (32, 48))
    assert column_parts(180, 4) == ((0, 64), (64, 128), (128, 160), (160, 180))
    assert [b - a for a, b in column_parts(2880, 4)] == [736, 736, 704, 704]
    assert [b - a for a, b in column_parts(1408, 8)] == [192] * 4 + [160] * 4
    assert column_parts(96, 4)[3] == (96, 96)
    assert whole_blocks(((0, 64), (64, 80))) and not whole_blocks(((0, 24), (24, 48)))


def test_choice_of_a_split() -> None:
    assert choose("auto", 8, 64, 2)[:2] == ("expert", ((0, 4), (4, 8)))
    kind, parts, reason = choose("auto", 8, 96, 3)
    assert kind == "tensor" and parts == column_parts(96, 3) and "do not divide by 3" in reason
    assert choose("tensor", 8, 64, 2)[0] == "tensor"
    with pytest.raises(OptimizeError, match=r'8 experts do not divide by 3 ranks: experts="tensor"'):
        choose("expert", 8, 64, 3)
    with pytest.raises(ValueError, match="auto, expert, tensor"):
        choose("rows", 8, 64, 2)  # type: ignore[arg-type]


def test_a_graph_without_the_op_is_refused() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    with pytest.raises(RewriteError, match="0 mxfp4::moe"):
        distribute(fx.GraphModule(torch.nn.Module(), graph), Shard("expert", 0, ((0, 1), (1, 2)), "g"))


def test_reduce_is_traced_and_has_no_gradient() -> None:
    traced = torch.export.export(_Reduced(), (torch.ones(2, 3),))
    assert [n.args[1] for n in traced.graph.nodes if n.target is schema.reduce] == ["a group"]


class _Reduced(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return schema.reduce(x, "a group") + 1  # type: ignore[no-any-return]


def test_one_process_imports_nothing_of_ranks() -> None:
    """What is outside of the room imports it inside of functions only, behind a look at the model or the arguments."""
    package = Path(mxfp4_compile.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name == "ranks":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef)):
                names = [n.module or "" for n in node.body if isinstance(n, ast.ImportFrom)]
                assert not any("ranks" in name.split(".") for name in names), path


@pytest.mark.slow
def test_optimize_in_one_process_is_as_without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("mxfp4_compile.ranks")]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"), progress=False)
    assert model.mxfp4_report.rewritten
    assert not torch.distributed.is_initialized()
