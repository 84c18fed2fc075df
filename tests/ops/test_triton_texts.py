"""The PTX (on AMD the assembly) of every kernel is the one that was recorded, to the letter.

For changes that must leave kernels as they are: code moved, names, arguments. triton_texts.json holds a digest of each
kernel's text without comments and line numbers, for releases of Triton that it was recorded with. After a change that
is meant to change kernels, ``python tests/ops/test_triton_texts.py`` records those of the installed release anew (with
words after it, only kernels whose names have them all: ``... sm90 512``); all take a quarter of an hour. What
changed is to be timed on a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cross_compile import (
    FP8_TARGETS,
    FP8_TOKENS,
    SHAPES,
    TARGETS,
    TOKENS,
    compiled,
    compiled_loop,
    digest_of,
    layers,
    loop_kernels,
    release,
)

RECORDED = Path(__file__).with_name("triton_texts.json")


def layer_kernels():
    """Names of kernels, by (target, shape, tokens, whether fp8) of their layer."""
    from mxfp4_compile.ops.backends.triton.select import choose

    found = {}
    for fp8, targets, counts in ((False, TARGETS, TOKENS), (True, FP8_TARGETS, FP8_TOKENS)):
        for target, shape, tokens in layers(targets, counts):
            quantized = choose(target, *SHAPES[shape][:4], tokens, fp8=fp8).fp8
            found[target, shape, tokens, fp8] = ["up", "down", *(("quantize_x", "quantize_h") if quantized else ())]
    for target in TARGETS:
        found.setdefault((target, "qwen3", 512, False), []).extend(["sort", "combine"])
    name = lambda target, shape, tokens, fp8: f"{target} {shape} {tokens}{' fp8' * fp8}"
    return {layer: {f"{name(*layer)} {part}": part for part in parts} for layer, parts in found.items()}


def cases():
    for target, shape, tokens, fp8 in layer_kernels():
        slow = fp8 or target != "sm90" or shape != "qwen3" or tokens > 8
        name = f"{target}-{shape}-{tokens}{'-fp8' * fp8}"
        yield pytest.param(target, shape, tokens, fp8, id=name, marks=pytest.mark.slow if slow else ())


def recorded():
    texts = json.loads(RECORDED.read_text())
    if release() not in texts:
        pytest.skip(f"no texts were recorded with Triton {release()}; run this file to record them")
    return texts[release()]


def check(name, kernel, wanted):
    assert digest_of(kernel) == wanted[name], (
        f"the text of {name} is not the recorded one. If kernels were meant to change: "
        "python tests/ops/test_triton_texts.py"
    )


@pytest.mark.parametrize(("target", "shape", "tokens", "fp8"), cases())
def test_texts(target, shape, tokens, fp8):
    wanted = recorded()
    for name, part in layer_kernels()[target, shape, tokens, fp8].items():
        check(name, compiled(target, shape, tokens, part, fp8)[0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "-")) for name in loop_kernels()])
def test_texts_of_loops(name):
    check(f"loop {name}", compiled_loop(name)[0], recorded())


def every_kernel():
    """name -> a call that compiles it."""
    found = {}
    for (target, shape, tokens, fp8), names in layer_kernels().items():
        for name, part in names.items():
            found[name] = lambda a=(target, shape, tokens, part, fp8): compiled(*a)[0]
    return found | {f"loop {name}": lambda name=name: compiled_loop(name)[0] for name in loop_kernels()}


def test_every_kernel_is_recorded():
    for texts in json.loads(RECORDED.read_text()).values():
        assert list(texts) == sorted(every_kernel())


def test_a_text_has_no_source_in_it():
    """A comment, a line number, a path and the PTX version count for nothing, an instruction does."""
    from types import SimpleNamespace

    text = (
        ".version 8.7\n.target sm_90a\n{0}\t// a comment\n\t.loc\t1 7 3\n\tadd.s32 %r1, %r2, {1};\n"
        '.file 1 "/a.py"\n\t.section\t.debug_str\n{0}{1}'
    )
    of = lambda *parts: digest_of(SimpleNamespace(asm={"ptx": text.format(*parts)}))
    assert of("", 1) == of("\n// begin", 1)
    assert of("", 1) != of("", 2)


if __name__ == "__main__":
    texts = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    chosen = {n: f for n, f in every_kernel().items() if all(word in n.split() for word in sys.argv[1:])}
    fresh = {name: digest_of(compile_it()) for name, compile_it in chosen.items()}
    texts[release()] = dict(sorted((texts.get(release(), {}) | fresh).items()))
    RECORDED.write_text(json.dumps(texts, indent=0) + "\n")
