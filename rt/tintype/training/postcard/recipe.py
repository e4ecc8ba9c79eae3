"""How the models in the box are made: sizes, steps and rates, by the name of the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..loop import FitConfig


@dataclass(frozen=True)
class Recipe:
    """``pictures`` rendered for training, the first ``encoded`` of them seen by the denoisers; the UNet's channels and
    layers a level; the flow transformer's width and blocks; of unCLIP the prior's blocks, and decoder's and upsampler's
    channels; how each is fitted."""

    pictures: int
    encoded: int
    channels: tuple[int, ...]
    layers: int
    width: int
    blocks: int
    prior_blocks: int
    decoder_channels: tuple[int, ...]
    upsampler_channels: tuple[int, ...]
    judge: FitConfig
    clip: FitConfig
    autoencoder: FitConfig
    denoiser: FitConfig
    flow: FitConfig
    prior: FitConfig
    decoder: FitConfig
    upsampler: FitConfig

    def on(self, device: str) -> Recipe:
        """The same recipe on another device."""
        fits = {name: replace(getattr(self, name), device=device) for name in FITTED}
        return replace(self, **fits)

    def for_steps(self, stage: str, steps: int) -> Recipe:
        """The same recipe with another length of one fitted stage."""
        return replace(self, **{stage: replace(getattr(self, stage), steps=steps)})


FITTED = ("judge", "clip", "autoencoder", "denoiser", "flow", "prior", "decoder", "upsampler")

RECIPES: Mapping[str, Recipe] = {
    # About an hour and a half on two CPU cores.
    "small": Recipe(
        pictures=60_000,
        encoded=30_000,
        channels=(64, 128, 192),
        layers=1,
        width=192,
        blocks=6,
        prior_blocks=4,
        decoder_channels=(32, 64, 128),
        upsampler_channels=(16, 32, 64),
        judge=FitConfig(2000, 64, 2e-3, cooldown=0.3, ema_decay=0.999),
        clip=FitConfig(2000, 192, 1e-3, weight_decay=0.1, cooldown=0.2, ema_decay=0.99),
        autoencoder=FitConfig(3000, 32, 1e-3, matrix_rate=4e-3, warmup=30, ema_decay=0.995),
        denoiser=FitConfig(2000, 64, 1e-3, matrix_rate=4e-3),
        flow=FitConfig(2400, 64, 1e-3, matrix_rate=1e-2, cooldown=0.3),
        prior=FitConfig(2000, 64, 1e-3, matrix_rate=1e-2),
        decoder=FitConfig(2000, 64, 1e-3, matrix_rate=4e-3),
        upsampler=FitConfig(1500, 32, 1e-3, matrix_rate=4e-3),
    ),
    # For a GPU: wider, longer, on more pictures; weights still fit the box.
    "large": Recipe(
        pictures=200_000,
        encoded=200_000,
        channels=(96, 160, 224),
        layers=1,
        width=256,
        blocks=6,
        prior_blocks=6,
        decoder_channels=(64, 128, 192),
        upsampler_channels=(32, 64, 96),
        judge=FitConfig(6000, 128, 2e-3, ema_decay=0.999),
        clip=FitConfig(8000, 512, 1e-3, weight_decay=0.1, ema_decay=0.999),
        autoencoder=FitConfig(30_000, 64, 1e-3, matrix_rate=4e-3, ema_decay=0.999),
        denoiser=FitConfig(60_000, 256, 1e-3, matrix_rate=4e-3, ema_decay=0.9995),
        flow=FitConfig(60_000, 256, 1e-3, matrix_rate=1e-2, ema_decay=0.9995),
        prior=FitConfig(20_000, 256, 1e-3, matrix_rate=1e-2, ema_decay=0.9995),
        decoder=FitConfig(60_000, 256, 1e-3, matrix_rate=4e-3, ema_decay=0.9995),
        upsampler=FitConfig(20_000, 128, 1e-3, matrix_rate=4e-3, ema_decay=0.9995),
    ),
}
