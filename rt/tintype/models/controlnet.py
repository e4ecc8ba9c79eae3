"""ControlNet: a copy of a UNet's way down that is shown a picture, whose activations are added to the UNet's own.

Zhang, Rao and Agrawala 2023 (arXiv 2302.05543).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from tintype.models.fused import convolved, per_sample, pointwise
from tintype.models.layers import Time
from tintype.models.unet_blocks import Context
from tintype.models.unet_config import ControlNetConfig
from tintype.models.unet_encoder import UNetEncoder

# What is added to a UNet's activations on the way down, and to those of its middle.
Lent = tuple[list[Tensor], Tensor]


class PictureEmbedding(nn.Module):
    """A picture [n, 3, 8h, 8w] -> what is added to the first activations [n, c, h, w]; halved between two widths."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in pairwise(widths):
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(convolved(self.conv_in, picture))
        for conv in self.blocks:
            x = F.silu(convolved(conv, x))
        return convolved(self.conv_out, x)


class ControlNet(UNetEncoder):
    """Noisy latents, time, text and a picture -> what to add to a UNet's activations, times a strength."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.encoder)
        channels = config.encoder.block_out_channels
        self.controlnet_cond_embedding = PictureEmbedding(
            config.conditioning_embedding_out_channels, channels[0]
        )
        self.controlnet_down_blocks = nn.ModuleList(
            nn.Conv2d(width, width, 1) for width in self.skip_widths
        )
        self.controlnet_mid_block = nn.Conv2d(channels[-1], channels[-1], 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        control: Tensor,
        control_scale: Tensor,
    ) -> Lent:
        """control [n, 3, 8h, 8w] in 0..1, control_scale [n]; the others as a UNet's."""
        time = self.time(timestep, text_embeds, time_ids, sample.dtype)
        shown = self.controlnet_cond_embedding(control)
        return self._lent(sample, time, encoder_hidden_states, shown, control_scale)

    def remember(
        self,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        control: Tensor,
        control_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        """What an encoder does, and the picture's embedding and strength."""
        text = super().remember(encoder_hidden_states, text_embeds, time_ids)
        return (*text, self.controlnet_cond_embedding(control), control_scale)

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        return super().at(remembered[:-2], times)

    def recall(
        self, remembered: tuple[Tensor, ...], told: Sequence[Tensor], sample: Tensor
    ) -> Lent:
        """`forward` of the sample, with what was remembered and what its time tells."""
        *text, shown, scale = remembered
        return self._lent(sample, *self.recalled(tuple(text), told), shown, scale)

    def _lent(
        self, sample: Tensor, time: Time, context: Context, shown: Tensor, scale: Tensor
    ) -> Lent:
        skips, middle = self.encoded(convolved(self.conv_in, sample) + shown, time, context)
        strength = per_sample(scale.to(sample.dtype), sample)
        lent = [
            strength * pointwise(conv, skip)
            for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)
        ]
        return lent, strength * pointwise(self.controlnet_mid_block, middle)
