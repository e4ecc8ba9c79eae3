"""What SD3's and FLUX's transformers share: text and image tokens in one attention, modulated by time and pooled text.

Esser et al. 2024 (arXiv 2403.03206), section 4; adaptive layer norm: Peebles and Xie 2023 (arXiv 2212.09748).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.models.layers import TimestepEmbedding, merge_heads, sinusoidal_embedding, split_heads

_EPS = 1e-6
_TIME_FREQUENCIES = 256
# cosines and sines [tokens, dim] that turn each pair of neighbouring channels by its token's position
Rotation = tuple[Tensor, Tensor]


class Conditioning(nn.Module):
    """Times [n] in 0..1000, pooled text [n, p] and, for models distilled with it, guidance [n] -> [n, width]."""

    def __init__(self, width: int, pooled_width: int, *, guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_TIME_FREQUENCIES, width)
        if guidance:
            self.guidance_embedder = TimestepEmbedding(_TIME_FREQUENCIES, width)
        self.text_embedder = TimestepEmbedding(pooled_width, width)

    def forward(self, time: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        embedded = self.timestep_embedder(_frequencies(time, pooled.dtype))
        if guidance is not None:
            # Guidance is told on the scale of times: 3.5 as 3500.
            embedded = embedded + self.guidance_embedder(
                _frequencies(1000 * guidance, pooled.dtype)
            )
        return embedded + self.text_embedder(pooled)


def _frequencies(value: Tensor, dtype: torch.dtype) -> Tensor:
    return sinusoidal_embedding(value, _TIME_FREQUENCIES).to(dtype)


class Modulation(nn.Module):
    """Conditioning [n, width] -> ``parts`` tensors [n, 1, width]: shifts, scales and gates of a block."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(conditioning))[:, None].chunk(self.parts, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of x [n, t, c] without weights of its own, then scaled and shifted by [n, 1, c]."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift


def fed_forward(
    x: Tensor, feed_forward: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    """x [n, t, c] plus what its feed-forward makes of it, gated."""
    return x + gate * feed_forward(modulated_norm(x, shift, scale))


class OutputNorm(nn.Module):
    """The last norm, whose published weights hold the scale before the shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(conditioning))[:, None].chunk(2, dim=-1)
        return modulated_norm(x, shift, scale)


class FeedForward(nn.Module):
    """Four times the width and back around a tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Widen(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class _Widen(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class JointAttention(nn.Module):
    """Attention of image tokens [n, i, c], over text tokens [n, t, c] as well where the block has both.

    ``text_output`` says whether the text goes on behind the block; ``output`` whether the image's is projected here.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        text: bool = False,
        text_output: bool = False,
        output: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        names = ["to_q", "to_k", "to_v"] + (["add_q_proj", "add_k_proj", "add_v_proj"] * text)
        for name in names:
            self.add_module(name, nn.Linear(width, width))
        norms = (["norm_q", "norm_k"] + ["norm_added_q", "norm_added_k"] * text) * qk_norm
        for name in norms:
            self.add_module(name, nn.RMSNorm(width // heads, eps=_EPS))
        if output:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if text_output:
            self.to_add_out = nn.Linear(width, width)

    def forward(
        self, image: Tensor, text: Tensor | None = None, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._heads(image, "to_{}", "norm_{}")
        if text is not None:
            streams = zip(self._heads(text, "add_{}_proj", "norm_added_{}"), (q, k, v), strict=True)
            q, k, v = (torch.cat(pair, dim=2) for pair in streams)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = merge_heads(F.scaled_dot_product_attention(q, k, v))
        told = None
        if text is not None:
            told, out = out.split([text.shape[1], image.shape[1]], dim=1)
            told = self.to_add_out(told) if hasattr(self, "to_add_out") else None
        return (self.to_out[0](out) if hasattr(self, "to_out") else out), told

    def _heads(self, x: Tensor, projection: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [n, heads, tokens, dim], the first two normalised where the model does so."""
        q, k, v = (
            split_heads(getattr(self, projection.format(name))(x), self.heads) for name in "qkv"
        )
        if hasattr(self, "norm_q"):
            q, k = getattr(self, norm.format("q"))(q), getattr(self, norm.format("k"))(k)
        return q, k, v


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of neighbouring channels of x [n, heads, tokens, dim] by its angle (arXiv 2104.09864)."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def rotation_at(positions: Tensor, widths: tuple[int, ...], theta: float = 10000.0) -> Rotation:
    """Cosines and sines, float32, for positions [tokens, axes], of which axis a turns ``widths[a]`` channels."""
    angles = []
    for axis, width in enumerate(widths):
        # float64: in float32 the angles of far tokens lose their last digits
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles.append(positions[:, axis, None].double() * theta**-exponents)
    doubled = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return doubled.cos().float(), doubled.sin().float()
