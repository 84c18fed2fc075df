"""Which kernels with which tiles run for T tokens: rules in configs/*.json, applied to (E, K, H, I, T).

A file holds, per regime, tiles ordered by the mean number of rows per expert hit that they suit, so that a
shape nobody tuned falls between its neighbours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
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
    """The regime for a number of tokens and the tiles of its two projections."""

    regime: Regime
    up: Tiles
    down: Tiles


@lru_cache(maxsize=None)
def load_config(architecture: str) -> dict[str, Any]:
    """The tuned data of ``architecture`` ("sm90"), or of the nearest one there is."""
    path = _CONFIGS / f"{architecture}.json"
    if not path.exists():
        path = _CONFIGS / "default.json"
    return json.loads(path.read_text())


def _tiles(entry: dict[str, int]) -> Tiles:
    sizes = tuple((k, v) for k, v in entry.items() if k not in ("warps", "stages", "registers"))
    return Tiles(entry["warps"], entry["stages"], sizes, entry.get("registers", 0))


def experts_hit(pairs: int, num_experts: int) -> float:
    """Expected number of experts with a pair under uniform routing."""
    return num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** pairs) if pairs else 0.0


@lru_cache(maxsize=4096)
def choose(architecture: str, num_experts: int, top_k: int, tokens: int) -> Choice:
    """The regime and tiles for ``tokens`` tokens of ``top_k`` experts each out of ``num_experts``."""
    config = load_config(architecture)
    pairs = tokens * top_k
    if tokens <= config["vector"]["max_tokens"]:
        return Choice("vector", _tiles(config["vector"]["up"]), _tiles(config["vector"]["down"]))
    regime: Regime = "scan" if pairs <= config["scan"]["max_pairs"] else "sorted"
    mean = pairs / max(experts_hit(pairs, num_experts), 1.0)
    for entry in config[regime]["tiles"]:
        if mean <= entry["per_expert"]:
            break
    return Choice(regime, _tiles(entry["up"]), _tiles(entry["down"]))


@lru_cache(maxsize=1024)
def choose_linear(architecture: str, num_experts: int, rows: int) -> Tiles:
    """The tiles of grouped_linear for ``rows`` rows."""
    mean = rows / max(experts_hit(rows, num_experts), 1.0)
    entry: dict[str, Any] = {}
    for entry in load_config(architecture)["sorted"]["tiles"]:
        if mean <= entry["per_expert"]:
            break
    return _tiles(entry["down"])
