"""The feed-forward gate of UNet transformers: the first half of x times the exact gelu of the second."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintype_kernels.ops.row_parts import part_width
from tintype_kernels.torch_op import (
    TorchOp,
    describe,
    empty,
    is_floating,
    public,
    unit_stride,
    wide,
)
from tintype_kernels.triton_support import (
    await_earlier,
    ceil_div,
    entry,
    jit,
    normal_below,
    tl,
    widen,
)


def baseline(x: Tensor) -> Tensor:
    """What a benchmark compares with."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def reference(x: Tensor) -> Tensor:
    """The op in plain PyTorch; half precision is computed in float32 and rounded once."""
    value, gate = wide(x).chunk(2, -1)
    return (value * gate * _below(gate)).to(x.dtype)


def _below(gate: Tensor) -> Tensor:
    """The weight of the normal distribution below gate; 1 + erf would cancel far below 0.

    PyTorch's gelu has other bits in the last elements of what a thread works on, so in other batches: erfc has not.
    """
    return 0.5 * torch.erfc(gate * -math.sqrt(0.5))


def _reference_forward(x: Tensor) -> Tensor:
    return reference(x).contiguous()


def _reference_backward(grad: Tensor, x: Tensor) -> Tensor:
    value, gate = wide(x).chunk(2, -1)
    below = _below(gate)
    slope = below + gate * (-0.5 * gate.square()).exp() * math.sqrt(0.5 / math.pi)
    dx, grad = empty(x), wide(grad)
    dvalue, dgate = dx.chunk(2, -1)
    dvalue.copy_(grad * gate * below)
    dgate.copy_(grad * value * slope)
    return dx


@jit
def load(at, C, inside):
    """Both halves at pointers to the first."""
    return widen(tl.load(at, inside, 0.0)), widen(tl.load(at + C, inside, 0.0))


@entry
def _forward_kernel(x, out, C, x_row, BLOCK: tl.constexpr):
    """BLOCK channels of a row: grid (rows, channels)."""
    await_earlier()
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value, gate = load(x + row * x_row + c, C, c < C)
    tl.store(out + row * C + c, value * gate * normal_below(gate), c < C)


@entry
def _backward_kernel(grad, x, dx, C, x_row, BLOCK: tl.constexpr):
    """BLOCK channels of both halves of a row: grid (rows, channels)."""
    await_earlier()
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value, gate = load(x + row * x_row + c, C, c < C)
    below = normal_below(gate)
    g = widen(tl.load(grad + row * C + c, c < C, 0.0))
    slope = below + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    tl.store(dx + row * 2 * C + c, g * gate * below, c < C)
    tl.store(dx + row * 2 * C + C + c, g * value * slope, c < C)


def as_rows(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n], of unit stride."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def _tile(c: int) -> dict[str, int]:
    """How a block is launched that holds a part of a row of c channels."""
    block = min(1024, part_width(c))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def _triton_forward(x: Tensor) -> Tensor:
    out, rows = _fake_forward(x), as_rows(x)
    c = out.shape[-1]
    tile = _tile(c)
    _forward_kernel[rows.shape[0], ceil_div(c, tile["BLOCK"])](rows, out, c, rows.stride(0), **tile)
    return out


def _triton_backward(grad: Tensor, x: Tensor) -> Tensor:
    dx, rows, c = empty(x), as_rows(x), grad.shape[-1]
    tile = _tile(c)
    _backward_kernel[rows.shape[0], ceil_div(c, tile["BLOCK"])](
        grad.contiguous(), rows, dx, c, rows.stride(0), **tile
    )
    return dx


def _fake_forward(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _fake_backward(grad: Tensor, x: Tensor) -> Tensor:
    return empty(x)


FORWARD = TorchOp("geglu", fake=_fake_forward, reference=_reference_forward, triton=_triton_forward)
BACKWARD = TorchOp(
    "geglu_backward", fake=_fake_backward, reference=_reference_backward, triton=_triton_backward
)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    dx: Tensor = BACKWARD(grad, *ctx.saved_tensors)
    return dx


FORWARD.differentiate(_setup_context, _backward)


def check_halves(x: Tensor) -> None:
    """Raise unless x is a floating tensor [..., 2*c]."""
    if not is_floating(x) or not x.ndim or x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f"x is {describe(x)}, expected a floating tensor [..., 2*c]")


@public(reference)
def geglu(x: Tensor) -> Tensor:
    """Return `value * gelu(gate)` for x [..., 2*c], whose first half is the value."""
    check_halves(x)
    out: Tensor = FORWARD(x)
    return out


# Tokens and channels of a half: four times the width of the transformer.
_SIZES = {
    "SD1.5 512, 320": (4096, 1280),
    "SD1.5 512, 1280": (256, 5120),
    "SDXL 1024, 640": (4096, 2560),
    "SDXL 1024, 1280": (1024, 5120),
}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (tokens, c) in _SIZES.items():
        yield label, {"x": make(batch, tokens, 2 * c)}
