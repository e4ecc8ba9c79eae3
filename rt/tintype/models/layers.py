"""The blocks that several architectures share: residual block, resampling, heads and tokens, embedded times."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.models.fused import (
    bias_apart,
    biased,
    convolved,
    convolved_apart,
    enlarged,
    group_norm,
    pointwise,
    unbiased,
)

# An embedded time [n, e], or what each layer that reads times was told of one.
Time = Tensor | Mapping[nn.Module, Tensor]


class ResnetBlock(nn.Module):
    """norm-SiLU-conv twice around a skip; what a time tells, where there is one, is added between."""

    def __init__(
        self, c_in: int, c_out: int, *, groups: int, eps: float, time_channels: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def told(self, time: Tensor) -> Tensor:
        """What an embedded time [.., e] adds to every pixel [.., c] behind the first convolution, its bias included."""
        told, bias = self.time_emb_proj(F.silu(time)), bias_apart(self.conv1)
        return told if bias is None else told + bias

    def forward(self, x: Tensor, time: Time | None = None) -> Tensor:
        h = group_norm(self.norm1, x, silu=True, readers=[self.conv1])
        if isinstance(time, Mapping):
            h, shift = unbiased(self.conv1, h), time[self][:, :, None, None]
        else:
            h, bias = convolved_apart(self.conv1, h)
            shift = _shift(None if time is None else self.time_emb_proj(F.silu(time)), bias, len(x))
        h = group_norm(self.norm2, h, silu=True, residual=shift, readers=[self.conv2])
        h, bias = convolved_apart(self.conv2, h)  # what it read is free before the sum is made
        if not hasattr(self, "conv_shortcut"):
            return biased(h, bias, x)
        return h + pointwise(self.conv_shortcut, x, bias)


def _shift(told: Tensor | None, bias: Tensor | None, samples: int) -> Tensor | None:
    """What is added to every pixel of a sample, [n, c, 1, 1]: of [n, c] and [c], where they are."""
    if bias is not None:
        told = bias.expand(samples, -1) if told is None else told + bias
    return None if told is None else told[:, :, None, None]


class Downsample(nn.Module):
    """Halve height and width. The autoencoder pads only right and bottom, the UNet on all sides."""

    def __init__(self, channels: int, *, one_sided: bool) -> None:
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(self.conv, F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, to ``size`` (h, w) or twofold, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            size = (2 * x.shape[-2], 2 * x.shape[-1])
        return convolved(self.conv, enlarged(x, size))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[n, tokens, heads*dim] -> [n, heads, tokens, dim]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[n, heads, tokens, dim] -> [n, tokens, heads*dim]"""
    return x.transpose(1, 2).flatten(2)


def image_to_tokens(x: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, h*w, c]"""
    return x.flatten(2).transpose(1, 2)


def tokens_to_image(x: Tensor, height: int, width: int) -> Tensor:
    """[n, h*w, c] -> [n, c, h, w]"""
    return x.transpose(1, 2).unflatten(2, (height, width))


def sinusoidal_embedding(
    t: Tensor, channels: int, *, cos_first: bool = True, shift: float = 0.0
) -> Tensor:
    """[..] -> [.., channels] in float32: cosines and sines at frequencies 10000^(-k / (channels/2 - shift))."""
    half = channels // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[..., None] * torch.exp(
        -torch.log(torch.tensor(10000.0)) * k / (half - shift)
    )
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


class TimestepEmbedding(nn.Module):
    """[n, c_in] -> [n, c_out] by two linear layers around a SiLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
