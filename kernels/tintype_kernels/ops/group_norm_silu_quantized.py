"""GroupNorm, then SiLU, whose pictures leave in 8 bits for a quantised convolution: no copy in x's type is written.

On a calibrated scale x is read as often as by `group_norm_silu`. A scale of each sample's own is known when all of its
groups are normed, so one more pass looks for the peak first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tintype_kernels.layout import memory_format
from tintype_kernels.ops import group_norm_kernels as kernels
from tintype_kernels.ops import group_norm_silu as plain
from tintype_kernels.ops.quantised_pictures import (
    QuantizedPictures,
    codes_tile,
    empty_pictures,
    lies_channels_last,
    plain_pictures,
    raise_peak,
    store_codes,
)
from tintype_kernels.torch_op import TorchOp, check, public
from tintype_kernels.triton_support import await_earlier, entry, tl


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True,
    residual: Tensor | None = None, input_scale: Tensor | None = None,
) -> QuantizedPictures:  # fmt: skip
    """The op in plain PyTorch."""
    normed = plain.reference(x, weight, bias, groups, eps, silu, residual)
    return plain_pictures(normed.contiguous(memory_format=memory_format(x)), input_scale)


def baseline(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True,
    residual: Tensor | None = None, input_scale: Tensor | None = None,
) -> QuantizedPictures:  # fmt: skip
    """What a benchmark compares with."""
    normed = plain.baseline(x, weight, bias, groups, eps, silu, residual)
    return plain_pictures(normed.contiguous(memory_format=memory_format(x)), input_scale)


def _reference_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, residual: Tensor | None,
    input_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pictures = reference(x, weight, bias, groups, eps, silu, residual, input_scale)
    return pictures.codes, pictures.scales


def _empty(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    codes, scales, _ = empty_pictures(x, others[-1])
    return codes, scales


@entry
def _kernel(
    x, residual, weight, bias, stats, affine, given, scales, codes, C, P, eps, GROUPS: tl.constexpr,
    SILU: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr, BACKWARDS: tl.constexpr, PEAK: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """The PEAK or the codes of a WHOLE group, grid (groups, n), or of a tile, grid (pixels, channels, n)."""
    await_earlier()
    if WHOLE:
        values, n, pixels, c, mask = kernels.whole_group(
            x, residual, weight, bias, stats, C, P, eps, GROUPS, SILU, RESIDUAL, CHANNELS_LAST, WIDTH, PIXELS, CHANNELS
        )  # fmt: skip
    else:
        values, n, pixels, c, mask = kernels.tile(
            x, residual, affine, C, P, SILU, RESIDUAL, CHANNELS_LAST, PIXELS, CHANNELS, BACKWARDS
        )
    values = values.to(x.dtype.element_ty).to(tl.float32)
    if PEAK:
        raise_peak(given + n, tl.where(mask, values, 0.0))
    else:
        at = kernels.offsets(pixels, c, C, P, True)
        store_codes(values, given, scales, codes + n * C * P, n, at, mask, STATIC)


def _triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, residual: Tensor | None,
    input_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan, static = plain.Plan(x, groups, residual), input_scale is not None
    codes, scales, given = empty_pictures(x, input_scale)
    stats, weights = plain.empty_stats(x, groups), (weight.contiguous(), bias.contiguous())
    if plan.fits:
        affine, grid, tile = stats, (groups, len(x)), plan.whole
    else:
        affine = plain.measure(plan, *weights, stats, eps)
        tile, grid = codes_tile(x)
        tile["WIDTH"] = plan.whole["WIDTH"]

    def run(*, peak: bool, backwards: bool) -> None:
        _kernel[grid](
            plan.x, plan.residual, *weights, stats, affine, given.view(torch.int32) if peak else given, scales, codes,
            plan.C, plan.P, eps, groups, silu,
            **plan.layout, **tile, WHOLE=plan.fits, BACKWARDS=backwards, PEAK=peak, STATIC=static,
        )  # fmt: skip

    if not static:
        run(peak=True, backwards=True)
    run(peak=False, backwards=static)
    return codes, scales


FORWARD = TorchOp(
    "group_norm_silu_quantized", fake=_empty, reference=_reference_forward, triton=_triton_forward
)


@public(reference)
def group_norm_silu_quantized(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True,
    residual: Tensor | None = None, input_scale: Tensor | None = None,
) -> QuantizedPictures:  # fmt: skip
    """Return `silu(group_norm(x + residual))` in the codes that `int8_conv2d` makes of it, for x [n, c, h, w].

    `residual` has x's shape or is [n, c, 1, 1]; `silu=False` leaves it at the norm. Codes are on one scale a sample, or
    on `input_scale`, float32 [].
    """
    plain.check_arguments(x, weight, bias, groups, residual)
    if input_scale is not None:
        check("input_scale", input_scale, (), x.new_empty(0, dtype=torch.float32))
    codes, scales = FORWARD(x, weight, bias, groups, eps, silu, residual, input_scale)
    return QuantizedPictures(codes, scales, x.dtype, lies_channels_last(x))


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, arguments in plain.cases(make, batch):
        yield label, arguments
        # A residual block's second norm, whose scale cuts some off.
        x = arguments["x"]
        scale = x.new_full((), 0.02, dtype=torch.float32)
        added = {"residual": make(*x.shape[:2], 1, 1), "input_scale": scale}
        yield f"{label}, static", {**arguments, **added}
