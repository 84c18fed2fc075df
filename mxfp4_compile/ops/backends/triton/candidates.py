"""Kernels and tiles that are worth trying for a layer and a number of tokens; tune.py tries them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from ...synthetic import LayerShape
from .select import experts_hit, load_config
from .tiles import Regime, Tiles, choice_of

_SHARED_BYTES = 225 << 10

Candidate = tuple[Regime, Tiles]


def regimes(shape: LayerShape, tokens: int) -> list[Regime]:
    """Kinds of kernels that are worth trying for a number of tokens."""
    pairs = tokens * shape.top_k
    found: list[Regime] = []
    if pairs <= 32:
        found.append("vector")
    if pairs <= 128:
        found.append("scan")
    if pairs >= 16:
        found.append("sorted")
    return found


def candidates(arch: str, shape: LayerShape, tokens: int) -> list[Candidate]:
    """Tiles worth trying: the shipped rules' for any number of tokens first, then a grid in random order."""
    kinds = regimes(shape, tokens)
    shipped = [choice_of(e["up"], e["down"]) for e in load_config(arch)["moe"]]
    known = [(r, t) for c in shipped for r, t in ((c.up_regime, c.up), (c.down_regime, c.down)) if r in kinds]
    rows = tokens * shape.top_k / max(experts_hit(tokens * shape.top_k, shape.num_experts), 1.0)
    # Of the tiles that others were tuned to, those near this number of rows first.
    known.sort(key=lambda c: abs(math.log2(dict(c[1].sizes).get("BT", 1) / rows)))
    grid = [(r, t) for r in kinds for t in _grid(arch, r, rows)]
    random.Random(0).shuffle(grid)
    return list(dict.fromkeys([*known, *grid]))


def _grid(arch: str, regime: Regime, rows: float) -> Iterator[Tiles]:
    dependent = _dependent(arch)
    if regime == "vector":
        for count, block, warps in itertools.product((8, 4, 2), (8, 16, 32, 64), (2, 4, 8)):
            if 16 <= count * block * 16 / (warps * 32) <= 64:
                yield Tiles(warps, 1, (("ROWS", count), ("BLOCK", block), ("PDL", int(dependent))))
        return
    # Each: (rows of weights, warps), columns, stages, QUADS, UNROLL, (TAIL, MERGE, FINE), SPLIT_K, AHEAD.
    blocks = ((64, 2), (64, 4), (128, 4), (256, 4))
    none = ((0, 0, 0),)
    tails: tuple[tuple[int, int, int], ...]
    tiles: Iterator[tuple[tuple[int, int], int, int, int, int, tuple[int, int, int], int, int]]
    if rows <= 10:
        tiles = itertools.chain(
            itertools.product((*blocks, (256, 8)), (8, 16), (3, 4, 5), (0, 1), (1, 2), none, (1,), (0,)),
            itertools.product(blocks, (8,), (2, 3), (1,), (1,), none, (1,), (2, 4)),
        )
        # Columns of blocks (matmul/), seen right on Hopper only.
        if arch == "sm90":
            splits = (1, 2, 4) if regime == "scan" else (1,)
            few = itertools.product(blocks, (1, 2, 4), (2, 3, 4), (1,), (1, 2, 4), none, splits, (0, 1))
            tiles = itertools.chain(few, tiles)
    elif rows <= 80:
        tails = ((0, 0, 0), (16, 0, 0), (16, 1, 0), (32, 0, 0), (32, 1, 0), (0, 0, 1), (16, 1, 1))
        tiles = itertools.product(
            ((64, 4), (128, 4), (128, 8), (256, 4), (256, 8)), (16, 32, 64, 128), (3, 4, 6), (0, 1), (1, 2), tails,
            (1, 2), (0,),
        )  # fmt: skip
    else:
        tails = ((0, 0, 1), (16, 1, 1), (32, 1, 1), (0, 0, 0), (32, 0, 0), (32, 1, 0), (64, 0, 0))
        tiles = itertools.product(
            ((128, 4), (128, 8), (256, 8)), (64, 128, 256), (3, 4, 5, 6), (0, 1), (1, 2), tails, (1,), (0,)
        )
    for (bm, warps), bt, stages, quads, unroll, (tail, merge, fine), split, ahead in tiles:
        # On Hopper mma.sync where wgmma does not apply, and only there; wgmma needs its WAIT (matmul/).
        wgmma = arch == "sm90" and bt >= 16 and warps >= 4
        if (arch == "sm90" and quads == wgmma) or tail * 2 > bt or (fine and bt < 64) or bm * bt // (warps * 32) > 128:
            continue
        codes, tokens = bm * 34, (max(bt, 8) + merge * tail) * 128
        steps = ahead if ahead and bt >= 8 else unroll * max(4 // bt, 1)
        # With AHEAD weights are in registers, of which every step takes so many.
        if ahead and (steps * bm // (warps * 16) * 4 > 64 or (unroll == 4 and bt != 4)):
            continue
        stage = steps * (tokens if ahead else codes + tokens)
        if stages * stage > _SHARED_BYTES or (unroll * stages > 8 and not ahead) or (stages > 3 and ahead):
            continue
        sizes = [("BM", bm), ("BT", bt), ("QUADS", quads), ("UNROLL", unroll), ("WAIT", int(wgmma))]
        if regime == "sorted":
            sizes += [("GROUP", 8), ("TAIL", tail), ("MERGE", merge), ("FINE", fine)]
        elif tail or fine:
            continue
        # Programs that have their first weights on the way while they wait do no harm when they start early.
        pdl = (2 if ahead else 1) if dependent else 0
        yield Tiles(warps, stages, (*sizes, ("SPLIT_K", split), ("AHEAD", ahead), ("PDL", pdl)))


def _dependent(arch: str) -> bool:
    """Whether kernels may start before the one before them has ended (dependent.py)."""
    return arch.startswith("sm") and int(arch[2:]) >= 90
