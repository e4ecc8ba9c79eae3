"""What a flow transformer does to queries and keys before attention: RMS norm over a head, then rotary embedding.

The rotation is FLUX's: neighbouring elements are the two parts of a complex number, and `cos` and `sin` [tokens, dim]
hold an entry for each element, so that `out = y * cos + rotate(y) * sin` with `rotate(a, b) = (-b, a)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tintype_kernels.torch_op import (
    TorchOp,
    check,
    check_floating,
    public,
    unit_stride,
    wide,
    wide_type,
)
from tintype_kernels.triton_support import (
    await_earlier,
    ceil_div,
    entry,
    jit,
    power_of_two,
    tl,
    widen,
)

TILE = 4096  # elements that a block of four warps holds in registers
HEADS = 4  # heads at most that share one load of cos and sin
Pair = tuple[Tensor, Tensor]


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    eps: float = 1e-6,
) -> Pair:  # fmt: skip
    """The op in plain PyTorch; half precision is computed in float32 and rounded once."""
    return _plain(q, q_weight, cos, sin, eps), _plain(k, k_weight, cos, sin, eps)


def _plain(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    y = _rms_normed(x, weight, eps)
    return (y * wide(cos) + _rotate(y) * wide(sin)).to(x.dtype)


def _rms_normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    h = unit_stride(wide(x))  # sums have other bits where elements lie apart
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * wide(weight)


def _rotate(y: Tensor) -> Tensor:
    even, odd = y[..., ::2], y[..., 1::2]
    return torch.stack([-odd, even], -1).flatten(-2)


def _reference_forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> Pair:  # fmt: skip
    q_out, k_out = _plain(q, q_weight, cos, sin, eps), _plain(k, k_weight, cos, sin, eps)
    return _empty(q).copy_(q_out), _empty(k).copy_(k_out)


def _reference_backward(
    q_grad: Tensor, k_grad: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dq_weight = _plain_backward(q_grad, q, q_weight, cos, sin, eps)
    dk, dk_weight = _plain_backward(k_grad, k, k_weight, cos, sin, eps)
    return dq, dk, dq_weight, dk_weight


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> Pair:  # fmt: skip
    g, h = wide(grad), wide(x)
    dy = g * wide(cos) - _rotate(g * wide(sin))
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    normed = h * rstd
    scaled = dy if weight is None else dy * wide(weight)
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
    dweight = _weight_like(x, weight).copy_(
        (dy * normed).sum((0, 1, 2))[: 0 if weight is None else None]
    )
    return _empty(x).copy_(dx), dweight


@jit
def _tile(T, D, TOKENS: tl.constexpr, DIM: tl.constexpr):
    """This program's tokens [tokens, 1], elements of a head [1, dim], and which of both exist."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    d = tl.arange(0, DIM)[None, :]
    return token, d, (token < T) & (d < D)


@jit
def _head(x, strides, n, head, token, d):
    """Pointers to a tile of a head of sample n."""
    return x + n * strides[0] + head * strides[1] + token * strides[2] + d


@jit
def _load_heads(x, strides, n, token, d, inside, HEADS: tl.constexpr):
    """A tile of each of this program's heads of sample n."""
    heads = ()
    for i in tl.static_range(HEADS):
        at = _head(x, strides, n, tl.program_id(1) * HEADS + i, token, d)
        heads += (widen(tl.load(at, inside, 0.0)),)
    return heads


@jit
def _halves(x):
    """Even and odd elements of x [tokens, dim], [tokens, dim/2] each."""
    return tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))


@jit
def _joined(even, odd):
    """What `_halves` was given."""
    return tl.join(even, odd).reshape(even.shape[0], 2 * even.shape[1])


@jit
def _rotation(table, token, d, inside, D):
    """Halves of cos or sin, for all heads."""
    return _halves(widen(tl.load(table + token * D + d, inside, 0.0)))


@jit
def _gain(weight, d, inside):
    """The weight of each element [tokens, dim]: in a row of its own it would go through shared memory."""
    return widen(tl.load(weight + tl.broadcast_to(d, inside.shape), inside, 0.0))


