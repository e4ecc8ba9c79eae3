"""What a latent UNet is made of: attention, transformers over pixels, and the levels on the ways down and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tintype.models.fused import (
    Readers,
    add_layer_norm,
    attention,
    geglu,
    group_norm,
    layer_norm,
    linears,
    pointwise,
)
from tintype.models.layers import (
    Downsample,
    ResnetBlock,
    Time,
    Upsample,
    image_to_tokens,
    merge_heads,
    split_heads,
    tokens_to_image,
)
from tintype.models.stacked import stack
from tintype.models.unet_config import UNetConfig

if TYPE_CHECKING:
    from tintype_kernels import QuantizedRows

# keys and values [n, heads, k, dim]
KeysAndValues = tuple[Tensor, Tensor]
# What attention is over: a text [n, k, d], or what each attention that is over it remembers of it.
Context = Tensor | Mapping["Attention", KeysAndValues]


class Attention(nn.Module):
    """Multi-head attention of x [n, q, c] over context [n, k, d] (over x itself when None), or over what it remembers
    of one."""

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self._stacked: tuple[nn.Module | None] = (None,)  # hidden from what looks for modules

    @property
    def _asking(self) -> Readers:
        return [self.to_q, self.to_k, self.to_v]

    def stack(self) -> None:
        """Lay queries', keys' and values' weights one behind the other, for inference to multiply at once."""
        self._stacked = (stack(self._asking),)

    def remember(self, context: Tensor) -> KeysAndValues:
        """Keys and values [n, heads, k, dim] of a context [n, k, d]."""
        k, v = (split_heads(layer(context), self.heads) for layer in (self.to_k, self.to_v))
        return k, v

    def readers(self, *, alone: bool) -> Readers:
        """The layers that x goes to, alone or beside a context."""
        return self._asking if alone else [self.to_q]

    def forward(self, x: Tensor | QuantizedRows, context: Context | None = None) -> Tensor:
        if context is None:
            parts = linears(self._asking, x, self._stacked[0])
            q, k, v = (split_heads(part, self.heads) for part in parts)
        else:
            q = split_heads(self.to_q(x), self.heads)
            k, v = self.remember(context) if isinstance(context, Tensor) else context[self]
        return self.to_out[0](merge_heads(attention(q, k, v)))


class GEGLU(nn.Module):
    """[.., c] -> [.., c_out]: one projection, half of it gated by the GELU of the other (arXiv 2002.05202)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor | QuantizedRows, readers: Readers) -> Tensor | QuantizedRows:
        return geglu(self.proj(x), readers)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; the empty slot keeps the published parameter names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)]
        )

    @property
    def readers(self) -> Readers:
        """The layers that the input goes to."""
        return [self.net[0].proj]

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        return self.net[2](self.net[0](x, [self.net[2]]))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm and added to its input.

    The last is left to add: who norms the sum next does both in one pass.
    """

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, left: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """x [n, t, c] and what the block before left to add to it -> the same of this block."""
        readers = self.attn1.readers(alone=True)
        if left is None:
            normed = layer_norm(self.norm1, x, readers)
        else:
            x, normed = add_layer_norm(self.norm1, x, left, readers)
        readers = self.attn2.readers(alone=False)
        x, normed = add_layer_norm(self.norm2, x, self.attn1(normed), readers)
        x, normed = add_layer_norm(self.norm3, x, self.attn2(normed, context), self.ff.readers)
        return x, self.ff(normed)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of x [n, c, h, w], attending to context [n, k, d]; residual."""

    def __init__(self, config: UNetConfig, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in, self.proj_out = (
            nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
            for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, config.cross_attention_dim, heads) for _ in range(depth)]
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        height, width = x.shape[-2:]
        h = group_norm(self.norm, x)
        tokens = (
            self.proj_in(image_to_tokens(h))
            if self.linear
            else image_to_tokens(pointwise(self.proj_in, h))
        )
        left = None
        for block in self.transformer_blocks:
            tokens, left = block(tokens, left, context)
        tokens = tokens + left
        if self.linear:
            return x + tokens_to_image(self.proj_out(tokens), height, width)
        return x + pointwise(self.proj_out, tokens_to_image(tokens, height, width))


class _Level(nn.Module):
    """One resolution: residual blocks, each followed by a transformer where the level attends (``depth`` > 0)."""

    def __init__(
        self, config: UNetConfig, widths: list[tuple[int, int]], heads: int, depth: int
    ) -> None:
        super().__init__()
        time_channels = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(
                i,
                o,
                groups=config.norm_num_groups,
                eps=config.norm_eps,
                time_channels=time_channels,
            )
            for i, o in widths
        )
        if depth:
            self.attentions = nn.ModuleList(
                SpatialTransformer(config, o, heads, depth) for _, o in widths
            )

    def layer(self, index: int, x: Tensor, time: Time, context: Context) -> Tensor:
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if hasattr(self, "attentions") else x


class DownLevel(_Level):
    """Encoder level; returns the activations that the decoder will take as skips."""

    def __init__(
        self, config: UNetConfig, widths: list[tuple[int, int]], heads: int, depth: int, last: bool
    ) -> None:
        super().__init__(config, widths, heads, depth)
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(widths[-1][1], one_sided=False)])

    def forward(self, x: Tensor, time: Time, context: Context) -> list[Tensor]:
        outputs: list[Tensor] = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            outputs.append(x)
        if hasattr(self, "downsamplers"):
            outputs.append(self.downsamplers[0](x))
        return outputs


class MidLevel(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        time_channels = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(
                channels,
                channels,
                groups=config.norm_num_groups,
                eps=config.norm_eps,
                time_channels=time_channels,
            )
            for _ in range(2)
        )
        self.attentions = nn.ModuleList([SpatialTransformer(config, channels, heads, depth)])

    def forward(self, x: Tensor, time: Time, context: Context) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UpLevel(_Level):
    """Decoder level; takes one skip a residual block, then enlarges to the next skip's size."""

    def __init__(
        self, config: UNetConfig, widths: list[tuple[int, int]], heads: int, depth: int, last: bool
    ) -> None:
        super().__init__(config, widths, heads, depth)
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(widths[-1][1])])

    def forward(self, x: Tensor, skips: list[Tensor], time: Time, context: Context) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), time, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, tuple(skips[-1].shape[-2:]))
        return x
