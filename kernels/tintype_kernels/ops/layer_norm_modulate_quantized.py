"""Adaptive layer norm, `layer_norm(x) * (unit + scale) + shift`, whose tokens leave in 8 bits for a quantised layer.

With a unit of 0 it is the plain norm with weights `scale` and `shift`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tintype_kernels.ops import layer_norm_modulate as plain
from tintype_kernels.ops.quantise import LARGEST
from tintype_kernels.ops.quantised_rows import (
    SCHEMES,
    QuantizedRows,
    RowsOp,
    as_bytes,
    plain_rows,
    store_quantized,
)
from tintype_kernels.ops.row_parts import row_parts
from tintype_kernels.torch_op import check_floating, per_sample, public, unit_stride
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, tl


def reference(
    x: Tensor, shift: Tensor, scale: Tensor, scheme: str = "int8", eps: float = 1e-6, unit: float = 1.0
) -> QuantizedRows:  # fmt: skip
    """The op in plain PyTorch."""
    return plain_rows(plain.reference(x, shift, scale, eps, unit), scheme)


def baseline(
    x: Tensor, shift: Tensor, scale: Tensor, scheme: str = "int8", eps: float = 1e-6, unit: float = 1.0
) -> QuantizedRows:  # fmt: skip
    """What a benchmark compares with."""
    return plain_rows(plain.baseline(x, shift, scale, eps, unit), scheme)


def _reference_forward(
    x: Tensor, scheme: str, shift: Tensor, scale: Tensor, eps: float, unit: float
) -> tuple[Tensor, Tensor]:
    rows = reference(x, shift, scale, scheme, eps, unit)
    return as_bytes(rows.codes), rows.scales


@entry
def _kernel(
    x, shift, scale, codes, scales, T, C: tl.constexpr, x_batch, x_row, shift_batch, scale_batch, eps, unit,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a sample: grid (tokens, samples)."""
    await_earlier()
    rows, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    parts = plain.load_tokens(x, rows, T, C, x_batch, x_row, WIDTH)
    parts = plain.modulated(parts, shift, scale, C, shift_batch, scale_batch, eps, unit, WIDTH)
    codes, scales = codes + b * T * C, scales + b * T
    store_quantized(parts, codes, scales, rows, T, C, x.dtype.element_ty, LIMIT, WIDTH)


def _triton(
    codes: Tensor, scales: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float, unit: float
) -> None:
    b, t, c = x.shape
    tile = row_parts(c)
    x, shift, scale = unit_stride(x), unit_stride(shift), unit_stride(scale)
    strides = (*x.stride()[:2], shift.stride(0), scale.stride(0))
    _kernel[ceil_div(t, tile["ROWS"]), b](
        x, shift, scale, codes, scales, t, c, *strides, eps, unit, LIMIT=LARGEST[codes.dtype], **tile
    )  # fmt: skip


OP = RowsOp(
    "layer_norm_modulate_quantized",
    shape=lambda x, *_: tuple(x.shape),
    reference=_reference_forward,
    triton=_triton,
)


@public(reference)
def layer_norm_modulate_quantized(
    x: Tensor, shift: Tensor, scale: Tensor, scheme: str = "int8", eps: float = 1e-6, unit: float = 1.0
) -> QuantizedRows:  # fmt: skip
    """Return `layer_norm(x) * (unit + scale) + shift` in codes of `scheme`, int8 or fp8, with a scale a token.

    x is [b, t, c]; shift and scale are [b, c] or [b, 1, c].
    """
    check_floating("x", x, 3)
    shift, scale = per_sample("shift", shift, x), per_sample("scale", scale, x)
    return OP(x, scheme, shift, scale, eps, unit)


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, arguments in plain.cases(make, batch):
        for scheme in SCHEMES:
            yield f"{label}, {scheme}", {**arguments, "scheme": scheme}