@jit
def _forward_tile(
    x, weight, cos, sin, out, strides, out_strides, n, T, D, eps,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    token, d, inside = _tile(T, D, TOKENS, DIM)
    heads = _load_heads(x, strides, n, token, d, inside, HEADS)
    cos_even, cos_odd = _rotation(cos, token, d, inside, D)
    sin_even, sin_odd = _rotation(sin, token, d, inside, D)
    if weight is not None:
        gain = _gain(weight, d, inside)
    for i in tl.static_range(HEADS):
        h = heads[i]
        y = h * tl.rsqrt(tl.sum(h * h, 1)[:, None] / D + eps)
        if weight is not None:
            y *= gain
        even, odd = _halves(y)
        rotated = _joined(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
        to = _head(out, out_strides, n, tl.program_id(1) * HEADS + i, token, d)
        tl.store(to, rotated, inside)


@entry
def _forward_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, q_strides, k_strides, q_out_strides, k_out_strides,
    T, D, eps, HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """A tile of q or of k: grid (tokens, heads, 2 * samples)."""
    await_earlier()
    n = (tl.program_id(2) // 2).to(tl.int64)
    if tl.program_id(2) % 2 == 0:
        _forward_tile(
            q, q_weight, cos, sin, q_out, q_strides, q_out_strides, n, T, D, eps, HEADS, TOKENS, DIM
        )  # fmt: skip
    else:
        _forward_tile(
            k, k_weight, cos, sin, k_out, k_strides, k_out_strides, n, T, D, eps, HEADS, TOKENS, DIM
        )  # fmt: skip


@entry
def _backward_kernel(
    grad, x, weight, cos, sin, dx, sums, grad_strides, strides, dx_strides, T, D, eps,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dx of a tile, and its sum of dy*normed: grid (tokens, heads, samples)."""
    await_earlier()
    n = tl.program_id(2).to(tl.int64)
    token, d, inside = _tile(T, D, TOKENS, DIM)
    grads = _load_heads(grad, grad_strides, n, token, d, inside, HEADS)
    heads = _load_heads(x, strides, n, token, d, inside, HEADS)
    cos_even, cos_odd = _rotation(cos, token, d, inside, D)
    sin_even, sin_odd = _rotation(sin, token, d, inside, D)
    total = tl.zeros((TOKENS, DIM), sums.dtype.element_ty)
    if weight is not None:
        gain = _gain(weight, d, inside)
    for i in tl.static_range(HEADS):
        even, odd = _halves(grads[i])
        dy = _joined(even * cos_even + odd * sin_odd, odd * cos_odd - even * sin_even)
        h = heads[i]
        rstd = tl.rsqrt(tl.sum(h * h, 1)[:, None] / D + eps)
        normed = h * rstd
        if weight is not None:
            total += dy * normed
            dy *= gain
        dh = (dy - normed * (tl.sum(dy * normed, 1)[:, None] / D)) * rstd
        to = _head(dx, dx_strides, n, tl.program_id(1) * HEADS + i, token, d)
        tl.store(to, dh, inside)
    if weight is not None:
        block = (n * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(sums + block * D + d, tl.sum(total, 0)[None, :], d < D)


def _launch(q: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    b, h, t, d = q.shape
    dim, heads = power_of_two(d), math.gcd(h, HEADS)
    tokens = max(1, TILE // (heads * dim))
    tile = {"HEADS": heads, "TOKENS": tokens, "DIM": dim, "num_warps": 4}
    return (ceil_div(t, tokens), h // heads, b), tile


def _triton_forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> Pair:  # fmt: skip
    q_out, k_out = _fake_forward(q, k)
    (tokens, heads, b), tile = _launch(q)
    q, k = unit_stride(q), unit_stride(k)
    strides = [x.stride()[:3] for x in (q, k, q_out, k_out)]
    _forward_kernel[tokens, heads, 2 * b](
        q, k, _contiguous(q_weight), _contiguous(k_weight), cos.contiguous(), sin.contiguous(), q_out, k_out,
        *strides, *q.shape[2:], eps, **tile,
    )  # fmt: skip
    return q_out, k_out


def _triton_backward(
    q_grad: Tensor, k_grad: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _fake_backward(q_grad, k_grad, q, k, q_weight, k_weight)
    grid, tile = _launch(q)
    cos, sin = cos.contiguous(), sin.contiguous()
    for which, (grad, x, weight) in enumerate(((q_grad, q, q_weight), (k_grad, k, k_weight))):
        dx, dweight = gradients[which], gradients[which + 2]
        grad, x, weight = unit_stride(grad), unit_stride(x), _contiguous(weight)  # noqa: PLW2901
        sums = q.new_empty(grid[0] * grid[1] * grid[2], q.shape[-1], dtype=wide_type(q))
        strides = [tensor.stride()[:3] for tensor in (grad, x, dx)]
        _backward_kernel[grid](
            grad, x, weight, cos, sin, dx, sums, *strides, *q.shape[2:], eps, **tile
        )
        if weight is not None:
            dweight.copy_(sums.sum(0))
    return gradients


def _empty(x: Tensor) -> Tensor:
    """Of x's shape and dense, tokens outside heads where they are that in x."""
    b, heads, tokens, dim = x.shape
    if x.stride(2) < x.stride(1):
        return x.new_empty(x.shape)
    return x.new_empty(b, tokens, heads, dim).transpose(1, 2)


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _weight_like(x: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of a weight that may be missing: ops cannot return None, so then it is empty."""
    return x.new_empty(0 if weight is None else x.shape[-1])


def _fake_forward(q: Tensor, k: Tensor, *_: Any) -> Pair:
    return _empty(q), _empty(k)


def _fake_backward(
    _: Tensor, __: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *___: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = _weight_like(q, q_weight), _weight_like(k, k_weight)
    return _empty(q), _empty(k), *weights


FORWARD = TorchOp(
    "qk_norm_rope", fake=_fake_forward, reference=_reference_forward, triton=_triton_forward
)
BACKWARD = TorchOp(
    "qk_norm_rope_backward",
    fake=_fake_backward,
    reference=_reference_backward,
    triton=_triton_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dq, dk, dq_weight, dk_weight = BACKWARD(q_grad, k_grad, *ctx.saved_tensors, ctx.eps)
    dcos = dsin = None
    if any(
        ctx.needs_input_grad[4:6]
    ):  # seldom: positions are rarely learned, so these have no kernel
        normed = [
            (q_grad, _rms_normed(q, q_weight, ctx.eps)),
            (k_grad, _rms_normed(k, k_weight, ctx.eps)),
        ]
        dcos = sum((wide(g) * y).sum((0, 1)) for g, y in normed).to(cos.dtype)  # type: ignore[union-attr]
        dsin = sum((wide(g) * _rotate(y)).sum((0, 1)) for g, y in normed).to(sin.dtype)  # type: ignore[union-attr]
    dweights = (None if q_weight is None else dq_weight, None if k_weight is None else dk_weight)
    return dq, dk, *dweights, dcos, dsin, None


FORWARD.differentiate(_setup_context, _backward)


@public(reference)
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    eps: float = 1e-6,
) -> Pair:  # fmt: skip
    """Return q and k [b, heads, t, d], normed over d, times their weights [d] if any, rotated by cos and sin [t, d]."""
    check_floating("q", q, 4)
    check("k", k, tuple(q.shape), q)
    t, d = q.shape[2:]
    if d % 2:
        raise ValueError(f"q has heads of {d} elements, expected an even number")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check(name, weight, (d,), q)
    check_floating("cos", cos, 2)
    check("cos", cos, (t, d), cos)
    check("sin", sin, (t, d), cos)
    q_out, k_out = FORWARD(q, k, q_weight, k_weight, cos, sin, eps)
    return q_out, k_out


# Heads, tokens and elements of a head.
_SIZES = {"SD3.5 1024": (24, 4096, 64), "FLUX 1024": (24, 4608, 128)}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models, laid out as a linear layer leaves them; `make(*shape)` gives a tensor."""
    for label, (heads, t, d) in _SIZES.items():
        q, k = (make(batch, t, heads, d).transpose(1, 2) for _ in "qk")
        tables = {"cos": make(t, d).float(), "sin": make(t, d).float()}
        yield label, {"q": q, "k": k, "q_weight": make(d), "k_weight": make(d), **tables}
