"""A ControlNet beside a latent UNet: both are one component from then on, which a picture steers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tintype.checkpoints.files import below
from tintype.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from tintype.checkpoints.checkpoint import Checkpoint, Component

PART = "controlnet"  # of the UNet's configuration and of its parameters' names
# Fields in which it is a copy of the UNet that it was trained for.
_COPIED = (
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "addition_embed_type",
)


def steered(checkpoint: Checkpoint, path: Path, allow_pickle: bool) -> Checkpoint:
    """The checkpoint with the ControlNet in a folder of diffusers' layout; CheckpointError where it does not fit."""
    from tintype.checkpoints.diffusers import open_controlnet

    if checkpoint.family != "latent_unet":
        raise CheckpointError(
            f"{path} cannot steer {checkpoint.source}, a {checkpoint.family}; ControlNets here are for Stable "
            "Diffusion 1, 2 and XL"
        )
    unet = checkpoint.components["unet"]
    if PART in unet.config:
        raise CheckpointError(f"{checkpoint.source} has a ControlNet; one at a time is possible")
    part = open_controlnet(path, allow_pickle=allow_pickle)
    _check(path, unet.config, part.config, checkpoint.defaults)
    return replace(
        checkpoint,
        components={**checkpoint.components, "unet": joined(unet, part)},
        defaults={**checkpoint.defaults, "steered": True},
    )


def joined(unet: Component, controlnet: Component) -> Component:
    """The UNet with the ControlNet in it."""
    own, other = unet.weights, controlnet.weights
    apart = dict.fromkeys(other.files, partial(below, f"{PART}.", other.translate))
    weights = replace(own, files=(*own.files, *other.files), apart={**own.apart, **apart})
    return replace(unet, config={**unet.config, PART: dict(controlnet.config)}, weights=weights)


def _check(
    path: Path, unet: Mapping[str, Any], own: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    from tintype.models.unet_config import ControlNetConfig, UNetConfig

    config, expected = ControlNetConfig.from_json(own), UNetConfig.from_json(unet)
    for field in _COPIED:
        given, asked = getattr(config.encoder, field), getattr(expected, field)
        if given != asked:
            raise CheckpointError(
                f"{path}: the ControlNet's {field} is {given!r}, and the UNet's {asked!r}; it is for another model"
            )
    shrinks = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    if shrinks != defaults["latent_factor"]:
        raise CheckpointError(
            f"{path}: the ControlNet reads {shrinks} pixels a latent, and the model has {defaults['latent_factor']}"
        )
