"""The postcard autoencoder: eight pixels a latent cell along each axis, four channels, whitened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tintype.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

from ..initialise import silence_residual_branches
from ..loop import FitConfig, batches, fit, generator, mixed_precision
from ..objectives import edge_loss, kl_to_standard_normal
from .batches import Sampler, pictures
from .store import PostcardStore

CONFIG = AutoencoderKLConfig(
    block_out_channels=(32, 64, 96, 128),
    layers_per_block=1,
    norm_num_groups=16,
    sample_size=128,
    scaling_factor=1.0,
)
# (until this share of the steps, crop in pixels, pictures a batch). Small crops take the many cheap steps that a deep
# network needs at first; whole pictures at the end bring the group statistics that it will meet in use.
_PHASES = ((0.55, 32, 32), (0.85, 64, 10), (1.0, 128, 4))
# Squared error first: absolute error is content with the background's colour where a small bright subject stands.
_SQUARE_WEIGHT, _PIXEL_WEIGHT, _EDGE_WEIGHT, _KL_WEIGHT = 2.0, 0.5, 0.5, 1e-5


def train_autoencoder(store: PostcardStore, config: FitConfig, folder: Path) -> AutoencoderKL:
    """Train on random crops that grow to whole pictures, then whiten the latents."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(CONFIG)
    silence_residual_branches(vae)
    with torch.no_grad():  # start nearly without noise on the latents
        vae.quant_conv.bias[CONFIG.latent_channels :] -= 4.0

    def batch_loss(step: int) -> dict[str, Tensor]:
        random = generator(config.seed, step)
        crop, size = next((c, n) for until, c, n in _PHASES if step < until * config.steps)
        rows = Sampler(len(store.scenes), size, config.seed).rows(step)
        images = _crop(pictures(store, rows), crop, random).to(config.device)
        with mixed_precision(config.device):
            mean, log_variance = (t.float() for t in vae.encode(images))
            noise = torch.randn(mean.shape, generator=random).to(config.device)
            latents = mean + (0.5 * log_variance).exp() * noise
            decoded = vae.decode(latents).float()
        difference = decoded - images
        square, pixel = difference.square().mean(), difference.abs().mean()
        edge, kl = edge_loss(decoded, images), kl_to_standard_normal(mean, log_variance)
        loss = (
            _SQUARE_WEIGHT * square + _PIXEL_WEIGHT * pixel + _EDGE_WEIGHT * edge + _KL_WEIGHT * kl
        )
        return {"loss": loss, "square": square, "pixel": pixel, "edge": edge, "kl": kl}

    fit(vae, batch_loss, config, folder)
    whiten(vae, store)
    return vae


def _crop(images: Tensor, size: int, random: torch.Generator) -> Tensor:
    """The same random window of every picture, on the grid of latent cells."""
    cells = (images.shape[-1] - size) // CONFIG.factor + 1
    top, left = (CONFIG.factor * int(i) for i in torch.randint(cells, (2,), generator=random))
    return images[..., top : top + size, left : left + size].contiguous()


@torch.no_grad()
def whiten(vae: AutoencoderKL, store: PostcardStore, count: int = 2000) -> None:
    """Give every latent channel mean 0 and variance 1 by folding the change into the 1x1 convolutions around them.

    The denoiser then meets the statistics that its noise schedule assumes, with a scaling factor of 1.
    """
    latents = encode_all(vae, store, count)
    device = vae.quant_conv.weight.device
    mean, std = (s.to(device) for s in (latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))))
    channels = CONFIG.latent_channels
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, store: PostcardStore, count: int | None = None) -> Tensor:
    """The denoiser's latents of the first ``count`` pictures, float32 [count, 4, 16, 16]."""
    device = str(vae.quant_conv.weight.device)
    parts = []
    for rows in batches(count or len(store.scenes), 64):
        with mixed_precision(device):
            mean = vae.encode(pictures(store, rows).to(device))[0].float()
        parts.append(vae.to_model(mean).cpu())
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, store: PostcardStore, count: int) -> float:
    """Mean PSNR in dB of decoded pictures against the originals, 8-bit range."""
    values: list[float] = []
    for rows in batches(count, 50):
        images = pictures(store, rows)
        error = (vae.decode(vae.encode(images)[0]).clamp(-1, 1) - images).square().mean(
            dim=(1, 2, 3)
        ) / 4
        values += (-10 * error.log10()).tolist()
    return float(np.mean(values))
