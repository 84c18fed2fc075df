"""`mxfp4_compile.mx` against an independent exact oracle, and its promises on error, memory and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mx_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mxfp4_compile import mx

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
rules = pytest.mark.parametrize("rule", mx.SCALE_RULES)
formats = pytest.mark.parametrize("fmt", DTYPES)
MIB = 1 << 20


def from_bits(bits: np.ndarray, fmt: str) -> Tensor:
    signed = np.int32 if fmt == "fp32" else np.int16
    return torch.from_numpy(bits.view(signed).copy()).view(DTYPES[fmt])


def to_bits(weight: Tensor) -> np.ndarray:
    weight = weight.contiguous()
    if weight.dtype == torch.float32:
        return weight.view(torch.int32).numpy().view(np.uint32)
    return weight.view(torch.int16).numpy().view(np.uint16)


def assert_matches_oracle(weight: Tensor, rule: str, fmt: str) -> None:
    packed, scales = mx.quantize(weight, rule)
    k = weight.shape[-1]
    assert packed.dtype == scales.dtype == torch.uint8
    assert packed.shape == (*weight.shape[:-1], (k + 1) // 2)
    assert scales.shape == (*weight.shape[:-1], (k + 31) // 32)
    want_packed, want_scales = oracle.quantize(to_bits(weight).reshape(-1, k), fmt, rule)
    np.testing.assert_array_equal(scales.reshape(-1, scales.shape[-1]).numpy(), want_scales)
    np.testing.assert_array_equal(packed.reshape(-1, packed.shape[-1]).numpy(), want_packed)


# Bit-exactness


@rules
@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_every_pattern_alone(fmt: str, rule: str) -> None:
    """Each 16-bit pattern, the only nonzero of its block, at a position that varies."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    bits = np.zeros((1 << 16, 32), np.uint16)
    bits[np.arange(1 << 16), (patterns * 7) % 32] = patterns
    assert_matches_oracle(from_bits(bits, fmt), rule, fmt)


@rules
@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_every_finite_pattern_in_random_company(fmt: str, rule: str) -> None:
    """Every finite pattern, sorted by magnitude and shuffled among its neighbours."""
    rng = np.random.default_rng(1)
    mantissa_bits, exponent_bits, _ = oracle.FORMATS[fmt]
    patterns = np.arange(1 << 16, dtype=np.uint16)
    magnitude = patterns & 0x7FFF
    patterns = patterns[magnitude < ((1 << exponent_bits) - 1) << mantissa_bits]
    order = np.argsort(patterns & 0x7FFF, kind="stable")
    neighbours = patterns[order].reshape(-1, 256)
    assert_matches_oracle(from_bits(rng.permuted(neighbours, axis=1).reshape(-1, 32), fmt), rule, fmt)


@rules
@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_every_pattern_fully_shuffled(fmt: str, rule: str) -> None:
    """All 65536 patterns in random order, NaN and Inf among them."""
    patterns = np.random.default_rng(2).permutation(1 << 16).astype(np.uint16).reshape(-1, 32)
    assert_matches_oracle(from_bits(patterns, fmt), rule, fmt)


@rules
@pytest.mark.parametrize("fmt", ["bf16", "fp32"])
def test_every_scale_exponent(fmt: str, rule: str) -> None:
    """Blocks whose elements share about one exponent, for every exponent a float can have."""
    rng = np.random.default_rng(3)
    mantissa_bits = oracle.FORMATS[fmt][0]
    kind = np.uint32 if fmt == "fp32" else np.uint16
    high = np.arange(255).repeat(4)[:, None] - rng.integers(0, 6, (1020, 32))
    bits = high.clip(0).astype(kind) << mantissa_bits | rng.integers(0, 1 << mantissa_bits, (1020, 32), kind)
    bits |= rng.integers(0, 2, (1020, 32), kind) << (31 if fmt == "fp32" else 15)
    assert_matches_oracle(from_bits(bits.astype(kind), fmt), rule, fmt)


