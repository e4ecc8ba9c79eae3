"""Postcard-unclip: a prior, a decoder and an upsampler in DALL-E 2's form, around the judge's view of a picture.

Ramesh et al. 2022 (arXiv 2204.06125). In the place of CLIP's image embedding stand the features that the judge reads a
scene from, which the text encoder was fitted to. All three models predict the clean picture, or embedding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.models.clip import CLIPTextEncoder
from tintype.models.pixel_unet import PixelUNet, PixelUNetConfig
from tintype.models.prior import Prior, PriorConfig
from tintype.models.unclip_projection import UnclipProjection, UnclipProjectionConfig
from tintype.schedulers.betas import alphas_cumprod
from tintype.tokenizer import ClipTokenizer

from ..initialise import silence_residual_branches
from ..loop import FitConfig, batches, fit, generator, mixed_precision
from ..objectives import learned_variance_loss, noisy_and_velocity
from .batches import EncodedCaptions, Sampler, pictures
from .clip import LONGEST_CAPTION
from .denoiser import even_times
from .judge import FEATURES
from .scene import Scene
from .store import PostcardStore

SMALL, LARGE = 32, 128  # pixels a side that the decoder draws, and that they are enlarged to
_HEAD = 32
_STEPS = 1000
_PRIOR_RANGE = 5.0  # embeddings of unit deviation are clipped to
_CROP = 64  # pixels a side of what the upsampler learns on
_SOFTEST = 0.1  # noise on the small pictures that it learns on, as what is drawn is not quite what is rendered
_ROUGHEST = 0.4  # of a feature's deviation, added to embeddings
_MOST_WEIGHT = 20.0  # of a time at which little noise is left
_LONGEST_STEP = 200  # times that a sampler passes over at once
_BITS_WEIGHT = 0.1  # of the variance's loss, which shall not decide what else is learnt
SCHEDULER_CONFIGS = {
    "prior_scheduler": {"variance_type": "fixed_small_log", "clip_sample_range": _PRIOR_RANGE},
    "decoder_scheduler": {"variance_type": "learned_range", "clip_sample_range": 1.0},
    "super_res_scheduler": {"variance_type": "fixed_small_log", "clip_sample_range": 1.0},
}


def prior_config(blocks: int) -> PriorConfig:
    """A transformer as wide as the embeddings, on a caption's tokens."""
    return PriorConfig(
        num_attention_heads=FEATURES // _HEAD,
        attention_head_dim=_HEAD,
        num_layers=blocks,
        embedding_dim=FEATURES,
        num_embeddings=LONGEST_CAPTION,
    )


def decoder_config(channels: tuple[int, ...]) -> PixelUNetConfig:
    """A UNet on small pictures that attends below the finest level, and says how much noise it wants."""
    attending = len(channels) - 1
    return PixelUNetConfig(
        sample_size=SMALL,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * attending),
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * attending, "ResnetUpsampleBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        cross_attention_dim=FEATURES,
        attention_head_dim=_HEAD,
        class_embed_type="identity",
    )


