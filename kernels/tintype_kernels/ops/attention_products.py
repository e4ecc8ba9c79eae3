"""Attention of heads too wide for any kernel to keep their scores on chip, such as an autoencoder's 512: two products
of the library's, and between them a softmax that reads float32 scores once and writes 16-bit weights once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tintype_kernels.ops.attention_forward import LOG2_E, empty_outputs
from tintype_kernels.triton_support import await_earlier, entry, power_of_two, tl, too_wide

# Of a head: up to there PyTorch's libraries have kernels that keep scores on chip.
WIDEST_FUSED = 256
# At a time: enough to fill a large GPU, and at 16,384 keys 400 MB of scores and weights.
_QUERIES = 4096


@entry
def _kernel(scores, weights, keys, scale, BLOCK: tl.constexpr):
    """The softmax of a row of scores times scale, which is in powers of two: grid (rows,)."""
    await_earlier()
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < keys
    x = scale * tl.load(scores + row * keys + at, inside, float("-inf"))
    x = tl.exp2(x - tl.max(x, 0))
    tl.store(weights + row * keys + at, (x / tl.sum(x, 0)).to(weights.dtype.element_ty), inside)


def products_forward(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, scale: float, extra_scale: float, differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse, lse_extra = empty_outputs(
        q, k, v, k_extra, v_extra, key_lengths, scale, extra_scale, differentiable
    )
    values, keys = v.flatten(0, 1), k.shape[2]
    turned = k.flatten(0, 1).transpose(1, 2)
    block = power_of_two(keys)
    options = {"BLOCK": block, "num_warps": max(4, min(16, block // 1024))}
    pieces = (each.split(_QUERIES, 2) for each in (q, out))  # type: ignore[no-untyped-call]
    for asked, result in zip(*pieces, strict=True):
        scores = _scores(asked.flatten(0, 1), turned)
        weights = torch.empty_like(scores, dtype=v.dtype)
        _kernel[scores.shape[:2].numel(),](scores, weights, keys, scale * LOG2_E, **options)
        result.copy_(torch.bmm(weights, values).view(result.shape))
    return out, lse, lse_extra


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """float32 [n, queries, keys]; on CUDA products of 16 bits are given so unrounded."""
    if q.is_cuda:
        return torch.bmm(q, k, out_dtype=torch.float32)
    return torch.bmm(q.float(), k.float())


def obstacle(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    key_lengths: Tensor | None, scale: float, extra_scale: float, differentiable: bool,
) -> str:  # fmt: skip
    """Why this form cannot take the op's arguments, or nothing."""
    if k_extra is not None or key_lengths is not None:
        return "this form takes one set of keys, of which all count"
    if differentiable:
        return "this form keeps nothing for a gradient"
    if q.shape[-1] <= WIDEST_FUSED or q.element_size() != 2:
        return f"q is {q.dtype} with {q.shape[-1]} a head, and this form takes 16 bits and more than {WIDEST_FUSED}"
    return too_wide(k.shape[2])