@rules
def test_fp32_next_to_every_threshold(rule: str) -> None:
    """Float32 within two units of every tie and boundary, where a premature rounding would show."""
    rng = np.random.default_rng(4)
    edges = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 8.0, 3.0, 4.0, 0.5, 1.5], np.float32)
    values = np.ldexp(rng.choice(edges, (1024, 32)), rng.integers(-126, 120, (1024, 1))).astype(np.float32)
    bits = values.view(np.uint32) + rng.integers(-2, 3, (1024, 32)).astype(np.uint32)
    bits |= rng.integers(0, 2, (1024, 32)).astype(np.uint32) << 31
    assert_matches_oracle(from_bits(bits, "fp32"), rule, "fp32")


@formats
def test_mse_near_ties(fmt: str) -> None:
    """Blocks in which the two candidates of the mse rule are equally good, or just not."""
    # In units of 2^e, the error of e + 1 less that of e is 4 (7 - y) above 7, 1/4 - |y - 1/2| about 1/2.
    ulp = 2.0 ** -oracle.FORMATS[fmt][0]
    blocks = []
    for excess in (ulp * 4, 2 * ulp * 4, 0.0625, 0.125):
        for nudge in (0, ulp / 4, -ulp / 4):
            for sign in (1, -1):
                block = [0.0] * 32
                block[5] = sign * (7 + excess)
                due = 4 * excess
                for i in (0, 9, 31):
                    part = min(due, 0.25)
                    due -= part
                    block[i] = -sign * (0.25 + part) if part else 0.0
                if block[0]:
                    block[0] += (nudge if block[0] > 0 else -nudge) * (1 if abs(block[0]) < 0.5 else 2)
                blocks.append(block)
    weight = torch.tensor(blocks, dtype=torch.float64)
    assert torch.equal(weight.to(DTYPES[fmt]).double(), weight), "the test's own blocks are not representable"
    weight = weight.to(DTYPES[fmt])
    _, scales = mx.quantize(weight, "mse")
    assert set(scales.flatten().tolist()) == {127, 128}, "the blocks should fall on both sides"
    assert_matches_oracle(weight, "mse", fmt)


def test_boundaries_by_hand() -> None:
    """Scale bytes at and about amax = 6, 7 and 8, written out rather than computed."""
    table = {  # amax: floor, even, round_up, mse
        5.96875: (127, 127, 127, 127),
        6.0: (127, 127, 127, 127),
        6.03125: (127, 127, 128, 127),
        6.96875: (127, 127, 128, 127),
        7.0: (127, 128, 128, 127),
        7.03125: (127, 128, 128, 128),
        7.96875: (127, 128, 128, 128),
        8.0: (128, 128, 128, 128),
        12.0: (128, 128, 128, 128),
        12.0625: (128, 128, 129, 128),
    }
    for amax, want in table.items():
        for rule, byte in zip(mx.SCALE_RULES, want, strict=True):
            _, scales = mx.quantize(torch.tensor([0.0, -amax]).bfloat16(), rule)
            assert scales.tolist() == [byte], (amax, rule)


def test_codes_by_hand() -> None:
    """Ties, nibble order, signs and an odd tail, written out."""
    values = [4.0, 0.25, 0.75, -1.25, 1.75, 2.5, -3.5, 5.0, 5.5, -0.25, -0.0]
    packed, scales = mx.quantize(torch.tensor(values), "floor")
    #        codes   6 0   2 a   4 4   e 6   7 8   8 -
    assert packed.tolist() == [0x06, 0xA2, 0x44, 0x6E, 0x87, 0x08]
    assert scales.tolist() == [127]
    want = [4.0, 0.0, 1.0, -1.0, 2.0, 2.0, -4.0, 4.0, 6.0, -0.0, -0.0]
    got = mx.dequantize(packed, scales, 11, torch.float32)
    assert got.tolist() == want
    assert torch.equal(torch.signbit(got), torch.signbit(torch.tensor(want)))


def test_codes_constant() -> None:
    assert mx.CODES[:8] == oracle.VALUES
    assert [-c for c in mx.CODES[8:]] == list(oracle.VALUES)
    assert mx.BLOCK == 32
    assert mx.DEFAULT_SCALE_RULE == "mse"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dequantize_every_byte_and_scale(dtype: torch.dtype) -> None:
    """All 256 bytes under all 256 scales: exact, or the nearest value or Inf where that cannot be."""
    packed = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    exact = oracle.dequantize(packed, scales, 512)
    got = mx.dequantize(torch.from_numpy(packed), torch.from_numpy(scales), dtype=dtype)
    assert got.dtype == dtype
    assert got.shape == (256, 512)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            want = exact.astype(np.float16).astype(np.float64)
    elif dtype == torch.float64:
        want = exact
    else:  # Every finite product is representable.
        want = np.where(np.abs(exact) >= 2.0**128, np.copysign(np.inf, exact), exact)
    np.testing.assert_array_equal(got.double().numpy(), want)
    signs = torch.signbit(got).numpy()[:255]
    np.testing.assert_array_equal(signs, np.signbit(exact)[:255])


