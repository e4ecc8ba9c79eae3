"""A ControlNet beside a latent UNet: both are one component from then on, which a picture steers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

from tintype.checkpoints.checkpoint import Component
from tintype.checkpoints.files import Weights, below, within
from tintype.checkpoints.original_keys import controlnet_key
from tintype.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from tintype.checkpoints.checkpoint import Checkpoint

PART = "controlnet"  # of the UNet's configuration and of its parameters' names
# In the original layout the first of what reads the picture, and of what reads noisy latents.
_FIRST, _NOISY = "input_hint_block.0.weight", "input_blocks.0.0.weight"
_WIDTHS = "conditioning_embedding_out_channels"
_UNET_ALONE = ("_class_name", "up_block_types", "out_channels", "sample_size")
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
    """The checkpoint with the ControlNet in a folder of diffusers' layout, or in a file of its own; CheckpointError
    where it does not fit."""
    if checkpoint.family != "latent_unet":
        raise CheckpointError(
            f"{path} cannot steer {checkpoint.source}, a {checkpoint.family}; ControlNets here are for Stable "
            "Diffusion 1, 2 and XL"
        )
    unet = checkpoint.components["unet"]
    if PART in unet.config:
        raise CheckpointError(f"{checkpoint.source} has a ControlNet; one at a time is possible")
    return attached(checkpoint, path, _open(path, unet.config, allow_pickle))


def attached(checkpoint: Checkpoint, path: Path, part: Component) -> Checkpoint:
    """The checkpoint with a ControlNet that has been opened from ``path``; CheckpointError where it does not fit."""
    unet = checkpoint.components["unet"]
    _check(path, unet.config, part.config, checkpoint.defaults)
    return replace(
        checkpoint,
        components={**checkpoint.components, "unet": joined(unet, part)},
        defaults={**checkpoint.defaults, "steered": True},
    )


def _open(path: Path, unet: Mapping[str, Any], allow_pickle: bool) -> Component:
    if not path.is_file():
        from tintype.checkpoints.diffusers import open_controlnet

        return open_controlnet(path, allow_pickle=allow_pickle)
    from tintype.checkpoints.weights import stored_shapes

    shapes = stored_shapes(path, allow_pickle)
    prefix = next((key[: -len(_FIRST)] for key in shapes if key.endswith(_FIRST)), "")
    if absent := [name for name in (_FIRST, _NOISY) if prefix + name not in shapes]:
        raise CheckpointError(
            f"{path} holds no ControlNet in the original layout: {absent[0]} is missing; name the folder of one in "
            "diffusers' layout"
        )
    numbered = (f"{prefix}input_hint_block.{number}.weight" for number in count(0, 2))
    hints = [shapes[name][0] for name in takewhile(shapes.__contains__, numbered)]
    config = {name: value for name, value in unet.items() if name not in _UNET_ALONE}
    # Two convolutions a width, of which the second is the next width's; the last leaves for the UNet's own.
    config |= {"in_channels": shapes[prefix + _NOISY][1], _WIDTHS: hints[:-1:2]}
    translate = partial(controlnet_key, layers=unet.get("layers_per_block", 2), hints=len(hints))
    weights = Weights((path,), partial(within, prefix, translate), allow_pickle)
    return Component("ControlNetModel", config, weights)


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
