"""Scaled dot-product attention and its gradient, each in passes that keep the scores on chip.

`out = attend(q, k, v) + extra_scale * attend(q, k_extra, v_extra)`; each set of keys has a softmax of its own.
Sources: Dao, "FlashAttention-2", ICLR 2024 (running softmax, two backward passes without atomics); Ye et al.,
"IP-Adapter", 2023 (the second set). A row's arithmetic depends on its own keys alone, so it has the same bits in any
batch. float32 is computed exactly, without tensor cores: it is for checking; models run in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tintype_kernels import forward_mode
from tintype_kernels.ops import attention_products, attention_roles
from tintype_kernels.ops.attention_backward import empty_gradients, triton_backward
from tintype_kernels.ops.attention_forward import LOG2_E, WIDEST, empty_outputs, triton_forward
from tintype_kernels.torch_op import TorchOp, check, check_floating, describe, public, wide


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, k_extra: Tensor | None = None,
    v_extra: Tensor | None = None, extra_scale: float = 1.0, key_lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch."""
    seen = None if key_lengths is None else _seen(k, key_lengths)
    out = _attended(q, k, v, seen, scale)
    if key_lengths is not None:  # a row without any key attends to nothing, whatever 0 / 0 gave
        out = out.masked_fill((key_lengths == 0)[:, None, None, None], 0)
    if k_extra is None or v_extra is None:
        return out
    extra = _attended(q, k_extra, v_extra, None, scale)
    return torch.add(out, extra, alpha=extra_scale)


def _attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None) -> Tensor:
    # Of the library's kernels not all know their tangents.
    plain = sdpa_kernel(SDPBackend.MATH) if forward_mode.is_active() else nullcontext()
    with plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def _seen(k: Tensor, key_lengths: Tensor) -> Tensor:
    return (torch.arange(k.shape[2], device=k.device) < key_lengths[:, None])[:, None, None]


def _plain_scores(q: Tensor, k: Tensor, scale: float, key_lengths: Tensor | None) -> Tensor:
    scores = wide(q) @ wide(k).transpose(-1, -2) * scale
    return scores if key_lengths is None else scores.masked_fill(~_seen(k, key_lengths), -math.inf)


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, scale: float, extra_scale: float, differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # The library's result comes as it is wherever its strides are those that were promised: the copy would be timed.
    out = reference(q, k, v, scale, k_extra, v_extra, extra_scale, key_lengths)
    empty, lse, lse_extra = empty_outputs(
        q, k, v, k_extra, v_extra, key_lengths, scale, extra_scale, differentiable
    )
    out = out if out.stride() == empty.stride() else empty.copy_(out)
    if differentiable:
        lse.copy_(_plain_scores(q, k, scale, key_lengths).logsumexp(-1) * LOG2_E)
    if differentiable and k_extra is not None:
        lse_extra.copy_(_plain_scores(q, k_extra, scale, None).logsumexp(-1) * LOG2_E)
    return out, lse, lse_extra


