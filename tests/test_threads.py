"""Threads: what changes or captures models takes turns, calls of such a model wait, and failures leave no trace."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import mxfp4_compile
from mxfp4_compile import circumstances, planning
from mxfp4_compile.checkpoint import meta_planning
from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.lifecycle import GUARD
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.explain import explain_model
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

pytestmark = pytest.mark.matching

# For what must not happen: how long it is given to happen. Nothing that must happen is given less than forever.
GRACE_SECONDS = 0.3


def tiny(family: str = "qwen3_moe") -> Any:
    return tiny_model(family, dtype=torch.bfloat16, layers=1)


class Other(threading.Thread):
    """Another thread that does one thing; ``result`` hands on what it returned or raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function, self.value, self.error = function, None, None
        self.began, self.ended = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        self.began.set()
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def result(self) -> Any:
        self.join()
        if self.error is not None:
            raise self.error
        return self.value


def free(lock: Any) -> bool:
    """Whether another thread could take a lock now."""

    def take() -> bool:
        taken = bool(lock.acquire(blocking=False))
        if taken:
            lock.release()
        return taken

    return bool(Other(take).result())


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have whoever matches models first stop there and run what the test put into ``then``; who is in, in order."""

    class Inside:
        then: Callable[[], None] | None = None
        log: list[tuple[str, int]] = []

    Inside.log = []
    real = planning.match_all

    def match_all(*args: Any, **kwargs: Any) -> None:
        Inside.log.append(("in", threading.get_ident()))
        then, Inside.then = Inside.then, None
        if then is not None:
            then()
        real(*args, **kwargs)
        Inside.log.append(("out", threading.get_ident()))

    for module in ("mxfp4_compile.planning", "mxfp4_compile.checkpoint.meta_planning"):
        monkeypatch.setattr(f"{module}.match_all", match_all)
    return Inside


def _convert(out: Path) -> Any:
    return convert(saved("qwen3_moe"), out)


@pytest.mark.parametrize("what", ["optimize", "load", "explain", "convert", "restore"])
def test_another_waits_until_optimize_is_done(what: str, inside: Any, tmp_path: Path) -> None:
    first, second = tiny(), tiny("gpt_oss")
    directory = saved("qwen3_moe")
    if what == "restore":
        mxfp4_compile.optimize(second)
        inside.log.clear()
    do = {
        "optimize": lambda: mxfp4_compile.optimize(second),
        "load": lambda: mxfp4_compile.load(directory),
        "explain": lambda: explain_model(second),
        "convert": lambda: convert(directory, tmp_path / "out"),
        "restore": lambda: mxfp4_compile.restore(second),
    }[what]
    others: list[Other] = []

    def then() -> None:
        others.append(Other(do))
        others[0].began.wait()
        assert not others[0].ended.wait(GRACE_SECONDS)

    inside.then = then
    mxfp4_compile.optimize(first)
    assert inside.log[0][1] == inside.log[1][1] == threading.get_ident(), "the other thread was in at the same time"
    result = others[0].result()
    assert mxfp4_sites(first)
    if what in ("optimize", "load"):
        assert mxfp4_sites(result)
        with torch.no_grad():
            assert result(**tiny_inputs(result)).logits.isfinite().all()
    if what == "restore":
        assert not mxfp4_sites(second)


def test_the_same_model_in_two_threads_is_optimized_once(inside: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model, others = tiny(), []
    inside.then = lambda: others.append(Other(lambda: mxfp4_compile.optimize(model)))
    assert mxfp4_compile.optimize(model) is model and others[0].result() is model
    assert [way for way, _ in inside.log] == ["in", "out"]
    assert "optimized already" in capfd.readouterr().err
    assert len(mxfp4_sites(model)) == 1 and list(model._modules).count(GUARD) == 1


def test_generate_and_forward_wait_for_optimize(inside: Any) -> None:
    model = tiny()
    inputs = tiny_inputs(model)
    ids, others = inputs["input_ids"], []
    seen: list[bool] = []

    def look(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != main:
            seen.append(bool(mxfp4_sites(model)))

    main = threading.get_ident()
    model.get_input_embeddings().register_forward_pre_hook(look)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(**inputs).logits

    def then() -> None:
        others.append(Other(lambda: model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)))
        others.append(Other(forward))
        assert not any(other.ended.wait(GRACE_SECONDS) for other in others)
        assert not seen

    inside.then = then
    mxfp4_compile.optimize(model)
    tokens, logits = (other.result() for other in others)
    assert seen and all(seen)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0))
    assert torch.equal(logits, forward())
    assert not model._forward_pre_hooks


def test_restore_inside_the_models_own_generate_is_refused() -> None:
    model = mxfp4_compile.optimize(tiny())
    ids = tiny_inputs(model)["input_ids"]

    class Restores:
        def put(self, value: Any) -> None:
            mxfp4_compile.restore(model)

        def end(self) -> None:
            pass

    with pytest.raises(mxfp4_compile.OptimizeError, match=r"own generate\(\)"):
        model.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0, streamer=Restores())
    assert mxfp4_sites(model) and not mxfp4_sites(mxfp4_compile.restore(model))


def test_a_thread_that_compiles_and_one_that_optimizes_do_not_wait_for_each_other(inside: Any) -> None:
    """Dynamo holds torch's lock when it calls our backend, which takes ours; optimize takes them in the same order."""
    from torch._dynamo import convert_frame

    got: list[bool] = []
    inside.then = lambda: got.append(free(convert_frame.compile_lock))
    mxfp4_compile.optimize(tiny())
    assert got == [False]
    assert free(circumstances._lock) and free(convert_frame.compile_lock)


