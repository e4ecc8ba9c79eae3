"""Puts the trained parts together as a checkpoint folder in diffusers layout, in half precision."""

from __future__ import annotations

from pathlib import Path

from tintype.models.autoencoder_kl import AutoencoderKL
from tintype.models.clip import CLIPTextEncoder
from tintype.models.unet import UNet

from ..save import published_config, save_component, write_json
from .denoiser import SCHEDULER_CONFIG

_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.31.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", SCHEDULER_CONFIG["_class_name"]],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_text_encoder(encoder: CLIPTextEncoder, folder: Path) -> None:
    """Without the contrastive projection, which no pipeline uses."""
    end = encoder.config.eos_token_id
    config = published_config(
        encoder.config,
        "CLIPTextModel",
        architectures=["CLIPTextModel"],
        model_type="clip_text_model",
        bos_token_id=end - 1,
        pad_token_id=end,
    )
    bare = CLIPTextEncoder(encoder.config)
    bare.load_state_dict({n: t for n, t in encoder.state_dict().items() if n in bare.state_dict()})
    save_component(bare, config, folder, "model.safetensors")


def save_autoencoder(vae: AutoencoderKL, folder: Path) -> None:
    levels = len(vae.config.block_out_channels)
    config = published_config(
        vae.config,
        "AutoencoderKL",
        act_fn="silu",
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    save_component(vae, config, folder, "diffusion_pytorch_model.safetensors")


def save_denoiser(unet: UNet, folder: Path) -> None:
    config = published_config(unet.config, "UNet2DConditionModel", act_fn="silu")
    save_component(unet, config, folder, "diffusion_pytorch_model.safetensors")


def save_index(folder: Path) -> None:
    """model_index.json and the scheduler's configuration."""
    write_json(folder / "model_index.json", _MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
