"""Triton's forward pass of attention, and the pieces of a head that the backward passes are made of too.

Source: Dao, "FlashAttention-2", ICLR 2024 (the running softmax). A row's arithmetic depends on its own keys alone, so
it has the same bits in any batch. float32 is computed exactly, without tensor cores: it is for checking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tintype_kernels.torch_op import wide_type
from tintype_kernels.triton_support import (
    arch_of,
    await_earlier,
    ceil_div,
    entry,
    jit,
    power_of_two,
    tl,
)

LOG2_E = math.log2(math.e)

# A tensor reaches a kernel as (pointer, batch stride, head stride, token stride), the strides in eighths where 8
# divides D: Triton asks only whether a number divides by 16, which 40 and 72 do not, and would load element by element.
# Of the D columns, the H first are a power of two and the rest are padded to R >= 16: 40 costs 48 columns, and 80, 96
# and 160 need no padding at all.


@jit
def head_of(tensor, b, h, D: tl.constexpr):
    UNIT: tl.constexpr = 8 if D % 8 == 0 else 1
    return tensor[0] + (b * tensor[1] + h * tensor[2]) * UNIT, tensor[3] * UNIT


@jit
def _load_columns(
    rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr
):
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    if not MASKED and FIRST + WIDTH <= D:
        return tl.load(rows + columns)
    mask = columns < D
    if MASKED and FIRST + WIDTH <= D:
        mask = inside
    elif MASKED:
        mask = mask & inside
    return tl.load(rows + columns, mask, 0.0)


@jit
def load(
    tokens, index, count, D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr
):
    """Tokens `index` of one head, in two groups of columns; zero from `count` on."""
    rows, inside = tokens[0] + index[:, None] * tokens[1], index[:, None] < count
    first = _load_columns(rows, inside, 0, H, D, MASKED)
    second = first
    if R > 0:
        second = _load_columns(rows, inside, H, R, D, MASKED)
    return first, second


@jit
def store(tokens, index, count, block, D: tl.constexpr, H: tl.constexpr, R: tl.constexpr):
    rows, inside = tokens[0] + index[:, None] * tokens[1], index[:, None] < count
    tl.store(rows + tl.arange(0, H)[None, :], block[0], inside)
    if R > 0:
        columns = H + tl.arange(0, R)[None, :]
        tl.store(rows + columns, block[1], inside & (columns < D))


@jit
def zeros(ROWS: tl.constexpr, H: tl.constexpr, R: tl.constexpr):
    return tl.zeros((ROWS, H), tl.float32), tl.zeros((ROWS, R if R > 0 else 16), tl.float32)


@jit
def products(a, b, R: tl.constexpr):
    """a b^T"""
    scores = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if R > 0:
        scores = tl.dot(a[1], tl.trans(b[1]), scores, input_precision="ieee")
    return scores


@jit
def add_weighted(total, weights, block, R: tl.constexpr):
    """total + weights block"""
    weights = weights.to(block[0].dtype)
    first, second = tl.dot(weights, block[0], total[0], input_precision="ieee"), total[1]
    if R > 0:
        second = tl.dot(weights, block[1], second, input_precision="ieee")
    return first, second


@jit
def soften(top, mass, scores, scale):
    """The running softmax after more scores: its maximum and denominator, their weights, what earlier ones fade by."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    return new_top, mass * fade + tl.sum(weights, 1), weights, fade


@jit
def settle(top, mass):
    """What weighted values are divided by, and the base-2 logarithm of the softmax's denominator."""
    mass = tl.where(mass == 0.0, 1.0, mass)  # a row without any key attends to nothing
    return mass, tl.where(top == float("-inf"), float("inf"), top + tl.log2(mass))


