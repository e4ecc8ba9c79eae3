"""Rows of activations in 8 bits, as the op before a quantised linear layer leaves them: what the ops of these share.

An op of them rounds to the type of its input first, so that its codes are those that the linear layer would have made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tintype_kernels.ops.quantise import quantize_rows
from tintype_kernels.ops.row_parts import columns, inside
from tintype_kernels.torch_op import TorchOp
from tintype_kernels.triton_support import (
    LEAST_NORMAL,
    jit,
    magnitude_bits,
    nearest_int8,
    tl,
    too_wide,
)

SCHEMES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# The first architecture whose instructions know a scheme's codes.
OLDEST_ARCH = {"int8": 0, "fp8": 89}


class QuantizedRows(NamedTuple):
    """codes int8 or float8_e4m3fn [..., n] and scales float32 [...], of rows that had `dtype`; no gradient passes."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def numbers(self) -> Tensor:
        """What the codes stand for, float64 [..., n]."""
        return self.codes.double() * self.scales.double()[..., None]


@jit
def store_quantized(
    parts, codes, scales, rows, M, N: tl.constexpr, INPUT: tl.constexpr, LIMIT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Write rows in parts, zero beside them, as codes [M, N] and scales [M]."""
    rounded, peaks = (), tl.zeros(parts[0].shape, tl.int32)
    for part in tl.static_range(len(parts)):
        values = parts[part].to(INPUT).to(tl.float32)
        peaks = tl.maximum(peaks, magnitude_bits(values))
        rounded += (values,)
    scale = tl.div_rn(tl.max(peaks, 1).to(tl.float32, bitcast=True), LIMIT)
    # What is so small that its inverse is infinite becomes zeros.
    inverse = tl.where(scale >= LEAST_NORMAL, tl.div_rn(1.0, scale), 0.0)
    codes += rows[:, None].to(tl.int64) * N
    for part in tl.static_range(len(parts)):
        values = rounded[part] * inverse[:, None]
        values = nearest_int8(values) if LIMIT == 127.0 else values.to(codes.dtype.element_ty)
        tl.store(codes + columns(part, WIDTH), values, inside(rows, M, part, N, WIDTH))
    tl.store(scales + rows, scale, rows < M)


def as_bytes(codes: Tensor) -> Tensor:
    """Codes as ops take and give them: e4m3 as bytes, which torch's checks of an op can compare."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def from_bytes(codes: Tensor) -> Tensor:
    """What `as_bytes` was given."""
    return codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes


def plain_rows(values: Tensor, scheme: str) -> QuantizedRows:
    """Values [..., n] rounded to codes in plain PyTorch."""
    return QuantizedRows(*quantize_rows(values.contiguous(), SCHEMES[scheme]), values.dtype)


def arch_obstacle(scheme: str, x: Tensor) -> str:
    """Why x's GPU has no instructions for the scheme's codes, or nothing."""
    oldest = OLDEST_ARCH[scheme]
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) >= divmod(oldest, 10):
        return ""
    return f"{scheme} needs sm_{oldest} or newer"


def empty_rows(x: Tensor, shape: tuple[int, ...], scheme: str) -> tuple[Tensor, Tensor]:
    """Codes as ops give them, of a shape, and a scale a row, to be written."""
    codes = torch.uint8 if scheme == "fp8" else torch.int8
    return x.new_empty(shape, dtype=codes), x.new_empty(shape[:-1], dtype=torch.float32)


def check_scheme(scheme: str) -> None:
    """Refuse what is no scheme."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")


class RowsOp:
    """`tintype::<name>` of (x, scheme, ...), which gives the rows of `shape(x, ...)`; `reference` gives them plainly.

    `triton` takes the op's arguments, and before them the codes and scales that it is to write.
    """

    def __init__(
        self,
        name: str,
        *,
        shape: Callable[..., tuple[int, ...]],
        reference: Callable[..., tuple[Tensor, Tensor]],
        triton: Callable[..., None],
    ) -> None:
        self._shape, self._triton = shape, triton
        self._op = TorchOp(
            name, fake=self._empty, reference=reference, triton=self._written, obstacles={"triton": self._obstacle}
        )  # fmt: skip

    def __call__(self, x: Tensor, scheme: str, *others: Any) -> QuantizedRows:
        check_scheme(scheme)
        codes, scales = self._op(x, scheme, *others)
        return QuantizedRows(from_bytes(codes), scales, x.dtype)

    def _empty(self, x: Tensor, scheme: str, *others: Any) -> tuple[Tensor, Tensor]:
        return empty_rows(x, self._shape(x, *others), scheme)

    def _written(self, x: Tensor, scheme: str, *others: Any) -> tuple[Tensor, Tensor]:
        codes, scales = self._empty(x, scheme, *others)
        self._triton(from_bytes(codes), scales, x, *others)
        return codes, scales

    def _obstacle(self, x: Tensor, scheme: str, *others: Any) -> str:
        return too_wide(self._shape(x, *others)[-1]) or arch_obstacle(scheme, x)
