"""The check of recorded steps by the layer: what is right passes, also in bf16, and every mutation is caught."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from recording import recorded
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile.runtime import attention, runtime_of
from mxfp4_compile.runtime.caches import full, hybrid, indexed, kinds, ring, states
from mxfp4_compile.runtime.caches.base import Clock
from mxfp4_compile.runtime.state import Way
from mxfp4_compile.runtime.step import DecodeStep
from mxfp4_compile.tools.families import tiny_model


@pytest.fixture(scope="module")
def models() -> Callable[[str, torch.dtype], nn.Module]:
    made: dict[Any, nn.Module] = {}

    def model(family: str, dtype: torch.dtype) -> nn.Module:
        key = family, dtype
        if key not in made:
            more = {"index_n_heads": 16, "seed": 2} if family == "mistral_large4" else {}
            made[key] = mxfp4_compile.optimize(tiny_model(family, dtype=dtype, **more), verify=False)
        return made[key]

    return model


HALF, SINGLE = torch.bfloat16, torch.float32
FAMILIES = ["gpt_oss", "qwen3_next", "mistral_large4", "llama4", "zaya", "qwen3_moe", "nemotron_h", "gemma4"]
QUICK = {"gpt_oss", "qwen3_moe", "qwen3_next"}


@pytest.mark.parametrize("dtype", [HALF, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_what_is_right_is_used_and_checked_by_the_layer(models: Any, family: str, dtype: torch.dtype) -> None:
    model = models(family, dtype)
    recorded(model)
    runtime = runtime_of(model)
    for rows in (1, 4):
        assert runtime.step(rows, 20) is not None, str(runtime.report)
    assert not runtime.report.notes
    assert {c.made for c in runtime.report.captures} == {"eager layers, own attention"}


# Mutations: (family whose layers they are about, what is exchanged by what).


def mask_of(kind: str, change: Callable[[Tensor, Clock], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        right = kinds._MASKS[kind]
        patch.setitem(kinds._MASKS, kind, lambda clock, forms: change(right(clock, forms).clone(), clock))

    return apply


def without(slot: int) -> Callable[[Tensor, Clock], Tensor]:
    def change(mask: Tensor, clock: Clock) -> Tensor:
        mask[..., slot] = False
        return mask

    return change


def one_more(mask: Tensor, clock: Clock) -> Tensor:
    """A slot that nothing was written to."""
    seen = int(clock.position)
    if seen + 1 < mask.shape[-1]:
        mask[..., seen + 1] = True
    return mask


def not_the_newest(mask: Tensor, clock: Clock) -> Tensor:
    mask[..., int(clock.position) % mask.shape[-1]] = False
    return mask


def padding_too(mask: Tensor, clock: Clock) -> Tensor:
    return mask | (clock.slots <= clock.position)[: mask.shape[-1]]


def ring_by(less: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A window that is shorter by ``less``."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        def mask(clock: Clock, forms: Any) -> Tensor:
            window = ring.window_of(forms)
            held, allowed = clock.ring_positions(min(window, clock.length))
            return (allowed & (held > clock.position - window + less))[:, None, None, :]

        patch.setitem(kinds._MASKS, "sliding_attention", mask)

    return apply


def chunk_as_window(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(kinds._MASKS, "chunked_attention", ring.mask)


def chunk_without_padding(patch: pytest.MonkeyPatch) -> None:
    right = kinds._MASKS["chunked_attention"]

    def mask(clock: Clock, forms: Any) -> Tensor:
        other = copy.copy(clock)
        other.padding = torch.zeros_like(clock.padding)
        return right(other, forms)

    patch.setitem(kinds._MASKS, "chunked_attention", mask)


def scaled(by: float) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        right = attention.reference

        def wrong(
            query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sinks: Any, scaling: float, cap: Any
        ) -> Any:
            return right(query, keys, values, mask, sinks, scaling * by, cap)

        patch.setattr(attention, "reference", wrong)

    return apply


def no_sinks(patch: pytest.MonkeyPatch) -> None:
    right = attention.reference
    patch.setattr(attention, "reference", lambda q, k, v, m, sinks, s, c: right(q, k, v, m, None, s, c))


def heads_turned(patch: pytest.MonkeyPatch) -> None:
    right = attention.reference
    patch.setattr(attention, "reference", lambda q, k, v, *rest: right(q, k.flip(1), v.flip(1), *rest))


def positions_by(n: int) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        right = DecodeStep._run

        def run(self: DecodeStep) -> None:
            self.position_ids.add_(n)
            right(self)

        patch.setattr(DecodeStep, "_run", run)

    return apply


def slot_by(view: type, n: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Keys and values in the slot ``n`` further."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        def update(self: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            slot = (getattr(self, "slot", self.position) + n).clamp(0, self.keys.shape[2] - 1)
            self.keys.index_copy_(2, slot, keys)
            self.values.index_copy_(2, slot, values)
            return self.keys, self.values

        patch.setattr(view, "update", update)

    return apply


def values_not_written(patch: pytest.MonkeyPatch) -> None:
    def update(self: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.keys.index_copy_(2, self.position, keys)
        return self.keys, self.values

    patch.setattr(full.FullView, "update", update)


def ring_slots_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Clock, "tick", lambda self: None)


def not_advanced(patch: pytest.MonkeyPatch) -> None:
    """Row 1 has the tokens of row 0."""
    right = full.copy_rows
    patch.setattr(full, "copy_rows", lambda target, source: right(target, source[:1]))


def state_not_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(states.StatesView, "update_recurrent_state", lambda self, new, layer_idx, state_idx=0, **kw: new)


def convolution_not_kept(patch: pytest.MonkeyPatch) -> None:
    def update(self: Any, new: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return torch.cat([self.conv_states[state_idx], new], dim=-1)

    patch.setattr(states.StatesView, "update_conv_state", update)


def convolution_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        states.StatesView, "get_conv_state", lambda self, i, state_idx=0: self.conv_states[state_idx].roll(1, -1)
    )


def indexer_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(indexed.IndexedView, "update_indexer", lambda self, new, layer_idx: self.indexer_keys)


def indices_left_out(patch: pytest.MonkeyPatch) -> None:
    right = attention.attention_forward

    def everything(*args: Any, indices: Any = None, **kwargs: Any) -> Any:
        return right(*args, **kwargs)

    attention._register()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, attention.NAME, everything)


def hybrid_states_not_filled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hybrid.HybridView, "fill", lambda self, layer, seen: self.attention.fill(layer, seen))


MUTATIONS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "mask: the first token": ("qwen3_moe", mask_of("full_attention", without(0))),
    "mask: a token within": ("qwen3_moe", mask_of("full_attention", without(5))),
    "mask: the newest token": ("qwen3_moe", mask_of("full_attention", not_the_newest)),
    "mask: a slot too many": ("qwen3_moe", mask_of("full_attention", one_more)),
    "mask: padding": ("qwen3_moe", mask_of("full_attention", padding_too)),
    "mask of a full layer: a token within": ("gpt_oss", mask_of("full_attention", without(3))),
    "window: one token less": ("gpt_oss", ring_by(1)),
    "window: two tokens less": ("gpt_oss", ring_by(2)),
    "window: a slot within": ("gpt_oss", mask_of("sliding_attention", without(2))),
    "window: the newest token": ("gpt_oss", mask_of("sliding_attention", not_the_newest)),
    "window: padding": ("gpt_oss", mask_of("sliding_attention", padding_too)),
    "chunk: a window": ("llama4", chunk_as_window),
    "chunk: counted from padding": ("llama4", chunk_without_padding),
    "chunk: the newest token": ("llama4", mask_of("chunked_attention", not_the_newest)),
    "position: one further": ("qwen3_moe", positions_by(1)),
    "position: one behind": ("gpt_oss", positions_by(-1)),
    "position: far away": ("llama4", positions_by(64)),
    "slot: one further": ("qwen3_moe", slot_by(full.FullView, 1)),
    "slot: one behind": ("qwen3_moe", slot_by(full.FullView, -1)),
    "slot of a ring: one further": ("gpt_oss", slot_by(ring.RingView, 1)),
    "slot of a ring: always the same": ("gpt_oss", ring_slots_late),
    "slot: keys without values": ("qwen3_moe", values_not_written),
    "rows: those of row 0": ("qwen3_moe", not_advanced),
    "scale: 5% more": ("qwen3_moe", scaled(1.05)),
    "scale: 20% less": ("gpt_oss", scaled(0.8)),
    "scale: twice": ("mistral_large4", scaled(2.0)),
    "sinks left out": ("gpt_oss", no_sinks),
    "heads in another order": ("gpt_oss", heads_turned),
    "state not kept": ("qwen3_next", state_not_kept),
    "convolution not kept": ("zaya", convolution_not_kept),
    "convolution one column further": ("qwen3_next", convolution_by_one),
    "states of a hybrid layer not filled": ("zaya", hybrid_states_not_filled),
    "indexer not written": ("mistral_large4", indexer_not_written),
    "indices left out": ("mistral_large4", indices_left_out),
}


@contextmanager
def only_own_attention(model: nn.Module) -> Iterator[Any]:
    """No second way of making a step, which might be right."""
    runtime = runtime_of(model)
    ways, runtime._ways = runtime._ways, lambda rows: [Way("eager", own=True)]
    try:
        yield runtime
    finally:
        runtime._ways = ways


@pytest.mark.parametrize("dtype", [HALF, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "name", [n if f in QUICK else pytest.param(n, marks=pytest.mark.slow) for n, (f, _) in MUTATIONS.items()]
)
def test_mutations(models: Any, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    family, mutate = MUTATIONS[name]
    model = models(family, dtype)
    recorded(model)
    mutate(monkeypatch)
    with only_own_attention(model) as runtime:
        assert runtime.step(4, 20) is None, runtime.report.captures
        assert any("not used, " in note for note in runtime.report.notes), runtime.report.notes


def test_experts_chosen_otherwise_for_one_token_are_not_a_fault(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of a router that is nearly undecided: another token decides."""
    model = models("qwen3_moe", HALF)
    recorded(model)
    router = model.model.layers[1].mlp.gate
    calls, forward = [], type(router).forward

    def undecided(self: nn.Module, hidden: Tensor) -> Any:
        logits, weights, ids = forward(self, hidden)
        if self is router and inside:
            calls.append(1)
            if len(calls) == 1:
                ids = (ids + 1) % 8
        return logits, weights, ids

    inside: list[int] = []
    run = DecodeStep.run_taught

    def taught(self: DecodeStep, teach: Any) -> None:
        inside.append(1)
        run(self, teach)
        inside.clear()

    monkeypatch.setattr(type(router), "forward", undecided)
    monkeypatch.setattr(DecodeStep, "run_taught", taught)
    assert runtime_of(model).step(2, 20) is not None, str(runtime_of(model).report)
    assert len(calls) > 3  # the condition was tried again


def test_layers_that_cannot_be_run_alone_are_checked_by_logits_and_that_is_said(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("qwen3_moe", HALF)
    recorded(model)

    def fails(*args: Any) -> None:
        raise RuntimeError("no copy of this layer")

    monkeypatch.setattr("mxfp4_compile.runtime.layer_check._widened", fails)
    runtime = runtime_of(model)
    assert runtime.step(2, 20) is not None
    assert "checked by whole logits, not by the layer (CannotCheck: RuntimeError: no copy of this layer" in str(
        runtime.report
    )