@formats
def test_codes_stay_finite_in_the_weights_dtype(fmt: str) -> None:
    top = torch.finfo(DTYPES[fmt]).max
    for rule in mx.SCALE_RULES:
        weight = torch.tensor([[top, -top, 0.0], [top / 2, top, 1.0]], dtype=DTYPES[fmt])
        packed, scales = mx.quantize(weight, rule)
        values = mx.dequantize(packed, scales, 3, DTYPES[fmt])
        assert values.isfinite().all()
        assert values[0, 0] == 6 * 2.0 ** (13 if fmt == "fp16" else 125)


# Properties


def _same(w: Tensor) -> Tensor:
    return w


def _transposed(w: Tensor) -> Tensor:
    return w.transpose(0, -1).contiguous().transpose(0, -1)


def _poison(*shape: int, dtype: torch.dtype) -> Tensor:
    """What must not be read: NaN, or bytes of 255."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 255, dtype=dtype)


def _strided(w: Tensor) -> Tensor:
    wide = _poison(*w.shape[:-1], 2 * w.shape[-1] + 3, dtype=w.dtype)
    wide[..., 1:-2:2] = w
    return wide[..., 1:-2:2]


def _row_padded(w: Tensor) -> Tensor:
    wide = _poison(*w.shape[:-1], w.shape[-1] + 5, dtype=w.dtype)
    wide[..., :-5] = w
    return wide[..., :-5]


def _outer_swapped(w: Tensor) -> Tensor:
    return w if w.dim() < 3 else w.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [_same, _transposed, _strided, _row_padded, _outer_swapped]


@settings(max_examples=80, deadline=None, database=None)
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    k=st.one_of(st.integers(1, 100), st.sampled_from([31, 32, 33, 64, 65, 2879, 2880])),
    exponent=st.one_of(st.integers(-152, 126), st.sampled_from([-149, -133, -127, -126, -24, 0, 14, 126])),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
    layout=st.sampled_from(LAYOUTS),
    fmt=st.sampled_from(list(DTYPES)),
    rule=st.sampled_from(mx.SCALE_RULES),
    chunk=st.sampled_from([32, 64, 96, 1 << 18]),
    seed=st.integers(0, 1 << 30),
)
def test_shapes_strides_and_magnitudes(
    lead: list[int],
    k: int,
    exponent: int,
    zeros: float,
    layout: Callable[[Tensor], Tensor],
    fmt: str,
    rule: str,
    chunk: int,
    seed: int,
) -> None:
    """Any shape, layout, magnitude and chunk size gives the oracle's bits, there and back."""
    if k > 1000:
        lead = lead[:1]
    rng = np.random.default_rng(seed)
    if fmt == "fp16":
        exponent = max(-26, min(exponent, 15))
    values = np.ldexp(rng.uniform(-2, 2, (*lead, k)) * (rng.random((*lead, k)) >= zeros), exponent)
    limit = torch.finfo(DTYPES[fmt]).max
    weight = torch.from_numpy(values.clip(-limit, limit)).to(DTYPES[fmt])
    laid_out = layout(weight)
    before = to_bits(laid_out).copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "_CHUNK_CPU", chunk)
        patch.setattr(mx, "_CHUNK_DEVICE", chunk)
        assert_matches_oracle(laid_out, rule, fmt)
        packed, scales = mx.quantize(laid_out, rule)
        assert packed.is_contiguous()
        assert scales.is_contiguous()
        exact = oracle.dequantize(
            packed.reshape(-1, (k + 1) // 2).numpy(), scales.reshape(-1, (k + 31) // 32).numpy(), k
        )
        exact = exact.reshape(*lead, k)
        got = mx.dequantize(_strided(packed), _strided(scales), k, torch.float64)
        np.testing.assert_array_equal(got.numpy(), exact)
        assert torch.equal(mx.dequantize(packed, scales, k), torch.from_numpy(exact).bfloat16())
        error = mx.relative_error(laid_out, packed, scales)
    np.testing.assert_array_equal(to_bits(laid_out), before)
    axes = tuple(range(1, weight.dim())) if lead else None
    power = np.square(weight.double().numpy()).sum(axes)
    noise = np.square(weight.double().numpy() - exact).sum(axes)
    want = np.divide(noise, power, out=np.zeros_like(power), where=power != 0)
    assert error.dtype == torch.float64
    assert error.shape == tuple(lead[:1])
    np.testing.assert_allclose(error.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 32), (0, 33), (3, 0, 7), (0, 4, 64)])
