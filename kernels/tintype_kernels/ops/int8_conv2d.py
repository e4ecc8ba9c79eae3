"""A convolution in int8 by implicit GEMM: weights with a scale an output channel, pictures with a scale a sample.

Pictures are rounded once, to channels-last codes; then a matrix product reads each tap's channels where they lie, so
that no unfolded copy of the picture is written. Sums are exact integers, whatever the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from tintype_kernels.ops.linear_epilogue import straight_through, tile_of
from tintype_kernels.ops.quantise import LARGEST, Int8Weight, dequantize, quantize_int8
from tintype_kernels.torch_op import (
    TorchOp,
    check,
    check_floating,
    describe,
    memory_format,
    public,
)
from tintype_kernels.triton_support import ceil_div, jit, magnitude_bits, power_of_two, tl, widen

LEAST, MOST = -128.0, LARGEST[torch.int8]  # codes of a picture, as QuantizeLinear saturates
LONGEST = 2**31 // (127 * 128)  # products of two codes that an int32 can sum


def reference(
    x: Tensor, qw: Int8Weight, bias: Tensor | None = None, residual: Tensor | None = None, *,
    stride: int = 1, padding: int = 1, input_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch, summed in float64."""
    rounded = straight_through(x, _rounded(x.detach(), input_scale))
    bias = None if bias is None else bias.double()
    z = F.conv2d(rounded, dequantize(qw, torch.float64), bias, stride, padding)
    return (z if residual is None else z + residual).to(x.dtype)


def _rounded(x: Tensor, input_scale: Tensor | None) -> Tensor:
    """The numbers in float64 that x's codes stand for."""
    values = x.float()
    scale = input_scale
    if scale is None:
        scale = values.abs().amax((1, 2, 3), keepdim=True) / MOST
    codes = (values / torch.where(scale == 0, 1.0, scale)).clamp(LEAST, MOST).round()
    return codes.double() * scale.double()


def _reference_forward(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, stride: int, padding: int,
) -> Tensor:  # fmt: skip
    out = _empty_output(x, codes, scales, bias, residual, input_scale, stride, padding)
    qw = Int8Weight(codes, scales)
    return out.copy_(
        reference(x, qw, bias, residual, stride=stride, padding=padding, input_scale=input_scale)
    )


def _library_forward(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, stride: int, padding: int,
) -> Tensor:  # fmt: skip
    """The library's convolution of x as it is with the weights that the codes stand for, in x's type."""
    z = F.conv2d(x, dequantize(Int8Weight(codes, scales), x.dtype), bias, stride, padding)
    z = z if residual is None else z + residual
    out = _empty_output(x, codes, scales, bias, residual, input_scale, stride, padding)
    return z if z.stride() == out.stride() else out.copy_(z)


def _output_shape(x: Tensor, codes: Tensor, stride: int, padding: int) -> tuple[int, ...]:
    height, width = (
        (size + 2 * padding - taps) // stride + 1
        for size, taps in zip(x.shape[2:], codes.shape[2:], strict=True)
    )
    return len(x), len(codes), height, width


