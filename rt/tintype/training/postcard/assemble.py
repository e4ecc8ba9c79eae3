"""Puts the trained parts together as a checkpoint folder in diffusers layout, in half precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tintype.models.autoencoder_kl import AutoencoderKL
from tintype.models.clip import CLIPTextEncoder
from tintype.models.pixel_unet import PixelUNet
from tintype.models.prior import Prior
from tintype.models.sd3 import SD3Transformer
from tintype.models.unclip_projection import UnclipProjection
from tintype.models.unet import UNet

from ..save import published_config, save_component, write_json
from . import denoiser, flow, unclip

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = {
    "_diffusers_version": "0.31.0",
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_UNCLIP_INDEX = {
    "_class_name": "UnCLIPPipeline",
    "_diffusers_version": "0.31.0",
    "decoder": ["diffusers", "UNet2DConditionModel"],
    "prior": ["diffusers", "PriorTransformer"],
    **{name: ["diffusers", "UnCLIPScheduler"] for name in unclip.SCHEDULER_CONFIGS},
    "super_res_first": ["diffusers", "UNet2DModel"],
    "super_res_last": ["diffusers", "UNet2DModel"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_proj": ["unclip", "UnCLIPTextProjModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
_UNET_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    **_INDEX,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", denoiser.SCHEDULER_CONFIG["_class_name"]],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
# Encoders that an index names as null are stood in for by zeros; those of SD3 that this one does not name never were.
_FLOW_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    **_INDEX,
    "scheduler": ["diffusers", flow.SCHEDULER_CONFIG["_class_name"]],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
}


def save_text_encoder(encoder: CLIPTextEncoder, folder: Path) -> None:
    """Without the contrastive projection, which the UNet does not use."""
    bare = CLIPTextEncoder(encoder.config)
    bare.load_state_dict({n: t for n, t in encoder.state_dict().items() if n in bare.state_dict()})
    _save_clip(bare, "CLIPTextModel", folder)


def _save_clip(encoder: CLIPTextEncoder, name: str, folder: Path) -> None:
    end = encoder.config.eos_token_id
    config = published_config(
        encoder.config,
        name,
        architectures=[name],
        model_type="clip_text_model",
        bos_token_id=end - 1,
        pad_token_id=end,
    )
    save_component(encoder, config, folder, "model.safetensors")


def save_autoencoder(vae: AutoencoderKL, folder: Path) -> None:
    levels = len(vae.config.block_out_channels)
    config = published_config(
        vae.config,
        "AutoencoderKL",
        act_fn="silu",
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    save_component(vae, config, folder, _WEIGHTS)


def save_denoiser(unet: UNet, folder: Path) -> None:
    config = published_config(unet.config, "UNet2DConditionModel", act_fn="silu")
    save_component(unet, config, folder, _WEIGHTS)


def save_index(folder: Path) -> None:
    """model_index.json and the scheduler's configuration."""
    _save_index(folder, _UNET_INDEX, denoiser.SCHEDULER_CONFIG)


def _save_index(folder: Path, index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def begin_flow(start: Path, encoder: CLIPTextEncoder, folder: Path) -> None:
    """A flow checkpoint but for its transformer: autoencoder, judge and tokenizer of ``start``, and this encoder."""
    shutil.copytree(start / "vae", folder / "vae", dirs_exist_ok=True)
    _begin(start, encoder, folder)
    _save_index(folder, _FLOW_INDEX, flow.SCHEDULER_CONFIG)


def begin_unclip(start: Path, encoder: CLIPTextEncoder, folder: Path) -> None:
    """An unCLIP checkpoint but for what is trained: judge and tokenizer of ``start``, and this encoder."""
    _begin(start, encoder, folder)
    write_json(folder / "model_index.json", _UNCLIP_INDEX)
    for name, config in unclip.SCHEDULER_CONFIGS.items():
        written = {"_class_name": "UnCLIPScheduler", "prediction_type": "sample", **config}
        write_json(folder / name / "scheduler_config.json", written)


def _begin(start: Path, encoder: CLIPTextEncoder, folder: Path) -> None:
    for name in ("judge", "tokenizer"):
        shutil.copytree(start / name, folder / name, dirs_exist_ok=True)
    settings = folder / "tokenizer" / "tokenizer_config.json"
    length = {"model_max_length": encoder.config.max_position_embeddings}
    write_json(settings, json.loads(settings.read_text(encoding="utf-8")) | length)
    _save_clip(encoder, "CLIPTextModelWithProjection", folder / "text_encoder")


def save_prior(prior: Prior, folder: Path) -> None:
    save_component(prior, published_config(prior.config, "PriorTransformer"), folder, _WEIGHTS)


def save_projection(projection: UnclipProjection, folder: Path) -> None:
    config = published_config(projection.config, "UnCLIPTextProjModel")
    save_component(projection, config, folder, _WEIGHTS)


def save_pixel_unet(unet: PixelUNet, folder: Path) -> None:
    if unet.config.cross_attention_dim is None:
        config = published_config(unet.config, "UNet2DModel", add_attention=False)
        del config["cross_attention_dim"]
    else:
        middle = "UNetMidBlock2DSimpleCrossAttn"
        config = published_config(unet.config, "UNet2DConditionModel", mid_block_type=middle)
    save_component(unet, config, folder, _WEIGHTS)


def save_transformer(transformer: SD3Transformer, folder: Path) -> None:
    config = published_config(transformer.config, "SD3Transformer2DModel")
    save_component(transformer, config, folder, _WEIGHTS)
