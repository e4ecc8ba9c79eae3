"""Whole rows in a block, held in parts that lie side by side.

Triton's tiles are powers of two long, and rows are three or five times one: in a tile of their own they would leave
up to two fifths of a block idle.
"""

from __future__ import annotations

from tintype_kernels.triton_support import REGISTERS, ceil_div, jit, power_of_two, tl

_MOST = 5  # parts of a row
_HOPPER = 90


def part_width(n: int) -> int:
    """The elements of a part of a row of n."""
    return power_of_two(ceil_div(n, _MOST))


def row_parts(n: int) -> dict[str, int]:
    """How a block that holds whole rows of n elements is launched: a thread holds eight or more of each part."""
    width = part_width(n)
    warps = min(max(4, width // 256), 16)
    return {"ROWS": max(1, 1024 // width), "WIDTH": width, "num_warps": warps, **REGISTERS}


_HELD = 48  # elements of rows that a thread of Hopper holds beside little else in 64 registers


def light_row_parts(n: int, arch: int) -> dict[str, int]:
    """The same for a block that needs little beside its rows: half the registers let twice as many run at a time.

    Other chips than Hopper would spill some.
    """
    width, tile = part_width(n), row_parts(n)
    if arch != _HOPPER:
        return tile
    held = tile["ROWS"] * width * ceil_div(n, width)
    warps = min(max(4, power_of_two(ceil_div(held, 32 * _HELD))), 16)
    return {**tile, "num_warps": warps, "maxnreg": 64}


@jit
def columns(part, WIDTH: tl.constexpr):
    """The columns of a part [1, WIDTH]."""
    return (part * WIDTH + tl.arange(0, WIDTH))[None, :]


@jit
def inside(rows, M, part: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """Whether elements of a part lie in an array [M, N]."""
    mask = rows[:, None] < M
    if (part + 1) * WIDTH > N:
        mask = mask & (columns(part, WIDTH) < N)
    return mask


@jit
def row_sums(parts):
    """The sums of rows [rows, 1]."""
    total = parts[0]
    for part in tl.static_range(1, len(parts)):
        total += parts[part]
    return tl.sum(total, 1)[:, None]
