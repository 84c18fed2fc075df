"""What a launch can be told: which kernels, with which tiles. Read from and written to JSON entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Regime = Literal["vector", "scan", "sorted"]

# The sizes that each kernel takes; the keys of a configuration's entry besides the launch options.
SIZES: dict[str, tuple[str, ...]] = {
    "vector": ("ROWS", "BLOCK", "PDL"),
    "scan": ("BM", "BT", "QUADS", "UNROLL", "WAIT", "SPLIT_K", "AHEAD", "PDL"),
    "sorted": ("BM", "BT", "QUADS", "UNROLL", "WAIT", "GROUP", "TAIL", "MERGE", "FINE", "SPLIT_K", "AHEAD", "PDL"),
}


@dataclass(frozen=True)
class Tiles:
    """Block sizes and launch options of one kernel; ``registers`` caps them per thread, 0 leaves them."""

    warps: int
    stages: int
    sizes: tuple[tuple[str, int], ...]
    registers: int = 0

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    def with_size(self, name: str, size: int) -> Tiles:
        """The same, but for one size."""
        return replace(self, sizes=tuple((k, size if k == name else v) for k, v in self.sizes))

    def __str__(self) -> str:
        parts = [f"{name}={size}" for name, size in self.sizes] + [f"warps={self.warps}", f"stages={self.stages}"]
        return " ".join(parts + ([f"registers={self.registers}"] if self.registers else []))


@dataclass(frozen=True)
class TileChoice:
    """The kernels of the two projections for a number of tokens; "sorted" goes with "sorted" only.

    ``fp8``: both multiply e4m3 ("sorted" only, on weights of layout "sm89_fp8").
    """

    up_regime: Regime
    up: Tiles
    down_regime: Regime
    down: Tiles
    fp8: bool = False

    def __str__(self) -> str:
        return f"{'fp8 ' if self.fp8 else ''}up {self.up_regime} {self.up}; down {self.down_regime} {self.down}"


def tiles_of(entry: Mapping[str, Any]) -> Tiles:
    """The tiles of one projection's entry."""
    sizes = tuple((k, v) for k, v in entry.items() if k not in ("kernel", "warps", "stages", "registers"))
    return Tiles(entry["warps"], entry["stages"], sizes, entry.get("registers", 0))


def entry_of(regime: Regime, tiles: Tiles) -> dict[str, Any]:
    """Inverse of ``tiles_of``, with the kernel's name."""
    entry = {"kernel": regime, **dict(tiles.sizes), "warps": tiles.warps, "stages": tiles.stages}
    return {**entry, "registers": tiles.registers} if tiles.registers else entry


def choice_of(up: Mapping[str, Any], down: Mapping[str, Any], fp8: bool = False) -> TileChoice:
    """The choice of two projections' entries."""
    return TileChoice(up["kernel"], tiles_of(up), down["kernel"], tiles_of(down), fp8)


def check_entry(entry: Any) -> None:
    """ValueError unless a projection's entry, from a file that anyone may have written, is one."""
    if not isinstance(entry, dict) or entry.get("kernel") not in get_args(Regime):
        raise ValueError(f"{entry!r} names no kernel")
    wanted = {"kernel", "warps", "stages", *SIZES[entry["kernel"]]}
    if not wanted <= entry.keys() <= wanted | {"registers"}:
        raise ValueError(f"an entry of kernel {entry['kernel']} has {sorted(entry)}, needs {sorted(wanted)}")
    for key, value in entry.items():
        if key != "kernel" and (type(value) is not int or not _fits(key, value)):
            raise ValueError(f"{key} is {value!r}")


def _fits(key: str, value: int) -> bool:
    """Whether a kernel can be built with this size or option: blocks and warps are powers of two."""
    if key in ("BM", "BT", "ROWS", "BLOCK", "UNROLL", "SPLIT_K", "GROUP", "warps"):
        return value > 0 and value.bit_count() == 1 and value <= (32 if key == "warps" else 1024)
    return {"stages": 1, "registers": 0}.get(key, 0) <= value <= {"stages": 8, "registers": 255}.get(key, 128)