@jit
def _attend_block(
    top, mass, total, q, k, v, index, count, scale,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one block of keys into the running softmax: its maximum, its denominator, its weighted values."""
    scores = products(q, load(k, index, count, D, H, R, MASKED), R)
    if MASKED:
        scores = tl.where(index[None, :] < count, scores, float("-inf"))
    top, mass, weights, fade = soften(top, mass, scores, scale)
    total = (total[0] * fade[:, None], total[1] * fade[:, None])
    return top, mass, add_weighted(total, weights, load(v, index, count, D, H, R, MASKED), R)


@jit
def _attend(
    q, k, v, count, scale,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One set of keys: its attention, and the base-2 logarithm of the softmax's denominator."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = zeros(ROWS, H, R)
    whole = count // KEYS * KEYS
    index = tl.arange(0, KEYS)
    for start in range(0, whole, KEYS):
        top, mass, total = _attend_block(
            top, mass, total, q, k, v, start + index, count, scale, D, H, R, False
        )
    if whole < count:
        top, mass, total = _attend_block(
            top, mass, total, q, k, v, whole + index, count, scale, D, H, R, True
        )
    mass, log = settle(top, mass)
    return (total[0] / mass[:, None], total[1] / mass[:, None]), log


@jit
def _log_mass(
    q, k, count, scale,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The base-2 logarithm of one set's softmax denominator."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for start in range(0, count, KEYS):
        index = start + tl.arange(0, KEYS)
        scores = products(q, load(k, index, count, D, H, R, True), R) * scale
        scores = tl.where(index[None, :] < count, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        mass = mass * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    return top + tl.log2(mass)


@jit
def _add_attention(
    total, q, k, v, log, count, scale, weight,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """total + weight * attention; with the denominator known one total serves both sets, as two fill the registers."""
    for start in range(0, count, KEYS):
        index = start + tl.arange(0, KEYS)
        scores = products(q, load(k, index, count, D, H, R, True), R)
        shares = weight * tl.exp2(scores * scale - log[:, None])
        shares = tl.where(index[None, :] < count, shares, 0.0)
        total = add_weighted(total, shares, load(v, index, count, D, H, R, True), R)
    return total


@jit
def key_count(key_lengths, b, keys, LENGTHS: tl.constexpr):
    count = keys
    if LENGTHS:
        count = tl.minimum(tl.load(key_lengths + b), keys)
    return count


@entry
def _forward_kernel(
    q, k, v, k_extra, v_extra, key_lengths, out, lse, lse_extra,
    heads, queries, keys, keys_extra, scale, extra_scale,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EXTRA: tl.constexpr, LENGTHS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head: grid (queries, batch * heads). Offsets to a head pass 2**31 elements."""
    await_earlier()
    at = tl.program_id(1).to(tl.int64)
    b, h = at // heads, at % heads
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = load(head_of(q, b, h, D), index, queries, D, H, R, True)
    count = key_count(key_lengths, b, keys, LENGTHS)
    total, log = _attend(
        block, head_of(k, b, h, D), head_of(v, b, h, D), count, scale, D, H, R, ROWS, KEYS
    )
    if SAVE:
        tl.store(lse + at * queries + index, log, index < queries)
    if EXTRA:
        k_head, v_head = head_of(k_extra, b, h, D), head_of(v_extra, b, h, D)
        log = _log_mass(block, k_head, keys_extra, scale, D, H, R, ROWS, KEYS)
        total = _add_attention(
            total, block, k_head, v_head, log, keys_extra, scale, extra_scale, D, H, R, KEYS
        )
        if SAVE:
            tl.store(lse_extra + at * queries + index, log, index < queries)
    store(head_of(out, b, h, D), index, queries, total, D, H, R)


# Queries, keys, warps and stages of a block, by the widest head they serve: the fullest that spill no register. Hopper
# and data-centre Blackwell multiply out of shared memory, the others out of registers. float32 has its own.
_BLOCKS = {
    "forward": {
        64: (128, 64, 8, 2),
        96: (128, 32, 8, 2),
        128: (128, 16, 8, 2),
        160: (64, 16, 8, 2),
    },
    "delta": {64: (64, 32, 4, 1), 96: (64, 16, 4, 1), 128: (64, 32, 8, 1), 160: (64, 32, 4, 1)},
    "query": {64: (64, 32, 4, 2), 96: (128, 32, 8, 2), 128: (32, 32, 4, 2), 160: (64, 16, 8, 2)},
    "key": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 160: (16, 64, 8, 2)},
}
_SHARED_MEMORY_BLOCKS = {
    "forward": {128: (128, 128, 8, 2), 160: (128, 32, 8, 2)},
    "delta": {160: (32, 32, 8, 1)},
    "query": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 160: (64, 32, 8, 2)},
    "key": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 160: (32, 64, 8, 2)},
}
_SHARED_MEMORY_ARCHS = (90, 100, 103)
_FLOAT32_BLOCK = (32, 32, 4, 1)
WIDEST = 160


def launch_options(kernel: str, q: Tensor) -> dict[str, int]:
    """How a kernel cuts up a head: by its width, type and chip alone, so that a row's bits depend on nothing else."""
    dim = q.shape[-1]
    first = power_of_two(dim + 1) // 2
    blocks = (_SHARED_MEMORY_BLOCKS if arch_of(q) in _SHARED_MEMORY_ARCHS else _BLOCKS)[kernel]
    block = next(block for widest, block in blocks.items() if dim <= widest)
    rows, keys, warps, stages = _FLOAT32_BLOCK if q.dtype == torch.float32 else block
    columns = {"D": dim, "H": first, "R": max(16, power_of_two(dim - first)) if dim > first else 0}
    return {**columns, "ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}


def strided(*tensors: Tensor) -> Iterator[tuple[Tensor, int, int, int]]:
    """Tensors as kernels take them; one that the unit does not divide is copied."""
    unit = 8 if tensors[0].shape[-1] % 8 == 0 else 1
    for tensor in tensors:
        fits = tensor.stride(-1) == 1 and all(stride % unit == 0 for stride in tensor.stride()[:3])
        dense = tensor if fits else tensor.contiguous()
        batch, head, token = (stride // unit for stride in dense.stride()[:3])
        yield dense, batch, head, token


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, scale: float, extra_scale: float, differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse, lse_extra = empty_outputs(
        q, k, v, k_extra, v_extra, key_lengths, scale, extra_scale, differentiable
    )
    second = (k, v) if k_extra is None or v_extra is None else (k_extra, v_extra)
    options = launch_options("forward", q)
    b, heads, queries, _ = q.shape
    _forward_kernel[ceil_div(queries, options["ROWS"]), b * heads](
        *strided(q, k, v, *second), lse if key_lengths is None else key_lengths, *strided(out), lse, lse_extra,
        heads, queries, k.shape[2], second[0].shape[2], scale * LOG2_E, extra_scale,
        EXTRA=k_extra is not None, LENGTHS=key_lengths is not None, SAVE=differentiable, **options,
    )  # fmt: skip
    return out, lse, lse_extra


def empty_like(x: Tensor) -> Tensor:
    """Tokens outside heads, or inside them, as in x: so that the projection that follows needs no copy."""
    b, heads, tokens, dim = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(b, tokens, heads, dim).transpose(1, 2)
    return x.new_empty(x.shape)


def empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, scale: float, extra_scale: float, differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, and where a gradient will be asked for the base-2 logarithms of both softmaxes' denominators."""
    empty, per_row = (0,), q.shape[:3]
    dtype = wide_type(q)
    lse = q.new_empty(per_row if differentiable else empty, dtype=dtype)
    extra = differentiable and k_extra is not None
    return empty_like(q), lse, q.new_empty(per_row if extra else empty, dtype=dtype)
