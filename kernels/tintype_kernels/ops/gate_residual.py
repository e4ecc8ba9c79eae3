"""What joins a branch of a flow transformer to its stream: `x + gate * y`, with one gate a channel and sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tintype_kernels.torch_op import (
    TorchOp,
    check,
    check_floating,
    empty,
    per_sample,
    public,
    unit_stride,
    wide,
    wide_type,
)  # fmt: skip
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, power_of_two, tl, widen

TILE = 4096  # elements that a block of four warps works on at a time


def baseline(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """What a benchmark compares with."""
    b, _, c = x.shape
    return x + gate.reshape(b, 1, c) * y


def reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The op in plain PyTorch; half precision is computed in float32 and rounded once."""
    return baseline(wide(x), wide(y), wide(gate)).to(x.dtype)


def _reference_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return empty(x).copy_(reference(x, y, gate))


def _reference_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return empty(y).copy_(grad * gate[:, None]), (wide(grad) * wide(y)).sum(1).to(y.dtype)


@entry
def _forward_kernel(
    x, y, gate, out, T, C, x_batch, x_row, y_batch, y_row, gate_batch,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of a sample: grid (tokens, channels, samples)."""
    await_earlier()
    rows, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (rows[:, None] < T) & (c[None, :] < C)
    row = rows[:, None]
    stream = widen(tl.load(x + b * x_batch + row * x_row + c[None, :], mask, 0.0))
    branch = widen(tl.load(y + b * y_batch + row * y_row + c[None, :], mask, 0.0))
    open_by = widen(tl.load(gate + b * gate_batch + c, c < C, 0.0))[None, :]
    tl.store(out + b * T * C + row * C + c[None, :], stream + open_by * branch, mask)


@entry
def _backward_kernel(
    grad, y, gate, dy, sums, T, C, SPAN, y_batch, y_row, gate_batch,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dy of SPAN tokens, and their sum of grad*y: grid (spans, channels, samples)."""
    await_earlier()
    span, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    last = tl.minimum(span * SPAN + SPAN, T)
    open_by = widen(tl.load(gate + b * gate_batch + c, c < C, 0.0))[None, :]
    total = tl.zeros((CHANNELS,), sums.dtype.element_ty)
    for start in range(span * SPAN, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < last) & (c[None, :] < C)
        row = rows[:, None]
        branch = widen(tl.load(y + b * y_batch + row * y_row + c[None, :], mask, 0.0))
        to = row * C + c[None, :]
        g = widen(tl.load(grad + b * T * C + to, mask, 0.0))
        total += tl.sum(g * branch, 0)
        tl.store(dy + b * T * C + to, g * open_by, mask)
    tl.store(sums + (b * tl.num_programs(0) + span) * C + c, total, c < C)


def _tile(c: int) -> dict[str, int]:
    channels = min(power_of_two(c), 256)
    return {"ROWS": TILE // channels, "CHANNELS": channels, "num_warps": 4}


def _triton_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    out, (b, t, c), tile = empty(x), x.shape, _tile(x.shape[-1])
    x, y, gate = unit_stride(x), unit_stride(y), unit_stride(gate)
    strides = (*x.stride()[:2], *y.stride()[:2], gate.stride(0))
    grid = (ceil_div(t, tile["ROWS"]), ceil_div(c, tile["CHANNELS"]), b)
    _forward_kernel[grid](x, y, gate, out, t, c, *strides, **tile)
    return out


def _triton_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dy, (b, t, c), tile = empty(y), y.shape, _tile(y.shape[-1])
    # How a sample is cut never depends on the batch.
    span = tile["ROWS"] * ceil_div(t, 128 * tile["ROWS"])
    sums = y.new_empty(b, ceil_div(t, span), c, dtype=wide_type(gate))
    y, gate = unit_stride(y), unit_stride(gate)
    _backward_kernel[sums.shape[1], ceil_div(c, tile["CHANNELS"]), b](
        grad.contiguous(), y, gate, dy, sums, t, c, span, *y.stride()[:2], gate.stride(0), **tile
    )
    return dy, sums.sum(1).to(gate.dtype)


def _fake_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return empty(x)


def _fake_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return empty(y), empty(gate)


FORWARD = TorchOp(
    "gate_residual", fake=_fake_forward, reference=_reference_forward, triton=_triton_forward
)
BACKWARD = TorchOp(
    "gate_residual_backward",
    fake=_fake_backward,
    reference=_reference_backward,
    triton=_triton_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return grad, *BACKWARD(grad, *ctx.saved_tensors)


FORWARD.differentiate(_setup_context, _backward)


@public(reference)
def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return `x + gate * y` for x and y [b, t, c] and a gate [b, c] or [b, 1, c]."""
    check_floating("x", x, 3)
    check("y", y, tuple(x.shape), x)
    out: Tensor = FORWARD(x, y, per_sample("gate", gate, x))
    return out


_SIZES = {"SD3 1024": (4096, 1536), "FLUX 1024": (4608, 3072)}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (t, c) in _SIZES.items():
        yield label, {"x": make(batch, t, c), "y": make(batch, t, c), "gate": make(batch, c)}
