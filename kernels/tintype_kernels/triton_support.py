"""Triton where it is installed, and what several kernels share. Op files import without it."""

# mypy: disable-error-code="name-defined, no-untyped-def, untyped-decorator"

from __future__ import annotations

import importlib
from typing import Any

jit: Any
set_allocator: Any
try:
    jit = importlib.import_module("triton").jit
    set_allocator = importlib.import_module("triton").set_allocator
    tl = importlib.import_module("triton.language")
    reason = ""
except ImportError as error:
    jit, tl, reason = lambda kernel: kernel, None, f"Triton is not usable: {error}"  # type: ignore[assignment]
    set_allocator = None


@jit
def widen(x):  # noqa: ANN001, ANN201
    """Give the type to compute in: float32, or float64 where x is that already."""
    wide: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    return x.to(wide)


@jit
def magnitude_bits(x):  # noqa: ANN001, ANN201
    """Give the bits of |x| of float32: integers that order as magnitudes do, NaN, which a maximum drops, above all."""
    return tl.abs(x).to(tl.int32, bitcast=True)


def ceil_div(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """Give the smallest power of two that is at least `count`: Triton's blocks have such lengths."""
    return 1 << max(count - 1, 0).bit_length()


WIDEST_ROW = 16384  # elements of a row that a block can hold


def row_tile(n: int) -> dict[str, int]:
    """How a block of eight warps that holds whole rows of n elements is launched."""
    columns = power_of_two(n)
    return {"ROWS": max(1, 4096 // columns), "CHANNELS": columns, "num_warps": 8}


def too_wide(n: int) -> str:
    """Why a row of n elements cannot be held, or nothing."""
    return f"a row of {n} elements does not fit a block's {WIDEST_ROW}" if n > WIDEST_ROW else ""
