"""A linear layer with int4 weights and 16-bit tokens: a quarter is read, and unpacked on chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintype_kernels import triton_support
from tintype_kernels.dispatch import interpreting
from tintype_kernels.ops import linear_epilogue as epilogue
from tintype_kernels.ops import linear_vector
from tintype_kernels.ops.linear_epilogue import store_finished, tile_of
from tintype_kernels.ops.quantise import Int4Weight, check_int4_weight, dequantize, quantize_int4
from tintype_kernels.torch_op import TorchOp, public
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, jit, tl


def reference(
    x: Tensor, qw: Int4Weight, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch: unpack, then multiply.

    Sums are made in float64: in which order a library makes them depends on how many rows there are, and then rounding
    once to x's type leaves nothing of it.
    """
    z = x.double() @ dequantize(qw, torch.float64).t()
    return epilogue.finish(z, bias, residual, activation).to(x.dtype)


def _reference_forward(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    return reference(x, Int4Weight(packed, scales), bias, activation, residual)


@jit
def _unpacked(codes, x, UNPACK: tl.constexpr):
    """Low nibbles and high ones, each less 8, which any type holds exactly."""
    if UNPACK == "":
        low = ((codes & 15).to(tl.float32) - 8.0).to(x.dtype.element_ty)
        high = ((codes >> 4).to(tl.float32) - 8.0).to(x.dtype.element_ty)
    else:
        low, high = tl.inline_asm_elementwise(
            UNPACK, "=r,=r,h", [codes], (x.dtype.element_ty, x.dtype.element_ty), True, 2
        )
    return low, high


@entry
def _kernel(
    x, packed, scales, bias, residual, out, M, N, groups,
    GROUP: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNPACK: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """x w^T with the epilogue: grid (tiles,)."""
    await_earlier()
    half: tl.constexpr = GROUP // 2
    down, across = tile_of(M, N, ROWS, COLUMNS, 8)
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    w_row = (columns % N).to(tl.int64)
    # Strides are multiples of what is known when compiled, for loads of 16 bytes.
    x_at = x + rows[:, None].to(tl.int64) * (groups * GROUP) + tl.arange(0, GROUP)[None, :]
    w_at = packed + w_row[:, None] * (groups * half) + tl.arange(0, half)[None, :]
    scale_at, last = scales + w_row * groups, groups - 1
    # Scales run two groups ahead by hand, as Triton lets only what goes into products run ahead. A turn has two groups
    # at least: where a value outlives the next turn, nothing runs ahead.
    scale, later = tl.load(scale_at), tl.load(scale_at + tl.minimum(1, last))
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(0, groups, STEP):
        for ahead in tl.static_range(STEP):
            g = start + ahead
            codes = tl.load(w_at + tl.minimum(g, last) * half)
            # Zeros make nothing of the groups past the last.
            here = rows < tl.where(g <= last, M, 0)
            values = tl.load(x_at + g * GROUP, here[:, None], 0.0)
            latest = tl.load(scale_at + tl.minimum(g + 2, last))
            low, high = _unpacked(codes, x, UNPACK)
            weights = tl.join(low, high).permute(0, 2, 1).reshape(COLUMNS, GROUP)
            part = tl.dot(weights, tl.trans(values), input_precision="ieee")
            total = tl.fma(part, scale[:, None], total)
            scale, later = later, latest
    z = tl.trans(total)
    store_finished(z, bias, residual, out, rows, columns, M, N, BIAS, RESIDUAL, ACTIVATION)


# Two bytes to four values of 16 bits, in PTX: a nibble goes under the exponent at which it counts whole numbers, and
# what it was added to is taken away again, with 8. Compilers make some three times as many instructions of it, and they
# would take longer than the memory where tokens are few.
_UNPACK = """{{
.reg .b32 a, one, less;
mov.b32 one, {one}; mov.b32 less, {less};
cvt.u32.u16 a, $2; prmt.b32 a, a, 0, 0x4140;
lop3.b32 $0, a, 0x000F000F, {base}, 0xEA; shr.u32 a, a, 4; lop3.b32 $1, a, 0x000F000F, {base}, 0xEA;
fma.rn.{kind}x2 $0, $0, one, less; fma.rn.{kind}x2 $1, $1, one, less;
}}"""
# 1024 in float16 and 128 in bfloat16; 1; and the first and 8, negated: all twice.
_UNPACKS = {
    torch.float16: _UNPACK.format(kind="f16", base="0x64006400", one="0x3C003C00", less="0xE408E408"),
    torch.bfloat16: _UNPACK.format(kind="bf16", base="0x43004300", one="0x3F803F80", less="0xC308C308"),
}  # fmt: skip
# Rows, columns, warps and stages of a tile, by the largest number of tokens it is for. A token's sums are made group by
# group in any, so in the same order whatever batch it came in.
_TILES = {16: (16, 64, 4, 5), 32: (32, 64, 4, 5), 64: (64, 64, 4, 3), 1 << 40: (64, 128, 8, 3)}
_FLOAT32_TILE = (32, 32, 4, 1)  # without tensor cores, for checking


def _triton_forward(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    out = epilogue.empty_output(x, packed, scales, bias, residual, activation)
    (n, groups), k = scales.shape, x.shape[-1]
    flat = x.reshape(-1, k).contiguous()
    tile = next(tile for most, tile in _TILES.items() if len(flat) <= most)
    rows, columns, warps, stages = _FLOAT32_TILE if x.dtype == torch.float32 else tile
    group = k // groups
    added = out if residual is None else residual.contiguous()
    unpack = "" if interpreting() else _UNPACKS.get(x.dtype, "")
    _kernel[(ceil_div(len(flat), rows) * ceil_div(n, columns),)](
        flat, packed.contiguous(), scales.contiguous(), out if bias is None else bias.contiguous(), added, out,
        len(flat), n, groups, GROUP=group, STEP=max(2, 128 // group), ROWS=rows, COLUMNS=columns, UNPACK=unpack,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation,
        # Two groups of 128 are more than a turn of the loop has elsewhere, and memory on chip has to hold its stages.
        num_warps=warps, num_stages=stages - (group == 128 and stages > 1),
    )  # fmt: skip
    return out


def _vector_forward(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    out = epilogue.empty_output(x, packed, scales, bias, residual, activation)
    linear_vector.fours(out, x, packed, scales, bias, residual, activation)
    return out


@entry
def _dequantize_kernel(packed, scales, out, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK groups of weights in out's type: grid (blocks,)."""
    await_earlier()
    half: tl.constexpr = GROUP // 2
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, place = (group < groups)[:, None], tl.arange(0, half)[None, :]
    codes = tl.load(packed + group[:, None] * half + place, inside, 0)
    scale = tl.load(scales + group, group < groups, 0.0)[:, None]
    low = ((codes & 15).to(tl.float32) - 8.0) * scale
    high = ((codes >> 4).to(tl.float32) - 8.0) * scale
    at = out + group[:, None] * GROUP + place
    tl.store(at, low.to(out.dtype.element_ty), inside)
    tl.store(at + half, high.to(out.dtype.element_ty), inside)


def unpacked_weight(qw: Int4Weight, dtype: torch.dtype) -> Tensor:
    """`dequantize`, to the same bits, in one pass over memory."""
    out = qw.packed.new_empty(len(qw.packed), 2 * qw.packed.shape[1], dtype=dtype)
    groups, block = qw.scales.numel(), 8192 // qw.group
    _dequantize_kernel[(ceil_div(groups, block),)](
        qw.packed.contiguous(), qw.scales.contiguous(), out, groups, GROUP=qw.group, BLOCK=block
    )
    return out


def _library_forward(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    """The library's product with weights that were unpacked into memory, which pays where tokens are many."""
    plain = triton_support.reason or x.dtype == torch.float64
    weight = (dequantize if plain else unpacked_weight)(Int4Weight(packed, scales), x.dtype)
    return epilogue.finish(F.linear(x, weight, bias), None, residual, activation)


def _triton_obstacle(x: Tensor, *_: Any) -> str:
    return (
        "x is torch.float64, and the kernel takes 16- and 32-bit floats"
        if x.dtype == torch.float64
        else ""
    )


def _vector_obstacle(x: Tensor, *others: Any) -> str:
    return _triton_obstacle(x) or linear_vector.obstacle(x)


FORWARD = TorchOp(
    "int4_linear", fake=epilogue.empty_output, reference=_reference_forward, triton=_triton_forward,
    variants={"triton_vector": _vector_forward}, library=_library_forward,
    obstacles={"triton": _triton_obstacle, "triton_vector": _vector_obstacle},
)  # fmt: skip
epilogue.differentiable(FORWARD, lambda codes, dtype: dequantize(Int4Weight(*codes), dtype))


@public(reference)
def int4_linear(
    x: Tensor, qw: Int4Weight, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return `activation(x w^T + bias) + residual` for x [..., in] and `qw = quantize_int4(w, group)`.

    Activations: none, gelu, gelu_tanh, silu.
    """
    epilogue.check_linear(x, check_int4_weight(qw), bias, residual, activation)
    out: Tensor = FORWARD(x, qw.packed, qw.scales, bias, residual, activation)
    return out


LIBRARIES, flops = epilogue.LIBRARIES, epilogue.flops


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, x, w, others in epilogue.linear_cases(make, batch):
        yield label, {"x": x, "qw": quantize_int4(w, 64), **others}
