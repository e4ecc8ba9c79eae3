"""What a library's convolution leaves to a pass of its own: its bias, and the skip beside it, `x + bias + residual`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tintype_kernels.layout import memory_format
from tintype_kernels.torch_op import TorchOp, check, check_floating, public, wide
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, power_of_two, tl, widen

TILE = 4096  # elements that a block of four warps works on at a time


def reference(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """The op in plain PyTorch; half precision is computed in float32 and rounded once."""
    added = None if residual is None else wide(residual)
    return baseline(wide(x), wide(bias), added).to(x.dtype)


def baseline(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """What a benchmark compares with."""
    out = x + bias[:, None, None]
    return out if residual is None else out + residual


def _reference_forward(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return _empty(x).copy_(reference(x, bias, residual))


@entry
def _kernel(
    x, bias, residual, out, M, N, C,
    ACROSS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of an array [M, N], whose channels go ACROSS it, or else down it over and over: grid (rows, columns)."""
    await_earlier()
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    at = rows[:, None] * N + columns[None, :]
    total = widen(tl.load(x + at, mask, 0.0))
    if ACROSS:
        total += widen(tl.load(bias + columns, columns < N, 0.0))[None, :]
    else:
        total += widen(tl.load(bias + rows % C))[:, None]
    if RESIDUAL:
        total += widen(tl.load(residual + at, mask, 0.0))
    tl.store(out + at, total, mask)


def _triton_forward(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    out, layout = _empty(x), memory_format(x)
    n, c, h, w = x.shape
    across = layout == torch.channels_last
    m, columns = (n * h * w, c) if across else (n * c, h * w)
    width = min(power_of_two(columns), 256)
    rows = TILE // width
    given = x.contiguous(memory_format=layout)
    beside = given if residual is None else residual.contiguous(memory_format=layout)
    _kernel[ceil_div(m, rows), ceil_div(columns, width)](
        given, bias.contiguous(), beside, out, m, columns, c,
        ACROSS=across, RESIDUAL=residual is not None, ROWS=rows, COLUMNS=width, num_warps=4,
    )  # fmt: skip
    return out


def _empty(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


FORWARD = TorchOp(
    "bias_residual", fake=_empty, reference=_reference_forward, triton=_triton_forward
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.beside = inputs[2] is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, grad.sum((0, 2, 3)), grad if ctx.beside else None


FORWARD.differentiate(_setup_context, _backward)


@public(reference)
def bias_residual(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return `x + bias + residual` for x and residual [n, c, h, w] and bias [c], channels-last where x is."""
    check_floating("x", x, 4, channels=1)
    check("bias", bias, (x.shape[1],), x)
    if residual is not None:
        check("residual", residual, tuple(x.shape), x)
    out: Tensor = FORWARD(x, bias, residual)
    return out


# Channels and side of what a residual block ends with.
_SIZES = {"SD1.5 512": (320, 64), "SDXL 1024": (640, 64), "decoder 1024": (128, 1024)}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (c, side) in _SIZES.items():
        x, residual = (
            make(batch, c, side, side).contiguous(memory_format=torch.channels_last) for _ in "xr"
        )
        yield label, {"x": x, "bias": make(c)}
        yield f"{label}, skip", {"x": x, "bias": make(c), "residual": residual}
