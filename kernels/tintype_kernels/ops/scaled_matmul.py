"""The product behind int8_linear and fp8_linear: tokens and weights in 8 bits, a scale for each row of both."""

from __future__ import annotations

import torch
from torch import Tensor

from tintype_kernels.ops.linear_epilogue import (
    empty_output,
    finish,
    store_finished,
    straight_through,
    tile_of,
)
from tintype_kernels.ops.quantise import LARGEST, Fp8Weight, Int8Weight, dequantize, quantize_rows
from tintype_kernels.triton_support import ceil_div, jit, power_of_two, tl


@jit
def _quantize_kernel(x, codes, scales, K, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    """One token: grid (tokens,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    top = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, K, WIDTH):
        at = start + columns
        top = tl.maximum(top, tl.abs(tl.load(x + row * K + at, at < K, 0.0).to(tl.float32)))
    scale = tl.div_rn(tl.max(top), LIMIT)
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, scale), 0.0)
    tl.store(scales + row, scale)
    for start in range(0, K, WIDTH):
        at = start + columns
        value = tl.load(x + row * K + at, at < K, 0.0).to(tl.float32) * inverse
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
        if LIMIT == 127.0:
            value = (value + 12582912.0) - 12582912.0  # the nearest integer, halves to even
        tl.store(codes + row * K + at, value.to(codes.dtype.element_ty), at < K)


@jit
def _matmul_kernel(
    x, w, x_scales, w_scales, bias, residual, out, M, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """x w^T with the epilogue: grid (tiles,). WHOLE says that DEPTH divides K."""
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


def _quantize_tokens(x: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of x [tokens, k], contiguous, and a scale for each token."""
    tokens, k = x.shape
    out, scales = x.new_empty(x.shape, dtype=codes), x.new_empty(tokens, dtype=torch.float32)
    width = min(power_of_two(k), 4096)
    _quantize_kernel[(tokens,)](x, out, scales, k, LIMIT=LARGEST[codes], WIDTH=width, num_warps=4)
    return out, scales


def triton_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    """The op on a GPU, for codes of either type."""
    out = empty_output(x, codes, scales, bias, residual, activation)
    n, k = codes.shape
    tokens, token_scales = _quantize_tokens(x.reshape(-1, k).contiguous(), codes.dtype)
    count = len(tokens)
    rows, columns, depth, warps, stages = next(t for most, t in _TILES.items() if count <= most)
    _matmul_kernel[(ceil_div(count, rows) * ceil_div(n, columns),)](
        tokens, codes.contiguous(), token_scales, scales.contiguous(), out if bias is None else bias.contiguous(),
        out if residual is None else residual.contiguous(), out, count, n, k,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, WHOLE=k % depth == 0,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def plain_linear(
    x: Tensor,
    qw: Int8Weight | Fp8Weight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """The op in plain PyTorch, summed in float64."""
    codes, scales = quantize_rows(x.detach(), qw.codes.dtype)
    tokens = codes.double() * scales.double()[..., None]
    z = straight_through(x, tokens) @ dequantize(qw, torch.float64).t()
    return finish(z, bias, residual, activation).to(x.dtype)
