"""The KL-regularised image autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tintype.models.config import from_json
from tintype.models.fused import attention, convolved, group_norm
from tintype.models.layers import (
    Downsample,
    ResnetBlock,
    Upsample,
    image_to_tokens,
    merge_heads,
    split_heads,
    tokens_to_image,
)

if TYPE_CHECKING:
    from tintype.models.vq_model import VQModel

_EPS = 1e-6
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "mid_block_add_attention": (True,),
    # a precision hint; the runtime decides by itself, see scale_residual_stream
    "force_upcast": (True, False),
}


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Fields as in the published ``vae/config.json``."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AutoencoderKLConfig:
        return from_json(cls, raw, component="vae", neutral=_NEUTRAL)

    @property
    def factor(self) -> int:
        """Pixels a latent cell, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)


class Widths(Protocol):
    """What encoder and decoder read of their autoencoder's configuration."""

    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def block_out_channels(self) -> tuple[int, ...]: ...
    @property
    def layers_per_block(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def norm_num_groups(self) -> int: ...


class MidAttention(nn.Module):
    """Single-head self-attention over all pixels, after a GroupNorm; residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = image_to_tokens(group_norm(self.group_norm, x))
        q, k, v = (split_heads(p(tokens), 1) for p in (self.to_q, self.to_k, self.to_v))
        attended = merge_heads(attention(q, k, v))
        return x + tokens_to_image(self.to_out[0](attended), *x.shape[-2:])


class _MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, groups=groups, eps=_EPS) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution where one follows."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups=groups, eps=_EPS)
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
        return x


class Encoder(nn.Module):
    """Image [n, 3, h, w] -> [n, channels_out, h/f, w/f]."""

    def __init__(self, config: Widths, channels_out: int) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            block = _Level(channels[max(level - 1, 0)], width, config.layers_per_block, groups)
            if level < len(channels) - 1:
                block.downsamplers = nn.ModuleList([Downsample(width, one_sided=True)])
            self.down_blocks.append(block)
        self.mid_block = _MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = convolved(self.conv_in, x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(group_norm(self.conv_norm_out, self.mid_block(x), silu=True))


class Decoder(nn.Module):
    """Latents [n, latent, h/f, w/f] -> image [n, 3, h, w]."""

    def __init__(self, config: Widths) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            block = _Level(channels[max(level - 1, 0)], width, config.layers_per_block + 1, groups)
            if level < len(channels) - 1:
                block.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(convolved(self.conv_in, x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(group_norm(self.conv_norm_out, x, silu=True))


class AutoencoderKL(nn.Module):
    """Images in -1..1 to latents and back. Latents here are unscaled; ``to_model`` and ``from_model`` scale them."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(moments, moments, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[n, 3, h, w] in -1..1 -> mean and log-variance of the latents, each [n, latent, h/f, w/f]."""
        moments = self.encoder(image)
        mean, log_variance = (
            self.quant_conv(moments) if self.config.use_quant_conv else moments
        ).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def means(self, image: Tensor) -> Tensor:
        """[n, 3, h, w] in -1..1 -> the mean of the latents, [n, latent, h/f, w/f]."""
        return self.encode(image)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """[n, latent, h/f, w/f] of any type -> [n, 3, h, w], nominally in -1..1 (not clamped)."""
        latents = latents.to(self.decoder.conv_norm_out.weight.dtype)
        return self.decoder(
            self.post_quant_conv(latents) if self.config.use_post_quant_conv else latents
        )

    def to_model(self, latents: Tensor) -> Tensor:
        """Unscaled latents -> the unit-variance latents that the denoiser works on."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def from_model(self, latents: Tensor) -> Tensor:
        """The denoiser's latents -> unscaled latents."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


def decode_tiled(
    vae: AutoencoderKL | VQModel, latents: Tensor, *, tile: int = 64, overlap: float = 0.25
) -> Tensor:
    """Decode in overlapping tiles of ``tile`` latent cells so that peak memory does not grow with the image.

    Neighbouring tiles are blended linearly over ``overlap`` of their width. Group statistics are then each
    tile's own, so the result is close to, not equal to, the whole decode.
    """
    return _tiled(vae.decode, latents, tile, int(tile * vae.config.factor), overlap)


def encode_tiled(
    vae: AutoencoderKL | VQModel, image: Tensor, *, tile: int = 512, overlap: float = 0.25
) -> Tensor:
    """What ``vae.means`` gives, in overlapping tiles of ``tile`` pixels."""
    return _tiled(vae.means, image, tile, tile // vae.config.factor, overlap)


def _tiled(
    run: Callable[[Tensor], Tensor], x: Tensor, tile_in: int, tile_out: int, overlap: float
) -> Tensor:
    """Cut x [n, c, h, w] into tiles, run each, blend each with its upper and left neighbour, and join them."""
    if x.shape[-2] <= tile_in and x.shape[-1] <= tile_in:
        return run(x)
    stride, blend = int(tile_in * (1 - overlap)), int(tile_out * overlap)
    keep = tile_out - blend
    rows: list[list[Tensor]] = [
        [
            run(x[..., top : top + tile_in, left : left + tile_in])
            for left in range(0, x.shape[-1], stride)
        ]
        for top in range(0, x.shape[-2], stride)
    ]
    joined = []
    for i, row in enumerate(rows):
        for j in range(len(row)):
            if i > 0:
                row[j] = _blend(rows[i - 1][j], row[j], blend, dim=-2)
            if j > 0:
                row[j] = _blend(row[j - 1], row[j], blend, dim=-1)
        joined.append(torch.cat([part[..., :keep, :keep] for part in row], dim=-1))
    return torch.cat(joined, dim=-2)


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """``after`` with its first ``extent`` cells along ``dim`` faded in from the last ones of ``before``."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    weight = torch.arange(extent, dtype=after.dtype, device=after.device) / extent
    weight = weight[:, None] if dim == -2 else weight
    head, rest = after.split([extent, after.shape[dim] - extent], dim=dim)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    return torch.cat([tail * (1 - weight) + head * weight, rest], dim=dim)


@torch.no_grad()
def scale_residual_stream(decoder: Decoder, factor: float) -> None:
    """Divide every value of the decoder's residual stream by ``factor``, in place, without changing its output.

    SDXL's decoder overflows float16 because that stream grows past 65504, while each branch starts with a
    GroupNorm, which is blind to scale once its epsilon is scaled with it. So writers into the stream are divided,
    readers' epsilons are divided by the square, and a power of two keeps every weight exact.
    """

    def divide(*parameters: nn.Parameter | None) -> None:
        for p in parameters:
            if p is not None:
                p.div_(factor)

    divide(decoder.conv_in.weight, decoder.conv_in.bias)
    for module in decoder.modules():
        if isinstance(module, ResnetBlock):
            module.norm1.eps /= factor**2
            divide(module.conv2.weight, module.conv2.bias)
            if hasattr(module, "conv_shortcut"):
                divide(module.conv_shortcut.bias)
        elif isinstance(module, MidAttention):
            module.group_norm.eps /= factor**2
            divide(module.to_out[0].weight, module.to_out[0].bias)
        elif isinstance(module, Upsample):
            divide(module.conv.bias)
    decoder.conv_norm_out.eps /= factor**2
