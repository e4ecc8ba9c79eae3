"""Products of one token a sample, such as what modulates a flow transformer's blocks: as fast as weights are read.

Tiles for tensor cores wait for one another through shared memory, and of one row in sixteen nothing is multiplied.
Here each thread reads sixteen bytes of weights at a time and adds its products up in registers; nothing else waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tintype_kernels.dispatch import interpreting
from tintype_kernels.ops.linear_epilogue import store_finished
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, jit, tl

COLUMNS = 16  # outputs of a block
_WARPS = 4
_BYTES = 512  # of each output's weights in a turn: sixteen for every thread of a warp
_ALIGNED = 16


@entry
def _eights_kernel(
    x, w, x_scales, w_scales, bias, residual, out, M, N, K,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, DP4A: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A row of codes by w^T with the epilogue: grid (rows, outputs). int8 comes as words of four codes, K of them."""
    await_earlier()
    row, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_at = x + row.to(tl.int64) * K + depth
    w_at = w + (columns % N)[:, None].to(tl.int64) * K + depth[None, :]
    words: tl.constexpr = x.dtype.element_ty == tl.int32
    total = tl.zeros((COLUMNS, DEPTH), tl.int32 if words else tl.float32)
    for start in range(0, K, DEPTH):
        if WHOLE:
            a, b = tl.load(x_at), tl.load(w_at)
        else:
            inside = start + depth < K
            a, b = tl.load(x_at, inside, 0.0), tl.load(w_at, inside[None, :], 0.0)
        if words:
            total = _add_products_of_four(b, a[None, :], total, DP4A)
        else:
            total = tl.fma(b.to(tl.float32), a.to(tl.float32)[None, :], total)
        x_at += DEPTH
        w_at += DEPTH
    z = tl.sum(total, 1).to(tl.float32) * tl.load(x_scales + row)
    z *= tl.load(w_scales + columns, columns < N, 0.0)
    rows = row + tl.arange(0, 1)
    store_finished(z[None, :], bias, residual, out, rows, columns, M, N, BIAS, RESIDUAL, ACTIVATION)


@jit
def _add_products_of_four(a, b, total, DP4A: tl.constexpr):
    """total and the products of the four signed bytes of a and of b: one instruction."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], tl.int32, True, 1
        )
    for byte in tl.static_range(4):
        total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return total


@jit
def _below_exponent(codes):
    """2**23 and the codes, as float32: bits beside an exponent, where a conversion takes four times as long."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@entry
def _fours_kernel(
    x, packed, scales, bias, residual, out, M, N, groups,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A row by weights in two codes a byte, with the epilogue: grid (rows, outputs). GROUPS of them in a turn."""
    await_earlier()
    half: tl.constexpr = GROUP // 2
    row, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w_row, place = (columns % N).to(tl.int64), tl.arange(0, GROUPS * half)
    # A byte's low code is of the first half of its group, its high one of the second.
    x_at = x + row.to(tl.int64) * (groups * GROUP) + place // half * GROUP + place % half
    w_at = packed + w_row[:, None] * (groups * half) + place[None, :]
    scale_at = scales + w_row[:, None] * groups + tl.arange(0, GROUPS)[None, :]
    total = tl.zeros((COLUMNS, GROUPS), tl.float32)
    for start in range(0, groups, GROUPS):
        if WHOLE:
            codes, scale = tl.load(w_at), tl.load(scale_at)
            low, high = tl.load(x_at), tl.load(x_at + half)
        else:
            inside = start + place // half < groups
            codes = tl.load(w_at, inside[None, :], 0)
            scale = tl.load(scale_at, (start + tl.arange(0, GROUPS) < groups)[None, :], 0.0)
            low, high = tl.load(x_at, inside, 0.0), tl.load(x_at + half, inside, 0.0)
        first, second = (
            _below_exponent(codes & 15) - 8388616.0,
            _below_exponent(codes & 240) - 8388736.0,
        )
        high = high.to(tl.float32) * 0.0625  # the second is sixteen times its code less 8
        part = tl.fma(first, low.to(tl.float32)[None, :], second * high[None, :])
        total = tl.fma(tl.sum(part.reshape(COLUMNS, GROUPS, half), 2), scale, total)
        x_at += GROUPS * GROUP
        w_at += GROUPS * half
        scale_at += GROUPS
    rows = row + tl.arange(0, 1)
    z = tl.sum(total, 1)[None, :]
    store_finished(z, bias, residual, out, rows, columns, M, N, BIAS, RESIDUAL, ACTIVATION)


def eights(
    out: Tensor, x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str,
) -> None:  # fmt: skip
    """Write the product of rows and weights in codes of eight bits."""
    n, k = codes.shape
    flat, codes = x.reshape(-1, k).contiguous(), codes.contiguous()
    if codes.dtype == torch.int8:
        flat, codes = flat.view(torch.int32), codes.view(torch.int32)
    depth, k = _BYTES // codes.element_size(), codes.shape[1]
    _eights_kernel[len(flat), ceil_div(n, COLUMNS)](
        flat, codes, x_scales.contiguous(), scales.contiguous(), out if bias is None else bias.contiguous(),
        out if residual is None else residual.contiguous(), out, len(flat), n, k,
        COLUMNS=COLUMNS, DEPTH=depth, WHOLE=k % depth == 0, DP4A=not interpreting(),
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation, num_warps=_WARPS,
    )  # fmt: skip


def fours(
    out: Tensor, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    activation: str,
) -> None:  # fmt: skip
    """Write the product of rows of numbers and weights in codes of four bits."""
    n, groups = scales.shape
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    group = flat.shape[1] // groups
    at_once = 2 * _BYTES // group
    _fours_kernel[len(flat), ceil_div(n, COLUMNS)](
        flat, packed.contiguous(), scales.contiguous(), out if bias is None else bias.contiguous(),
        out if residual is None else residual.contiguous(), out, len(flat), n, groups,
        GROUP=group, COLUMNS=COLUMNS, GROUPS=at_once, WHOLE=groups % at_once == 0,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation, num_warps=_WARPS,
    )  # fmt: skip


def obstacle(x: Tensor, *_: Any) -> str:
    """Why these forms cannot take rows [b, ..., n], or nothing. How many samples there are is no reason: a row shall
    have the same bits in any batch."""
    if x.shape[1:-1].numel() != 1 or x.ndim < 2:
        return f"x has shape {[*x.shape]}, and this form takes one token a sample"
    if x.shape[-1] % _ALIGNED:
        return f"rows of {x.shape[-1]} are not whole words of {_ALIGNED} bytes"
    return ""
