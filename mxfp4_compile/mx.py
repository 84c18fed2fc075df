"""MXFP4 numerics: quantize weights to E2M1 codes with E8M0 block scales, and back.

The format is OCP Microscaling Formats (MX) v1.0: elements are E2M1 (section 5.3.3: sign in bit 3, two
exponent bits, one mantissa bit), a block of 32 along the last axis (section 5.2) shares one E8M0 scale
(section 5.4.1: byte = e + 127, 255 = NaN), and section 6.3 is the conversion from scalars. Two codes share a
byte, the even index in the low nibble.

Everything is pure torch: the same bits come out on every device, nothing waits for the device, and no Python
branch depends on a value in a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "CODES",
    "DEFAULT_SCALE_RULE",
    "EXPECTED_RELATIVE_MSE",
    "SCALE_RULES",
    "check_scale_rule",
    "dequantize",
    "quantize",
    "relative_error",
]

BLOCK = 32
"""Elements that share one scale."""

SCALE_RULES = ("floor", "even", "round_up", "mse")
"""Known rules for choosing a block's scale exponent; see `quantize`."""

DEFAULT_SCALE_RULE = "mse"
"""Rule used where none is named: the smallest error of the four."""

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each of the 16 E2M1 codes."""

# ||w - dq||^2 / ||w||^2 for (Gaussian, Laplace) weights. Measured on 100k+ blocks of independent samples per
# entry; another sample of that size lands within 1 %.
EXPECTED_RELATIVE_MSE: dict[str, tuple[float, float]] = {
    "floor": (0.01322, 0.01605),
    "even": (0.01252, 0.01533),
    "round_up": (0.01333, 0.01743),
    "mse": (0.01246, 0.01505),
}

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_BIAS = 127
_NAN_BYTE = 255
# Largest e whose largest code 6 * 2^e is finite: 6 * 2^125 = 1.5 * 2^127 in fp32 and bf16, 6 * 2^13 in fp16.
_MAX_BYTE = 125 + _BIAS
_MAX_BYTE_FP16 = 13 + _BIAS

# What to add to the bit pattern of a block's fp32 amax before its exponent field is read, which rounds amax
# up to the next power of two from some mantissa on: floor never (from 8 = 2^3 on), even from 1.75 on,
# inclusive (7 = 1.75 * 2^2; as if amax were rounded to E2M1's single mantissa bit, half up, the way vLLM,
# Quark and compressed-tensors do it), round_up above 1.5, exclusive (6 = 1.5 * 2^2 is itself a code, so it
# need not go up).
_AMAX_ROUNDING = {"floor": 0, "even": 0x200000, "round_up": 0x3FFFFF, "mse": 0}

# Elements worked on at a time: long enough to hide the overhead of an operation, short enough that a CPU's
# caches hold the buffers (2^18 measured fastest of 2^15 to 2^19). 13 to 24 bytes of temporaries per element
# are in use: at most 6 MiB on a CPU, 96 MiB elsewhere (an H200 quantizes 25 M weights in 12.1, 7.4, 3.0 and
# 2.1 ms by 2^20, 2^21, 2^22 and 2^23).
_CHUNK_CPU = 1 << 18
_CHUNK_DEVICE = 1 << 22


def check_scale_rule(rule: str) -> None:
    """Raise ValueError, listing the known rules, unless `rule` is one of `SCALE_RULES`."""
    if rule not in SCALE_RULES:
        raise ValueError(f"unknown scale rule {rule!r}; known: {', '.join(SCALE_RULES)}")


def quantize(weight: Tensor, scale_rule: str = DEFAULT_SCALE_RULE) -> tuple[Tensor, Tensor]:
    """Quantize `weight` to MXFP4 in blocks of 32 along its last axis.

    Args:
        weight: [..., K] bfloat16, float16 or float32, any strides, K >= 1. A short last block counts as
            padded with zeros.
        scale_rule: how the exponent e of a block follows from amax, its largest magnitude: "floor" e =
            floor(log2 amax) - 2, the OCP formula; "even" the smallest e with amax < 7 * 2^e, as vLLM, Quark
            and compressed-tensors choose it; "round_up" the smallest e with amax <= 6 * 2^e, which never
            clips; "mse" the better in squared error of the floor rule's e and e + 1, of two equals the floor
            rule's. e is clamped to [-127, 125], for float16 to [-127, 13], so that every code stays finite in
            the weight's dtype. The choice is exact, never a float log2.

    Returns:
        packed: [..., ceil(K / 2)] uint8, two E2M1 codes a byte, the even index in the low nibble, 0 in the
            last high nibble if K is odd. Elements round to nearest, ties to the even code, saturate at 6,
            keep their sign (a negative one that rounds to zero gives code 8).
        scales: [..., ceil(K / 32)] uint8 E8M0, byte e + 127; 0 for an all-zero block. A block that holds NaN
            or Inf gets byte 255 (NaN) and all-zero codes.

    Raises:
        TypeError: `weight` is no tensor, or of another dtype.
        ValueError: an unknown rule, or a weight without a last axis or with an empty one.

    Source: OCP Microscaling Formats (MX) v1.0, sections 5.2, 5.3.3, 5.4.1 and 6.3.
    """
    check_scale_rule(scale_rule)
    _check_weight(weight)
    weight = weight.detach()
    lead, k = weight.shape[:-1], weight.shape[-1]
    packed = torch.empty((*lead, _ceil_div(k, 2)), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((*lead, _ceil_div(k, BLOCK)), dtype=torch.uint8, device=weight.device)
    if weight.numel() == 0:
        return packed, scales

    chunk = _chunk(weight.device)
    work = _Workspace(min(chunk, weight.numel() // k * scales.shape[-1] * BLOCK), weight, scale_rule)
    with torch.no_grad():
        for w, p, s in _panels(weight, packed, scales):
            if k % BLOCK == 0 and w.is_contiguous():
                w, p, s = w.view(-1, BLOCK), p.view(-1, BLOCK // 2), s.view(-1, 1)
            for rows, k0, k1 in _tiles(w.shape[0], w.shape[1], chunk):
                _quantize_tile(
                    w[rows, k0:k1],
                    p[rows, k0 // 2 : _ceil_div(k1, 2)],
                    s[rows, k0 // BLOCK : _ceil_div(k1, BLOCK)],
                    scale_rule,
                    work,
                )
    return packed, scales


def dequantize(
    packed: Tensor,
    scales: Tensor,
    size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return the values code * 2^e of an MXFP4 tensor, exactly wherever `dtype` can represent them.

    Args:
        packed: [..., P] uint8, two E2M1 codes a byte, the even index in the low nibble, any strides.
        scales: [..., ceil(size / 32)] uint8 E8M0, any strides. Byte 255 makes its whole block NaN.
        size: K, either 2 * P (the default) or, for an odd K, 2 * P - 1.
        dtype: bfloat16, float16, float32 or float64. Values it cannot represent round to nearest, or to Inf.

    Returns:
        [..., size] of `dtype`, contiguous.

    Raises:
        TypeError: `packed` or `scales` is no tensor.
        ValueError: dtypes, shapes, devices or `size` that do not fit together.

    Source: OCP Microscaling Formats (MX) v1.0, sections 5.1 to 5.4.1.
    """
    size = _check_packed(packed, scales, size)
    if dtype not in _OUT_DTYPES:
        raise ValueError(f"dtype must be one of {_names(_OUT_DTYPES)}, got {dtype}")
    out = torch.empty((*packed.shape[:-1], size), dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out

    # 2^e of float16's blocks need not fit float16 where the product does, so that product is formed in
    # float32. In bfloat16 and float32 every 2^e does fit, the smallest, 2^-127, as a subnormal.
    compute = torch.float32 if dtype == torch.float16 else dtype
    chunk = _chunk(packed.device)
    pairs, exps = pair_table(compute, packed.device), scale_table(compute, packed.device)
    with torch.no_grad():
        for p, s, o in _panels(packed.detach(), scales.detach(), out):
            if size % BLOCK == 0 and p.is_contiguous() and s.is_contiguous():
                p, s, o = p.view(-1, BLOCK // 2), s.view(-1, 1), o.view(-1, BLOCK)
            for rows, k0, k1 in _tiles(o.shape[0], o.shape[1], chunk):
                _dequantize_tile(
                    p[rows, k0 // 2 : _ceil_div(k1, 2)],
                    s[rows, k0 // BLOCK : _ceil_div(k1, BLOCK)],
                    o[rows, k0:k1],
                    pairs,
                    exps,
                )
    return out


def relative_error(weight: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Return ||weight - dequantized||^2 / ||weight||^2 of each slice of the first axis, 0 for 0 / 0.

    Args:
        weight: [D, ..., K] bfloat16, float16 or float32, any strides; or [K].
        packed: [D, ..., ceil(K / 2)] uint8, as `quantize` returns it.
        scales: [D, ..., ceil(K / 32)] uint8, as `quantize` returns it.

    Returns:
        [D] float64, summed in float64; of a one-axis weight a scalar, []. A slice with a NaN or Inf is NaN.

    Raises:
        TypeError: `weight` is no tensor, or of another dtype.
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: the measure is this project's own; the values are as in OCP MX v1.0, section 5.1.
    """
    _check_weight(weight)
    k = weight.shape[-1]
    _check_packed(packed, scales, k)
    if packed.shape[:-1] != weight.shape[:-1]:
        raise ValueError(
            f"leading axes differ: weight {list(weight.shape)}, packed {list(packed.shape)}, "
            f"scales {list(scales.shape)}"
        )
    if packed.device != weight.device:
        raise ValueError(f"weight is on {weight.device}, packed on {packed.device}")
    if weight.dim() == 1:
        return relative_error(weight[None], packed[None], scales[None])[0]
    noise, power = squares(weight, packed, scales)
    return torch.where((noise == 0) & (power == 0), 0.0, noise / power)


def squares(weight: Tensor, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return ||weight - dequantized||^2 and ||weight||^2 of each slice of the first axis, both [D] float64.

    What `relative_error` divides, for sums over several weights; arguments as there, of two axes or more.
    """
    k, chunk = weight.shape[-1], _chunk(weight.device)
    weight = weight.detach()
    noise = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    power = torch.zeros_like(noise)
    if weight.numel() > 0:
        # Whole slices while they fit a chunk together, else one slice in tiles.
        step = chunk * weight.shape[0] // weight.numel()
        for i in range(0, weight.shape[0], max(1, step)):
            some = slice(i, i + max(1, step))
            if step:
                noise[some], power[some] = _squares(weight[some], packed[some], scales[some])
                continue
            for w, p, s in _panels(weight[i], packed[i], scales[i]):
                for rows, k0, k1 in _tiles(w.shape[0], k, chunk):
                    part = _squares(
                        w[rows, k0:k1],
                        p[rows, k0 // 2 : _ceil_div(k1, 2)],
                        s[rows, k0 // BLOCK : _ceil_div(k1, BLOCK)],
                    )
                    noise[i] += part[0].sum()
                    power[i] += part[1].sum()
    return noise, power


def _quantize_tile(weight: Tensor, packed: Tensor, scales: Tensor, rule: str, work: _Workspace) -> None:
    """Quantize a tile [rows, width] into its [rows, ceil(width / 2)] and [rows, ceil(width / 32)] outputs."""
    rows, width = weight.shape
    blocks = rows * scales.shape[1]
    x, a, b, codes = work.take(blocks * BLOCK)
    if weight.dtype == torch.float32 and width % BLOCK == 0 and weight.is_contiguous():
        x = weight.view(blocks, BLOCK)
    else:
        padded = x.view(rows, -1)
        padded[:, :width].copy_(weight)
        if width % BLOCK:
            padded[:, width:].zero_()

    # Bit patterns of non-negative floats are ordered as the floats are, with Inf and then the NaNs on top.
    torch.abs(x, out=a)
    amax = a.view(torch.int32).amax(-1, keepdim=True)
    bad = amax >= 0x7F800000
    # The exponent field of amax / 4, which is e + 127. It is at most 0, so e clamped to -127, wherever amax
    # is so small that its own field says nothing (zero, subnormal).
    top = _MAX_BYTE_FP16 if weight.dtype == torch.float16 else _MAX_BYTE
    byte = amax.add_(_AMAX_ROUNDING[rule]).bitwise_right_shift_(23).sub_(2).clamp_(0, top)
    # y = |x| * 2^-e: exact where y is large enough to matter. 254 - byte is the exponent field of 2^-e.
    y = a.mul_((254 - byte).bitwise_left_shift_(23).view(torch.float32))
    if rule == "mse":
        up = _next_is_better(y, b, work.wide).logical_and_(byte < top)
        byte.add_(up)
        y.mul_(torch.where(up, 0.5, 1.0))
    scales.copy_(byte.masked_fill_(bad, _NAN_BYTE).view(rows, -1))

    if weight.dtype == torch.float32:
        # Keep 11 mantissa bits and fold the others into the lowest of them (round to odd): no element crosses
        # or reaches a tie by it, and y + 1 below becomes exact, as it is for the shorter dtypes.
        bits, rest = y.view(torch.int32), b.view(torch.int32)
        torch.bitwise_and(bits, 0xFFF, out=rest)
        bits.bitwise_or_(rest.add_(0xFFF)).bitwise_and_(~0xFFF)
    # E2M1 has one mantissa bit from 1 on and steps of 1/2 below, as y + 1 in [1, 2) would have with one bit.
    # So z = y + 1 below 1 and 2 y from there on has the codes' values at one mantissa bit throughout, and the
    # top bits of its pattern number them. From 5 on, z = y + 5 rounds to 12, code 7, for every y < 9; y < 8
    # always.
    z = torch.clamp(y, 1, 5, out=b).add_(y).view(torch.int32)
    # Round the pattern to one mantissa bit, ties to even, and count from z = 1, whose exponent field is 127.
    odd = torch.bitwise_right_shift(z, 22, out=a.view(torch.int32)).bitwise_and_(1)
    z.add_(odd).add_(0x1FFFFF - (2 * _BIAS << 22)).bitwise_right_shift_(22)
    sign = torch.bitwise_right_shift(x.view(torch.int32), 28, out=a.view(torch.int32)).bitwise_and_(8)
    codes.copy_(z.bitwise_or_(sign))

    # A pair of codes read as one little-endian 16-bit number is hi << 8 | lo (hosts and devices
    # are little-endian); hi << 4 | lo is wanted.
    pair = codes.view(torch.int16)
    high = a.view(torch.int16).view(-1)[: pair.numel()].view_as(pair)
    pair.bitwise_or_(torch.bitwise_right_shift(pair, 4, out=high))
    pair.bitwise_and_(torch.where(bad, 0, 0xFF).to(torch.int16))
    packed.copy_(pair.view(rows, -1)[:, : packed.shape[1]])


def _next_is_better(y: Tensor, b: Tensor, wide: Tensor | None) -> Tensor:
    """Whether e + 1 gives blocks [n, 32] a smaller squared error than e; y = |x| * 2^-e < 8. [n, 1] bool.

    Rounding to the grid of e + 1, {0, 1, 2, 3, 4, 6, 8, ...}, differs from rounding to that of e only near
    the values that one of them lacks, .5, 1.5 and 8. There (y - q')^2 - (y - q)^2 comes to 1/4 - |y - 1/2|,
    1/4 - |y - 3/2| and 4 (7 - y), and it is 0 wherever that is of the other sign. With v = min(||y - 1| -
    1/2|, 1/4) the sum over the block is sum(1/4 - v) - 4 sum(max(y, 7) - 7).

    That is exact, in any order of summation: all that counts is y >= 1/4, so for bfloat16 and float16 weights
    every term is a multiple of 2^-12 and every sum below 2^8. Float32 weights have multiples of 2^-25 and
    take float64.
    """
    v = b if wide is None else wide[: y.numel()].view_as(y)
    over = torch.clamp(y, min=7, out=b).sum(-1, keepdim=True, dtype=v.dtype)
    v.copy_(y).sub_(1).abs_().sub_(0.5).abs_().clamp_(max=0.25)
    return 0.25 * BLOCK - v.sum(-1, keepdim=True) < 4 * (over - 7 * BLOCK)


class _Workspace:
    """Buffers for one chunk of `quantize`, used again for the next."""

    def __init__(self, size: int, weight: Tensor, rule: str) -> None:
        self._floats = torch.empty((3, size), dtype=torch.float32, device=weight.device)
        self._codes = torch.empty(size, dtype=torch.uint8, device=weight.device)
        self.wide: Tensor | None = None
        if rule == "mse" and weight.dtype == torch.float32:
            self.wide = torch.empty(size, dtype=torch.float64, device=weight.device)

    def take(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Three float32 buffers and a uint8 one, each [size / 32, 32]."""
        x, a, b = (buffer[:size].view(-1, BLOCK) for buffer in self._floats)
        return x, a, b, self._codes[:size].view(-1, BLOCK)


def _dequantize_tile(packed: Tensor, scales: Tensor, out: Tensor, pairs: Tensor, exps: Tensor) -> None:
    """Dequantize [rows, ceil(width / 2)] and [rows, ceil(width / 32)] into `out`, [rows, width]."""
    rows, width = out.shape
    blocks = scales.shape[1]
    index = torch.empty((rows, blocks * BLOCK // 2), dtype=torch.int32, device=packed.device)
    index[:, : packed.shape[1]].copy_(packed)
    index[:, packed.shape[1] :].zero_()
    values = pairs.index_select(0, index.view(-1)).view(exps.dtype).view(rows, blocks, BLOCK)
    factors = exps.index_select(0, scales.reshape(-1).to(torch.int32)).view(rows, blocks, 1)
    if out.is_contiguous() and width % BLOCK == 0 and out.dtype == values.dtype:
        torch.mul(values, factors, out=out.view(rows, blocks, BLOCK))
    else:
        out.copy_(values.mul_(factors).view(rows, -1)[:, :width])


def pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of each byte, [256, 2] or, where an integer is as wide as two values, [256].

    Computed rather than copied from the host, which would wait for the device; and not cached, so that no
    fake tensor of a tracing mode can stay behind.
    """
    code = torch.arange(256, dtype=torch.int32, device=device).view(-1, 1).expand(-1, 2).clone()
    code[:, 1].bitwise_right_shift_(4)
    size = code & 7
    # From code 2 (1.0) on, codes count the float32 patterns with one mantissa bit; 0x3F000000 is 1/2.
    bits = torch.where(size < 2, size * 0x3F000000, (size + (2 * _BIAS - 2)) << 22) | ((code & 8) << 28)
    table = bits.view(torch.float32).to(dtype)
    wide = {2: torch.int32, 4: torch.int64}.get(dtype.itemsize)
    return table if wide is None else table.view(wide).view(-1)


def scale_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """2^e for each scale byte, [256]; NaN for byte 255."""
    bits = torch.arange(256, dtype=torch.int32, device=device) << 23
    # Filled, not assigned: an assignment would copy a scalar from the host and wait for the device.
    bits[:1].fill_(0x00400000)  # 2^-127 is a float32 subnormal.
    bits[_NAN_BYTE:].fill_(0x7FC00000)
    return bits.view(torch.float32).to(dtype)


def _squares(weight: Tensor, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """||weight - dequantized||^2 and ||weight||^2 per slice of the first axis, in float64."""
    axes = tuple(range(1, weight.dim()))
    exact = weight.to(torch.float64)
    # Every value is exact in float32, from which a GPU gathers several times as fast.
    noise = dequantize(packed, scales, weight.shape[-1], torch.float32).to(torch.float64).sub_(exact)
    return noise.square_().sum(axes), exact.square_().sum(axes)


def _panels(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """View tensors [..., n_i] with equal leading axes as matrices [rows, n_i], in pieces if need be."""
    try:
        yield tuple(t.view(-1, t.shape[-1]) for t in tensors)
        return
    except RuntimeError:
        if tensors[0].dim() <= 2:
            raise
    for parts in zip(*(t.unbind(0) for t in tensors), strict=True):
        yield from _panels(*parts)


def _tiles(rows: int, width: int, chunk: int) -> Iterator[tuple[slice, int, int]]:
    """Cut [rows, width] into tiles (rows, start, end) of at most `chunk` elements, padding included."""
    columns = min(_ceil_div(width, BLOCK) * BLOCK, chunk)
    step = max(1, chunk // columns)
    for i in range(0, rows, step):
        for k in range(0, width, columns):
            yield slice(i, min(i + step, rows)), k, min(k + columns, width)


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in _WEIGHT_DTYPES:
        raise TypeError(f"weight must be one of {_names(_WEIGHT_DTYPES)}, got {weight.dtype}")
    if weight.dim() == 0 or weight.shape[-1] == 0:
        raise ValueError(f"weight must have a last axis K of at least 1, got shape {list(weight.shape)}")


def _check_packed(packed: Tensor, scales: Tensor, size: int | None) -> int:
    """Check that packed codes, scales and size fit together; return the size."""
    for name, t in (("packed", packed), ("scales", scales)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype != torch.uint8:
            raise ValueError(f"{name} must be torch.uint8, got {t.dtype}")
    shapes = f"packed {list(packed.shape)}, scales {list(scales.shape)}"
    if packed.dim() == 0 or packed.shape[-1] == 0:
        raise ValueError(f"packed must have a last axis of at least 1: {shapes}")
    if size is None:
        size = 2 * packed.shape[-1]
    if _ceil_div(size, 2) != packed.shape[-1]:
        raise ValueError(f"size {size} takes {_ceil_div(size, 2)} bytes of codes in the last axis: {shapes}")
    if packed.shape[:-1] != scales.shape[:-1] or scales.dim() != packed.dim():
        raise ValueError(f"leading axes differ: {shapes}")
    if scales.shape[-1] != _ceil_div(size, BLOCK):
        raise ValueError(f"size {size} takes {_ceil_div(size, BLOCK)} scales in the last axis: {shapes}")
    if packed.device != scales.device:
        raise ValueError(f"packed is on {packed.device}, scales on {scales.device}")
    return size


def _chunk(device: torch.device) -> int:
    return _CHUNK_CPU if device.type == "cpu" else _CHUNK_DEVICE


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