# whatever fails


def fakes(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        for store in (module._parameters, module._buffers, vars(module)):
            for key, value in store.items():
                values = value if isinstance(value, (list, tuple)) else [value]
                if any(isinstance(v, FakeTensor) for v in values):
                    found.append(f"{name}.{key}")
    return found


class _Failure(BaseException):
    """Not an Exception: as KeyboardInterrupt, nothing may swallow it."""


@pytest.mark.parametrize("where", ["forward", "export", "match"])
def test_no_fake_tensor_stays_whatever_fails(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    experts = model.model.layers[0].mlp.experts
    real = type(experts).forward
    calls: list[bool] = []

    def forward(self: Any, hidden: torch.Tensor, *args: Any) -> Any:
        self.seen = hidden
        self.kept.append(hidden)
        self.register_buffer("last", hidden.detach(), persistent=False)
        calls.append(isinstance(hidden, FakeTensor))
        if where == "forward" and calls[-1]:
            raise _Failure
        return real(self, hidden, *args)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise _Failure

    experts.kept = []
    monkeypatch.setattr(type(experts), "forward", forward)
    if where == "export":
        monkeypatch.setattr("torch.export.ExportedProgram.run_decompositions", fail)
    if where == "match":
        monkeypatch.setattr("mxfp4_compile.planning.match", fail)
    with pytest.raises(_Failure):
        mxfp4_compile.optimize(model)
    assert any(calls), "nothing was traced"
    assert not fakes(model) and experts.kept == [] and not hasattr(experts, "seen") and "last" not in experts._buffers
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert where == "forward" or model(**tiny_inputs(model)).logits.isfinite().all()
    assert free(circumstances._lock)


def test_no_fake_tensor_stays_in_a_skeleton(monkeypatch: pytest.MonkeyPatch) -> None:
    real = meta_planning.record_calls
    seen: list[nn.Module] = []

    def record(model: Any, *args: Any) -> None:
        attention = model.model.layers[0].self_attn
        forward = attention.forward

        def remembering(*args: Any, **kwargs: Any) -> Any:
            attention.remembered = kwargs["hidden_states"]
            return forward(*args, **kwargs)

        monkeypatch.setattr(attention, "forward", remembering)
        seen.append(attention)
        real(model, *args)

    monkeypatch.setattr(meta_planning, "record_calls", record)
    model = mxfp4_compile.load(saved("qwen3_moe"))
    assert seen and not fakes(model) and not hasattr(seen[0], "remembered")