def test_empty_leading_axes(shape: tuple[int, ...]) -> None:
    packed, scales = mx.quantize(torch.empty(shape))
    k = shape[-1]
    assert packed.shape == (*shape[:-1], (k + 1) // 2)
    assert scales.shape == (*shape[:-1], (k + 31) // 32)
    assert mx.dequantize(packed, scales, k).shape == shape
    assert mx.relative_error(torch.empty(shape), packed, scales).tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("again", ["floor", "mse"])
@rules
@formats
def test_requantizing_is_lossless(fmt: str, rule: str, again: str) -> None:
    generator = torch.Generator().manual_seed(5)
    scale = torch.exp2(torch.randint(-14, 14, (512, 1), generator=generator).double())
    weight = (torch.randn(512, 320, generator=generator, dtype=torch.float64) * scale).to(DTYPES[fmt])
    weight = weight.nan_to_num(posinf=60000, neginf=-60000)
    once = mx.dequantize(*mx.quantize(weight, rule), dtype=DTYPES[fmt])
    assert once.count_nonzero() > weight.numel() // 2
    assert torch.equal(mx.dequantize(*mx.quantize(once, again), dtype=DTYPES[fmt]), once)


def test_parameters_and_autograd() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 64))
    packed, scales = mx.quantize(parameter)
    plain = mx.quantize(parameter.detach())
    assert torch.equal(packed, plain[0])
    assert torch.equal(scales, plain[1])
    assert not mx.relative_error(parameter, packed, scales).requires_grad
    assert parameter.grad is None


# Error


def _samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(20240229)
    gaussian = torch.randn(1, 160_000 * 32, generator=generator)
    uniform = torch.rand(1, 160_000 * 32, generator=generator, dtype=torch.float64).sub_(0.5)
    return {"gaussian": gaussian, "laplace": (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()}


def test_relative_mse_table() -> None:
    """Each rule's error is what the table says, and the mse rule's is the least, in every block."""
    assert set(mx.EXPECTED_RELATIVE_MSE) == set(mx.SCALE_RULES)
    for column, weight in enumerate(_samples().values()):
        errors, per_block = {}, {}
        for rule in mx.SCALE_RULES:
            packed, scales = mx.quantize(weight, rule)
            errors[rule] = mx.relative_error(weight, packed, scales).item()
            values = mx.dequantize(packed, scales, dtype=torch.float32)
            per_block[rule] = (values - weight).double().square().view(-1, 32).sum(-1)
            assert errors[rule] == pytest.approx(mx.EXPECTED_RELATIVE_MSE[rule][column], rel=0.01)
        for rule in mx.SCALE_RULES:
            assert errors["mse"] <= errors[rule]
            assert (per_block["mse"] <= per_block[rule]).all()


def test_relative_error_by_hand() -> None:
    weight = torch.tensor([[4.0, 1.25], [0.0, 0.0], [6.0, 3.0], [8.0, 0.0]])
    packed = torch.tensor([[0x26], [0x00], [0x57], [0x07]], dtype=torch.uint8)
    scales = torch.tensor([[127], [0], [127], [127]], dtype=torch.uint8)
    want = [0.0625 / 17.5625, 0.0, 0.0, 4.0 / 64.0]
    assert mx.relative_error(weight, packed, scales).tolist() == want
    three = mx.relative_error(weight.view(2, 2, 2), packed.view(2, 2, 1), scales.view(2, 2, 1))
    assert three.tolist() == [0.0625 / 17.5625, 4.0 / 109.0]
    scalar = mx.relative_error(weight[0], packed[0], scales[0])
    assert scalar.shape == ()
    assert scalar.item() == want[0]
    nothing = mx.relative_error(torch.zeros(1, 2), packed[:1], scales[:1])
    assert nothing.tolist() == [float("inf")]


def test_relative_error_of_huge_and_tiny_weights() -> None:
    """Squares that overflow or vanish in float32."""
    for magnitude in (1e38, 1e-37):
        weight = torch.tensor([[1.0, 0.3, -0.7]]) * magnitude
        packed, scales = mx.quantize(weight)
        assert 0 <= mx.relative_error(weight, packed, scales).item() < 0.05


# NaN, Inf, wrong arguments


@rules
@formats
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_blocks(fmt: str, rule: str, poison: float) -> None:
    weight = torch.full((3, 70), -1.5, dtype=DTYPES[fmt])
    weight[1, 40] = poison
    weight[2, 69] = poison
    packed, scales = mx.quantize(weight, rule)
    clean = mx.quantize(torch.full((1, 70), -1.5, dtype=DTYPES[fmt]), rule)
    assert (scales == 255).tolist() == [[False] * 3, [False, True, False], [False, False, True]]
    assert not packed[1, 16:32].any()
    assert not packed[2, 32:].any()
    assert torch.equal(packed[0], clean[0][0])
    assert torch.equal(packed[1, :16], clean[0][0, :16])
    values = mx.dequantize(packed, scales, 70, DTYPES[fmt])
    want = torch.zeros(3, 70, dtype=torch.bool)
    want[1, 32:64] = True
    want[2, 64:] = True
    assert torch.equal(values.isnan(), want)
    assert (values[~want] == -1.5).all()
    error = mx.relative_error(weight, packed, scales)
    assert error.isnan().tolist() == [False, True, True]


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match=r"'nearest'.*floor, even, round_up, mse"):
        mx.check_scale_rule("nearest")
    with pytest.raises(ValueError, match="known"):
        mx.quantize(torch.ones(32), "nearest")
    for rule in mx.SCALE_RULES:
        mx.check_scale_rule(rule)


