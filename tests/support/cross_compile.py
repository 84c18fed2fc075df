"""Kernels of the native backend compiled for GPUs that need not be here, and the text that they come to."""

from __future__ import annotations

import hashlib
import re
from functools import cache, lru_cache

import pytest
import torch
from model_activations import GPT_OSS

from mxfp4_compile.spec import Activation, MoEParams

# Shared memory a program may use, and what a tensor-core instruction is called there.
TARGETS = {
    "sm80": ("cuda", 80, 163 << 10, r"mma\.sync"),
    "sm90": ("cuda", 90, 227 << 10, r"wgmma\.mma_async|mma\.sync"),
    "sm100": ("cuda", 100, 227 << 10, r"tcgen05\.mma|mma\.sync"),
    "sm120": ("cuda", 120, 99 << 10, r"mma\.sync"),
    "gfx942": ("hip", "gfx942", 64 << 10, r"v_mfma"),
    "gfx950": ("hip", "gfx950", 160 << 10, r"v_mfma"),
}
# Where activations may be fp8, and its instruction.
FP8_TARGETS = {
    "sm89": ("cuda", 89, 99 << 10, r"mma\.sync\S*e4m3"),
    "sm90": ("cuda", 90, 227 << 10, r"wgmma\.mma_async\S*e4m3"),
    "sm100": ("cuda", 100, 227 << 10, r"tcgen05\.mma\S*f8f6f4|mma\.sync\S*e4m3"),
    "sm120": ("cuda", 120, 99 << 10, r"mma\.sync\S*e4m3"),
}
TOKENS = (1, 8, 40, 512, 4096)
FP8_TOKENS = (1, 8, 40, 512, 1024, 1500, 4096)
SHAPES = {
    "qwen3": (128, 8, 2048, 768, Activation("silu")),
    "gpt_oss": (32, 4, 2880, 2880, GPT_OSS),
    "ragged": (60, 4, 1000, 1408, Activation("gelu_tanh")),
    "narrow": (64, 8, 72, 40, Activation("silu")),
}
_POINTERS = {
    "x": "*bf16", "h": "*bf16", "y": "*bf16", "out": "*bf16", "bias": "*bf16", "codes": "*i32",
    "scales": "*i32", "ids": "*i64", "weights": "*fp32", "offsets": "*i32", "order": "*i32",
    "pairs": "i32", "x_scales": "*fp32", "bases": "*u8",
}  # fmt: skip


def layers(targets: dict[str, tuple], tokens: tuple[int, ...]) -> list[tuple[str, str, int]]:
    """(target, shape, tokens) of the layers to compile.

    The rules of sm90 are measured: each shape with each number of tokens. Elsewhere, and for weights laid out for
    fp8, every two of target, shape and number of tokens meet, but not every three.
    """
    out = []
    others = [target for target in targets if target != "sm90"]
    for target in targets:
        # Fewer steps than are loaded ahead, which only sm90's tiles do.
        shapes = [shape for shape in SHAPES if shape != "narrow" or target == "sm90"]
        for n, count in enumerate(tokens):
            if target != "sm90":
                chosen = [shapes[(n + others.index(target)) % len(shapes)]]
            elif tokens is FP8_TOKENS:
                chosen = [shapes[(n + 2) % 4], shapes[(n + 3) % 4]]
            else:
                chosen = shapes
            out += [(target, shape, count) for shape in SHAPES if shape in chosen]
    return out


def compile_step(step, gpu, absent: set[str], pointers: dict[str, str] | None = None):
    """A launch's kernel for ``gpu``, and whether it had to be compiled twice to suit the order of K that Triton chose.

    ``absent``: its arguments that are None. ``pointers``: types of arguments where they are others than usual.
    """
    import triton
    from triton.compiler import ASTSource

    types = _POINTERS | (pointers or {})
    none = {name: None for name in step.kernel.arg_names if name in absent}
    constant = lambda name: name in none or name in step.constants
    signature = {name: "constexpr" if constant(name) else types[name] for name in step.kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind.startswith("*")}

    def once():
        source = ASTSource(step.kernel, signature, constexprs={**step.constants, **none}, attrs=aligned)
        return triton.compile(source, target=gpu, options=dict(step.options))

    kernel = once()
    again = step.settle(kernel.asm["ttgir"])
    return (once() if again else kernel), again


class HopperDriver:
    """Triton's driver of a Hopper that is not here, as far as compiling for it goes."""

    def get_current_device(self) -> int:
        return 99  # no real one, whose compiled kernels are remembered under its number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@cache
def release() -> str:
    """Of Triton, "3.9.0"; skips the test where there is none."""
    triton = pytest.importorskip("triton")
    return triton.__version__.split("+")[0]


