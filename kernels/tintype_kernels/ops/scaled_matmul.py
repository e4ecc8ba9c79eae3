"""The product behind int8_linear and fp8_linear: tokens and weights in 8 bits, a scale for each row of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tintype_kernels.ops import linear_vector
from tintype_kernels.ops.activate_quantized import write_quantized
from tintype_kernels.ops.linear_epilogue import (
    check_epilogue,
    finish,
    store_finished,
    straight_through,
    tile_of,
)
from tintype_kernels.ops.quantise import Fp8Weight, Int8Weight, dequantize, quantize_rows
from tintype_kernels.ops.quantised_rows import (
    QuantizedRows,
    arch_obstacle,
    as_bytes,
    from_bytes,
)
from tintype_kernels.torch_op import TorchOp, check, describe
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, tl, too_wide


@entry
def _matmul_kernel(
    x, w, x_scales, w_scales, bias, residual, out, M, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """x w^T with the epilogue: grid (tiles,). WHOLE says that DEPTH divides K."""
    await_earlier()
    down, across = tile_of(M, N, ROWS, COLUMNS, 8)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_at = x + (rows % M)[:, None].to(tl.int64) * K + depth[None, :]
    w_at = w + (columns % N)[:, None].to(tl.int64) * K + depth[None, :]
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros((ROWS, COLUMNS), kind)
    for start in range(0, K, DEPTH):
        if WHOLE:
            a, b = tl.load(x_at), tl.load(w_at)
        else:
            inside = (start + depth < K)[None, :]
            a, b = tl.load(x_at, inside, 0.0), tl.load(w_at, inside, 0.0)
        total = tl.dot(a, tl.trans(b), total, out_dtype=kind)
        x_at += DEPTH
        w_at += DEPTH
    z = total.to(tl.float32) * tl.load(x_scales + rows, rows < M, 0.0)[:, None]
    z *= tl.load(w_scales + columns, columns < N, 0.0)[None, :]
    store_finished(z, bias, residual, out, rows, columns, M, N, BIAS, RESIDUAL, ACTIVATION)


# Rows, columns, depth, warps and stages of a tile, by the largest number of tokens it is for. One depth for all: a
# token's sums are then made in the same order whatever batch it came in.
_TILES = {64: (64, 64, 128, 4, 3), 1 << 40: (128, 128, 128, 8, 3)}


def triton_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    """The op on a GPU, for codes of either type."""
    rows = x.new_empty(x.shape, dtype=codes.dtype)
    row_scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    write_quantized(rows, row_scales, x)
    out: Tensor = ROWS_FORWARD(
        as_bytes(rows), row_scales, as_bytes(codes), scales, bias, residual, activation, x.dtype
    )
    return out


def width_obstacle(x: Tensor, *_: Any) -> str:
    """Why the op's Triton form cannot round x's rows, or nothing."""
    return too_wide(x.shape[-1])


def _multiply(
    out: Tensor, x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str,
) -> None:  # fmt: skip
    n, k = codes.shape
    count = x_scales.numel()
    rows, columns, depth, warps, stages = next(t for most, t in _TILES.items() if count <= most)
    _matmul_kernel[(ceil_div(count, rows) * ceil_div(n, columns),)](
        x.contiguous(), codes.contiguous(), x_scales.contiguous(), scales.contiguous(),
        out if bias is None else bias.contiguous(), out if residual is None else residual.contiguous(), out,
        count, n, k, ROWS=rows, COLUMNS=columns, DEPTH=depth, WHOLE=k % depth == 0,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def plain_linear(
    x: Tensor | QuantizedRows,
    qw: Int8Weight | Fp8Weight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """The op in plain PyTorch, summed in float64."""
    z = _tokens(x, qw.codes.dtype) @ dequantize(qw, torch.float64).t()
    return finish(z, bias, residual, activation).to(x.dtype)


def _tokens(x: Tensor | QuantizedRows, kind: torch.dtype) -> Tensor:
    """The numbers that x's codes stand for."""
    if isinstance(x, QuantizedRows):
        return x.numbers()
    return straight_through(x, QuantizedRows(*quantize_rows(x, kind), x.dtype).numbers())


def _rows_reference(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    rows, weight = QuantizedRows(from_bytes(x), x_scales, dtype), from_bytes(codes)
    kind = Int8Weight if weight.dtype == torch.int8 else Fp8Weight
    return plain_linear(rows, kind(weight, scales), bias, activation, residual)


def _rows_triton(x: Tensor, x_scales: Tensor, codes: Tensor, *others: Any) -> Tensor:
    out = _empty_product(x, x_scales, codes, *others)
    _multiply(out, from_bytes(x), x_scales, from_bytes(codes), *others[:-1])
    return out


def _rows_vector(x: Tensor, x_scales: Tensor, codes: Tensor, *others: Any) -> Tensor:
    out = _empty_product(x, x_scales, codes, *others)
    linear_vector.eights(out, from_bytes(x), x_scales, from_bytes(codes), *others[:-1])
    return out


def _empty_product(x: Tensor, x_scales: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0], dtype=others[-1])


def _rows_library(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """PyTorch's product of e4m3, which scales rows of both factors, too, and is summed as Triton's is."""
    z = torch._scaled_mm(
        from_bytes(x).reshape(-1, x.shape[-1]), from_bytes(codes).t(), x_scales.reshape(-1, 1), scales.reshape(1, -1),
        bias, out_dtype=dtype, use_fast_accum=True,
    )  # fmt: skip
    return finish(z.view(*x.shape[:-1], -1), None, residual, activation)


def _rows_obstacle(x: Tensor, *_: Any) -> str:
    return arch_obstacle("fp8" if x.dtype == torch.uint8 else "int8", x)


def _vector_obstacle(x: Tensor, *_: Any) -> str:
    return _rows_obstacle(x) or linear_vector.obstacle(x)


def _library_obstacle(x: Tensor, x_scales: Tensor, codes: Tensor, *others: Any) -> str:
    if (
        x.dtype != torch.uint8
        or others[-1] != torch.bfloat16
        or codes.shape[0] % 16 + codes.shape[1] % 16
    ):
        return "PyTorch scales rows of e4m3 alone, whose sides 16 divides, to bfloat16"
    hopper = torch.cuda.get_device_capability(x.device) >= (9, 0)
    return "" if hopper else "PyTorch scales rows of e4m3 from sm_90 on"


ROWS_FORWARD = TorchOp(
    "quantized_rows_linear", fake=_empty_product, reference=_rows_reference, triton=_rows_triton,
    variants={"triton_vector": _rows_vector}, library=_rows_library,
    obstacles={"triton": _rows_obstacle, "triton_vector": _vector_obstacle, "library": _library_obstacle},
)  # fmt: skip


def linear_of_rows(
    x: QuantizedRows, qw: Int8Weight | Fp8Weight, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:  # fmt: skip
    """`activation(x w^T + bias) + residual` of rows that are quantised already, in the type that they had."""
    outputs, columns = qw.codes.shape
    if x.codes.dtype != qw.codes.dtype or x.shape[-1] != columns:
        raise ValueError(
            f"x has codes {describe(x.codes)}, expected {qw.codes.dtype}[..., {columns}]"
        )
    check("x's scales", x.scales, x.shape[:-1], x.scales.float())
    like = x.scales.new_empty(0, dtype=x.dtype)
    check_epilogue(like, (*x.shape[:-1], outputs), bias, residual, activation)
    out: Tensor = ROWS_FORWARD(
        as_bytes(x.codes), x.scales, as_bytes(qw.codes), qw.scales, bias, residual, activation, x.dtype
    )  # fmt: skip
    return out
