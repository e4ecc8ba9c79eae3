"""A linear layer with int4 weights and 16-bit tokens: a quarter is read, and unpacked on chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tintype_kernels.ops import linear_epilogue as epilogue
from tintype_kernels.ops.linear_epilogue import store_finished, tile_of
from tintype_kernels.ops.quantise import Int4Weight, dequantize, quantize_int4
from tintype_kernels.torch_op import TorchOp, public, wide
from tintype_kernels.triton_support import ceil_div, jit, tl


def reference(
    x: Tensor, qw: Int4Weight, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch: unpack, then multiply."""
    z = wide(x) @ dequantize(qw, wide(x).dtype).t()
    return epilogue.finish(z, bias, residual, activation).to(x.dtype)


def _reference_forward(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    return reference(x, Int4Weight(packed, scales), bias, activation, residual)


@jit
def _unpacked(nibbles, scales, dtype: tl.constexpr):
    return ((nibbles.to(tl.float32) - 8.0) * scales).to(dtype)


@jit
def _kernel(
    x, packed, scales, bias, residual, out, M, N, K,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BYTES: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """x w^T with the epilogue, low nibbles and high ones as two products: grid (tiles,)."""
    half: tl.constexpr = GROUP // 2
    down, across = tile_of(M, N, ROWS, COLUMNS, 8)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    x_row = x + (rows % M)[:, None].to(tl.int64) * K
    w_row = packed + (columns % N)[:, None].to(tl.int64) * (K // 2)
    scale_row = scales + (columns % N)[:, None].to(tl.int64) * (K // GROUP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K // 2, BYTES):
        byte = start + tl.arange(0, BYTES)[None, :]
        inside = byte < K // 2
        column = byte // half * GROUP + byte % half
        codes = tl.load(w_row + byte, inside, 0)
        scale = tl.load(scale_row + byte // half, inside, 0.0).to(tl.float32)
        low = _unpacked(codes & 15, scale, x.dtype.element_ty)
        high = _unpacked(codes >> 4, scale, x.dtype.element_ty)
        a, b = tl.load(x_row + column, inside, 0.0), tl.load(x_row + column + half, inside, 0.0)
        total = tl.dot(a, tl.trans(low), total, input_precision="ieee")
        total = tl.dot(b, tl.trans(high), total, input_precision="ieee")
    store_finished(total, bias, residual, out, rows, columns, M, N, BIAS, RESIDUAL, ACTIVATION)


# Rows, columns, bytes of depth, warps and stages of a tile, by the largest number of tokens it is for. One depth for
# all: a token's sums are then made in the same order whatever batch it came in.
_TILES = {64: (64, 64, 32, 4, 4), 1 << 40: (64, 128, 32, 8, 3)}
_FLOAT32_TILE = (32, 32, 16, 4, 1)  # without tensor cores, for checking


def _triton_forward(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    out = epilogue.empty_output(x, packed, scales, bias, residual, activation)
    k, n = x.shape[-1], packed.shape[0]
    flat = x.reshape(-1, k).contiguous()
    tile = next(tile for most, tile in _TILES.items() if len(flat) <= most)
    rows, columns, depth, warps, stages = _FLOAT32_TILE if x.dtype == torch.float32 else tile
    added = out if residual is None else residual.contiguous()
    _kernel[(ceil_div(len(flat), rows) * ceil_div(n, columns),)](
        flat, packed.contiguous(), scales.contiguous(), out if bias is None else bias, added, out,
        len(flat), n, k, GROUP=k // scales.shape[1], ROWS=rows, COLUMNS=columns, BYTES=depth,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _triton_obstacle(x: Tensor, *_: Any) -> str:
    return (
        "x is torch.float64, and the kernel takes 16- and 32-bit floats"
        if x.dtype == torch.float64
        else ""
    )


FORWARD = TorchOp(
    "int4_linear", fake=epilogue.empty_output, reference=_reference_forward, triton=_triton_forward,
    obstacles={"triton": _triton_obstacle},
)  # fmt: skip
epilogue.differentiable(FORWARD, lambda codes, dtype: dequantize(Int4Weight(*codes), dtype))


@public(reference)
def int4_linear(
    x: Tensor, qw: Int4Weight, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return `activation(x w^T + bias) + residual` for x [..., in] and `qw = quantize_int4(w, group)`.

    Activations: none, gelu, gelu_tanh, silu.
    """
    outputs, columns = qw.packed.shape
    epilogue.check_linear(x, (outputs, 2 * columns), bias, residual, activation)
    out: Tensor = FORWARD(x, qw.packed, qw.scales, bias, residual, activation)
    return out


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, x, w, others in epilogue.linear_cases(make, batch):
        yield label, {"x": x, "qw": quantize_int4(w, 64), **others}
