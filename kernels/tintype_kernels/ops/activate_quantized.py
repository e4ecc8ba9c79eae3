"""Rows in 8 bits for a quantised linear layer, of numbers as they are or behind an activation, or of both in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tintype_kernels.ops.linear_epilogue import ACTIVATIONS, activate, check_activation
from tintype_kernels.ops.quantise import LARGEST
from tintype_kernels.ops.quantised_rows import (
    SCHEMES,
    QuantizedRows,
    RowsOp,
    as_bytes,
    plain_rows,
    store_quantized,
)
from tintype_kernels.ops.row_parts import columns, inside, light_row_parts
from tintype_kernels.torch_op import check, describe, is_floating, public, unit_stride
from tintype_kernels.triton_support import arch_of, await_earlier, ceil_div, entry, tl, widen


def reference(
    x: Tensor, scheme: str = "int8", activation: str = "none", before: Tensor | None = None
) -> QuantizedRows:
    """The op in plain PyTorch."""
    values = ACTIVATIONS[activation](x)
    return plain_rows(values if before is None else torch.cat([before, values], -1), scheme)


def _reference_forward(
    x: Tensor, scheme: str, activation: str, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = reference(x, scheme, activation, before)
    return as_bytes(rows.codes), rows.scales


@entry
def _kernel(
    x, before, codes, scales, M, N: tl.constexpr, B: tl.constexpr, x_row, before_row,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of B + N elements: grid (rows,)."""
    await_earlier()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x += rows[:, None].to(tl.int64) * x_row - B
    before += rows[:, None].to(tl.int64) * before_row
    parts = ()
    for part in tl.static_range((B + N + WIDTH - 1) // WIDTH):
        c, mask = columns(part, WIDTH), inside(rows, M, part, B + N, WIDTH)
        values = tl.zeros((ROWS, WIDTH), tl.float32)  # every activation has 0 at 0
        if (part + 1) * WIDTH > B:
            values += activate(widen(tl.load(x + c, mask & (c >= B), 0.0)), ACTIVATION)
        if part * WIDTH < B:
            values += widen(tl.load(before + c, mask & (c < B), 0.0))
        parts += (values,)
    store_quantized(parts, codes, scales, rows, M, B + N, x.dtype.element_ty, LIMIT, WIDTH)


def write_quantized(
    codes: Tensor, scales: Tensor, x: Tensor, activation: str = "none", before: Tensor | None = None
) -> None:
    """Launch the kernel; codes [..., b + n] and scales [...] are contiguous."""
    rows = unit_stride(x.reshape(-1, x.shape[-1]))
    others = rows if before is None else unit_stride(before.reshape(-1, before.shape[-1]))
    first = 0 if before is None else others.shape[1]
    tile = light_row_parts(first + x.shape[-1], arch_of(x))
    _kernel[(ceil_div(len(rows), tile["ROWS"]),)](
        rows, others, codes, scales, *rows.shape, first, rows.stride(0), others.stride(0),
        LIMIT=LARGEST[codes.dtype], ACTIVATION=activation, **tile,
    )  # fmt: skip


def _shape(x: Tensor, activation: str, before: Tensor | None) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] + (0 if before is None else before.shape[-1]))


OP = RowsOp(
    "activate_quantized", shape=_shape, reference=_reference_forward, triton=write_quantized
)


@public(reference)
def activate_quantized(
    x: Tensor, scheme: str = "int8", activation: str = "none", before: Tensor | None = None
) -> QuantizedRows:
    """Return `activation(x)` in codes of `scheme`, int8 or fp8, with a scale a row, for x [..., n].

    With `before` [..., b] rows are [..., b + n]: its numbers as they are, then those. Activations: none, gelu,
    gelu_tanh, silu.
    """
    if not is_floating(x) or not x.ndim or not x.shape[-1]:
        raise ValueError(f"x is {describe(x)}, expected a floating tensor [..., n]")
    if before is not None:
        check("before", before, (*x.shape[:-1], before.shape[-1] if before.ndim else 0), x)
    check_activation(activation)
    return OP(x, scheme, activation, before)


# Tokens and channels of feed-forwards before they are narrowed.
_SIZES = {"SD3 1024": (4096, 6144), "FLUX 1024": (4608, 12288)}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (tokens, channels) in _SIZES.items():
        for scheme in SCHEMES:
            x = make(batch, tokens, channels)
            yield f"{label}, {scheme}", {"x": x, "scheme": scheme, "activation": "gelu_tanh"}
            before = make(batch, tokens, channels // 4)
            arguments = {"x": x, "scheme": scheme, "activation": "gelu_tanh", "before": before}
            yield f"{label}, {scheme}, beside attention", arguments
