"""GroupNorm, then SiLU: `silu(group_norm(x + residual))`, in one read and one write where a group fits on chip.

`residual` is what a ResnetBlock adds between its first convolution and its second norm, the time embedding
[n, c, 1, 1], or a tensor of x's shape; the sum itself is not returned, as nothing after that norm reads it.

A group that does not fit on chip is split over blocks: three launches, of which the last finds what the first read
in the cache, if the cache holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintype_kernels import native as extension
from tintype_kernels.layout import memory_format
from tintype_kernels.ops import group_norm_kernels as kernels
from tintype_kernels.torch_op import (
    TorchOp,
    check,
    check_floating,
    public,
    wide,
    wide_type,
)
from tintype_kernels.triton_support import REGISTERS, ceil_div, power_of_two

ON_CHIP = 16384  # elements of a group that a block of sixteen warps holds without a spill
TILE = 4096  # elements that a block of four warps works on at a time
BLOCKS = 128  # that a sample is to have at least: one in each multiprocessor of a large chip
PIECES = 8192  # pieces of a group that are merged by one block


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch; half precision is computed in float32 and rounded once."""
    h, _ = _centred(x, groups, residual)
    return baseline(h.view(x.shape), wide(weight), wide(bias), groups, eps, silu).to(x.dtype)


