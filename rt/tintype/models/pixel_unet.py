"""The UNets of unCLIP that draw pixels: the decoder, told a context, and those that enlarge what it drew.

Nichol and Dhariwal 2021 (arXiv 2102.09672) and Dhariwal and Nichol 2021 (arXiv 2105.05233): residual blocks that change
resolution themselves, and whose norms a time may scale. Context as in GLIDE (Nichol et al. 2022, arXiv 2112.10741).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.errors import CheckpointError
from tintype.models.config import from_json, require_dividing
from tintype.models.fused import attention, bias_of_unread, convolved, enlarged, group_norm
from tintype.models.layers import (
    ResnetBlock,
    Time,
    TimestepEmbedding,
    image_to_tokens,
    merge_heads,
    sinusoidal_embedding,
    split_heads,
    tokens_to_image,
)

KeysAndValues = tuple[Tensor, Tensor]
# A context's tokens [n, k, d], or what each attention made of them, and 1 where one is read [n, k].
Context = tuple[Tensor | Mapping[nn.Module, KeysAndValues], Tensor]
_DOWN, _UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
_ATTENDING = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "add_attention": (False,),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),  # of convolutions, where there are none
    "downsample_type": ("conv",),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),
    "upcast_attention": (True, False),
    "upsample_type": ("conv",),
}


@dataclass(frozen=True)
class PixelUNetConfig:
    """Fields as in the published ``config.json`` of ``decoder``, ``super_res_first`` and ``super_res_last``.

    ``cross_attention_dim`` None: there is no context, and nothing attends.
    """

    sample_size: int | None = 64
    in_channels: int = 3
    out_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (_DOWN,)
    up_block_types: tuple[str, ...] = (_UP,)
    block_out_channels: tuple[int, ...] = (320, 640, 960, 1280)
    layers_per_block: int = 3
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    cross_attention_dim: int | None = None
    attention_head_dim: int = 8
    class_embed_type: str | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], component: str) -> PixelUNetConfig:
        told = raw.get("cross_attention_dim") is not None
        middle = "UNetMidBlock2DSimpleCrossAttn" if told else "UNetMidBlock2D"
        config = from_json(
            cls, raw, component=component, neutral={**_NEUTRAL, "mid_block_type": (middle,)}
        )
        down, up = ((_DOWN, _ATTENDING[0]), (_UP, _ATTENDING[1])) if told else ((_DOWN,), (_UP,))
        choices = {
            "down_block_types": down,
            "up_block_types": up,
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": ("identity",) if told else (None,),
        }
        for field, possible in choices.items():
            value = getattr(config, field)
            for each in value if isinstance(value, tuple) else (value,):
                if each not in possible:
                    raise CheckpointError(
                        f"{component}/config.json asks for {field}={each!r}; possible here: "
                        + ", ".join(map(repr, possible))
                    )
        for width in config.block_out_channels if told else ():
            require_dividing(width // max(1, config.attention_head_dim), width, component)
        return config

    @property
    def time_channels(self) -> int:
        """The width of an embedded time."""
        return 4 * self.block_out_channels[0]


def _kept(x: Tensor) -> Tensor:
    return x


def _halved(x: Tensor) -> Tensor:
    """Each pixel the mean of four."""
    return F.avg_pool2d(x, 2)


def _doubled(x: Tensor) -> Tensor:
    """Each pixel four times."""
    return enlarged(x, (2 * x.shape[-2], 2 * x.shape[-1]))


class PixelBlock(ResnetBlock):
    """A residual block that may change resolution between its first norm and its first convolution, skip included."""

    def __init__(
        self,
        config: PixelUNetConfig,
        c_in: int,
        c_out: int,
        resample: Callable[[Tensor], Tensor] = _kept,
    ) -> None:
        groups, eps, time = config.norm_num_groups, config.norm_eps, config.time_channels
        super().__init__(c_in, c_out, groups=groups, eps=eps, time_channels=time)
        self.resample = resample
        self.scales = config.resnet_time_scale_shift == "scale_shift"
        if self.scales:
            self.time_emb_proj = nn.Linear(time, 2 * c_out)

    def told(self, time: Tensor) -> Tensor:
        """What an embedded time [.., m] says of every pixel, [.., c_out] or twice as many."""
        told: Tensor = self.time_emb_proj(F.silu(time))
        return told

    def forward(self, x: Tensor, time: Time) -> Tensor:  # type: ignore[override]
        """x [n, c_in, h, w] -> [n, c_out, h', w']."""
        h = self.resample(group_norm(self.norm1, x, silu=True))
        h, x = convolved(self.conv1, h), self.resample(x)
        told = (time[self] if isinstance(time, Mapping) else self.told(time))[:, :, None, None]
        if self.scales:
            scale, shift = told.chunk(2, dim=1)
            h = F.silu(group_norm(self.norm2, h) * (1 + scale) + shift)
        else:
            h = group_norm(self.norm2, h, silu=True, residual=told)
        h = convolved(self.conv2, h)
        return h + (convolved(self.conv_shortcut, x) if hasattr(self, "conv_shortcut") else x)


class ContextAttention(nn.Module):
    """Pixels attend to a context's tokens and to one another at once."""

    def __init__(self, config: PixelUNetConfig, channels: int) -> None:
        super().__init__()
        assert config.cross_attention_dim is not None
        context = config.cross_attention_dim
        self.heads = channels // config.attention_head_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-5)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.add_k_proj = nn.Linear(context, channels)
        self.add_v_proj = nn.Linear(context, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def remember(self, tokens: Tensor) -> KeysAndValues:
        """Keys and values [n, heads, k, dim] of a context's tokens [n, k, d]."""
        k, v = (
            split_heads(layer(tokens), self.heads) for layer in (self.add_k_proj, self.add_v_proj)
        )
        return k, v

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [n, c, h, w] -> the same."""
        height, width = x.shape[-2:]
        tokens, read = context
        told = self.remember(tokens) if isinstance(tokens, Tensor) else tokens[self]
        pixels = image_to_tokens(group_norm(self.group_norm, x))
        q, *own = (
            split_heads(layer(pixels), self.heads) for layer in (self.to_q, self.to_k, self.to_v)
        )
        k, v = (torch.cat(pair, dim=2) for pair in zip(told, own, strict=True))
        read = F.pad(read.to(x.dtype), (0, height * width), value=1.0)
        attended = attention(q, k, v, bias_of_unread(read))
        return x + tokens_to_image(self.to_out[0](merge_heads(attended)), height, width)


class _Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the level attends; then, but for the last, a
    block that goes on to the next resolution."""

    resampler: str  # the published name of that block's list
    resample: Callable[[Tensor], Tensor]

    def __init__(
        self,
        config: PixelUNetConfig,
        widths: Sequence[tuple[int, int]],
        *,
        attends: bool,
        last: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(PixelBlock(config, *each) for each in widths)
        if attends:
            self.attentions = nn.ModuleList(ContextAttention(config, o) for _, o in widths)
        if not last:
            width = widths[-1][1]
            block = PixelBlock(config, width, width, type(self).resample)
            self.add_module(self.resampler, nn.ModuleList([block]))

    def layer(self, index: int, x: Tensor, time: Time, context: Context | None) -> Tensor:
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if hasattr(self, "attentions") else x


class DownLevel(_Level):
    """On the way down; what every layer gives is a skip."""

    resampler, resample = "downsamplers", _halved

    def forward(self, x: Tensor, time: Time, context: Context | None) -> list[Tensor]:
        skips = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            skips.append(self.downsamplers[0](x, time))
        return skips


class MidLevel(nn.Module):
    """Two residual blocks at the lowest resolution, and attention between them where there is a context."""

    def __init__(self, config: PixelUNetConfig, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(PixelBlock(config, width, width) for _ in range(2))
        if config.cross_attention_dim is not None:
            self.attentions = nn.ModuleList([ContextAttention(config, width)])

    def forward(self, x: Tensor, time: Time, context: Context | None) -> Tensor:
        x = self.resnets[0](x, time)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UpLevel(_Level):
    """On the way up; takes one skip a residual block."""

    resampler, resample = "upsamplers", _doubled

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Time, context: Context | None
    ) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, torch.cat([x, skips.pop()], dim=1), time, context)
        return self.upsamplers[0](x, time) if hasattr(self, "upsamplers") else x


class PixelUNet(nn.Module):
    """Predicts the noise in pixels, and where it has channels for that, which noise a step should add."""

    def __init__(self, config: PixelUNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], config.time_channels)

        self.down_blocks = nn.ModuleList()
        width, skips = channels[0], [channels[0]]
        for level, kind in enumerate(config.down_block_types):
            last = level == len(channels) - 1
            widths = _widths([width, *[channels[level]] * (layers - 1)], channels[level])
            attends = kind in _ATTENDING
            self.down_blocks.append(DownLevel(config, widths, attends=attends, last=last))
            width = channels[level]
            skips += [width] * (layers + (not last))

        self.mid_block = MidLevel(config, width)

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(len(channels))), config.up_block_types, strict=True):
            own = channels[level]
            widths = _widths([given + skips.pop() for given in (width, *[own] * layers)], own)
            attends = kind in _ATTENDING
            self.up_blocks.append(UpLevel(config, widths, attends=attends, last=level == 0))
            width = own

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Context | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """sample [n, c, h, w], timestep [n], a context ([n, k, d], [n, k]) and what is added to the embedded time
        [n, m], where the model is told them -> [n, c_out, h, w]."""
        return self._denoised(sample, self._time(timestep, added, sample.dtype), context)

    def remember(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """What is the same at every step of a picture: each attention's keys and values of the context's tokens."""
        return tuple(chain.from_iterable(each.remember(tokens) for each in self._attending()))

    def at(self, times: Tensor, added: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What each of the times [s, n], with what is added to it embedded, tells each residual block, [s, n, c]."""
        time = self._time(times, added, dtype)
        return tuple(block.told(time) for block in self._timed())

    def recall(
        self,
        told: Sequence[Tensor],
        sample: Tensor,
        remembered: Sequence[Tensor] = (),
        read: Tensor | None = None,
    ) -> Tensor:
        """`forward` of the sample with what its time tells, of `at` [n, c] for each, and what was remembered of a
        context, of which ``read`` is 1 where a token is read."""
        time = dict(zip(self._timed(), told, strict=True))
        if read is None:
            return self._denoised(sample, time, None)
        pairs = zip(remembered[::2], remembered[1::2], strict=True)
        return self._denoised(
            sample, time, (dict(zip(self._attending(), pairs, strict=True)), read)
        )

    def _attending(self) -> list[ContextAttention]:
        return [each for each in self.modules() if isinstance(each, ContextAttention)]

    def _timed(self) -> list[PixelBlock]:
        return [each for each in self.modules() if isinstance(each, PixelBlock)]

    def _time(self, t: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Times [.., n], embedded, and what is added to them [n, m] -> [.., n, m]."""
        config = self.config
        waves = sinusoidal_embedding(
            t,
            config.block_out_channels[0],
            cos_first=config.flip_sin_to_cos,
            shift=config.freq_shift,
        )
        time: Tensor = self.time_embedding(waves.to(dtype))
        return time if added is None else time + added

    def _denoised(self, sample: Tensor, time: Time, context: Context | None) -> Tensor:
        x = convolved(self.conv_in, sample)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], time, context)
        x = self.mid_block(skips[-1], time, context)
        for up in self.up_blocks:
            x = up(x, skips, time, context)
        return convolved(self.conv_out, group_norm(self.conv_norm_out, x, silu=True))


def _widths(given: Sequence[int], own: int) -> list[tuple[int, int]]:
    """(in, out) of a level's residual blocks."""
    return [(each, own) for each in given]