def _plain_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What one set of keys sends back to q, k and v."""
    weights = _plain_scores(q, k, scale, key_lengths).softmax(-1)
    if key_lengths is not None:
        weights = weights.masked_fill(~_seen(k, key_lengths), 0)
    slopes = wide(grad) @ wide(v).transpose(-1, -2)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) * scale
    dk, dv = slopes.transpose(-1, -2) @ wide(q), weights.transpose(-1, -2) @ wide(grad)
    return slopes @ wide(k), dk, dv


def _reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, out: Tensor, lse: Tensor, lse_extra: Tensor, scale: float, extra_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    empty = empty_gradients(grad, q, k, v, k_extra, v_extra)
    gradients = list(_plain_gradients(grad, q, k, v, scale, key_lengths))
    if k_extra is not None and v_extra is not None:
        extra = _plain_gradients(wide(grad) * extra_scale, q, k_extra, v_extra, scale, None)
        gradients = [gradients[0] + extra[0], *gradients[1:], *extra[1:]]
    for tensor, values in zip(empty, gradients, strict=False):
        tensor.copy_(values)
    return empty


def _triton_obstacle(*arguments: Any) -> str:
    q = next(tensor for tensor in arguments if isinstance(tensor, Tensor))
    if q.dtype == torch.float64:
        return "q is torch.float64, and the kernels take 16- and 32-bit floats"
    if not 16 <= q.shape[-1] <= WIDEST:
        return f"q's head dimension is {q.shape[-1]}, and the kernels take 16 to {WIDEST}"
    return ""


FORWARD = TorchOp(
    "attention", fake=empty_outputs, reference=_reference_forward, triton=triton_forward,
    variants={
        "triton_roles": attention_roles.roles_forward, "triton_products": attention_products.products_forward
    },
    obstacles={
        "triton": _triton_obstacle, "triton_roles": attention_roles.obstacle,
        "triton_products": attention_products.obstacle,
    },
    unmeasured="reference",
)  # fmt: skip
BACKWARD = TorchOp(
    "attention_backward", fake=empty_gradients, reference=_reference_backward,
    triton=triton_backward, obstacles={"triton": _triton_obstacle},
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.extra_scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = BACKWARD(grad, *ctx.saved_tensors, ctx.scale, ctx.extra_scale)
    extra = gradients[3:] if ctx.saved_tensors[3] is not None else (None, None)
    return *gradients[:3], *extra, None, None, None, None


FORWARD.differentiate(_setup_context, _backward)


def _check_set(q: Tensor, **keys_and_values: Tensor) -> None:
    (k_name, k), (v_name, v) = keys_and_values.items()
    check_floating(k_name, k, 4)
    b, heads, _, dim = q.shape
    check(k_name, k, (b, heads, k.shape[2], dim), q)
    check(v_name, v, tuple(k.shape), q)


@public(reference)
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, k_extra: Tensor | None = None,
    v_extra: Tensor | None = None, extra_scale: float = 1.0, key_lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q over k and v, all [b, heads, tokens, dim]; `scale` is dim**-0.5 unless given.

    With `k_extra` and `v_extra`, `extra_scale` times q's attention over them is added. `key_lengths` [b] says how
    many of a batch element's first keys count; with none, its rows are zero.
    """
    check_floating("q", q, 4)
    _check_set(q, k=k, v=v)
    if (k_extra is None) != (v_extra is None):
        missing, given = ("k_extra", "v_extra") if k_extra is None else ("v_extra", "k_extra")
        raise ValueError(f"{missing} is None, expected a tensor because {given} is one")
    if k_extra is not None and v_extra is not None:
        _check_set(q, k_extra=k_extra, v_extra=v_extra)
    if key_lengths is not None and (
        key_lengths.shape != q.shape[:1]
        or key_lengths.dtype != torch.int32
        or key_lengths.device != q.device
    ):
        expected = f"torch.int32[{q.shape[0]}] on {q.device}"
        raise ValueError(f"key_lengths is {describe(key_lengths)}, expected {expected}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a positive number")
    tensors = (q, k, v, k_extra, v_extra)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    out: Tensor = FORWARD(*tensors, key_lengths, scale, extra_scale, differentiable)[0]
    return out


def is_preferred(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether Triton's kernel is asked for, or was measured to be faster than the library on this GPU."""
    plain = (None, None, None, q.shape[-1] ** -0.5, 1.0, False)
    return FORWARD.form(q, k, v, *plain).startswith("triton")


def _by(library: SDPBackend) -> Callable[..., Tensor]:
    """The reference by one of PyTorch's libraries alone."""

    def attend(*arguments: Any, **named: Any) -> Tensor:
        with sdpa_kernel(library):
            return reference(*arguments, **named)

    return attend


# What a benchmark compares with by name.
LIBRARIES = {
    "flash": _by(SDPBackend.FLASH_ATTENTION),
    "cudnn": _by(SDPBackend.CUDNN_ATTENTION),
}


def flops(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None = None, v_extra: Tensor | None = None, **_: Any
) -> int:  # fmt: skip
    """Multiplications and additions of a call's products."""
    keys = k.shape[2] + (0 if k_extra is None else k_extra.shape[2])
    return 4 * q.numel() * keys


# Heads, queries, keys and head dimension of each model's widest layers.
_SIZES = {
    "SD1.5 512, self": (8, 4096, 4096, 40),
    "SD1.5 512, 80 wide": (8, 1024, 1024, 80),
    "SD1.5 512, 160 wide": (8, 256, 256, 160),
    "SD1.5 512, cross": (8, 4096, 77, 40),
    "SDXL 1024, self": (10, 4096, 4096, 64),
    "SDXL 1024, cross": (10, 4096, 77, 64),
    "SD3 1024, joint": (24, 4250, 4250, 64),
    "FLUX 1024, joint": (24, 4608, 4608, 128),
    "decoder 1024, 512 wide": (1, 16384, 16384, 512),
}


def cases(make: Callable[..., Tensor], batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments at the sizes of real models; `make(*shape)` gives a tensor."""
    for label, (heads, queries, keys, dim) in _SIZES.items():
        shapes = {"q": queries, "k": keys, "v": keys}
        yield (
            label,
            {
                name: make(batch, tokens, heads, dim).transpose(1, 2)
                for name, tokens in shapes.items()
            },
        )
    for heads, queries, dim in ((8, 4096, 40), (8, 1024, 80), (8, 256, 160), (10, 4096, 64)):
        shapes = {"q": queries, "k": 77, "v": 77, "k_extra": 16, "v_extra": 16}
        tensors = {
            name: make(batch, tokens, heads, dim).transpose(1, 2) for name, tokens in shapes.items()
        }
        yield f"image prompt, {dim} wide", tensors
