"""Pictures in 8 bits, as `int8_conv2d` reads them and as the op before it may leave them: what the two share.

An op that leaves them rounds to the type of its input first, so that its codes are those that the convolution would
have made. Codes cannot hold NaN: a scale of NaN says that a sample held one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tintype_kernels.layout import memory_format
from tintype_kernels.ops.quantise import LARGEST
from tintype_kernels.triton_support import (
    LEAST_NORMAL,
    await_earlier,
    ceil_div,
    entry,
    jit,
    magnitude_bits,
    nearest_int8,
    power_of_two,
    tl,
)

LEAST, MOST = -128.0, LARGEST[torch.int8]  # codes of a picture, as QuantizeLinear saturates


class QuantizedPictures(NamedTuple):
    """codes int8 [n, h, w, c] and scales float32 [n], of pictures [n, c, h, w] that had `dtype`; no gradient passes.

    `channels_last` says how the pictures lay, which is how what a convolution makes of them lies.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    channels_last: bool

    @property
    def shape(self) -> torch.Size:
        n, h, w, c = self.codes.shape
        return torch.Size((n, c, h, w))

    def numbers(self) -> Tensor:
        """What the codes stand for, float64 [n, c, h, w]."""
        numbers = self.codes.double() * self.scales.double()[:, None, None, None]
        return numbers.permute(0, 3, 1, 2)


def plain_pictures(values: Tensor, input_scale: Tensor | None = None) -> QuantizedPictures:
    """Values [n, c, h, w] rounded to codes in plain PyTorch, on one scale for all where it is given."""
    wide = values.detach().float()
    scales = wide.abs().amax((1, 2, 3)) / MOST
    if input_scale is not None:
        scales = torch.where(scales.isnan(), scales, input_scale)
    # What is so small that the inverse of its scale is infinite becomes zeros.
    divisors = torch.where(scales < torch.finfo(scales.dtype).tiny, 1.0, scales)
    steps = wide / divisors[:, None, None, None]
    codes = steps.clamp(LEAST, MOST).round().to(torch.int8).permute(0, 2, 3, 1).contiguous()
    return QuantizedPictures(codes, scales, values.dtype, lies_channels_last(values))


def lies_channels_last(x: Tensor) -> bool:
    """Whether what is made of x [n, c, h, w] is channels-last."""
    return memory_format(x) == torch.channels_last


@jit
def raise_peak(peak, values):
    """Raise the bits of a sample's peak to those of the largest magnitude, the same in any order."""
    tl.atomic_max(peak, tl.max(magnitude_bits(values)), sem="relaxed")


@jit
def store_codes(values, given, scales, codes, n, at, inside, STATIC: tl.constexpr):
    """Round values of sample n to codes, at offsets `at` from its first, and keep their scale.

    `given` holds the scale of all samples where STATIC, and then `scales` holds it already; else it holds peaks. Beside
    `inside` there must be no NaN in a sample that has none.
    """
    if STATIC:
        scale = tl.load(given)
        # Bits above those of infinity are NaN's.
        tl.store(scales + n, float("nan"), tl.max(magnitude_bits(values)) > 0x7F800000)
    else:
        scale = tl.div_rn(tl.load(given + n), 127.0)
        tl.store(scales + n, scale)
    scale = tl.where(scale < LEAST_NORMAL, 1.0, scale)
    inverse = tl.div_rn(1.0, scale)
    values = tl.minimum(tl.maximum(values, -128.0 * scale), 127.0 * scale)
    # The quotient's own bits: what a product with the inverse leaves over is exact (Markstein, 1990).
    steps = values * inverse
    steps = tl.fma(tl.fma(steps, -scale, values), inverse, steps)
    tl.store(codes + at, nearest_int8(steps), inside)


@entry
def _peak_kernel(x, peaks, SIZE, SPAN: tl.constexpr):
    """Each sample's peak: grid (spans, samples)."""
    await_earlier()
    n = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    raise_peak(peaks + n, tl.load(x + n * SIZE + at, at < SIZE, 0.0).to(tl.float32))


@entry
def _codes_kernel(
    x, given, scales, codes, C, P,
    STATIC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of a sample, which lies either way: grid (pixels, channels, samples)."""
    await_earlier()
    n = tl.program_id(2).to(tl.int64)
    pixels = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS))[:, None]
    channels = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = (pixels < P) & (channels < C)
    last = pixels * C + channels
    at = last if CHANNELS_LAST else channels * P + pixels
    values = tl.load(x + n * C * P + at, inside, 0.0).to(tl.float32)
    store_codes(values, given, scales, codes + n * C * P, n, last, inside, STATIC)


SPAN = 4096  # elements that a block of the first kernel reads


def write_pictures(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x's codes and scales, by the kernels."""
    n, c, h, w = x.shape
    x = x.contiguous(memory_format=memory_format(x))
    codes, scales, given = empty_pictures(x, input_scale)
    if input_scale is None:
        size = c * h * w
        _peak_kernel[ceil_div(size, SPAN), n](x, given.view(torch.int32), size, SPAN=SPAN)
    tile, grid = codes_tile(x)
    layout = {"STATIC": input_scale is not None, "CHANNELS_LAST": lies_channels_last(x)}
    _codes_kernel[grid](x, given, scales, codes, c, h * w, **layout, **tile)
    return codes, scales


def empty_pictures(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """New codes and scales for pictures of x's shape, and what `store_codes` takes as given: peaks are still 0."""
    n, c, h, w = x.shape
    codes = x.new_empty((n, h, w, c), dtype=torch.int8)
    if input_scale is None:
        scales = x.new_empty(n, dtype=torch.float32)
        return codes, scales, torch.zeros_like(scales)
    return codes, input_scale.expand(n).clone(), input_scale


def codes_tile(x: Tensor) -> tuple[dict[str, int], tuple[int, int, int]]:
    """A tile that is read along pixels or channels and written along channels, and the grid of such tiles of x."""
    n, c, h, w = x.shape
    channels = min(64, power_of_two(c))
    pixels = min(4096 // channels, power_of_two(h * w))
    grid = (ceil_div(h * w, pixels), ceil_div(c, channels), n)
    return {"PIXELS": pixels, "CHANNELS": channels}, grid
