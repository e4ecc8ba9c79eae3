"""Adaptive layer norm of flow transformers: `layer_norm(x) * (unit + scale) + shift`, one read and one write.

With a unit of 0 it is the plain norm with weights `scale` and `shift`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintype_kernels.ops.row_parts import columns, inside, row_parts, row_sums
from tintype_kernels.torch_op import (
    TorchOp,
    check_floating,
    empty,
    first_tensor,
    per_sample,
    public,
    unit_stride,
    wide,
    wide_type,
)  # fmt: skip
from tintype_kernels.triton_support import (
    await_earlier,
    ceil_div,
    entry,
    jit,
    power_of_two,
    tl,
    too_wide,
    widen,
)


def reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, unit: float = 1.0
) -> Tensor:
    """The op in plain PyTorch; half precision is computed in float32 and rounded once."""
    # PyTorch's norm on CPUs loses what is small beside the mean.
    return baseline(_less_mean(wide(x)), wide(shift), wide(scale), eps, unit).to(x.dtype)


def baseline(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, unit: float = 1.0
) -> Tensor:
    """What a benchmark compares with."""
    b, _, c = x.shape
    gain, offset = unit + scale.reshape(b, 1, c), shift.reshape(b, 1, c)
    return F.layer_norm(x, (c,), eps=eps) * gain + offset


def _less_mean(h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True)


def _reference_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float, unit: float) -> Tensor:
    return empty(x).copy_(reference(x, shift, scale, eps, unit))


def _reference_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, unit: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Twice: what rounding left of the mean matters where the mean is thousands of times the spread.
    grad, h = wide(grad), _less_mean(_less_mean(wide(x)))
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    normed, scaled = h * rstd, grad * (unit + wide(scale)[:, None])
    spread = (scaled * normed).mean(-1, keepdim=True)
    dx = (scaled - scaled.mean(-1, keepdim=True) - normed * spread) * rstd
    return empty(x).copy_(dx), grad.sum(1).to(x.dtype), (grad * normed).sum(1).to(x.dtype)


@jit
def _centred(parts, C: tl.constexpr, WIDTH: tl.constexpr):
    """Rows in parts less their means; zero from channel C on."""
    mean, centred = row_sums(parts) / C, ()
    for part in tl.static_range(len(parts)):
        h = parts[part] - mean
        centred += (tl.where(columns(part, WIDTH) < C, h, 0.0) if (part + 1) * WIDTH > C else h,)
    return centred


@jit
def _normed(parts, C: tl.constexpr, WIDTH: tl.constexpr):
    """Rows in parts, centred, and their variances [rows, 1]."""
    # Twice: what rounding left of the mean matters where the mean is thousands of times the spread.
    parts, squares = _centred(_centred(parts, C, WIDTH), C, WIDTH), ()
    for part in tl.static_range(len(parts)):
        squares += (parts[part] * parts[part],)
    return parts, row_sums(squares) / C


@jit
def load_tokens(x, rows, T, C: tl.constexpr, x_batch, x_row, WIDTH: tl.constexpr):
    """Tokens `rows` of sample program_id(1), in parts, zero beside them."""
    at, parts = x + tl.program_id(1).to(tl.int64) * x_batch + rows[:, None] * x_row, ()
    for part in tl.static_range((C + WIDTH - 1) // WIDTH):
        loaded = tl.load(at + columns(part, WIDTH), inside(rows, T, part, C, WIDTH), 0.0)
        parts += (widen(loaded),)
    return parts


@jit
def spread(vectors, stride, part: tl.constexpr, like, C: tl.constexpr, WIDTH: tl.constexpr):
    """A part of the vector of sample program_id(1), for each row: from the cache, not through shared memory."""
    c = tl.broadcast_to(columns(part, WIDTH), like.shape)
    return widen(tl.load(vectors + tl.program_id(1).to(tl.int64) * stride + c, c < C, 0.0))


@jit
def modulated(
    parts, shift, scale, C: tl.constexpr, shift_batch, scale_batch, eps, unit, WIDTH: tl.constexpr
):
    """`layer_norm(x) * (unit + scale) + shift` of tokens of sample program_id(1), in parts."""
    parts, variance = _normed(parts, C, WIDTH)
    rstd, outputs = tl.rsqrt(variance + eps), ()
    for part in tl.static_range(len(parts)):
        gain = unit + spread(scale, scale_batch, part, parts[part], C, WIDTH)
        offset = spread(shift, shift_batch, part, parts[part], C, WIDTH)
        outputs += (parts[part] * rstd * gain + offset,)
    return outputs


@jit
def store_tokens(parts, out, rows, T, C: tl.constexpr, WIDTH: tl.constexpr):
    """Write tokens `rows` of sample program_id(1) to contiguous [b, T, C]."""
    at = out + tl.program_id(1).to(tl.int64) * T * C + rows[:, None] * C
    for part in tl.static_range(len(parts)):
        tl.store(at + columns(part, WIDTH), parts[part], inside(rows, T, part, C, WIDTH))


@entry
def _forward_kernel(
    x, shift, scale, out, T, C: tl.constexpr, x_batch, x_row, shift_batch, scale_batch, eps, unit,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a sample: grid (tokens, samples)."""
    await_earlier()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    parts = load_tokens(x, rows, T, C, x_batch, x_row, WIDTH)
    parts = modulated(parts, shift, scale, C, shift_batch, scale_batch, eps, unit, WIDTH)
    store_tokens(parts, out, rows, T, C, WIDTH)