def baseline(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a benchmark compares with."""
    h = x if residual is None else x + residual
    # F.group_norm refuses a group of one value.
    normed = torch.group_norm(h, groups, weight, bias, eps, torch.backends.cudnn.enabled)
    return F.silu(normed) if silu else normed


def _reference_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, residual: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, stats = _empty_outputs(x, weight, bias, groups)
    out.copy_(reference(x, weight, bias, groups, eps, silu, residual))
    h, mean = _centred(x, groups, residual)
    variance, low = torch.var_mean(h, (2, 3), correction=0)
    stats.copy_(torch.stack([mean.flatten(1), low, torch.rsqrt(variance + eps)], 1))
    return out, stats


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, silu: bool, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With z the norm's output, dz is passed back through the norm to x, weight and bias."""
    groups = stats.shape[-1]
    mean, low, rstd = stats[..., None, None].unbind(1)
    normed = (_grouped(x, groups, residual) - mean - low) * rstd
    scale, shift = (wide(p).view(groups, -1, 1) for p in (weight, bias))
    dz = _grouped(grad, groups)
    if silu:
        z = normed * scale + shift
        gate = torch.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    plain = (dz * scale).mean((2, 3), keepdim=True)
    moved = (dz * scale * normed).mean((2, 3), keepdim=True)
    dx, dweight, dbias = _empty_gradients(grad, x, weight, bias)
    dx.copy_(((dz * scale - plain - normed * moved) * rstd).view(x.shape))
    dweight.copy_((dz * normed).sum((0, 3)).view(-1))
    dbias.copy_(dz.sum((0, 3)).view(-1))
    return dx, dweight, dbias


def _grouped(x: Tensor, groups: int, residual: Tensor | None = None) -> Tensor:
    h = wide(x) if residual is None else wide(x) + wide(residual)
    n, c, height, width = x.shape
    # Sums of what lies channels-last have other bits in other batches.
    return h.contiguous().view(n, groups, c // groups, height * width)


def _centred(x: Tensor, groups: int, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """x + residual less the means of groups, and these: PyTorch's norms lose what is small beside the mean."""
    h = _grouped(x, groups, residual)
    # Sample by sample: how threads share a sum out depends on how many there are, and with it the bits.
    mean = torch.cat([sample.mean((2, 3), keepdim=True) for sample in torch.split(h, 1)])
    return h - mean, mean


class Plan:
    """How one sample is cut up. Nothing here depends on the batch, so neither do the bits."""

    def __init__(self, x: Tensor, groups: int, residual: Tensor | None) -> None:
        n, C, H, W = x.shape
        self.C, self.P, self.groups = C, H * W, groups
        layout = memory_format(x)
        self.x = x.contiguous(memory_format=layout)
        kind, self.residual = "none", self.x
        if residual is not None:
            kind = "full" if residual.shape == x.shape else "channel"
            own = layout if kind == "full" else torch.contiguous_format
            self.residual = residual.contiguous(memory_format=own)
        self.layout = {"RESIDUAL": kind, "CHANNELS_LAST": layout == torch.channels_last}
        # How a block holds a whole group, if it can.
        pixels, channels = power_of_two(self.P), power_of_two(C // groups)
        self.fits = pixels * channels <= ON_CHIP
        self.whole = {
            "WIDTH": C // groups,
            "PIXELS": pixels,
            "CHANNELS": channels,
            "num_warps": max(4, pixels * channels // 1024),
            **REGISTERS,
        }
        # Channels-last reads 64 channels in a row, contiguous as many pixels as a tile holds.
        channels = 64 if layout == torch.channels_last else ceil_div(TILE, power_of_two(self.P))
        channels = min(channels, power_of_two(C))
        pixels = min(TILE // channels, power_of_two(self.P))
        # Up to eight tiles a block spread the cost of a piece's statistics, as long as a sample has blocks for a chip;
        # more where a group would have too many pieces.
        tiles = ceil_div(self.P, pixels) * ceil_div(C, channels)
        fewest = ceil_div(self.P * (C // groups), PIECES * pixels)
        self.span = pixels * max(1, min(8, tiles // BLOCKS), fewest)
        self.splits = ceil_div(self.P, self.span)
        self.tile = {**self.layout, "PIXELS": pixels, "CHANNELS": channels}
        self.tiles = (ceil_div(self.P, pixels), ceil_div(C, channels), n)
        self.spans = (self.splits, *self.tiles[1:])
        pieces = power_of_two(C // groups * self.splits)
        self.merge = {"BLOCK": pieces, "num_warps": 4 if pieces <= TILE else 16}


def measure(plan: Plan, weight: Tensor, bias: Tensor, stats: Tensor, eps: float) -> Tensor:
    """Statistics of groups that are split over blocks; give [n, 3, c]: mean, gain and offset of each channel."""
    n, groups, sizes = len(plan.x), plan.groups, (plan.C, plan.P, plan.span)
    pieces, affine = stats.new_empty(n, 3, plan.C, plan.splits), stats.new_empty(n, 3, plan.C)
    kernels.pieces_kernel[plan.spans](plan.x, plan.residual, pieces, *sizes, **plan.tile)
    kernels.merge_kernel[groups, n](
        pieces, weight, bias, stats, affine, *sizes, plan.splits, eps, groups, plan.whole["CHANNELS"], **plan.merge
    )  # fmt: skip
    return affine


def _triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, residual: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, stats = _empty_outputs(x, weight, bias, groups)
    plan = Plan(x, groups, residual)
    inputs, weights = (plan.x, plan.residual), (weight.contiguous(), bias.contiguous())
    if plan.fits:
        kernels.group_kernel[groups, len(x)](
            *inputs, *weights, out, stats, plan.C, plan.P, eps, groups, silu, **plan.layout, **plan.whole
        )  # fmt: skip
        return out, stats
    affine = measure(plan, *weights, stats, eps)
    kernels.apply_kernel[plan.tiles](*inputs, affine, out, plan.C, plan.P, silu, **plan.tile)
    return out, stats


def _triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, silu: bool, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight, dbias = _empty_gradients(grad, x, weight, bias)
    plan, n, groups = Plan(x, stats.shape[-1], residual), len(x), stats.shape[-1]
    sums, means = stats.new_empty(n, 2, plan.C, plan.splits), stats.new_empty(n, 2, groups)
    weight, bias = weight.contiguous(), bias.contiguous()
    tensors = (
        grad.contiguous(memory_format=memory_format(x)), plan.x, plan.residual, weight, bias, stats, sums, means, dx
    )  # fmt: skip
    sizes, grouping = (plan.C, plan.P), (groups, plan.whole["WIDTH"])
    pixels = plan.tile["PIXELS"]
    kernels.backward_kernel[plan.spans](
        *tensors, *sizes, plan.span, *grouping, silu, **plan.tile, SUMS=True
    )
    kernels.means_kernel[groups, n, 2](
        sums, weight, means, *sizes, plan.splits, groups, **plan.merge
    )
    kernels.backward_kernel[plan.tiles](
        *tensors, *sizes, pixels, *grouping, silu, **plan.tile, SUMS=False
    )
    return dx, dweight.copy_(sums[:, 1].sum((0, 2))), dbias.copy_(sums[:, 0].sum((0, 2)))


def _native_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, residual: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = x.contiguous(memory_format=memory_format(x))
    out, stats = extension.group_norm_silu(x, weight, bias, groups, eps, silu, residual)
    return out, stats


def _native_obstacle(x: Tensor, *_: Any) -> str:
    return "" if x.dtype == torch.float32 else f"x is {x.dtype} and the native kernel takes float32"


def _empty_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=memory_format(x)), empty_stats(x, groups)


def empty_stats(x: Tensor, groups: int) -> Tensor:
    """[n, 3, groups]: mean, what the mean lost in rounding, inverse standard deviation."""
    return x.new_empty(x.shape[0], 3, groups, dtype=wide_type(x))


def _empty_gradients(
    _: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format(x))
    return dx, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


FORWARD = TorchOp(
    "group_norm_silu", fake=_empty_outputs, reference=_reference_forward, triton=_triton_forward,
    native=_native_forward, obstacles={"native": _native_obstacle},
)  # fmt: skip
BACKWARD = TorchOp(
    "group_norm_silu_backward",
    fake=_empty_gradients,
    reference=_reference_backward,
    triton=_triton_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, _, ctx.silu, residual = inputs
    ctx.save_for_backward(x, weight, bias, output[1], residual)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, stats, residual = ctx.saved_tensors
    dx, dweight, dbias = BACKWARD(grad, x, weight, bias, stats, ctx.silu, residual)
    dresidual = dx
    if residual is not None and residual.shape != x.shape:
        dresidual = dx.sum((2, 3), keepdim=True)
    return dx, dweight, dbias, None, None, None, None if residual is None else dresidual


FORWARD.differentiate(_setup_context, _backward)


@public(reference)
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return `silu(group_norm(x + residual))` for x [n, c, h, w], channels-last where x is.

    `residual` has x's shape or is [n, c, 1, 1]; `silu=False` leaves it at the norm.
    """
    check_arguments(x, weight, bias, groups, residual)
    out: Tensor = FORWARD(x, weight, bias, groups, eps, silu, residual)[0]
    return out


def check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, residual: Tensor | None
) -> None:
    """Refuse what does not fit x [n, c, h, w]."""
    check_floating("x", x, 4, channels=1)
    n, c = x.shape[:2]
    if groups < 1 or c % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of x's {c} channels")
    check("weight", weight, (c,), x)
    check("bias", bias, (c,), x)
    if residual is not None:
        spread = tuple(residual.shape[2:]) != (1, 1)
        check("residual", residual, tuple(x.shape) if spread else (n, c, 1, 1), x)


# Channels and side of norms in each model's denoiser and in the latent decoder that all share.
_SIZES = {
    "SD1.5 512, 320 x 64": (320, 64),
    "SD1.5 512, 1280 x 16": (1280, 16),  # the largest that fits on chip
    "SD1.5 512, 2560 x 8": (2560, 8),
    "SDXL 1024, 320 x 128": (320, 128),
    "SDXL 1024, 1280 x 32": (1280, 32),
    "decoder 1024, 512 x 128": (512, 128),
    "decoder 1024, 128 x 1024": (128, 1024),
}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (c, side) in _SIZES.items():
        for name, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            x = make(batch, c, side, side).contiguous(memory_format=layout)
            yield f"{label}, {name}", {"x": x, "weight": make(c), "bias": make(c), "groups": 32}