def upsampler_config(channels: tuple[int, ...]) -> PixelUNetConfig:
    """A UNet on large pictures beside small ones at their size."""
    return PixelUNetConfig(
        sample_size=LARGE,
        in_channels=6,
        down_block_types=("ResnetDownsampleBlock2D",) * len(channels),
        up_block_types=("ResnetUpsampleBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
    )


def new_prior(blocks: int, seed: int) -> Prior:
    """An untrained prior."""
    torch.manual_seed(seed)
    prior = Prior(prior_config(blocks))
    for embedding in (prior.positional_embedding, prior.prd_embedding):
        nn.init.normal_(embedding, std=0.02)
    return prior


def new_decoder(channels: tuple[int, ...], seed: int) -> nn.ModuleDict:
    """An untrained decoder, and before it what tells it of an embedding and a text."""
    torch.manual_seed(seed)
    config = decoder_config(channels)
    told = UnclipProjectionConfig(
        clip_embeddings_dim=FEATURES,
        time_embed_dim=config.time_channels,
        cross_attention_dim=FEATURES,
    )
    unet = PixelUNet(config)
    silence_residual_branches(unet)
    return nn.ModuleDict({"projection": UnclipProjection(told), "unet": unet})


def new_upsampler(channels: tuple[int, ...], seed: int) -> PixelUNet:
    """An untrained upsampler."""
    torch.manual_seed(seed)
    unet = PixelUNet(upsampler_config(channels))
    silence_residual_branches(unet)
    return unet


def train_prior(
    prior: Prior,
    data: tuple[Tensor, list[Scene]],
    text_encoder: CLIPTextEncoder,
    tokenizer: ClipTokenizer,
    fitting: FitConfig,
    folder: Path,
) -> None:
    """Train on embeddings [n, e] of scenes and fresh captions, a tenth of them emptied for guidance."""
    embeds, scenes = data
    mean, deviation = embeds.mean(0), embeds.std(0)
    deviation = deviation.clamp(min=0.01 * float(deviation.mean()))  # some features say nothing
    normal = (embeds - mean) / deviation
    prior.clip_mean.requires_grad_(False).copy_(mean)
    prior.clip_std.requires_grad_(False).copy_(deviation)
    captions = EncodedCaptions(scenes, text_encoder, tokenizer, fitting)

    def batch_loss(step: int) -> dict[str, Tensor]:
        rows, random = captions.rows(step), generator(fitting.seed, step)
        dropped = captions.dropped(rows, random)
        x0, noise = normal[rows], torch.randn(len(rows), FEATURES, generator=random)
        noisy, times, _ = _noisy(x0, noise, random)
        with mixed_precision(fitting.device):
            told = _told(captions, captions.ids(rows, step, dropped))
            predicted = prior(noisy.to(fitting.device), times.to(fitting.device), *told)
        return {"loss": (predicted.float() - x0.to(fitting.device)).square().mean()}

    fit(prior, batch_loss, fitting, folder)


def train_decoder(
    decoder: nn.ModuleDict,
    data: tuple[Tensor, Tensor, list[Scene]],
    text_encoder: CLIPTextEncoder,
    tokenizer: ClipTokenizer,
    fitting: FitConfig,
    folder: Path,
) -> None:
    """Train on small pictures [n, 3, h, w] in -1..1, embeddings [n, e] of scenes and fresh captions.

    A tenth is told nothing, for guidance; the embeddings are roughened, as a prior's are not quite a picture's.
    """
    small, embeds, scenes = data
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    spread = embeds.std(0)
    captions = EncodedCaptions(scenes, text_encoder, tokenizer, fitting)

    def batch_loss(step: int) -> dict[str, Tensor]:
        rows, random = captions.rows(step), generator(fitting.seed, step)
        dropped = captions.dropped(rows, random)
        amount = _ROUGHEST * torch.rand(len(rows), 1, generator=random)
        rough = amount * spread * torch.randn(len(rows), FEATURES, generator=random)
        x0 = small[rows]
        noisy, times, weight = _noisy(x0, torch.randn(x0.shape, generator=random), random)
        shown = (~dropped[:, 0]).float()
        x, t, seen = (each.to(fitting.device) for each in (noisy, times, embeds[rows] + rough))
        with mixed_precision(fitting.device):
            hidden, pooled, own = _told(captions, captions.ids(rows, step, dropped))
            context, added = decoder["projection"](seen, shown.to(fitting.device), hidden, pooled)
            read = F.pad(own, (context.shape[1] - own.shape[1], 0), value=1.0)
            x = x.contiguous(memory_format=torch.channels_last)
            predicted = decoder["unet"](x, t, (context, read), added)
        clean, wanted = predicted.float().chunk(2, dim=1)
        truth = x0.to(fitting.device)
        error = (clean - truth).square().mean(dim=(1, 2, 3))
        now, then = _step_back(times.long(), random)
        bits = learned_variance_loss((truth, clean.detach(), wanted), now, then)
        loss = (weight.to(fitting.device) * error).mean()
        return {"loss": loss + _BITS_WEIGHT * bits, "error": error.mean(), "bits": bits}

    fit(decoder, batch_loss, fitting, folder)


def train_upsampler(
    unet: PixelUNet, store: PostcardStore, fitting: FitConfig, folder: Path
) -> None:
    """Train on crops of pictures beside the same crops of what they were before they were made small."""
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sampler = Sampler(len(store.scenes), fitting.batch_size, fitting.seed)

    def batch_loss(step: int) -> dict[str, Tensor]:
        random = generator(fitting.seed, step)
        whole = pictures(store, sampler.rows(step))
        soft = F.interpolate(made_small(whole), size=(LARGE, LARGE), mode="bicubic")
        x0, low_res = _cropped(torch.cat([whole, soft], dim=1), random).chunk(2, dim=1)
        amount = _SOFTEST * torch.rand(len(x0), 1, 1, 1, generator=random)
        low_res = low_res + amount * torch.randn(x0.shape, generator=random)
        noisy, times, weight = _noisy(x0, torch.randn(x0.shape, generator=random), random)
        x = torch.cat([noisy, low_res], dim=1).to(fitting.device, memory_format=torch.channels_last)
        with mixed_precision(fitting.device):
            predicted = unet(x, times.to(fitting.device)).float()
        error = (predicted - x0.to(fitting.device)).square().mean(dim=(1, 2, 3))
        return {"loss": (weight.to(fitting.device) * error).mean(), "error": error.mean()}

    fit(unet, batch_loss, fitting, folder)


def made_small(images: Tensor) -> Tensor:
    """Pictures [n, 3, h, w] as the decoder draws them, each pixel the mean of those that it stands for."""
    return F.avg_pool2d(images, LARGE // SMALL)


def small_pictures(store: PostcardStore, count: int) -> Tensor:
    """The first ``count`` pictures, small, float32 [n, 3, h, w] in -1..1."""
    return torch.cat([made_small(pictures(store, rows)) for rows in batches(count, 500)])


def _told(captions: EncodedCaptions, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States [n, t, e], pooled text [n, e], and 1 where a token is the text's own [n, t]."""
    encoded = captions.encoded(ids)
    own = (torch.arange(ids.shape[1]) <= captions.end(ids)[:, None]).float()
    return encoded.last_hidden_state, encoded.pooled, own.to(encoded.pooled.device)


@cache
def _alphas() -> Tensor:
    """The share of the signal's variance at each time, float64 [steps]: unCLIP's cosine schedule."""
    shares = alphas_cumprod("squaredcos_cap_v2", 0, 0, _STEPS, zero_terminal_snr=False)
    return torch.from_numpy(shares)


def _noisy(x0: Tensor, noise: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_t at evenly spread times, those times [n], and what an error of the clean prediction weighs there.

    As much as an error of the velocity would (Salimans and Ho 2022), but for the last times.
    """
    times = (even_times(len(x0), random) * _STEPS).long()
    alpha = _alphas()[times]
    noisy, _ = noisy_and_velocity(x0, noise, alpha)
    weight = (1 / (1 - alpha)).clamp(max=_MOST_WEIGHT).float()
    return noisy, times.float(), weight


def _step_back(times: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The signal's share at times [n] and after a step back from each, as long as samplers make them.

    Of a step of one time the least variance and the most are nearly one, and nothing would say how much is wanted.
    """
    alphas = torch.cat([_alphas(), torch.ones(1, dtype=torch.float64)])
    lengths = torch.randint(1, _LONGEST_STEP + 1, times.shape, generator=random)
    return alphas[times], alphas[(times - lengths).clamp(min=-1)]


def _cropped(images: Tensor, random: torch.Generator) -> Tensor:
    """The same random square of all."""
    top, left = torch.randint(LARGE - _CROP + 1, (2,), generator=random).tolist()
    return images[..., top : top + _CROP, left : left + _CROP]
