"""Triton's forward pass of attention with a role for each group of warps, for Hopper and data-centre Blackwell.

One group has the copy engine bring keys and values by tensor descriptors; others multiply and exponentiate, on Hopper
two that take half of the queries each, so that one's exponentials run beside the other's products. Triton deals the
roles out where a loop says `warp_specialize`; on Hopper it does so with four warps, descriptors made in the kernel and
nothing that multiplies behind the loop, so that a rest of keys is masked inside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tintype_kernels.ops.attention_forward import (
    LOG2_E,
    empty_outputs,
    head_of,
    settle,
    soften,
    strided,
)
from tintype_kernels.triton_support import (
    arch_of,
    await_earlier,
    ceil_div,
    entry,
    jit,
    set_allocator,
    tl,
)


@jit
def _tokens(head, count, ROWS: tl.constexpr, D: tl.constexpr):
    """Describes one head's tokens [count, D] to the copy engine, in blocks of ROWS."""
    return tl.make_tensor_descriptor(head[0], [count, D], [head[1], 1], [ROWS, D])


@entry
def _kernel(
    q, k, v, out, heads, queries, keys, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head: grid (queries, batch * heads). WHOLE says that KEYS divides the keys."""
    await_earlier()
    at, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    b, h = at // heads, at % heads
    k_tokens = _tokens(head_of(k, b, h, D), keys, KEYS, D)
    v_tokens = _tokens(head_of(v, b, h, D), keys, KEYS, D)
    block = _tokens(head_of(q, b, h, D), queries, ROWS, D).load([first, 0])
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, D), tl.float32)
    for start in tl.range(0, keys, KEYS, warp_specialize=True):
        scores = tl.dot(block, tl.trans(k_tokens.load([start, 0])))
        if not WHOLE:
            inside = start + tl.arange(0, KEYS) < keys
            scores = tl.where(inside[None, :], scores, float("-inf"))
        top, mass, weights, fade = soften(top, mass, scores, scale)
        total = tl.dot(weights.to(block.dtype), v_tokens.load([start, 0]), total * fade[:, None])
    mass, _ = settle(top, mass)
    to = _tokens(head_of(out, b, h, D), queries, ROWS, D)
    to.store([first, 0], (total / mass[:, None]).to(block.dtype))


# Queries, keys, warps and stages of a block, by chip and head; the interpreter, 0, does as Hopper.
_HOPPER = {64: (128, 128, 4, 3), 128: (128, 128, 4, 2)}
_BLACKWELL = {64: (128, 128, 4, 2), 128: (128, 128, 8, 2)}
_BLOCKS = {0: _HOPPER, 90: _HOPPER, 100: _BLACKWELL, 103: _BLACKWELL}


def obstacle(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, scale: float, extra_scale: float, differentiable: bool,
) -> str:  # fmt: skip
    """Why this form cannot take the op's arguments, or nothing."""
    if arch_of(q) not in _BLOCKS:
        return "the copy engine and the roles need sm_90, sm_100 or sm_103"
    if k_extra is not None or key_lengths is not None:
        return "this form takes one set of keys, of which all count"
    if differentiable:
        # Triton 3.6 gave wrong maxima behind the loop on an H200, in heads of 128 with a rest of keys; outputs, which
        # do not depend on them, were right.
        return "this form keeps nothing for a gradient"
    if q.shape[-1] not in _HOPPER or q.element_size() != 2:
        return f"q is {q.dtype} with {q.shape[-1]} a head, and this form takes 16 bits and {list(_HOPPER)} a head"
    if any(tensor.data_ptr() % 16 for tensor in (q, k, v)):
        return "the copy engine takes addresses that 16 divides"
    return ""


def roles_forward(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, scale: float, extra_scale: float, differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op by this form."""
    out, lse, lse_extra = empty_outputs(
        q, k, v, k_extra, v_extra, key_lengths, scale, extra_scale, differentiable
    )
    (b, heads, queries, dim), keys = q.shape, k.shape[2]
    rows, columns, warps, stages = _BLOCKS[arch_of(q)][dim]
    # Descriptors that a kernel makes lie in memory that a launch asks for.
    set_allocator(lambda size, _, __: torch.empty(size, dtype=torch.int8, device=q.device))
    _kernel[ceil_div(queries, rows), b * heads](
        *strided(q, k, v, out), heads, queries, keys, scale * LOG2_E,
        D=dim, ROWS=rows, KEYS=columns, WHOLE=keys % columns == 0,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse, lse_extra
