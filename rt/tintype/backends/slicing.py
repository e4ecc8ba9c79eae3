"""Attention in slices where PyTorch has no fused kernel for it and would hold every score at once.

A fused kernel never holds them, and is left alone: CPUs have one for all that our models ask, NVIDIA GPUs for nearly
all but bfloat16 before sm_80. What is left is PyTorch's plain path, whose scores [n, heads, queries, keys] are float32
and are there twice while their softmax is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

SCORES = 16 << 20  # in a slice: 64 MiB, and products still large enough for a device


class AttentionSlices(TorchFunctionMode):
    """Within it `F.scaled_dot_product_attention` is `sliced_attention`, whichever model asks."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        called = sliced_attention if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


def sliced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of [n, heads, tokens, dim] in slices of heads, and of queries where one head has too many scores.

    A slice has at most ``SCORES`` scores, or one query's; a causal one has whole heads. A sample's slices are the same
    in any batch.
    """
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    if _is_fused(q, k, v, attn_mask, **options):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)
    rows, heads, queries, _ = q.shape
    keys = k.shape[2]
    some_heads = max(1, SCORES // (queries * keys))
    some_queries = queries if is_causal else max(1, SCORES // keys)
    mask = None if attn_mask is None else attn_mask.expand(rows, heads, queries, keys)
    # Heads lie beside each other in memory, as they are about to be merged.
    out = q.new_empty(rows, queries, heads, v.shape[-1]).transpose(1, 2)
    begins = product(range(rows), range(0, heads, some_heads), range(0, queries, some_queries))
    for row, head, query in begins:
        here = row, slice(head, head + some_heads)
        asked = *here, slice(query, query + some_queries)
        seen = None if mask is None else mask[asked]
        out[asked] = F.scaled_dot_product_attention(q[asked], k[here], v[here], seen, **options)
    return out


def _is_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> bool:
    """Whether PyTorch has a kernel for this that does not hold the scores."""
    try:
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, **options)
    except NotImplementedError:  # a device that has nothing to choose from
        return False
    return choice != SDPBackend.MATH.value
