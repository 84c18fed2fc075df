"""Which kernels with which tiles run for T tokens: rules in configs/*.json, applied to (E, K, H, I, T).

A file holds an ordered list; the first entry whose bounds all hold is taken. Bounds ("max_rows",
"min_weights") are on tokens, pairs (tokens times top_k), rows (mean pairs per expert hit, under uniform
routing) and weights (hidden times intermediate size), so that a shape nobody tuned falls between its
neighbours.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

Regime = Literal["vector", "scan", "sorted"]

_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Tiles:
    """Block sizes and launch options of one kernel; ``registers`` caps them per thread, 0 leaves them."""

    warps: int
    stages: int
    sizes: tuple[tuple[str, int], ...]
    registers: int = 0

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]


@dataclass(frozen=True)
class Choice:
    """The kernels of the two projections for a number of tokens; "sorted" goes with "sorted" only."""

    up_regime: Regime
    up: Tiles
    down_regime: Regime
    down: Tiles


@cache
def load_config(architecture: str) -> dict[str, Any]:
    """The tuned data of ``architecture`` ("sm90"), or of the nearest one there is."""
    path = _CONFIGS / f"{architecture}.json"
    if not path.exists():
        path = _CONFIGS / "default.json"
    return json.loads(path.read_text())


def _tiles(entry: dict[str, Any]) -> Tiles:
    sizes = tuple((k, v) for k, v in entry.items() if k not in ("kernel", "warps", "stages", "registers"))
    return Tiles(entry["warps"], entry["stages"], sizes, entry.get("registers", 0))


def experts_hit(pairs: int, num_experts: int) -> float:
    """Expected number of experts with a pair under uniform routing."""
    return num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** pairs) if pairs else 0.0


# fp16 and fp32 tokens take twice the registers and shared memory: no wider tiles than for this many rows.
_WIDE_ROWS = 20.0


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
    architecture: str, num_experts: int, top_k: int, hidden: int, inner: int, tokens: int, bf16: bool = True
) -> Choice:
    """The kernels for ``tokens`` tokens of ``top_k`` experts each, of ``num_experts`` of hidden x inner."""
    pairs = tokens * top_k
    facts = {
        "tokens": tokens,
        "pairs": pairs,
        "rows": _rows(pairs, num_experts, bf16),
        "weights": hidden * inner,
    }
    for entry in load_config(architecture)["moe"]:
        if _fits(entry, facts):
            up, down = entry["up"], entry["down"]
            return Choice(up["kernel"], _tiles(up), down["kernel"], _tiles(down))
    raise ValueError(f"no entry of configs/{architecture}.json fits {facts}")


@lru_cache(maxsize=1024)
def choose_linear(architecture: str, num_experts: int, rows: int, bf16: bool = True) -> Tiles:
    """The tiles of grouped_linear for ``rows`` rows: those of a sorted down-projection."""
    mean = _rows(rows, num_experts, bf16)
    for entry in load_config(architecture)["moe"]:
        if entry["down"]["kernel"] == "sorted" and entry.get("max_rows", math.inf) >= mean:
            return _tiles(entry["down"])
    raise ValueError(f"no sorted entry of configs/{architecture}.json fits {mean} rows per expert")
