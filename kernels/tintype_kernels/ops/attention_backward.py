"""Triton's backward passes of attention: one over queries, one over keys, each owning what it writes: no atomics.

Source: Dao, "FlashAttention-2", ICLR 2024, algorithm 2, as two kernels so that sums have one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tintype_kernels.ops.attention_forward import (
    LOG2_E,
    add_weighted,
    empty_like,
    head_of,
    key_count,
    launch_options,
    load,
    products,
    store,
    strided,
    zeros,
)
from tintype_kernels.triton_support import await_earlier, ceil_div, entry, jit, tl


@jit
def _slopes(q, grad, k, v, log, index, count, scale, weight, R: tl.constexpr, MASKED: tl.constexpr):
    """Softmax weights of a block of keys [queries, keys], and the loss's slopes along them."""
    weights = tl.exp2(products(q, k, R) * scale - log[:, None])
    if MASKED:
        weights = tl.where(index[None, :] < count, weights, 0.0)
    return weights, weight * products(grad, v, R)


@jit
def _row(table, at, index, queries, OTHER: tl.constexpr):
    return tl.load(table + at * queries + index, index < queries, OTHER)


@entry
def _delta_kernel(
    q, k_extra, v_extra, grad, out, lse_extra, delta, delta_extra,
    heads, queries, keys_extra, scale, extra_scale,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EXTRA: tl.constexpr,
):  # fmt: skip
    """Each set's sum of weights times slopes, [queries]: together grad . out, so the first set needs no pass."""
    await_earlier()
    at = tl.program_id(1).to(tl.int64)
    b, h = at // heads, at % heads
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g = load(head_of(grad, b, h, D), index, queries, D, H, R, True)
    o = load(head_of(out, b, h, D), index, queries, D, H, R, True)
    both = tl.sum(g[0].to(tl.float32) * o[0].to(tl.float32), 1)
    if R > 0:
        both += tl.sum(g[1].to(tl.float32) * o[1].to(tl.float32), 1)
    if EXTRA:
        block = load(head_of(q, b, h, D), index, queries, D, H, R, True)
        log = _row(lse_extra, at, index, queries, float("inf"))
        extra = tl.zeros((ROWS,), tl.float32)
        for start in range(0, keys_extra, KEYS):
            key = start + tl.arange(0, KEYS)
            k = load(head_of(k_extra, b, h, D), key, keys_extra, D, H, R, True)
            v = load(head_of(v_extra, b, h, D), key, keys_extra, D, H, R, True)
            weights, slopes = _slopes(
                block, g, k, v, log, key, keys_extra, scale, extra_scale, R, True
            )
            extra += tl.sum(weights * slopes, 1)
        tl.store(delta_extra + at * queries + index, extra, index < queries)
        both -= extra
    tl.store(delta + at * queries + index, both, index < queries)


