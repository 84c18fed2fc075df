"""The MoE layers that ``bench`` and ``tune`` work on, by a model's configuration or by sizes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .models import model_name

if TYPE_CHECKING:
    from ...ops.synthetic import LayerShape


def arguments(trust: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The arguments that both commands have."""
    layer = argparse.ArgumentParser(add_help=False, parents=[trust])
    which = layer.add_mutually_exclusive_group()
    which.add_argument(
        "model", nargs="?", metavar="MODEL", help="a directory or a hub id; only its configuration is read"
    )
    which.add_argument(
        "--shape", type=_sizes, metavar="E,K,H,I", help="experts, experts per token, hidden and intermediate size"
    )
    layer.add_argument("--tokens", type=_counts, metavar="T,T,...", help="numbers of tokens")
    layer.add_argument("--device", default="cuda", metavar="DEVICE", help="cuda, cuda:1, ...; bench: cpu too")
    return layer


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(p.isdecimal() and 1 <= int(p) <= 65536 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 to 65536, as in 1,8,64")
    return tuple(sorted(set(map(int, parts))))


def _sizes(text: str) -> tuple[int, int, int, int]:
    """E, K, H, I of a ``LayerShape``, refused in the words of ``parse_shape`` without importing it, and torch."""
    parts = [p.strip() for p in text.split(",")]
    if len(parts) != 4 or not all(p.isdecimal() for p in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape E,K,H,I (experts, experts per token, hidden, intermediate size)"
        )
    experts, top_k, hidden, intermediate = sizes = tuple(map(int, parts))
    if min(sizes) < 1 or top_k > experts:
        raise argparse.ArgumentTypeError(f"E,K,H,I = {sizes}: all must be at least 1, and K no more than E")
    return experts, top_k, hidden, intermediate


def layers(args: argparse.Namespace) -> tuple[str, list[LayerShape]]:
    """What the arguments name, in words, and its MoE layers."""
    from ...ops.synthetic import QWEN3_30B_A3B, LayerShape

    if args.shape:
        return "the given sizes", [LayerShape(*args.shape)]
    if not args.model:
        return "the layer of Qwen3-30B-A3B", [QWEN3_30B_A3B]
    import torch

    from ..demo import quiet
    from ..model_shapes import model_shapes

    with quiet():
        return args.model, model_shapes(
            model_name(args.model), torch.bfloat16, trust_remote_code=args.trust_remote_code
        )
