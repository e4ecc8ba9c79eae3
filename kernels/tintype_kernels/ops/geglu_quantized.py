"""The feed-forward gate of UNet transformers, whose rows leave in 8 bits for a quantised linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tintype_kernels.ops import geglu as plain
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
from tintype_kernels.torch_op import public
from tintype_kernels.triton_support import arch_of, await_earlier, ceil_div, entry, normal_below, tl


def reference(x: Tensor, scheme: str = "int8") -> QuantizedRows:
    """The op in plain PyTorch."""
    return plain_rows(plain.reference(x), scheme)


def baseline(x: Tensor, scheme: str = "int8") -> QuantizedRows:
    """What a benchmark compares with."""
    return plain_rows(plain.baseline(x), scheme)


def _reference_forward(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    rows = reference(x, scheme)
    return as_bytes(rows.codes), rows.scales


@entry
def _kernel(
    x, codes, scales, M, C: tl.constexpr, x_row,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """ROWS rows: grid (rows,)."""
    await_earlier()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = x + rows[:, None].to(tl.int64) * x_row
    parts = ()
    for part in tl.static_range((C + WIDTH - 1) // WIDTH):
        mask = inside(rows, M, part, C, WIDTH)
        value, gate = plain.load(at + columns(part, WIDTH), C, mask)
        parts += (value * gate * normal_below(gate),)
    store_quantized(parts, codes, scales, rows, M, C, x.dtype.element_ty, LIMIT, WIDTH)


def _triton(codes: Tensor, scales: Tensor, x: Tensor) -> None:
    rows, c = plain.as_rows(x), codes.shape[-1]
    tile = light_row_parts(c, arch_of(x))
    _kernel[(ceil_div(len(rows), tile["ROWS"]),)](
        rows, codes, scales, len(rows), c, rows.stride(0), LIMIT=LARGEST[codes.dtype], **tile
    )


OP = RowsOp(
    "geglu_quantized",
    shape=lambda x, *_: (*x.shape[:-1], x.shape[-1] // 2),
    reference=_reference_forward,
    triton=_triton,
)


@public(reference)
def geglu_quantized(x: Tensor, scheme: str = "int8") -> QuantizedRows:
    """Return `value * gelu(gate)` in codes of `scheme`, int8 or fp8, with a scale a row, for x [..., 2*c]."""
    plain.check_halves(x)
    return OP(x, scheme)


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, arguments in plain.cases(make, batch):
        for scheme in SCHEMES:
            yield f"{label}, {scheme}", {**arguments, "scheme": scheme}