def test_wrong_weights() -> None:
    with pytest.raises(TypeError, match="float64"):
        mx.quantize(torch.ones(32, dtype=torch.float64))
    with pytest.raises(TypeError, match="int8"):
        mx.quantize(torch.ones(32, dtype=torch.int8))
    with pytest.raises(TypeError, match="list"):
        mx.quantize([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[4, 0\]"):
        mx.quantize(torch.ones(4, 0))
    with pytest.raises(ValueError, match=r"\[\]"):
        mx.quantize(torch.tensor(1.0))


def _bytes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("packed", "scales", "size", "text"),
    [
        (_bytes(4, 16).float(), _bytes(4, 1), None, "packed must be torch.uint8, got torch.float32"),
        (_bytes(4, 16), _bytes(4, 1).char(), None, "scales must be torch.uint8, got torch.int8"),
        (_bytes(4, 16), _bytes(4, 2), None, r"size 32 takes 1 scales.*\[4, 16\].*\[4, 2\]"),
        (_bytes(4, 17), _bytes(4, 1), None, r"size 34 takes 2 scales"),
        (_bytes(4, 16), _bytes(3, 1), None, r"leading axes differ.*\[4, 16\].*\[3, 1\]"),
        (_bytes(4, 16), _bytes(1), None, "leading axes differ"),
        (_bytes(1, 16), _bytes(1), None, "leading axes differ"),
        (_bytes(4, 16), _bytes(4, 1), 30, r"size 30 takes 15 bytes.*\[4, 16\]"),
        (_bytes(4, 16), _bytes(4, 1), 33, "size 33 takes 17 bytes"),
        (_bytes(4, 0), _bytes(4, 0), None, r"at least 1.*\[4, 0\]"),
        (torch.tensor(1, dtype=torch.uint8), _bytes(1), None, "at least 1"),
    ],
)
def test_wrong_packed(packed: Tensor, scales: Tensor, size: int | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mx.dequantize(packed, scales, size)


def test_other_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"torch\.int8"):
        mx.dequantize(_bytes(16), _bytes(1), dtype=torch.int8)
    with pytest.raises(TypeError, match="packed"):
        mx.dequantize([0], _bytes(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"leading axes differ: weight \[2, 32\], packed \[3, 16\]"):
        mx.relative_error(torch.ones(2, 32), _bytes(3, 16), _bytes(3, 1))
    with pytest.raises(ValueError, match="size 40 takes 20 bytes"):
        mx.relative_error(torch.ones(2, 40), _bytes(2, 16), _bytes(2, 1))
    with pytest.raises(TypeError, match="float64"):
        mx.relative_error(torch.ones(2, 32).double(), _bytes(2, 16), _bytes(2, 1))


# Memory


def _weak(t: Tensor) -> Any:
    return StorageWeakRef(t.untyped_storage())  # type: ignore[no-untyped-call]


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Peak of the bytes of tensors alive that operations have returned, but for the storages of `known`."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {_weak(t).cdata for t in known}
        self.live: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                ref = _weak(leaf)
                if ref.cdata not in self.known and ref.cdata not in self.live:
                    self.live[ref.cdata] = (ref, leaf.untyped_storage().nbytes())
        # The weak reference keeps the address from being used again, so no entry is another storage's.
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.fixture(scope="module")
def large() -> Tensor:
    """256 MiB of bfloat16."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(6)).bfloat16()
    return block.repeat(128)


def test_peak_bytes_sees_temporaries() -> None:
    x = torch.ones(MIB)
    with PeakBytes(x) as seen:
        x.view(4, -1).add_(1)
        y = x * 2
        y = y * 2
        y.view(-1)[:5].sum()
        for _ in range(4):
            z = y + 1
            del z
    assert 12 * MIB > seen.peak >= 8 * MIB


def _as_experts(w: Tensor) -> Tensor:
    return w.view(16, 2048, 4096)


def _as_one_row(w: Tensor) -> Tensor:
    return w[:-1]


def _as_transposed_experts(w: Tensor) -> Tensor:
    return w.view(2, 2048, 32768).transpose(1, 2)


def _as_float32(w: Tensor) -> Tensor:
    return w.view(torch.int16).view(torch.float32).nan_to_num(0.0, 0.0, 0.0).view(8, 8, -1)


@pytest.mark.parametrize("shape", [_as_experts, _as_one_row, _as_transposed_experts, _as_float32])
def test_temporary_memory(large: Tensor, shape: Callable[[Tensor], Tensor]) -> None:
    """Temporaries stay below 64 MiB over input and outputs, for any shape of 256 MiB of weights."""
    weight = shape(large)
    assert weight.untyped_storage().nbytes() == 256 * MIB
    with PeakBytes(weight) as seen:
        packed, scales = mx.quantize(weight)
    assert MIB < seen.peak - packed.numel() - scales.numel() < 64 * MIB
    if shape is _as_transposed_experts:
        return  # What follows takes the same path as for the others, only more slowly.
    with PeakBytes(weight, packed, scales) as seen:
        values = mx.dequantize(packed, scales, weight.shape[-1])
    assert seen.peak - values.numel() * 2 < 64 * MIB
    del values
    with PeakBytes(weight, packed, scales) as seen:
        mx.relative_error(weight, packed, scales)
    assert seen.peak < 64 * MIB


# CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@rules
@formats
def test_cuda_gives_the_same_bits(fmt: str, rule: str) -> None:
    rng = np.random.default_rng(7)
    if fmt == "fp32":
        bits = rng.integers(0, 1 << 32, (4096, 33), np.uint32)
    else:
        bits = rng.permutation(1 << 16).astype(np.uint16).reshape(-1, 32)
    narrow = rng.normal(size=(4096, 2880)) * np.exp2(rng.integers(-140, 120, (4096, 1)))
    for weight in (from_bits(bits, fmt), torch.from_numpy(narrow).to(DTYPES[fmt])):
        packed, scales = mx.quantize(weight, rule)
        device = weight.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_device = mx.quantize(device, rule)
            values = mx.dequantize(*on_device, weight.shape[-1], DTYPES[fmt])
            error = mx.relative_error(device, *on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(on_device[0].cpu(), packed)
        assert torch.equal(on_device[1].cpu(), scales)
        want = mx.dequantize(packed, scales, weight.shape[-1], DTYPES[fmt])
        torch.testing.assert_close(values.cpu(), want, rtol=0, atol=0, equal_nan=True)
        want_error = mx.relative_error(weight, packed, scales)
        torch.testing.assert_close(error.cpu(), want_error, rtol=1e-12, atol=0, equal_nan=True)