@lru_cache(maxsize=16)
def compiled(target: str, shape: str, tokens: int, part: str, fp8: bool = False):
    """A layer's kernel, compiled as a launch for ``tokens`` tokens would, and its regime. ``fp8``: of those weights."""
    from triton.backends.compiler import GPUTarget

    from mxfp4_compile.ops.backends.triton.moe import LaunchPlan, pairs_class
    from mxfp4_compile.ops.backends.triton.select import choose

    backend, arch = (FP8_TARGETS if fp8 else TARGETS)[target][:2]
    e, top_k, h, i, act = SHAPES[shape]
    params = MoEParams(e, h, i, act, "halves", 0, False, torch.bfloat16, torch.bfloat16)
    choice = choose(target, e, top_k, h, i, tokens, fp8=fp8)
    pairs = tokens * top_k
    bits = 2 if fp8 else int(backend == "cuda")
    step = getattr(
        LaunchPlan(target, params, top_k, h, False, bits, choice, pairs_class(choice, pairs), pairs >= e), part
    )
    absent = set() if shape == "gpt_oss" else {"bias"}
    if not choice.fp8:
        absent |= {"x_scales", "bases"}
    if part != "combine" and not (part == "down" and choice.down_regime == "vector"):
        absent.add("weights")
    pointers = {"x": "*fp8e4nv"} if choice.fp8 and part in ("up", "down") else {}
    if part.startswith("quantize"):
        pointers = {"out": "*fp8e4nv", "scales": "*fp32"}
    kernel, _ = compile_step(step, GPUTarget(backend, arch, 64 if backend == "hip" else 32), absent, pointers)
    regime = choice.up_regime if part == "up" else choice.down_regime
    return kernel, "fp8" if choice.fp8 else regime


# A shape of whole steps, where rules count registers; 64 pairs are scanned, more are sorted.
_LOOPS_OF = (128, 8, 2048, 768)


def loop_kernels() -> dict[str, tuple]:
    """name -> (part, kernel, tiles) of each kernel that rules give few tokens, but for when the next one may start."""
    from mxfp4_compile.ops.backends.triton.select import load_config
    from mxfp4_compile.ops.backends.triton.tiles import tiles_of

    found = {}
    for entry in load_config("sm90")["moe"]:
        for part in ("up", "down"):
            if entry[part].get("QUADS"):
                tiles = tiles_of(entry[part]).with_size("PDL", 1)
                found[f"{part} {entry[part]['kernel']} {tiles}"] = part, entry[part]["kernel"], tiles
    return found


@lru_cache(maxsize=4)
def compiled_loop(name: str):
    """One of ``loop_kernels``, whether it had to be compiled twice, and its rows of weights."""
    from triton.backends.compiler import GPUTarget

    from mxfp4_compile.ops.backends.triton.moe import LaunchPlan, pairs_class
    from mxfp4_compile.ops.backends.triton.tiles import TileChoice

    part, regime, tiles = loop_kernels()[name]
    choice = TileChoice(regime, tiles, regime, tiles)
    e, top_k, hidden, inner = _LOOPS_OF
    params = MoEParams(e, hidden, inner, Activation("silu"), "halves", 0, False, torch.bfloat16, torch.bfloat16)
    pairs = 64 if regime == "scan" else 512
    step = getattr(LaunchPlan("sm90", params, top_k, hidden, False, 1, choice, pairs_class(choice, pairs), False), part)
    kernel, again = compile_step(step, GPUTarget("cuda", 90, 32), {"bias", "weights", "x_scales", "bases"})
    return kernel, again, tiles["BM"]


# What of a text says where its source lies, which compiler wrote it, or nothing.
_ABOUT_SOURCE = (".loc", ".file", ".version", "$L__tmp", ".Ltmp", "$L__func_begin", "$L__func_end", ".Lfunc_")
_DEBUG = (".section\t.debug", ".section .debug", '.section\t".debug')


def text_of(kernel) -> str:
    """The PTX or AMD assembly of a kernel without comments, line numbers and the version of PTX."""
    return text_without_lines(kernel.asm.get("ptx") or kernel.asm["amdgcn"])


def text_without_lines(text: str) -> str:
    """See ``text_of``."""
    comment = ";" if ".amdgcn_target" in text else "//"
    lines = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith(_DEBUG):  # to the end
            break
        if stripped and not stripped.startswith((comment, *_ABOUT_SOURCE)):
            lines.append(re.sub(rf"\s*{comment}.*$", "", line.rstrip()))
    return "\n".join(lines) + "\n"


def digest_of(kernel) -> str:
    """Of ``text_of``."""
    return hashlib.sha256(text_of(kernel).encode()).hexdigest()[:16]