def _empty_output(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, stride: int, padding: int,
) -> Tensor:  # fmt: skip
    """What the op gives, [n, out, h', w'], channels-last where x is."""
    shape = _output_shape(x, codes, stride, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@jit
def _peak_kernel(x, peaks, SIZE, SPAN: tl.constexpr):
    """Raise each sample's peak to its largest magnitude, which is the same in any order: grid (spans, samples)."""
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    values = tl.load(x + sample * SIZE + at, at < SIZE, 0.0).to(tl.float32)
    tl.atomic_max(peaks + sample, tl.max(magnitude_bits(values), 0), sem="relaxed")


@jit
def _scale_of(sample, scales, STATIC: tl.constexpr):
    """What a code of the sample stands for; `scales` holds peaks, or one scale for all where STATIC."""
    if STATIC:
        return tl.load(scales).to(tl.float32)
    return tl.div_rn(tl.load(scales + sample), 127.0)


@jit
def _codes_kernel(
    x, scales, codes, C, P,
    STATIC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Round a tile of a sample, which lies either way, to channels-last codes: grid (pixels, channels, samples)."""
    sample = tl.program_id(2).to(tl.int64)
    pixels = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS))[:, None]
    channels = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = (pixels < P) & (channels < C)
    last = pixels * C + channels
    at = last if CHANNELS_LAST else channels * P + pixels
    scale = _scale_of(sample, scales, STATIC)
    values = tl.load(x + sample * C * P + at, inside, 0.0).to(tl.float32)
    values = tl.div_rn(values, tl.where(scale == 0.0, 1.0, scale))
    values = tl.minimum(tl.maximum(values, -128.0), 127.0)
    values = (values + 12582912.0) - 12582912.0  # the nearest integer, halves to even
    tl.store(codes + sample * C * P + last, values.to(tl.int8), inside)


@jit
def _convolve_kernel(
    x, w, x_scales, w_scales, bias, residual, out, N, C, H, W, OUT_W, P, TAPS, stride,
    WIDTH: tl.constexpr, PADDING: tl.constexpr, STATIC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x [n, H, W, C] over w [N, TAPS, C] with the epilogue, for P pixels a sample: grid (tiles, samples)."""
    sample = tl.program_id(1).to(tl.int64)
    down, across = tile_of(P, N, ROWS, COLUMNS, 8)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    pixels, depth = rows % P, tl.arange(0, DEPTH)[None, :]
    top, left = pixels // OUT_W * stride - PADDING, pixels % OUT_W * stride - PADDING
    x_at = x + sample * H * W * C + (((top * W + left) * C)[:, None] + depth)
    w_at = w + ((columns % N * TAPS * C)[:, None] + depth)
    blocks = tl.cdiv(C, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    # One loop over taps and channels, for loads to run ahead from each tap into the next.
    for step in range(0, TAPS * blocks):
        tap, start = step // blocks, step % blocks * DEPTH
        tap_y, tap_x = tap // WIDTH, tap % WIDTH
        read = depth < C - start
        seen = read & tl.full((ROWS, 1), True, tl.int1)
        if PADDING > 0:
            row, column = top + tap_y, left + tap_x
            seen &= ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None]
        a = tl.load(x_at + ((tap_y * W + tap_x) * C + start), seen, 0)
        b = tl.load(w_at + (tap * C + start), read, 0)
        total = tl.dot(a, tl.trans(b), total, out_dtype=tl.int32)
    value = total.to(tl.float32) * _scale_of(sample, x_scales, STATIC)
    value *= widen(tl.load(w_scales + columns, columns < N, 0.0))[None, :]
    if BIAS:
        value += widen(tl.load(bias + columns, columns < N, 0.0))[None, :]
    inside = (rows[:, None] < P) & (columns[None, :] < N)
    between_pixels, between_outputs = (N, 1) if CHANNELS_LAST else (1, P)
    at = rows[:, None] * between_pixels + columns[None, :] * between_outputs
    if RESIDUAL:
        value += widen(tl.load(residual + sample * N * P + at, inside, 0.0))
    tl.store(out + sample * N * P + at, value.to(out.dtype.element_ty), inside)


SPAN = 4096  # elements that a block of the first kernel reads
# Rows, columns, warps and stages of a tile of the product, by the largest number of a sample's pixels that it is for.
_TILES = {1024: (64, 64, 4, 4), 1 << 40: (128, 128, 8, 3)}


def _triton_forward(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, stride: int, padding: int,
) -> Tensor:  # fmt: skip
    out = _empty_output(x, codes, scales, bias, residual, input_scale, stride, padding)
    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    x_scales = _peaks(x) if input_scale is None else input_scale
    choices = {"STATIC": input_scale is not None, "CHANNELS_LAST": layout == torch.channels_last}
    pictures = _write_codes(x, x_scales, choices)
    # Nothing is copied where the codes are held channels-last.
    weight = codes.contiguous(memory_format=torch.channels_last)
    added = None if residual is None else residual.contiguous(memory_format=layout)
    _convolve(out, pictures, weight, x_scales, scales, bias, added, (stride, padding), choices)
    return out


def _peaks(x: Tensor) -> Tensor:
    peaks = x.new_zeros(len(x), dtype=torch.float32)
    size = x.shape[1:].numel()
    _peak_kernel[ceil_div(size, SPAN), len(x)](x, peaks.view(torch.int32), size, SPAN=SPAN)
    return peaks


def _write_codes(x: Tensor, scales: Tensor, choices: dict[str, bool]) -> Tensor:
    """x's codes, [n, h, w, c]."""
    n, c, h, w = x.shape
    codes = x.new_empty((n, h, w, c), dtype=torch.int8)
    channels = min(64, power_of_two(c))
    pixels = min(4096 // channels, power_of_two(h * w))
    grid = (ceil_div(h * w, pixels), ceil_div(c, channels), n)
    _codes_kernel[grid](x, scales, codes, c, h * w, **choices, PIXELS=pixels, CHANNELS=channels)
    return codes


def _convolve(
    out: Tensor, pictures: Tensor, weight: Tensor, x_scales: Tensor, w_scales: Tensor,
    bias: Tensor | None, residual: Tensor | None, geometry: tuple[int, int], choices: dict[str, bool],
) -> None:  # fmt: skip
    _, height, width, c = pictures.shape
    samples, n, out_height, out_width = out.shape
    pixels = out_height * out_width
    rows, columns, warps, stages = next(t for most, t in _TILES.items() if pixels <= most)
    stride, padding = geometry
    _convolve_kernel[ceil_div(pixels, rows) * ceil_div(n, columns), samples](
        pictures, weight, x_scales, w_scales.contiguous(), out if bias is None else bias.contiguous(),
        out if residual is None else residual, out,
        n, c, height, width, out_width, pixels, weight.shape[2:].numel(), stride,
        WIDTH=weight.shape[3], PADDING=padding, **choices, BIAS=bias is not None, RESIDUAL=residual is not None,
        ROWS=rows, COLUMNS=columns, DEPTH=128 if c % 128 == 0 else 64, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _triton_obstacle(x: Tensor, codes: Tensor, *_: Any) -> str:
    length = codes.shape[1:].numel()
    return f"sums of {length} products pass int32's {LONGEST}" if length > LONGEST else ""


FORWARD = TorchOp(
    "int8_conv2d", fake=_empty_output, reference=_reference_forward, triton=_triton_forward,
    library=_library_forward, obstacles={"triton": _triton_obstacle}, unmeasured="library",
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, bias, residual, _, ctx.stride, ctx.padding = inputs
    ctx.shape, ctx.biased, ctx.added = x.shape, bias is not None, residual is not None
    ctx.save_for_backward(codes, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = dequantize(Int8Weight(*ctx.saved_tensors), grad.dtype)
    dx = conv2d_input(ctx.shape, weight, grad, ctx.stride, ctx.padding)  # type: ignore[no-untyped-call]
    dbias = grad.sum((0, 2, 3)) if ctx.biased else None
    return dx, None, None, dbias, grad if ctx.added else None, None, None, None


FORWARD.differentiate(_setup_context, _backward)


@public(reference)
def int8_conv2d(
    x: Tensor, qw: Int8Weight, bias: Tensor | None = None, residual: Tensor | None = None, *,
    stride: int = 1, padding: int = 1, input_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return `conv2d(x, w, bias) + residual`, [n, out, h', w'], for x [n, in, h, w], channels-last where x is.

    `qw` has codes int8 [out, in, kh, kw], best held channels-last, and scales float32 [out]. x is rounded to 127 steps
    either way on one scale a sample, or to -128..127 steps of `input_scale`, float32 []; gradients pass the rounding
    by. Raises ValueError for what does not fit.
    """
    arguments = _checked(
        x, qw, bias, residual, stride=stride, padding=padding, input_scale=input_scale
    )
    out: Tensor = FORWARD(*arguments)
    return out


def is_preferred(*arguments: Any, **geometry: Any) -> bool:
    """Whether, for its arguments, Triton's kernels are asked for or were measured to be faster than the library."""
    return FORWARD.form(*_checked(*arguments, **geometry)) == "triton"


def _checked(
    x: Tensor, qw: Int8Weight, bias: Tensor | None = None, residual: Tensor | None = None, *,
    stride: int = 1, padding: int = 1, input_scale: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The op's arguments, of which all fit."""
    check_floating("x", x, 4)
    codes, scales = qw
    if codes.dtype != torch.int8 or codes.ndim != 4 or codes.shape[1] != x.shape[1]:
        raise ValueError(
            f"qw has codes {describe(codes)}, expected torch.int8[out, {x.shape[1]}, kh, kw]"
        )
    if stride < 1 or padding < 0:
        raise ValueError(
            f"stride is {stride} and padding {padding}, expected at least 1 and at least 0"
        )
    shape = _output_shape(x, codes, stride, padding)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"x is {describe(x)}, expected pictures that hold a kernel of {list(codes.shape[2:])}"
        )
    if bias is not None:
        check("bias", bias, shape[1:2], x)
    if residual is not None:
        check("residual", residual, shape, x)
    if input_scale is not None:
        check("input_scale", input_scale, (), scales)
    return x, codes, scales, bias, residual, input_scale, stride, padding


@lru_cache(maxsize=1)
def _wide_weight(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(Int8Weight(codes, scales), dtype)


def _wide_convolution(*arguments: Any, **geometry: Any) -> Tensor:
    """The library's convolution, whose weight was never in codes, for the op's arguments."""
    x, codes, scales, bias, residual, _, stride, padding = _checked(*arguments, **geometry)
    z = F.conv2d(x, _wide_weight(codes, scales, x.dtype), bias, stride, padding)
    return z if residual is None else z + residual


# What a benchmark compares with by name.
LIBRARIES = {"conv2d": _wide_convolution}


def flops(x: Tensor, qw: Int8Weight, *, stride: int, padding: int, **_: Any) -> int:
    """Multiplications and additions of a call."""
    n, out, height, width = _output_shape(x, qw.codes, stride, padding)
    return 2 * n * height * width * out * qw.codes.shape[1:].numel()


# Channels in and out, side of the picture and of the kernel, and stride, of layers of each model's denoiser.
_SIZES = {
    "SD1.5 512, 1280 x 8": (1280, 1280, 8, 3, 1),
    "SDXL 1024, 320 x 128": (320, 320, 128, 3, 1),
    "SDXL 1024, 320 x 128 halved": (320, 320, 128, 3, 2),
    "SDXL 1024, 640 x 64": (640, 640, 64, 3, 1),
    "SDXL 1024, 2560 x 32": (2560, 1280, 32, 3, 1),
    "SDXL 1024, 960 x 128 pointwise": (960, 320, 128, 1, 1),
}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (c, out, side, taps, stride) in _SIZES.items():
        codes, scales = quantize_int8(make(out, taps * taps * c))
        qw = Int8Weight(codes.view(out, taps, taps, c).permute(0, 3, 1, 2), scales)
        how = {"stride": stride, "padding": taps // 2}
        for name, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            x = make(batch, c, side, side).contiguous(memory_format=layout)
            yield f"{label}, {name}", {"x": x, "qw": qw, "bias": make(out), **how}
        residual = make(batch, out, side // stride, side // stride)
        added = {"residual": residual.contiguous(memory_format=torch.channels_last)}
        yield f"{label}, static", {"x": x, "qw": qw, **added, **how, "input_scale": _calibrated(x)}


def _calibrated(x: Tensor) -> Tensor:
    return x.abs().amax().float() / MOST