@jit
def _query_block(
    total, q, grad, log, delta, k, v, index, count, scale, weight,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    keys = load(k, index, count, D, H, R, MASKED)
    values = load(v, index, count, D, H, R, MASKED)
    weights, slopes = _slopes(q, grad, keys, values, log, index, count, scale, weight, R, MASKED)
    return add_weighted(total, weights * (slopes - delta[:, None]), keys, R)


@jit
def _query_set(
    total, q, grad, log, delta, k, v, count, scale, weight,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add what one set of keys sends back to a block of queries."""
    whole = count // KEYS * KEYS
    index = tl.arange(0, KEYS)
    for start in range(0, whole, KEYS):
        total = _query_block(
            total, q, grad, log, delta, k, v, start + index, count, scale, weight, D, H, R, False
        )
    if whole < count:
        total = _query_block(
            total, q, grad, log, delta, k, v, whole + index, count, scale, weight, D, H, R, True
        )
    return total


@entry
def _query_kernel(
    q, k, v, k_extra, v_extra, key_lengths, grad, lse, lse_extra, delta, delta_extra, dq,
    heads, queries, keys, keys_extra, scale, extra_scale, factor,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EXTRA: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS queries of one head: grid (queries, batch * heads)."""
    await_earlier()
    at = tl.program_id(1).to(tl.int64)
    b, h = at // heads, at % heads
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = load(head_of(q, b, h, D), index, queries, D, H, R, True)
    g = load(head_of(grad, b, h, D), index, queries, D, H, R, True)
    log, fall = _row(lse, at, index, queries, float("inf")), _row(delta, at, index, queries, 0.0)
    count = key_count(key_lengths, b, keys, LENGTHS)
    k_head, v_head = head_of(k, b, h, D), head_of(v, b, h, D)
    total = zeros(ROWS, H, R)
    total = _query_set(total, block, g, log, fall, k_head, v_head, count, scale, 1.0, D, H, R, KEYS)
    if EXTRA:
        log = _row(lse_extra, at, index, queries, float("inf"))
        fall = _row(delta_extra, at, index, queries, 0.0)
        k_head, v_head = head_of(k_extra, b, h, D), head_of(v_extra, b, h, D)
        total = _query_set(
            total,
            block,
            g,
            log,
            fall,
            k_head,
            v_head,
            keys_extra,
            scale,
            extra_scale,
            D,
            H,
            R,
            KEYS,
        )
    store(head_of(dq, b, h, D), index, queries, (total[0] * factor, total[1] * factor), D, H, R)


@entry
def _key_kernel(
    q, k, v, key_lengths, grad, lse, delta, dk, dv,
    heads, queries, keys, scale, weight, factor,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """The gradients of KEYS keys and values of one head, transposed throughout: grid (keys, batch * heads)."""
    await_earlier()
    at = tl.program_id(1).to(tl.int64)
    b, h = at // heads, at % heads
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    count = key_count(key_lengths, b, keys, LENGTHS)
    k_block = load(head_of(k, b, h, D), key, count, D, H, R, True)
    v_block = load(head_of(v, b, h, D), key, count, D, H, R, True)
    q_head, g_head = head_of(q, b, h, D), head_of(grad, b, h, D)
    k_total, v_total = zeros(KEYS, H, R), zeros(KEYS, H, R)
    for start in range(0, queries, ROWS):
        index = start + tl.arange(0, ROWS)
        block = load(q_head, index, queries, D, H, R, True)
        g = load(g_head, index, queries, D, H, R, True)
        log = _row(lse, at, index, queries, float("inf"))
        fall = _row(delta, at, index, queries, 0.0)
        weights = tl.exp2(products(k_block, block, R) * scale - log[None, :])
        v_total = add_weighted(v_total, weights, g, R)
        slopes = weight * products(v_block, g, R) - fall[None, :]
        k_total = add_weighted(k_total, weights * slopes, block, R)
    seen = (key < count)[:, None]  # keys beyond the count had no part in the softmax
    k_total = (tl.where(seen, k_total[0] * factor, 0.0), tl.where(seen, k_total[1] * factor, 0.0))
    v_total = (tl.where(seen, v_total[0] * weight, 0.0), tl.where(seen, v_total[1] * weight, 0.0))
    store(head_of(dk, b, h, D), key, keys, k_total, D, H, R)
    store(head_of(dv, b, h, D), key, keys, v_total, D, H, R)


def triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, out: Tensor, lse: Tensor, lse_extra: Tensor, scale: float, extra_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = empty_gradients(grad, q, k, v, k_extra, v_extra)
    delta, delta_extra = torch.empty_like(lse), torch.empty_like(lse_extra)
    b, heads, queries, _ = q.shape
    extra, lengths = k_extra is not None, key_lengths is not None
    second = (k, v) if k_extra is None or v_extra is None else (k_extra, v_extra)
    inputs = tuple(strided(q, k, v, *second, grad, out))
    *qkv, k2, v2, g, o = inputs
    counts, scales = (heads, queries), (scale * LOG2_E, extra_scale)
    options = launch_options("delta", q)
    _delta_kernel[ceil_div(queries, options["ROWS"]), b * heads](
        qkv[0], k2, v2, g, o, lse_extra, delta, delta_extra, *counts, second[0].shape[2], *scales,
        EXTRA=extra, **options,
    )  # fmt: skip
    options = launch_options("query", q)
    lengths_or_any = lse if key_lengths is None else key_lengths
    _query_kernel[ceil_div(queries, options["ROWS"]), b * heads](
        *qkv, k2, v2, lengths_or_any, g, lse, lse_extra, delta, delta_extra, *strided(gradients[0]),
        *counts, k.shape[2], second[0].shape[2], *scales, scale, EXTRA=extra, LENGTHS=lengths, **options,
    )  # fmt: skip
    sets = [(qkv[1:], lse, delta, gradients[1:3], 1.0, lengths)]
    if extra:
        sets.append(([k2, v2], lse_extra, delta_extra, gradients[3:], extra_scale, False))
    options = launch_options("key", q)
    for (keys, values), log, fall, results, weight, masked in sets:
        count = keys[0].shape[2]
        _key_kernel[ceil_div(count, options["KEYS"]), b * heads](
            qkv[0], keys, values, lengths_or_any, g, log, fall, *strided(*results),
            *counts, count, scale * LOG2_E, weight, scale, LENGTHS=masked, **options,
        )  # fmt: skip
    return gradients


def empty_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    extra = [q.new_empty(0) if x is None else empty_like(x) for x in (k_extra, v_extra)]
    return empty_like(q), empty_like(k), empty_like(v), extra[0], extra[1]
