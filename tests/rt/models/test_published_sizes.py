"""At full size our modules have exactly the parameters of the published checkpoints."""

from __future__ import annotations

import diffusers
import pytest
import torch
import transformers
from torch import nn

from tintype.checkpoints.diffusers import text_encoder_key
from tintype.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tintype.models.clip import CLIPTextConfig, CLIPTextEncoder
from tintype.models.unet import UNet
from tintype.models.unet_config import UNetConfig
from tintype_bench import published_configs as published


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("model", published.UNETS)
def test_unet_names_and_shapes_equal_diffusers(model: str) -> None:
    config = published.UNETS[model]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config)
        ours = UNet(UNetConfig.from_json(config))
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("model", published.UNETS)
def test_a_controlnet_beside_a_unet_has_the_names_and_shapes_of_diffusers(model: str) -> None:
    config = published.UNETS[model]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
        theirs = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        ours = UNet(UNetConfig.from_json({**config, "controlnet": dict(theirs.config)}))
    assert shapes(ours.controlnet) == shapes(theirs)
    if model == "sd15":  # 361 million, as published
        assert sum(each.numel() for each in ours.controlnet.parameters()) == 361_279_120


@pytest.mark.parametrize("model", published.VAES)
def test_vae_names_and_shapes_equal_diffusers(model: str) -> None:
    config = published.VAES[model]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(config)
        ours = AutoencoderKL(AutoencoderKLConfig.from_json(config))
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("model", published.TEXT_ENCODERS)
def test_text_encoder_names_and_shapes_equal_transformers(model: str) -> None:
    config, projection = published.TEXT_ENCODERS[model]
    peer = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    with torch.device("meta"):
        theirs = peer(transformers.CLIPTextConfig(**config))
        ours = CLIPTextEncoder(CLIPTextConfig.from_json(config), projection=projection)
    stored = {text_encoder_key(name)[0].name: shape for name, shape in shapes(theirs).items()}
    assert shapes(ours) == stored


@pytest.mark.parametrize("model", published.UNETS)
def test_published_sample_sizes_give_the_published_picture_sizes(model: str) -> None:
    unet = UNetConfig.from_json(published.UNETS[model])
    vae = AutoencoderKLConfig.from_json(published.VAES[model])
    assert unet.sample_size is not None
    assert unet.sample_size * vae.factor == vae.sample_size
