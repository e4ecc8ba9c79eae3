"""The autoencoder with a codebook, VQGAN's, of latent diffusion (Esser, Rombach and Ommer, CVPR 2021, arXiv 2012.09841;
Rombach et al. 2022, arXiv 2112.10752): a denoiser works on latents before they are rounded, decoding rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.models.autoencoder_kl import Decoder, Encoder
from tintype.models.config import from_json

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "mid_block_add_attention": (True,),
    "norm_type": ("group",),
    "lookup_from_codebook": (
        False,
    ),  # to decode numbers of entries, where a denoiser gives latents
    "force_upcast": (True, False),  # a precision hint
}


@dataclass(frozen=True)
class VQModelConfig:
    """Fields as in the published ``vae/config.json`` of class VQModel."""

    block_out_channels: tuple[int, ...]
    latent_channels: int
    num_vq_embeddings: int
    vq_embed_dim: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> VQModelConfig:
        return from_json(cls, raw, component="vae", neutral=_NEUTRAL)

    @property
    def factor(self) -> int:
        """Pixels a latent cell, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)


class Codebook(nn.Module):
    """Rounds each cell of latents to the nearest of its entries."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, width)
        nn.init.uniform_(self.embedding.weight, -1 / entries, 1 / entries)

    def forward(self, latents: Tensor) -> Tensor:
        """[n, c, h, w] -> entries in their own type; a gradient goes through as if nothing had been rounded."""
        nearest = self.embedding(self.nearest(latents)).movedim(-1, 1)
        if not latents.requires_grad:
            return nearest
        return nearest.detach() + (latents - latents.detach())

    def nearest(self, latents: Tensor) -> Tensor:
        """[n, c, h, w] -> the number of the entry nearest to each cell, [n, h, w]."""
        # In 16 bits many entries would seem to be equally near.
        with torch.autocast(latents.device.type, enabled=False):
            cells, entries = latents.movedim(1, -1).float(), self.embedding.weight.float()
            # Squared distances, less the square of the cell, which is the same for all entries.
            return F.linear(cells, -2 * entries, entries.square().sum(1)).argmin(-1)

    def losses(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """How far entries are from the latents that are rounded to them, and those from them: each a mean square, whose
        gradient goes to the first."""
        nearest = self(latents.detach())
        return F.mse_loss(nearest, latents.detach()), F.mse_loss(latents, nearest.detach())


class VQModel(nn.Module):
    """Images in -1..1 to latents and back. Latents here are unscaled; ``to_model`` and ``from_model`` scale them."""

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        self.config = config
        wide = config.latent_channels
        width = wide if config.vq_embed_dim is None else config.vq_embed_dim
        self.encoder = Encoder(config, wide)
        self.quant_conv = nn.Conv2d(wide, width, 1)
        self.quantize = Codebook(config.num_vq_embeddings, width)
        self.post_quant_conv = nn.Conv2d(width, wide, 1)
        self.decoder = Decoder(config)

    def means(self, image: Tensor) -> Tensor:
        """[n, 3, h, w] in -1..1 -> latents that are not rounded, [n, c, h/f, w/f]."""
        return self.quant_conv(self.encoder(image))

    def decode(self, latents: Tensor) -> Tensor:
        """[n, c, h/f, w/f] of any type, which are rounded first -> [n, 3, h, w], nominally in -1..1 (not clamped)."""
        return self.decoder(self.post_quant_conv(self.quantize(latents)))

    def to_model(self, latents: Tensor) -> Tensor:
        """Unscaled latents -> those that the denoiser works on."""
        return latents * self.config.scaling_factor

    def from_model(self, latents: Tensor) -> Tensor:
        """The denoiser's latents -> unscaled latents."""
        return latents / self.config.scaling_factor
