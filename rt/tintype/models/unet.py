"""The conditional UNet of latent diffusion: Stable Diffusion 1.x, 2.x, XL and their inpainting variants.

Rombach et al. 2022 (arXiv 2112.10752); SDXL's added text and size conditions: Podell et al. 2023 (arXiv 2307.01952).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tintype.models.config import per_level
from tintype.models.controlnet import ControlNet, Lent
from tintype.models.fused import convolved, group_norm
from tintype.models.layers import Time
from tintype.models.unet_blocks import Context, UpLevel
from tintype.models.unet_config import UNetConfig
from tintype.models.unet_encoder import UNetEncoder


class UNet(UNetEncoder):
    """Predicts noise, velocity or image (as it was trained) from noisy latents, a time and text.

    With a ControlNet in it, it is steered by a picture, too.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        layers = per_level(config.layers_per_block, levels)
        heads = per_level(config.attention_head_dim, levels)
        depths = per_level(config.transformer_layers_per_block, levels)

        self.up_blocks = nn.ModuleList()
        width, skip_widths = channels[-1], list(self.skip_widths)
        for level, kind in zip(reversed(range(levels)), config.up_block_types, strict=True):
            widths = []
            for _ in range(layers[level] + 1):
                widths.append((width + skip_widths.pop(), channels[level]))
                width = channels[level]
            depth = depths[level] if kind.startswith("CrossAttn") else 0
            self.up_blocks.append(UpLevel(config, widths, heads[level], depth, last=level == 0))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        if config.controlnet is not None:
            self.controlnet = ControlNet(config.controlnet)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        *control: Tensor,
    ) -> Tensor:
        """sample [n, c, h, w], timestep [n], encoder_hidden_states [n, k, d] -> [n, c_out, h, w].

        SDXL also takes text_embeds [n, p] (pooled text) and time_ids [n, 6] (sizes and crop); a UNet with a ControlNet
        a picture [n, 3, 8h, 8w] in 0..1 and its strength [n].
        """
        time = self.time(timestep, text_embeds, time_ids, sample.dtype)
        lent = None
        if self._steered:
            told = (encoder_hidden_states, text_embeds, time_ids)
            lent = self.controlnet(self._latents(sample), timestep, *told, *control)
        return self._denoised(sample, time, encoder_hidden_states, lent)

    def remember(
        self,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        *control: Tensor,
    ) -> tuple[Tensor, ...]:
        """What an encoder does, and the same of the ControlNet behind it."""
        told = (encoder_hidden_states, text_embeds, time_ids)
        steering = self.controlnet.remember(*told, *control) if self._steered else ()
        return (*super().remember(*told), *steering)

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        own = super().at(remembered[: self.remembers], times)
        if not self._steered:
            return own
        return (*own, *self.controlnet.at(remembered[self.remembers :], times))

    def recall(
        self, remembered: tuple[Tensor, ...], told: Sequence[Tensor], sample: Tensor
    ) -> Tensor:
        """`forward` of the sample with what was remembered and what its time tells, of `at` [n, c] for each."""
        own, lent = self.recalled(remembered[: self.remembers], told[: self.told]), None
        if self._steered:
            steering = (remembered[self.remembers :], told[self.told :])
            lent = self.controlnet.recall(*steering, self._latents(sample))
        return self._denoised(sample, *own, lent)

    @property
    def _steered(self) -> bool:
        return self.config.controlnet is not None

    def _latents(self, sample: Tensor) -> Tensor:
        """What the ControlNet sees, without the mask and the picture that a model which inpaints is shown behind it."""
        return sample[:, : self.controlnet.config.in_channels]

    def _denoised(self, sample: Tensor, time: Time, context: Context, lent: Lent | None) -> Tensor:
        skips, x = self.encoded(convolved(self.conv_in, sample), time, context)
        if lent is not None:
            skips = [skip + more for skip, more in zip(skips, lent[0], strict=True)]
            x = x + lent[1]
        for up in self.up_blocks:
            x = up(x, skips, time, context)
        return self.conv_out(group_norm(self.conv_norm_out, x, silu=True))
