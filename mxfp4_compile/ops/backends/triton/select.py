"""Which kernels with which tiles run for T tokens: rules in configs/*.json, applied to (E, K, H, I, T).

A file holds an ordered list; the first entry whose bounds all hold is taken. Bounds ("max_rows",
"min_weights") are on tokens, pairs (tokens times top_k), rows (mean pairs per expert hit, under uniform
routing), weights (hidden times intermediate size), outputs (rows of the down-projections of the experts hit)
and ragged (1 where K is not whole steps: its masks take registers), so that a shape nobody tuned falls between
its neighbours. What the user tuned on this GPU (tuned.py) goes before all of it, for exactly its shapes.

Where activations may be fp8, a second list, "moe_fp8", goes before everything; it says from how many rows on that pays.
A third, "backward", has the tiles of gradients' products.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from . import tuned
from .layout import STEP
from .tiles import Regime, TileChoice, Tiles, choice_of, tiles_of
from .tuned import architecture

_CONFIGS = Path(__file__).parent / "configs"


@cache
def load_config(architecture: str) -> dict[str, Any]:
    """The tuned data of ``architecture`` ("sm90"), or of the nearest one there is."""
    path = _CONFIGS / f"{architecture}.json"
    if not path.exists():
        path = _CONFIGS / "default.json"
    return json.loads(path.read_text())


def experts_hit(pairs: int, num_experts: int) -> float:
    """Expected number of experts with a pair under uniform routing."""
    return num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** pairs) if pairs else 0.0


# fp16 and fp32 tokens take twice the registers and shared memory: no wider tiles than for this many rows.
_WIDE_ROWS = 20.0

# More tokens than any rule's bound.
_MANY = 1 << 24


def _rows(pairs: int, num_experts: int, bf16: bool) -> float:
    mean = pairs / max(experts_hit(pairs, num_experts), 1.0)
    return mean if bf16 else min(mean, _WIDE_ROWS)


def _fits(entry: dict[str, Any], facts: dict[str, float]) -> bool:
    return all(
        facts[bound[4:]] <= limit if bound.startswith("max_") else facts[bound[4:]] >= limit
        for bound, limit in entry.items()
        if bound.startswith(("max_", "min_"))
    )


@lru_cache(maxsize=4096)
def choose(
    architecture: str,
    num_experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    tokens: int,
    bf16: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
) -> TileChoice:
    """The kernels for ``tokens`` tokens of ``top_k`` experts each, of ``num_experts`` of hidden x inner.

    With ``device`` and ``dtype`` (of tokens and roundings alike) the user's tuned data come first; without, the
    shipped rules alone decide. ``fp8``: kernels that multiply e4m3 may be chosen.
    """
    pairs = tokens * top_k
    config = load_config(architecture)
    facts = {
        "tokens": tokens,
        "pairs": pairs,
        "rows": _rows(pairs, num_experts, True),
        "weights": hidden * inner,
        "outputs": experts_hit(pairs, num_experts) * hidden,
        "ragged": float(hidden % STEP > 0 or inner % STEP > 0),
    }
    if fp8:
        for entry in config["moe_fp8"]:
            if _fits(entry, facts):
                return choice_of(entry["up"], entry["down"], fp8=True)
    if device is not None and dtype is not None:
        choice = tuned.lookup(device, (num_experts, top_k, hidden, inner), dtype, tokens)
        if choice is not None:
            return choice
    facts["rows"] = _rows(pairs, num_experts, bf16)
    for entry in config["moe"]:
        if _fits(entry, facts):
            return choice_of(entry["up"], entry["down"])
    raise ValueError(f"no entry of configs/{architecture}.json fits {facts}")


@lru_cache(maxsize=1024)
def fp8_from(architecture: str, num_experts: int, top_k: int, hidden: int, inner: int) -> int | None:
    """The smallest number of tokens for which ``choose`` takes kernels that multiply e4m3; None if it never does."""

    def quantized(tokens: int) -> bool:
        return choose(architecture, num_experts, top_k, hidden, inner, tokens, fp8=True).fp8

    if not quantized(_MANY):
        return None
    low, high = 0, _MANY
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if quantized(middle) else (middle, high)
    return high


@lru_cache(maxsize=1024)
def choose_linear(architecture: str, num_experts: int, rows: int, bf16: bool = True) -> Tiles:
    """The tiles of grouped_linear for ``rows`` rows: those of a sorted down-projection."""
    mean = _rows(rows, num_experts, bf16)
    for entry in load_config(architecture)["moe"]:
        bounded = "min_weights" in entry
        if entry["down"]["kernel"] == "sorted" and entry.get("max_rows", math.inf) >= mean and not bounded:
            return tiles_of(entry["down"])
    raise ValueError(f"no sorted entry of configs/{architecture}.json fits {mean} rows per expert")


@dataclass(frozen=True)
class BackwardChoice:
    """The tiles of ``transposed_matmul`` for a backward's two projections."""

    down: Tiles
    up: Tiles


@lru_cache(maxsize=1024)
def choose_backward(architecture: str, num_experts: int, pairs: int, weights: int, bf16: bool = True) -> BackwardChoice:
    """The tiles of a backward of ``pairs`` pairs, of experts of ``weights`` = hidden x inner."""
    facts = {"rows": _rows(pairs, num_experts, bf16), "weights": weights}
    for entry in load_config(architecture)["backward"]:
        if _fits(entry, facts):
            return BackwardChoice(tiles_of(entry["down"]), tiles_of(entry["up"]))
    raise ValueError(f"no entry for a backward of configs/{architecture}.json fits {facts}")


def forget_tuned() -> None:
    """Consult the user's tuned data anew, as they are now."""
    tuned.forget()
    choose.cache_clear()


__all__ = [
    "BackwardChoice",
    "Regime",
    "TileChoice",
    "Tiles",
    "architecture",
    "choose",
    "choose_backward",
    "choose_linear",
    "forget_tuned",
    "fp8_from",
    "load_config",
]  # fmt: skip
