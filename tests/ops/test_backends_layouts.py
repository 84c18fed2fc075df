"""Prepared layouts: the way back is exact for every backend, and the orders are the libraries' own."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from model_activations import GPT_OSS
from signatures.extract import RESULT, K, N, digest, pattern, scale_pattern

import mxfp4_compile  # noqa: F401  (registers the backends)
from mxfp4_compile.ops import permutations, schema
from mxfp4_compile.ops.arguments import Slot
from mxfp4_compile.ops.backends.flashinfer import CUTLASS, TRTLLM
from mxfp4_compile.ops.backends.triton_kernels import layout as tk
from mxfp4_compile.ops.backends.triton_kernels.backend import scale_warps
from mxfp4_compile.ops.registry import get_backend
from mxfp4_compile.ops.target import Parallel, Request, Target
from mxfp4_compile.spec import Activation, MoEParams

EXTRACTED = json.loads(RESULT.read_text())["layouts"]

LAYOUTS = [
    ("reference", "canonical"),
    ("cpu", "canonical"),
    ("triton", "sm80"),
    ("triton", "nibbles"),
    ("triton", "sm89_fp8"),
    *[("triton_kernels", layout) for layout in tk.LAYOUTS],
    ("humming", "interleaved"),
    ("humming", "native"),
    ("flashinfer_trtllm", "bf16-512"),
    ("flashinfer_trtllm", "mxfp8-512"),
    ("flashinfer_cutlass", "sm90-512"),
    ("marlin", "marlin"),
    ("aiter", "a16w4"),
]
FUSED_ONLY = {"flashinfer_trtllm", "flashinfer_cutlass", "marlin", "aiter"}


def params(activation=GPT_OSS, layout="halves", half=0, *, e=3, h=201, i=72) -> MoEParams:
    gated = activation.gated
    return MoEParams(
        e, h, i, activation, layout if gated else "none", half if gated else 0, False, torch.bfloat16, torch.bfloat16
    )


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@pytest.mark.parametrize(("gate", "half"), [("halves", 0), ("halves", 1), ("interleaved", 0), ("interleaved", 1)])
@pytest.mark.parametrize("gated", [True, False])
def test_recover_is_exact(name: str, layout: str, gate: str, half: int, gated: bool) -> None:
    """Weights, scales and biases, at sizes that are multiples of nothing and at ones that need no padding."""
    if not gated and (gate, half) != ("halves", 0):
        pytest.skip("without a gate there is one arrangement")
    backend = get_backend(name)
    # The native layout's scales have a range of their own (its _MAX_SCALE); others hold any byte.
    limit = 160 if name == "triton" else 255
    for h, i in ((201, 72), (512, 256)):
        p = params(GPT_OSS if gated else Activation("relu2", gated=False), gate, half, h=h, i=i)
        for role in ("up", "down"):
            e, n, k = p.shape(role)
            packed, scales = pattern(e, n, (k + 1) // 2), pattern(e, n, -(-k // 32), salt=5) % limit
            slot = Slot(role, p, layout)
            prepared = backend.prepare(packed, scales, slot, k=k)
            assert all(t.shape[0] == e for t in prepared)
            back = backend.recover(prepared, slot, n=n, k=k)
            assert torch.equal(back[0], packed) and torch.equal(back[1], scales)
            # Expert by expert is the same as all at once: that is how sites are prepared.
            one = backend.prepare(packed[1:2], scales[1:2], slot, k=k)
            assert all(torch.equal(a[1:2], b) for a, b in zip(prepared, one, strict=True))
            bias = torch.randn(e, n).to(torch.bfloat16)
            assert torch.equal(backend.recover_bias(backend.prepare_bias(bias, slot), slot, n=n), bias)


@pytest.mark.parametrize(("name", "layout"), [x for x in LAYOUTS if x[0] not in FUSED_ONLY])
def test_recover_is_exact_for_single_projections(name: str, layout: str) -> None:
    packed, scales = pattern(2, 40, 35), pattern(2, 40, 3) % 160
    weight = get_backend(name).prepare(packed, scales, Slot(None, None, layout), k=70)
    back = get_backend(name).recover(weight, Slot(None, None, layout), n=40, k=70)
    assert torch.equal(back[0], packed) and torch.equal(back[1], scales)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_prepare_runs_on_fake_tensors(name: str, layout: str) -> None:
    """The op's fake is the implementation: plain reshapes."""
    p = params(h=512, i=256)
    e, n, k = p.shape("up")
    args = (k, "up", *schema.moe_scalars(p), name, layout)
    real = schema.prepare_moe(pattern(e, n, k // 2), pattern(e, n, k // 32) % 160, *args)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = schema.prepare_moe(
            torch.empty(e, n, k // 2, dtype=torch.uint8), torch.empty(e, n, k // 32, dtype=torch.uint8), *args
        )
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]


def by_definition(p: MoEParams, x: torch.Tensor, layout: str, activated: int, inner: int) -> torch.Tensor:
    """Rows one at a time: which row of the model is gate i, which is up i, and where each goes."""
    out = x.new_zeros((x.shape[0], 2 * inner, *x.shape[2:]))
    for i in range(p.intermediate):
        gate, up = (i, p.intermediate + i) if p.gate_layout == "halves" else (2 * i, 2 * i + 1)
        if p.activated_half == 1:
            gate, up = up, gate
        first, second = (gate, up) if activated == 0 else (up, gate)
        to = (i, inner + i) if layout == "halves" else (2 * i, 2 * i + 1)
        out[:, to[0]], out[:, to[1]] = x[:, first], x[:, second]
    return out


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("activated", [0, 1])
@pytest.mark.parametrize("gate", ["halves", "interleaved"])
@pytest.mark.parametrize("half", [0, 1])
def test_gate_and_up_go_where_a_kernel_reads_them(layout: str, activated: int, gate: str, half: int) -> None:
    p = params(layout=gate, half=half, i=10)
    x = pattern(2, 20, 3)
    slot, order = Slot("up", p, "any"), permutations.RowOrder(layout, activated)
    got = permutations.arrange_rows(x, slot, order, 16)
    assert torch.equal(got, by_definition(p, x, layout, activated, 16))
    assert torch.equal(permutations.recover_rows(got, 20, slot, order), x)


def test_row_orders_of_the_backends() -> None:
    """Halves or turns, and which comes first, as each library documents it."""
    assert TRTLLM.rounding.rows == permutations.RowOrder("interleaved", 1)  # up0, gate0, up1, ...
    assert CUTLASS.rounding.rows == permutations.RowOrder("halves", 1)  # up; gate
    assert get_backend("marlin").rounding.rows == permutations.RowOrder("halves", 0)
    assert get_backend("aiter").rounding.rows == permutations.RowOrder("halves", 0)


def test_rounding_of_the_backends() -> None:
    p = params(h=2880, i=2880)
    sizes = {n: get_backend(n).rounding.sizes(p) for n in FUSED_ONLY}
    assert sizes == {
        "flashinfer_trtllm": (3072, 3072),
        "flashinfer_cutlass": (2944, 2944),
        "marlin": (3072, 2944),
        "aiter": (3072, 3072),
    }
    assert tk.multiples("hopper-w8") == (64, 64)


# against the libraries' own functions, as extracted from their wheels


def swizzled(backend, role: str, kind: int) -> torch.Tensor:
    p = params(h=K if role == "up" else N, i=N // 2 if role == "up" else K)
    return backend.swizzle(pattern(1, N, K // 2), scale_pattern(1, N, K // 32), Slot(role, p, "bf16-512"))[kind]


OURS = {
    "marlin codes": lambda: permutations.marlin_codes(pattern(1, N, K // 2)),
    "marlin scales": lambda: swizzled(get_backend("marlin"), "down", 1),
    "marlin bias": lambda: permutations.marlin_bias(pattern(1, N)),
    "aiter up codes": lambda: swizzled(get_backend("aiter"), "up", 0),
    "aiter down codes": lambda: swizzled(get_backend("aiter"), "down", 0),
    "aiter up scales": lambda: swizzled(get_backend("aiter"), "up", 1),
    "aiter down scales": lambda: swizzled(get_backend("aiter"), "down", 1),
    "trtllm rows": lambda: swizzled(TRTLLM, "down", 0),
    # The library is given [up; gate]: the model's second half is the activated one.
    "trtllm gated rows": lambda: TRTLLM.swizzle(
        permutations.arrange_rows(
            pattern(1, N, K // 2), Slot("up", params(half=1, e=1, h=K, i=N // 2), "bf16-512"), TRTLLM.rounding.rows, 128
        ),
        scale_pattern(1, N, K // 32), Slot("up", params(), "bf16-512"),
    )[0],
    "cutlass scales": lambda: swizzled(CUTLASS, "down", 1),
    "hopper codes": lambda: tk.swizzle_values(pattern(1, N, K // 2), "hopper-w8"),
    "hopper scales w8": lambda: tk.swizzle_scales(scale_pattern(1, N, K // 32), "hopper-w8"),
    "hopper scales w4": lambda: tk.swizzle_scales(scale_pattern(1, N, K // 32), "hopper-w4"),
    "blackwell codes": lambda: tk.swizzle_values(pattern(1, N, K // 2), "blackwell"),
    "blackwell scales": lambda: tk.swizzle_scales(scale_pattern(1, N, K // 32), "blackwell"),
    "cdna4 scales": lambda: tk.swizzle_scales(scale_pattern(1, N, K // 32), "cdna4"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EXTRACTED))
def test_orders_are_the_libraries_own(name: str) -> None:
    assert digest(OURS[name]()) == EXTRACTED[name]["sha256"], f"differs from {EXTRACTED[name]['wheel']}"


def test_every_extracted_layout_is_compared() -> None:
    assert set(OURS) == set(EXTRACTED)


# the two orders that only kernels know, written down thread by thread from their sources


def test_cutlass_codes_thread_by_thread() -> None:
    """FlashInfer 0.7.2, interleave_fp4_weights_for_sm90_mixed_gemm_kernel."""
    rows, cols = 32, 128
    packed = pattern(1, rows, cols // 2)
    source, out = packed.flatten().tolist(), [0] * packed.numel()
    moves = {  # bits of a little-endian word of four bytes -> where they go
        7: 31, 6: 24, 5: 23, 4: 22, 3: 15, 2: 8, 1: 7, 0: 6,
        15: 28, 14: 21, 13: 20, 12: 19, 11: 12, 10: 5, 9: 4, 8: 3,
        23: 25, 22: 18, 21: 17, 20: 16, 19: 9, 18: 2, 17: 1, 16: 0,
        31: 30, 28: 29, 30: 27, 29: 26, 27: 14, 24: 13, 26: 11, 25: 10,
    }  # fmt: skip
    for block in range(rows // 2):
        for partition in range(cols // 64):
            for lane in range(16):
                row, mma = block // 8 * 16 + block % 8, lane // 4
                to_row = row + mma % 2 * 8
                col = partition * 32 + mma * 8 + lane % 4
                to_col = partition * 32 + lane // 8 * 16 + lane % 4 * 4
                first, second = row * cols // 2 + col, (row + 8) * cols // 2 + col
                word = sum(source[at] << 8 * i for i, at in enumerate((first, second, first + 4, second + 4)))
                moved = sum((word >> a & 1) << b for a, b in moves.items())
                for i in range(4):
                    out[to_row * cols // 2 + to_col + i] = moved >> 8 * i & 255
    p = params(h=cols, i=rows // 2)
    got = CUTLASS.swizzle(packed, pattern(1, 64, 4), Slot("up", p, "sm90-512"))[0]  # the scales are not looked at
    assert got.flatten().tolist() == out


def test_block_scales_one_at_a_time() -> None:
    """tcgen05's 128x4 blocks: offset of (row, group) within a block is (row % 32)*16 + (row // 32)*4 + group."""
    n, groups = 256, 8
    scales = pattern(1, n, groups)
    rows = TRTLLM.swizzle(pattern(1, n, 16), scales, Slot("down", params(), "bf16-512"))[1].flatten()
    shuffled = TRTLLM.swizzle(scales, scales, Slot("down", params(), "bf16-512"))[0][0]
    for row in range(n):
        for group in range(groups):
            block = (row // 128) * (groups // 4) + group // 4
            at = block * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + group % 4
            assert rows[at] == shuffled[row, group]


def test_humming_codes_thread_by_thread() -> None:
    """humming 0.1.19, weight_repack_nk for 4-bit weights and 16-bit activations (interleave mode 3)."""
    n, k = 128, 64
    packed = pattern(1, n, k // 2)
    code = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[0]
    for native in (False, True):
        out = torch.zeros(k // 16, 2 * n, dtype=torch.int64)
        for block in range(n // 64):
            for thread in range(32):
                values = torch.zeros(4, 4, 2, 2, 2, dtype=torch.int64)
                for i in range(8):
                    for j in range(8):
                        for half in range(2):
                            column = j * 8 + thread % 4 * 2 + half
                            values[j // 2, i // 2, i % 2, j % 2, half] = code[block * 64 + i * 8 + thread // 4, column]
                flat = values.flatten()
                for i in range(4):
                    for j in range(4):
                        eight = flat[i * 32 + j * 8 : i * 32 + j * 8 + 8].tolist()
                        order = range(8) if native else [m % 4 * 2 + m // 4 for m in range(8)]
                        word = sum(eight[source] << 4 * place for place, source in enumerate(order))
                        out[i, block * 128 + thread * 4 + j] = word
        words = torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)
        assert torch.equal(permutations.marlin_codes(packed, native=native)[0], words)


# against installed libraries


def test_hopper_and_blackwell_against_the_installed_library() -> None:
    if importlib.util.find_spec("triton_kernels") is None:
        pytest.skip("triton_kernels is not installed")
    from mxfp4_compile.ops.backends.triton_kernels.api import load

    api = load()
    n = 320  # not a multiple of what is filled up
    packed, scales = pattern(2, n, K // 2), scale_pattern(2, n, K // 32)
    hopper = "hopper256" if api.generation == "3.8" else "hopper"
    for layout in (f"{hopper}-w8", f"{hopper}-w4", "blackwell"):
        values, stored = tk.swizzle_values(packed, layout), tk.swizzle_scales(scales, layout)
        weight, config = api.weight(values, stored, layout, n, K)
        scale = config.b_mx_scale if api.new else config.weight_scale
        for ours, plain in ((weight, packed), (scale, scales)):
            kind = ours.storage.layout
            if api.new:
                kind = kind.make_transformation(list(ours.shape), ours is weight)
            want = plain.mT
            if api.new and ours is weight:  # its canonical form is packed along N
                want = permutations.bytes_of(permutations.codes(plain).mT)
            back = kind.unswizzle_data(ours.storage.data)
            assert torch.equal(back[:, : want.shape[1], : want.shape[2]], want)
            if hasattr(kind, "storage_shape"):
                assert list(ours.storage.data.shape) == list(kind.storage_shape)


def test_layouts_follow_the_architecture() -> None:
    backend = get_backend("triton_kernels")
    plans = {a: backend.plan(Request(), Target(a)) for a in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")}
    assert plans == {
        "sm_80": "strided", "sm_90": "hopper-w8", "sm_100": "blackwell", "sm_120": "blackwell", "gfx942": "strided",
        "gfx950": "cdna4",
    }  # fmt: skip


def test_warps_by_token_count_under_expert_parallelism() -> None:
    assert scale_warps(Parallel(), 100) == 8
    assert scale_warps(Parallel(expert=4), 512) == 4
    assert scale_warps(Parallel(expert=4), 513) == 8
    request = Request(max_capture_size=256, parallel=Parallel(expert=2))
    assert get_backend("triton_kernels").plan(request, Target("sm_90")) == "hopper-w4"
