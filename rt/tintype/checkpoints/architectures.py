"""Published class names -> our modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from tintype.errors import CheckpointError
from tintype.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tintype.models.clip import (
    CLIPImageEncoder,
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPVisionConfig,
)
from tintype.models.config import per_level, require_dividing
from tintype.models.flux import FluxConfig, FluxTransformer
from tintype.models.pixel_unet import PixelUNet, PixelUNetConfig
from tintype.models.prior import Prior, PriorConfig
from tintype.models.sd3 import SD3Config, SD3Transformer
from tintype.models.t5 import T5Config, T5Encoder
from tintype.models.unclip_projection import UnclipProjection, UnclipProjectionConfig
from tintype.models.unet import UNet
from tintype.models.unet_config import UNetConfig
from tintype.models.vq_model import VQModel, VQModelConfig


def _text(name: str, config: Mapping[str, Any], *, projection: bool) -> nn.Module:
    return CLIPTextEncoder(CLIPTextConfig.from_json(config, name), projection=projection)


def _vision(name: str, config: Mapping[str, Any]) -> nn.Module:
    return CLIPImageEncoder(CLIPVisionConfig.from_json(config, name))


def _unet(name: str, config: Mapping[str, Any]) -> nn.Module:
    """diffusers has one class for latents' UNets and unCLIP's decoder."""
    if name == "decoder":
        return _pixel_unet(name, config)
    parsed = UNetConfig.from_json(config)
    widths = parsed.block_out_channels
    heads = per_level(parsed.attention_head_dim, len(widths))
    for width, shares, kind in zip(widths, heads, parsed.down_block_types, strict=True):
        if kind.startswith("CrossAttn"):
            require_dividing(shares, width, name)
    if widths:  # between the ways down and up
        require_dividing(heads[-1], widths[-1], name)
    return UNet(parsed)


def _pixel_unet(name: str, config: Mapping[str, Any]) -> nn.Module:
    return PixelUNet(PixelUNetConfig.from_json(config, name))


def _prior(_: str, config: Mapping[str, Any]) -> nn.Module:
    return Prior(PriorConfig.from_json(config))


def _projection(_: str, config: Mapping[str, Any]) -> nn.Module:
    return UnclipProjection(UnclipProjectionConfig.from_json(config))


def _t5(name: str, config: Mapping[str, Any]) -> nn.Module:
    return T5Encoder(T5Config.from_json(config, name))


def _sd3(_: str, config: Mapping[str, Any]) -> nn.Module:
    return SD3Transformer(SD3Config.from_json(config))


def _flux(_: str, config: Mapping[str, Any]) -> nn.Module:
    parsed = FluxConfig.from_json(config)
    if sum(parsed.axes_dims_rope) != parsed.attention_head_dim:
        raise ValueError(
            f"axes_dims_rope={list(parsed.axes_dims_rope)} does not add up to attention_head_dim="
            f"{parsed.attention_head_dim}"
        )
    return FluxTransformer(parsed)


def _vae(_: str, config: Mapping[str, Any]) -> nn.Module:
    return AutoencoderKL(AutoencoderKLConfig.from_json(config))


def _vq_model(_: str, config: Mapping[str, Any]) -> nn.Module:
    return VQModel(VQModelConfig.from_json(config))


_BUILDERS: dict[str, Callable[[str, Mapping[str, Any]], nn.Module]] = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _pixel_unet,
    "PriorTransformer": _prior,
    "UnCLIPTextProjModel": _projection,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "AutoencoderKL": _vae,
    "VQModel": _vq_model,
    "T5EncoderModel": _t5,
    "CLIPTextModel": partial(_text, projection=False),
    "CLIPTextModelWithProjection": partial(_text, projection=True),
    "CLIPVisionModelWithProjection": _vision,
}


def builder(name: str, architecture: str, config: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """What builds component `name` of the published class `architecture`."""

    def build() -> nn.Module:
        try:
            return _BUILDERS[architecture](name, config)
        except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{name}/config.json describes no {architecture} that can be built: {error}"
            ) from error

    return build
