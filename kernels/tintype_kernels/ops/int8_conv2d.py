"""A convolution in int8 by implicit GEMM: weights with a scale an output channel, pictures with a scale a sample.

Pictures are rounded once, to channels-last codes, or come in them from the op before; then a matrix product reads each
tap's channels where they lie, so that no unfolded copy of the picture is written. Sums are exact integers, whatever the
tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from tintype_kernels.layout import memory_format
from tintype_kernels.ops.linear_epilogue import straight_through, tile_of
from tintype_kernels.ops.quantise import Int8Weight, check_weight, dequantize, quantize_int8
from tintype_kernels.ops.quantised_pictures import (
    MOST,
    QuantizedPictures,
    plain_pictures,
    write_pictures,
)
from tintype_kernels.torch_op import TorchOp, check, check_floating, describe, public
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, tl, widen

LONGEST = 2**31 // (127 * 128)  # products of two codes that an int32 can sum


def reference(
    x: Tensor | QuantizedPictures, qw: Int8Weight, bias: Tensor | None = None, residual: Tensor | None = None, *,
    stride: int = 1, padding: int = 1, input_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch, summed in float64."""
    if isinstance(x, QuantizedPictures):
        numbers = x.numbers()
    else:
        numbers = straight_through(x, plain_pictures(x, input_scale).numbers())
    bias = None if bias is None else bias.double()
    z = F.conv2d(numbers, dequantize(qw, torch.float64), bias, stride, padding)
    return (z if residual is None else z + residual).to(x.dtype)


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


def _output_shape(
    shape: Sequence[int], codes: Tensor, stride: int, padding: int
) -> tuple[int, ...]:
    height, width = (
        (size + 2 * padding - taps) // stride + 1
        for size, taps in zip(shape[2:], codes.shape[2:], strict=True)
    )
    return shape[0], len(codes), height, width


