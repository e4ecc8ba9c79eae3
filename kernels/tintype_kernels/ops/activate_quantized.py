"""Rows in 8 bits for a quantised linear layer, of numbers as they are or behind an activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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
from tintype_kernels.torch_op import describe, public, unit_stride
from tintype_kernels.triton_support import ceil_div, jit, row_tile, tl, widen


def reference(x: Tensor, scheme: str = "int8", activation: str = "none") -> QuantizedRows:
    """The op in plain PyTorch."""
    return plain_rows(ACTIVATIONS[activation](x), scheme)


def _reference_forward(x: Tensor, scheme: str, activation: str) -> tuple[Tensor, Tensor]:
    rows = reference(x, scheme, activation)
    return as_bytes(rows.codes), rows.scales


@jit
def _kernel(
    x, codes, scales, M, N, x_row,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, LIMIT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """ROWS rows: grid (rows,)."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    at = rows[:, None].to(tl.int64) * x_row + columns[None, :]
    values = activate(widen(tl.load(x + at, inside, 0.0)), ACTIVATION)
    store_quantized(values, codes, scales, rows, columns, M, N, x.dtype.element_ty, LIMIT)


def write_quantized(codes: Tensor, scales: Tensor, x: Tensor, activation: str = "none") -> None:
    """Launch the kernel; codes [..., n] and scales [...] are contiguous."""
    rows = unit_stride(x.reshape(-1, x.shape[-1]))
    tile = row_tile(x.shape[-1])
    _kernel[(ceil_div(len(rows), tile["ROWS"]),)](
        rows, codes, scales, *rows.shape, rows.stride(0),
        LIMIT=LARGEST[codes.dtype], ACTIVATION=activation, **tile,
    )  # fmt: skip


OP = RowsOp(
    "activate_quantized",
    shape=lambda x: tuple(x.shape),
    reference=_reference_forward,
    triton=write_quantized,
)


@public(reference)
def activate_quantized(x: Tensor, scheme: str = "int8", activation: str = "none") -> QuantizedRows:
    """Return `activation(x)` in codes of `scheme`, int8 or fp8, with a scale a row, for x [..., n].

    Activations: none, gelu, gelu_tanh, silu.
    """
    if not x.dtype.is_floating_point or not x.ndim:
        raise ValueError(f"x is {describe(x)}, expected a floating tensor [..., n]")
    check_activation(activation)
    return OP(x, scheme, activation)


# Tokens and channels of feed-forwards before they are narrowed.
_SIZES = {"SD3 1024": (4096, 6144), "FLUX 1024": (4608, 12288)}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (tokens, channels) in _SIZES.items():
        for scheme in SCHEMES:
            x = make(batch, tokens, channels)
            yield f"{label}, {scheme}", {"x": x, "scheme": scheme, "activation": "gelu_tanh"}
