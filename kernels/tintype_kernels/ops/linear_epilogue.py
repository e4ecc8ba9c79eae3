"""What follows a quantised product: scales, bias, activation, residual; and its gradient, which all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintype_kernels.ops.quantise import dequantize
from tintype_kernels.ops.quantised_rows import QuantizedRows
from tintype_kernels.torch_op import check, describe, is_floating
from tintype_kernels.triton_support import jit, normal_below, sigmoid, tl, widen

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def finish(z: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """The epilogue in plain PyTorch, in z's type."""
    z = z if bias is None else z + bias
    out = ACTIVATIONS[activation](z)
    return out if residual is None else out + residual


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient goes to x as though nothing had been rounded."""
    return x.double() + (rounded - x.double()).detach()


@jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        z = z * sigmoid(z)
    if ACTIVATION == "gelu":
        z = z * normal_below(z)
    if ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        z = z * sigmoid(z * (1.5957691216057308 + 0.0713548162726009 * z * z))
    return z


@jit
def store_finished(
    z, bias, residual, out, rows, columns, M, N,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Write a tile of activation(z + bias) + residual; out and residual are [M, N], contiguous."""
    if BIAS:
        z += widen(tl.load(bias + columns, columns < N, 0.0))[None, :]
    z = activate(z, ACTIVATION)
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    if RESIDUAL:
        z += widen(tl.load(residual + at, inside, 0.0))
    tl.store(out + at, z.to(out.dtype.element_ty), inside)


@jit
def tile_of(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """The tile of this program: column by column through BAND rows of tiles, so that the cache serves both factors."""
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    band = tl.program_id(0) // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * across)
    return band * BAND + inside % height, inside // height


def empty_output(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    """What every op of these gives, [..., out]."""
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def gradients(
    grad: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Of x, bias and residual; z is what went into the activation, and rounding to codes counts as the identity."""
    dz = grad if z is None else _through_activation(grad, z, activation)
    dbias = None if bias is None else dz.reshape(-1, dz.shape[-1]).sum(0)
    return dz @ weight, dbias, None if residual is None else grad


def _through_activation(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        gate = torch.sigmoid(z)
        return grad * gate * (1 + z * (1 - gate))
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    dz: Tensor = torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
    return dz


def differentiable(op: Any, weight: Callable[[tuple[Any, ...], torch.dtype], Tensor]) -> None:
    """Give `op(x, *codes and scales, bias, residual, activation)` its gradient; `weight` undoes the codes."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *codes, bias, residual = ctx.saved_tensors
        z = None
        if ctx.activation != "none":
            z = op(x, *codes, bias, None, "none")
        dx, dbias, dresidual = gradients(
            grad, z, weight(tuple(codes), grad.dtype), bias, residual, ctx.activation
        )
        return dx, *[None] * len(codes), dbias, dresidual, None

    op.differentiate(setup_context, backward)


def check_linear(
    x: Tensor,
    weight: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Refuse what does not fit weights [out, in]."""
    outputs, columns = weight
    if not is_floating(x) or x.ndim < 1 or x.shape[-1] != columns:
        raise ValueError(f"x is {describe(x)}, expected a floating tensor [..., {columns}]")
    check_epilogue(x, (*x.shape[:-1], outputs), bias, residual, activation)


def check_epilogue(
    like: Tensor,
    shape: tuple[int, ...],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Refuse what does not fit outputs of `shape` that have the type and the device of `like`."""
    if bias is not None:
        check("bias", bias, shape[-1:], like)
    if residual is not None:
        check("residual", residual, shape, like)
    check_activation(activation)


def check_activation(activation: str) -> None:
    """Raise unless `activation` is one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


@lru_cache(maxsize=2)
def _wide(value: Any, dtype: torch.dtype) -> Tensor:
    """What weights or rows in codes stand for."""
    if isinstance(value, QuantizedRows):
        return value.numbers().to(dtype)
    return dequantize(value, dtype)


def wide_linear(
    x: Any, qw: Any, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The library's product for an op's arguments, as if nothing had ever been in codes."""
    numbers = x if isinstance(x, Tensor) else _wide(x, x.dtype)
    return finish(F.linear(numbers, _wide(qw, x.dtype), bias), None, residual, activation)


# What a benchmark compares with by name.
LIBRARIES = {"16 bits": wide_linear}


def flops(x: Any, qw: Any, **_: Any) -> int:
    """Multiplications and additions of a call's product."""
    count: int = 2 * math.prod(x.shape) * len(qw.scales)
    return count


# Rows of x, columns of x and outputs of each model's linear layers.
SIZES = {
    "SDXL 1024, 640": (4096, 640, 640),
    "SDXL 1024, feed-forward": (4096, 640, 5120),
    "FLUX 1024, feed-forward": (4608, 3072, 12288),
    "FLUX 1024, one row": (1, 3072, 18432),
}


def linear_cases(
    make: Callable[..., Tensor], batch: int
) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    """Label, x, the weight to quantise and the other arguments, at the sizes of real models."""
    for label, (rows, columns, outputs) in SIZES.items():
        x, w = make(batch, rows, columns), make(outputs, columns)
        yield label, x, w, {"bias": make(outputs), "activation": "gelu_tanh"}
        yield f"{label}, residual", x, w, {"residual": make(batch, rows, outputs)}
