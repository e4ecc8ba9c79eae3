"""The way down and the middle, of a UNet and of the copy of them that a ControlNet is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from tintype.models.config import per_level
from tintype.models.layers import ResnetBlock, Time, TimestepEmbedding, sinusoidal_embedding
from tintype.models.unet_blocks import Attention, Context, DownLevel, MidLevel, TransformerBlock
from tintype.models.unet_config import UNetConfig


class UNetEncoder(nn.Module):
    """Noisy latents, a time and text -> activations at every level, each smaller than the one before.

    Beside its whole it goes in three, as `Remembering` stages do: what is the same at every step of a picture, what
    times tell of it, and the rest.
    """

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
        self.skip_widths = [channels[0]]
        for level, kind in enumerate(config.down_block_types):
            last = level == levels - 1
            before = channels[max(level - 1, 0)]
            widths = [
                (before if i == 0 else channels[level], channels[level])
                for i in range(layers[level])
            ]
            depth = depths[level] if kind.startswith("CrossAttn") else 0
            self.down_blocks.append(DownLevel(config, widths, heads[level], depth, last))
            self.skip_widths += [channels[level]] * (layers[level] + (not last))

        self.mid_block = MidLevel(config, channels[-1], heads[-1], depths[-1])

    def time(
        self, t: Tensor, text_embeds: Tensor | None, time_ids: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Times [n], embedded, with what SDXL adds to them: [n, e]."""
        return self._time(t, self._added_embedding(text_embeds, time_ids, dtype), dtype)

    def encoded(self, x: Tensor, time: Time, context: Context) -> tuple[list[Tensor], Tensor]:
        """Behind the first convolution: every activation on the way down, x the first, and the middle's."""
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], time, context)
        return skips, self.mid_block(skips[-1], time, context)

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

    def recalled(
        self, remembered: tuple[Tensor, ...], told: Sequence[Tensor]
    ) -> tuple[Time, Context]:
        """The time and the context of what was remembered and what a time tells, of `at` [n, c] for each."""
        crossing = self._crossing()
        count = 2 * len(crossing)
        pairs = zip(remembered[:count:2], remembered[1:count:2], strict=True)
        time = dict(zip(self._timed(), told, strict=True))
        return time, dict(zip(crossing, pairs, strict=True))

    @property
    def remembers(self) -> int:
        """How many tensors `remember` gives."""
        return 2 * len(self._crossing()) + hasattr(self, "add_embedding")

    @property
    def told(self) -> int:
        """How many tensors `at` gives."""
        return len(self._timed())

    def _crossing(self) -> list[Attention]:
        return [block.attn2 for block in self._own() if isinstance(block, TransformerBlock)]

    def _timed(self) -> list[ResnetBlock]:
        return [block for block in self._own() if isinstance(block, ResnetBlock)]

    def _own(self) -> Iterator[nn.Module]:
        """All modules in it but those of another encoder."""
        parts = (part for part in self.children() if not isinstance(part, UNetEncoder))
        return chain.from_iterable(part.modules() for part in parts)

    def _time(self, t: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Times [.., n], embedded, and what SDXL adds to them [n, e] -> [.., n, e]."""
        waves = self._waves(t, self.config.block_out_channels[0])
        time = self.time_embedding(waves.to(dtype))
        return time if added is None else time + added

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