@entry
def _backward_kernel(
    grad, x, scale, dx, sums, T, C: tl.constexpr, SPAN, x_batch, x_row, scale_batch, eps, unit,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of SPAN tokens of a sample, and their sums of grad and grad*normed: grid (spans, samples)."""
    await_earlier()
    span, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    last = tl.minimum(span * SPAN + SPAN, T)
    gain = unit + widen(tl.load(scale + b * scale_batch + c, c < C, 0.0))[None, :]
    plain = tl.zeros((CHANNELS,), sums.dtype.element_ty)
    moved = tl.zeros((CHANNELS,), sums.dtype.element_ty)
    for start in range(span * SPAN, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < last) & (c[None, :] < C)
        at = rows[:, None] * x_row + c[None, :]
        h = widen(tl.load(x + b * x_batch + at, mask, 0.0))
        parts, variance = _normed((h,), C, CHANNELS)
        rstd = tl.rsqrt(variance + eps)
        normed = parts[0] * rstd
        to = rows[:, None] * C + c[None, :]
        g = widen(tl.load(grad + b * T * C + to, mask, 0.0))
        plain += tl.sum(g, 0)
        moved += tl.sum(g * normed, 0)
        g *= gain
        g = g - tl.sum(g, 1)[:, None] / C - normed * (tl.sum(g * normed, 1)[:, None] / C)
        tl.store(dx + b * T * C + to, g * rstd, mask)
    sums += (b * tl.num_programs(0) + span) * 2 * C + c
    tl.store(sums, plain, c < C)
    tl.store(sums + C, moved, c < C)


def _triton_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float, unit: float) -> Tensor:
    out, (b, t, c), tile = empty(x), x.shape, row_parts(x.shape[-1])
    x, shift, scale = unit_stride(x), unit_stride(shift), unit_stride(scale)
    strides = (*x.stride()[:2], shift.stride(0), scale.stride(0))
    _forward_kernel[ceil_div(t, tile["ROWS"]), b](
        x, shift, scale, out, t, c, *strides, eps, unit, **tile
    )  # fmt: skip
    return out


def _triton_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, unit: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, (b, t, c) = empty(x), x.shape
    channels = power_of_two(c)
    rows = max(1, 4096 // channels)
    # Sums over 128 spans at most; how a sample is cut never depends on the batch.
    span = rows * ceil_div(t, 128 * rows)
    sums = x.new_empty(b, ceil_div(t, span), 2, c, dtype=wide_type(scale))
    x, scale = unit_stride(x), unit_stride(scale)
    _backward_kernel[sums.shape[1], b](
        grad.contiguous(), x, scale, dx, sums, t, c, span, *x.stride()[:2], scale.stride(0), eps, unit,
        ROWS=rows, CHANNELS=channels, num_warps=8,
    )  # fmt: skip
    totals = sums.sum(1).to(x.dtype)
    return dx, totals[:, 0].clone(), totals[:, 1].clone()


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return empty(x)


def _fake_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, unit: float
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x), empty(scale), empty(scale)


def obstacle(*arguments: Any) -> str:
    """Why no block holds a row of the first tensor, or nothing."""
    return too_wide(first_tensor(arguments).shape[-1])


FORWARD = TorchOp(
    "layer_norm_modulate", fake=_fake_forward, reference=_reference_forward, triton=_triton_forward,
    obstacles={"triton": obstacle},
)  # fmt: skip
BACKWARD = TorchOp(
    "layer_norm_modulate_backward", fake=_fake_backward, reference=_reference_backward, triton=_triton_backward,
    obstacles={"triton": obstacle},
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, ctx.eps, ctx.unit = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    return *BACKWARD(grad, x, scale, ctx.eps, ctx.unit), None, None


FORWARD.differentiate(_setup_context, _backward)


@public(reference)
def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, unit: float = 1.0
) -> Tensor:
    """Return `layer_norm(x) * (unit + scale) + shift` for x [b, t, c]; shift and scale are [b, c] or [b, 1, c]."""
    check_floating("x", x, 3)
    shift, scale = per_sample("shift", shift, x), per_sample("scale", scale, x)
    out: Tensor = FORWARD(x, shift, scale, eps, unit)
    return out


_SIZES = {
    "SD1.5 512": (4096, 320),
    "SDXL 1024": (4096, 640),
    "SD3 1024": (4096, 1536),
    "FLUX 1024": (4608, 3072),
}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (t, c) in _SIZES.items():
        yield label, {"x": make(batch, t, c), "shift": make(batch, c), "scale": make(batch, c)}
