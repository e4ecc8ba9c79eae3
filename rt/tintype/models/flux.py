"""FLUX.1's transformer: blocks with a stream each for text and image, then blocks with one stream for both.

Black Forest Labs 2024; the layout is that of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tintype.models.config import from_json
from tintype.models.fused import Rotation, linear_of_both
from tintype.models.joint import (
    Conditioning,
    FeedForward,
    JointAttention,
    Modulation,
    Stream,
    output_norm,
    rotation_at,
)
from tintype.models.layers import Time

_PATCH = 2  # latents are packed in squares of two before they reach the transformer
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class FluxConfig:
    """Fields as in the published ``transformer/config.json``; dev has ``guidance_embeds``, schnell has not."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> FluxConfig:
        return from_json(cls, raw, component="transformer", neutral={})

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class _Block(nn.Module):
    """Joint attention and a feed-forward for each stream."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = JointAttention(
            width, config.num_attention_heads, qk_norm=True, text=True, text_output=True
        )
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    def forward(
        self, image: Stream, text: Stream, conditioning: Time, rotation: Rotation
    ) -> tuple[Stream, Stream]:
        shift, scale, gate, *of_image = self.norm1(conditioning)
        text_shift, text_scale, text_gate, *of_text = self.norm1_context(conditioning)
        image, seen = image.normed(shift, scale, self.attn.readers)
        text, heard = text.normed(text_shift, text_scale, self.attn.text_readers)
        seen, heard = self.attn(seen, heard, rotation)
        image = Stream(image.tokens, seen, gate).fed_forward(self.ff, *of_image)
        text = Stream(text.tokens, heard, text_gate).fed_forward(self.ff_context, *of_text)
        return image, _within_half(text)


class _SingleBlock(nn.Module):
    """Attention and feed-forward beside each other over text and image tokens in a row."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.width
        self.norm = Modulation(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.attn = JointAttention(width, config.num_attention_heads, qk_norm=True, output=False)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, stream: Stream, conditioning: Time, rotation: Rotation) -> Stream:
        shift, scale, gate = self.norm(conditioning)
        stream, normed = stream.normed(shift, scale, [*self.attn.readers, self.proj_mlp])
        attended, _ = self.attn(normed, rotation=rotation)
        update = linear_of_both(self.proj_out, attended, self.proj_mlp, normed)
        return _within_half(Stream(stream.tokens, update, gate))


def _within_half(stream: Stream) -> Stream:
    """The published model outgrows float16 in places; there its largest values are cut."""
    if stream.tokens.dtype != torch.float16:
        return stream
    return Stream(stream.settled().clamp(-_LARGEST_HALF, _LARGEST_HALF))


class FluxTransformer(nn.Module):
    """Noisy latents, times, text, pooled text and guidance -> the velocity from picture to noise."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.time_text_embed = Conditioning(
            config.width, config.pooled_projection_dim, guidance=config.guidance_embeds
        )
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.x_embedder = nn.Linear(config.in_channels, config.width)
        self.transformer_blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            _SingleBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, config.out_channels or config.in_channels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """[n, c, h, w], [n] in 0..1000, [n, t, d], [n, p], [n] -> [n, c, h, w]; h and w are even."""
        text = self.context_embedder(encoder_hidden_states)
        return self.denoised(sample, self.time_text_embed(timestep, pooled, guidance), text)

    def denoised(self, sample: Tensor, conditioning: Time, tokens: Tensor) -> Tensor:
        """`forward` of the sample, what `time_text_embed` makes of the rest, and embedded text [n, t, width]."""
        height, width = sample.shape[-2:]
        image, text = Stream(self.x_embedder(packed(sample))), Stream(tokens)
        words = tokens.shape[1]
        grid = (words, height // _PATCH, width // _PATCH)
        # A picture's shape has one for all steps; a tracer's tensors must not be kept.
        traced = type(sample) is not Tensor or torch.compiler.is_compiling()
        rotation = (_rotation if traced else _kept_rotation)(
            *grid, self.config.axes_dims_rope, sample.device
        )
        for block in self.transformer_blocks:
            image, text = block(image, text, conditioning, rotation)
        both = Stream(torch.cat([text.settled(), image.settled()], dim=1))
        for block in self.single_transformer_blocks:
            both = block(both, conditioning, rotation)
        image = Stream(both.settled()[:, words:])
        normed = output_norm(self.norm_out, image, conditioning)
        return unpacked(self.proj_out(normed), height, width)


def packed(latents: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, h/2 * w/2, 4c], a token for each square of two by two."""
    squares = latents.unflatten(3, (-1, _PATCH)).unflatten(2, (-1, _PATCH))
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """[n, h/2 * w/2, 4c] -> [n, c, h, w]"""
    grid = tokens.unflatten(2, (-1, _PATCH, _PATCH)).unflatten(
        1, (height // _PATCH, width // _PATCH)
    )
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _rotation(
    text: int, rows: int, columns: int, widths: tuple[int, ...], device: torch.device
) -> Rotation:
    """Of text at the origin and picture tokens at (0, row, column).

    NumPy makes it, so that a traced graph holds it as a constant, and no float64 that engines lack.
    """
    places = np.zeros((text + rows * columns, 3))
    places[text:, 1:] = np.indices((rows, columns)).reshape(2, -1).T
    with torch.inference_mode(False):  # what is kept must serve training, too
        cos, sin = (torch.from_numpy(table) for table in rotation_at(places, widths))
        return cos.to(device), sin.to(device)


_kept_rotation = lru_cache(maxsize=8)(_rotation)
