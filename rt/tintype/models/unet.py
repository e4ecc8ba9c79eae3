"""The conditional UNet of latent diffusion: Stable Diffusion 1.x, 2.x, XL and their inpainting variants.

Rombach et al. 2022 (arXiv 2112.10752); SDXL's added text and size conditions: Podell et al. 2023 (arXiv 2307.01952).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tintype.errors import CheckpointError
from tintype.models.config import from_json, per_level
from tintype.models.fused import (
    Readers,
    add_layer_norm,
    attention,
    convolved,
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
    TimestepEmbedding,
    Upsample,
    image_to_tokens,
    merge_heads,
    sinusoidal_embedding,
    split_heads,
    tokens_to_image,
)
from tintype.models.stacked import stack

if TYPE_CHECKING:
    from tintype_kernels import QuantizedRows

# keys and values [n, heads, k, dim]
KeysAndValues = tuple[Tensor, Tensor]
# What attention is over: a text [n, k, d], or what each attention that is over it remembers of it.
Context = Tensor | Mapping["Attention", KeysAndValues]

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "addition_embed_type_num_heads": (64,),
    # a precision hint: attention scores are accumulated in float32 here in any case
    "upcast_attention": (True, False),
}


@dataclass(frozen=True)
class UNetConfig:
    """Fields as in the published ``unet/config.json``. ``attention_head_dim`` holds the number of heads, a misnomer
    that every published file keeps."""

    sample_size: int | None = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> UNetConfig:
        config = from_json(cls, raw, component="unet", neutral=_NEUTRAL)
        if not isinstance(config.cross_attention_dim, int):
            raise CheckpointError(
                f"unet/config.json asks for cross_attention_dim={raw['cross_attention_dim']!r}; "
                "possible here: one number for all levels"
            )
        return config


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


class UNet(nn.Module):
    """Predicts noise, velocity or image (as it was trained) from noisy latents, a time and text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        layers = per_level(config.layers_per_block, levels)
        heads = per_level(config.attention_head_dim, levels)
        depths = per_level(config.transformer_layers_per_block, levels)
        time_channels = 4 * channels[0]

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_channels)
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, time_channels
            )

        self.down_blocks = nn.ModuleList()
        skip_widths = [channels[0]]
        for level, kind in enumerate(config.down_block_types):
            last = level == levels - 1
            before = channels[max(level - 1, 0)]
            widths = [
                (before if i == 0 else channels[level], channels[level])
                for i in range(layers[level])
            ]
            depth = depths[level] if kind.startswith("CrossAttn") else 0
            self.down_blocks.append(DownLevel(config, widths, heads[level], depth, last))
            skip_widths += [channels[level]] * (layers[level] + (not last))

        self.mid_block = MidLevel(config, channels[-1], heads[-1], depths[-1])

        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for level, kind in zip(reversed(range(levels)), config.up_block_types, strict=True):
            widths = []
            for _ in range(layers[level] + 1):
                widths.append((width + skip_widths.pop(), channels[level]))
                width = channels[level]
            depth = depths[level] if kind.startswith("CrossAttn") else 0
            self.up_blocks.append(UpLevel(config, widths, heads[level], depth, last=level == 0))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """sample [n, c, h, w], timestep [n], encoder_hidden_states [n, k, d] -> [n, c_out, h, w].

        SDXL also takes text_embeds [n, p] (pooled text) and time_ids [n, 6] (sizes and crop).
        """
        added = self._added_embedding(text_embeds, time_ids, sample.dtype)
        time = self._time(timestep, added, sample.dtype)
        return self._denoised(sample, time, encoder_hidden_states)

    def remember(
        self,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What is the same at every step of a picture: each cross-attention's keys and values, and what SDXL adds."""
        pairs = [attention.remember(encoder_hidden_states) for attention in self._crossing()]
        added = self._added_embedding(text_embeds, time_ids, encoder_hidden_states.dtype)
        return (*chain.from_iterable(pairs), *([] if added is None else [added]))

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        """What each of the times [s, n] tells each residual block of what was remembered: [s, n, c] for each."""
        added = next(iter(remembered[2 * len(self._crossing()) :]), None)
        time = self._time(times, added, remembered[0].dtype)
        return tuple(block.told(time) for block in self._timed())

    def recall(
        self, remembered: tuple[Tensor, ...], told: Sequence[Tensor], sample: Tensor
    ) -> Tensor:
        """`forward` of the sample with what was remembered and what its time tells, of `at` [n, c] for each."""
        crossing = self._crossing()
        count = 2 * len(crossing)
        pairs = zip(remembered[:count:2], remembered[1:count:2], strict=True)
        context = dict(zip(crossing, pairs, strict=True))
        return self._denoised(sample, dict(zip(self._timed(), told, strict=True)), context)

    def _crossing(self) -> list[Attention]:
        return [block.attn2 for block in self.modules() if isinstance(block, TransformerBlock)]

    def _timed(self) -> list[ResnetBlock]:
        return [block for block in self.modules() if isinstance(block, ResnetBlock)]

    def _time(self, t: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Times [.., n], embedded, and what SDXL adds to them [n, e] -> [.., n, e]."""
        waves = self._waves(t, self.config.block_out_channels[0])
        time = self.time_embedding(waves.to(dtype))
        return time if added is None else time + added

    def _denoised(self, sample: Tensor, time: Time, context: Context) -> Tensor:
        x = convolved(self.conv_in, sample)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], time, context)
        x = self.mid_block(skips[-1], time, context)
        for up in self.up_blocks:
            x = up(x, skips, time, context)
        return self.conv_out(group_norm(self.conv_norm_out, x, silu=True))

    def _added_embedding(
        self, text_embeds: Tensor | None, time_ids: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """What SDXL adds to the embedding of times: of pooled text, sizes and crop."""
        config = self.config
        if config.addition_embed_type != "text_time":
            return None
        assert text_embeds is not None
        assert time_ids is not None
        assert config.addition_time_embed_dim is not None
        ids = self._waves(time_ids.flatten(), config.addition_time_embed_dim)
        ids = ids.reshape(len(time_ids), -1).to(text_embeds.dtype)
        return self.add_embedding(torch.cat([text_embeds, ids], dim=-1).to(dtype))

    def _waves(self, t: Tensor, channels: int) -> Tensor:
        config = self.config
        return sinusoidal_embedding(
            t, channels, cos_first=config.flip_sin_to_cos, shift=config.freq_shift
        )