def _empty_output(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, stride: int, padding: int,
) -> Tensor:  # fmt: skip
    """What the op gives, [n, out, h', w'], channels-last where x is."""
    shape = _output_shape(x.shape, codes, stride, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@entry
def _convolve_kernel(
    x, w, x_scales, w_scales, bias, residual, out, N, C, H, W, OUT_W, P, TAPS, stride,
    WIDTH: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x [n, H, W, C] over w [N, TAPS, C] with the epilogue, for P pixels a sample: grid (tiles, samples)."""
    await_earlier()
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
    value = total.to(tl.float32) * tl.load(x_scales + sample)
    value *= widen(tl.load(w_scales + columns, columns < N, 0.0))[None, :]
    if BIAS:
        value += widen(tl.load(bias + columns, columns < N, 0.0))[None, :]
    inside = (rows[:, None] < P) & (columns[None, :] < N)
    between_pixels, between_outputs = (N, 1) if CHANNELS_LAST else (1, P)
    at = rows[:, None] * between_pixels + columns[None, :] * between_outputs
    if RESIDUAL:
        value += widen(tl.load(residual + sample * N * P + at, inside, 0.0))
    tl.store(out + sample * N * P + at, value.to(out.dtype.element_ty), inside)


# Rows, columns, warps and stages of a tile of the product, by the largest number of a sample's pixels that it is for.
_TILES = {1024: (64, 64, 4, 4), 1 << 40: (128, 128, 8, 3)}


def _triton_forward(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, stride: int, padding: int,
) -> Tensor:  # fmt: skip
    out = _empty_output(x, codes, scales, bias, residual, input_scale, stride, padding)
    pictures = write_pictures(x, input_scale)
    return _convolve(out, *pictures, codes, scales, bias, residual, stride, padding)


def _convolve(
    out: Tensor, pictures: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None,
    residual: Tensor | None, stride: int, padding: int,
) -> Tensor:  # fmt: skip
    """`out`, written as it lies."""
    _, height, width, c = pictures.shape
    samples, n, out_height, out_width = out.shape
    pixels, layout = out_height * out_width, memory_format(out)
    # Nothing is copied where the codes are held channels-last.
    weight = codes.contiguous(memory_format=torch.channels_last)
    added = out if residual is None else residual.contiguous(memory_format=layout)
    rows, columns, warps, stages = next(t for most, t in _TILES.items() if pixels <= most)
    _convolve_kernel[ceil_div(pixels, rows) * ceil_div(n, columns), samples](
        pictures, weight, x_scales, scales.contiguous(), out if bias is None else bias.contiguous(), added, out,
        n, c, height, width, out_width, pixels, codes.shape[2:].numel(), stride,
        WIDTH=codes.shape[3], PADDING=padding, CHANNELS_LAST=layout == torch.channels_last,
        BIAS=bias is not None, RESIDUAL=residual is not None,
        ROWS=rows, COLUMNS=columns, DEPTH=128 if c % 128 == 0 else 64, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _triton_obstacle(weight: Tensor) -> str:
    length = weight.shape[1:].numel()
    return f"sums of {length} products pass int32's {LONGEST}" if length > LONGEST else ""


FORWARD = TorchOp(
    "int8_conv2d", fake=_empty_output, reference=_reference_forward, triton=_triton_forward, library=_library_forward,
    obstacles={"triton": lambda x, codes, *_: _triton_obstacle(codes)}, unmeasured="library",
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


def _reference_of_pictures(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    geometry: list[int], dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    pictures, (stride, padding) = QuantizedPictures(x, x_scales, dtype, channels_last), geometry
    out = _empty_of_pictures(
        x, x_scales, codes, scales, bias, residual, geometry, dtype, channels_last
    )
    qw = Int8Weight(codes, scales)
    return out.copy_(reference(pictures, qw, bias, residual, stride=stride, padding=padding))


def _triton_of_pictures(*arguments: Any) -> Tensor:
    *tensors, geometry, _, _ = arguments
    return _convolve(_empty_of_pictures(*arguments), *tensors, *geometry)


def _empty_of_pictures(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    geometry: list[int], dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    """What the op gives for pictures in codes; `geometry` is stride and padding."""
    pictures = QuantizedPictures(x, x_scales, dtype, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = _output_shape(pictures.shape, codes, *geometry)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


PICTURES_FORWARD = TorchOp(
    "quantized_pictures_conv2d", fake=_empty_of_pictures, reference=_reference_of_pictures,
    triton=_triton_of_pictures, obstacles={"triton": lambda x, x_scales, codes, *_: _triton_obstacle(codes)},
)  # fmt: skip


@public(reference)
def int8_conv2d(
    x: Tensor | QuantizedPictures, qw: Int8Weight, bias: Tensor | None = None, residual: Tensor | None = None, *,
    stride: int = 1, padding: int = 1, input_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return `conv2d(x, w, bias) + residual`, [n, out, h', w'], for x [n, in, h, w], channels-last where x is.

    `qw` has codes int8 [out, in, kh, kw], best held channels-last, and scales float32 [out]. x is rounded to 127 steps
    either way on one scale a sample, or to -128..127 steps of `input_scale`, float32 [], unless it comes as
    `QuantizedPictures`; gradients pass the rounding by. Raises ValueError for what does not fit.
    """
    op, arguments = _call(
        x, qw, bias, residual, stride=stride, padding=padding, input_scale=input_scale
    )
    out: Tensor = op(*arguments)
    return out


def is_preferred(*arguments: Any, **geometry: Any) -> bool:
    """Whether, for its arguments, Triton's kernels are asked for or were measured to be faster than the library."""
    op, fitting = _call(*arguments, **geometry)
    return op.form(*fitting) == "triton"


def _call(
    x: Tensor | QuantizedPictures, qw: Int8Weight, bias: Tensor | None = None, residual: Tensor | None = None, *,
    stride: int = 1, padding: int = 1, input_scale: Tensor | None = None,
) -> tuple[TorchOp, tuple[Any, ...]]:  # fmt: skip
    """The op that takes x, and its arguments, of which all fit."""
    if isinstance(x, QuantizedPictures):
        _check_pictures(x, input_scale)
        _check(x, qw, bias, residual, stride, padding, like=x.scales.new_empty(0, dtype=x.dtype))
        geometry = [stride, padding]
        return PICTURES_FORWARD, (*x[:2], *qw, bias, residual, geometry, *x[2:])
    check_floating("x", x, 4, channels=1)
    _check(x, qw, bias, residual, stride, padding, like=x)
    if input_scale is not None:
        check("input_scale", input_scale, (), qw.scales)
    return FORWARD, (x, *qw, bias, residual, input_scale, stride, padding)


def _check_pictures(x: QuantizedPictures, input_scale: Tensor | None) -> None:
    if x.codes.dtype != torch.int8 or x.codes.ndim != 4:
        raise ValueError(f"x has codes {describe(x.codes)}, expected torch.int8[n, h, w, c]")
    check("x's scales", x.scales, x.codes.shape[:1], x.scales.float())
    if input_scale is not None:
        raise ValueError(
            f"input_scale is {describe(input_scale)}, expected none beside x in codes, which have scales"
        )


def _check(
    x: Tensor | QuantizedPictures, qw: Int8Weight, bias: Tensor | None, residual: Tensor | None,
    stride: int, padding: int, *, like: Tensor,
) -> None:  # fmt: skip
    """Refuse what does not fit pictures of x's shape that have the type and the device of `like`."""
    check_weight(qw, Int8Weight, ndim=4)
    codes = qw.codes
    if codes.shape[1] != x.shape[1]:
        raise ValueError(
            f"qw has codes {describe(codes)}, expected torch.int8[out, {x.shape[1]}, kh, kw]"
        )
    if stride < 1 or padding < 0:
        raise ValueError(
            f"stride is {stride} and padding {padding}, expected at least 1 and at least 0"
        )
    shape = _output_shape(x.shape, codes, stride, padding)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"x is {list(x.shape)}, expected pictures that hold a kernel of {list(codes.shape[2:])}"
        )
    if bias is not None:
        check("bias", bias, shape[1:2], like)
    if residual is not None:
        check("residual", residual, shape, like)


@lru_cache(maxsize=2)
def _wide(value: Int8Weight | QuantizedPictures, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Int8Weight):
        return dequantize(value, dtype)
    layout = torch.channels_last if value.channels_last else torch.contiguous_format
    return value.numbers().to(dtype).contiguous(memory_format=layout)


def _wide_convolution(
    x: Tensor | QuantizedPictures, qw: Int8Weight, bias: Tensor | None = None, residual: Tensor | None = None, *,
    stride: int = 1, padding: int = 1, **_: Any,
) -> Tensor:  # fmt: skip
    """The library's convolution for the op's arguments, as if nothing had ever been in codes."""
    numbers = _wide(x, x.dtype) if isinstance(x, QuantizedPictures) else x
    z = F.conv2d(numbers, _wide(qw, x.dtype), bias, stride, padding)
    return z if residual is None else z + residual


# What a benchmark compares with by name.
LIBRARIES = {"conv2d": _wide_convolution}


def flops(
    x: Tensor | QuantizedPictures, qw: Int8Weight, *, stride: int, padding: int, **_: Any
) -> int:
    """Multiplications and additions of a call."""
    n, out, height, width = _output_shape(x.shape, qw.codes, stride, padding)
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
        yield f"{label}, codes", {"x": plain_pictures(x), "qw": qw, "bias": make(out), **how}
        residual = make(batch, out, side // stride, side // stride)
        added = {"residual": residual.contiguous(memory_format=torch.channels_last)}
        yield f"{label}, static", {"x": x, "qw": qw, **added, **how, "input_scale": _calibrated(x)}


def _calibrated(x: Tensor) -> Tensor:
    return x.abs().amax().float() / MOST
