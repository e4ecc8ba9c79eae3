"""The joint text-image transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tintype.errors import CheckpointError, RequestError
from tintype.models.config import from_json
from tintype.models.joint import (
    Conditioning,
    FeedForward,
    JointAttention,
    Modulation,
    Stream,
    output_norm,
)
from tintype.models.layers import Time, image_to_tokens, sinusoidal_embedding


@dataclass(frozen=True)
class SD3Config:
    """Fields as in the published ``transformer/config.json``; 3.5 lists ``dual_attention_layers`` and norms q and k."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> SD3Config:
        config = from_json(cls, raw, component="transformer", neutral={})
        if config.qk_norm not in {None, "rms_norm"}:
            raise CheckpointError(
                f"transformer/config.json asks for qk_norm={config.qk_norm!r}; possible here: None, 'rms_norm'"
            )
        return config

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class _PatchEmbed(nn.Module):
    """Latents [n, c, h, w] -> tokens [n, h/p * w/p, width] plus the middle of a square table of positions."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.side = config.pos_embed_max_size
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)
        table = _position_table(self.side, config.sample_size // patch, config.width)
        self.register_buffer("pos_embed", table)

    def forward(self, latents: Tensor) -> Tensor:
        patches = self.proj(latents)
        rows, columns = patches.shape[-2:]
        if max(rows, columns) > self.side:
            raise RequestError(
                f"the latents are {rows}x{columns} patches; the model has positions for {self.side}x{self.side}"
            )
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.pos_embed.view(self.side, self.side, -1)
        places = table[top : top + rows, left : left + columns].flatten(0, 1)
        return image_to_tokens(patches) + places.to(patches.dtype)


def _position_table(side: int, trained_side: int, width: int) -> Tensor:
    """Sines, then cosines, of column and row [1, side*side, width], on the scale of the side first trained at."""
    places = torch.arange(side, dtype=torch.float32) / (side / trained_side)
    axis = sinusoidal_embedding(places, width // 2, cos_first=False)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=-1)[None]


class _Block(nn.Module):
    """Joint attention and a feed-forward for each stream; the last block lets the text go."""

    def __init__(self, config: SD3Config, *, dual: bool, last: bool) -> None:
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        qk_norm = config.qk_norm is not None
        self.last = last
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, qk_norm=qk_norm, text=True, text_output=not last)
        if dual:
            self.attn2 = JointAttention(width, heads, qk_norm=qk_norm)
        self.ff = FeedForward(width)
        if not last:
            self.ff_context = FeedForward(width)

    def forward(
        self, image: Stream, text: Stream, conditioning: Time
    ) -> tuple[Stream, Stream | None]:
        shift, scale, gate, *of_feed_forward = self.norm1(conditioning)
        if self.last:
            told = output_norm(self.norm1_context, text, conditioning)
        else:
            text_shift, text_scale, text_gate, *of_text = self.norm1_context(conditioning)
            text, told = text.normed(text_shift, text_scale, self.attn.text_readers)
        image, normed = image.normed(shift, scale, self.attn.readers)
        seen, heard = self.attn(normed, told)
        attended = Stream(image.tokens, seen, gate)
        if hasattr(self, "attn2"):
            own_shift, own_scale, own_gate = of_feed_forward[3:]
            _, normed = image.normed(own_shift, own_scale, self.attn2.readers)
            attended = Stream(attended.settled(), self.attn2(normed)[0], own_gate)
        image = attended.fed_forward(self.ff, *of_feed_forward[:3])
        if self.last:
            return image, None
        return image, Stream(text.tokens, heard, text_gate).fed_forward(self.ff_context, *of_text)


class SD3Transformer(nn.Module):
    """Noisy latents, times, text and pooled text -> the velocity from picture to noise."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        self.pos_embed = _PatchEmbed(config)
        self.time_text_embed = Conditioning(config.width, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            _Block(config, dual=i in config.dual_attention_layers, last=i == config.num_layers - 1)
            for i in range(config.num_layers)
        )
        self.norm_out = Modulation(config.width, 2)
        channels = config.out_channels or config.in_channels
        self.proj_out = nn.Linear(config.width, config.patch_size**2 * channels)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled: Tensor
    ) -> Tensor:
        """[n, c, h, w], [n] in 0..1000, [n, t, d], [n, p] -> [n, c, h, w]; h and w are multiples of the patch."""
        text = self.context_embedder(encoder_hidden_states)
        return self.denoised(sample, self.time_text_embed(timestep, pooled), text)

    def denoised(self, sample: Tensor, conditioning: Time, tokens: Tensor) -> Tensor:
        """`forward` of the sample, what `time_text_embed` makes of the rest, and embedded text [n, t, width]."""
        image, text = Stream(self.pos_embed(sample)), Stream(tokens)
        for block in self.transformer_blocks:
            image, text = block(image, text, conditioning)
        tokens = self.proj_out(output_norm(self.norm_out, image, conditioning))
        return self._unpatched(tokens, sample.shape[-2], sample.shape[-1])

    def _unpatched(self, tokens: Tensor, height: int, width: int) -> Tensor:
        patch = self.config.patch_size
        grid = tokens.unflatten(2, (patch, patch, -1)).unflatten(
            1, (height // patch, width // patch)
        )
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
