"""The file that ``prepare.py`` writes and ``train.py`` reads: token ids of each text, and their tokenizer."""

from __future__ import annotations

import json
import lzma
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

END = "<|end|>"
"""Stands before each file of a text; the model's own text begins with it."""

# Ids are two bytes each: the compressor is told.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}]


def pack(file: Path, splits: Mapping[str, array[int]], tokenizer: str, facts: Mapping[str, Any]) -> None:
    """Write texts, each an array of uint16, after a line of JSON that says how long each is."""
    header = {**facts, "tokens": {name: len(ids) for name, ids in splits.items()}, "tokenizer": tokenizer}
    with lzma.open(file, "wb", format=lzma.FORMAT_XZ, filters=_FILTERS) as out:
        out.write(json.dumps(header).encode() + b"\n")
        for ids in splits.values():
            ids = array("H", ids)
            if sys.byteorder == "big":
                ids.byteswap()
            out.write(ids.tobytes())


def unpack(file: Path) -> tuple[dict[str, array[int]], dict[str, Any]]:
    """The texts by name, and what the header says: vocabulary, end, bytes of each text, tokenizer."""
    with lzma.open(file, "rb") as source:
        header = json.loads(source.readline())
        splits = {}
        for name, count in header["tokens"].items():
            ids = array("H")
            ids.frombytes(source.read(2 * count))
            if sys.byteorder == "big":
                ids.byteswap()
            if len(ids) != count:
                raise ValueError(f"{file} ends in the middle of {name}")
            splits[name] = ids
    return splits, header


__all__ = ["END", "pack", "unpack"]
