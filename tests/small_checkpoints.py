"""Small random-weight checkpoints of every supported kind, made and saved by diffusers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

KINDS = ("sd1", "sd2", "sdxl", "sd_inpainting", "sd_vq")
PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd_inpainting": diffusers.StableDiffusionInpaintPipeline,
    "sd_vq": diffusers.StableDiffusionPipeline,
}
_WIDTHS = (32, 32, 64, 64)  # of an autoencoder whose latents are an eighth as wide as pictures
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with three merges."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "th", "the</w>", "re", "red</w>"]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>")]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


def text_encoder(
    width: int, *, layers: int = 3, projection: int | None = None, act: str = "quick_gelu"
) -> Any:
    words = len(tokenizer())
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        hidden_act=act,
        projection_dim=projection or width,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def unet(context: int, **changes: Any) -> diffusers.UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": context,
        "attention_head_dim": 8,
        "layers_per_block": 2,
    }
    return diffusers.UNet2DConditionModel(**settings | changes)


def vae(*widths: int, **changes: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(**_levels(*widths) | changes)


def vq_model(*widths: int, **changes: Any) -> diffusers.VQModel:
    """VQGAN's autoencoder, whose entries lie where unscaled latents of unit variance do."""
    codebook = {"latent_channels": 3, "vq_embed_dim": 4, "num_vq_embeddings": 64}
    model = diffusers.VQModel(**_levels(*widths) | codebook | changes)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=1 / model.config.scaling_factor)
    return model


def _levels(*widths: int) -> dict[str, Any]:
    """An autoencoder's levels, of one block each."""
    levels = len(widths or _WIDTHS)
    return {
        "block_out_channels": widths or _WIDTHS,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "sample_size": 64,
    }


def controlnet(unet: diffusers.UNet2DConditionModel, **changes: Any) -> diffusers.ControlNetModel:
    """A ControlNet for a UNet, of which every layer has its say: those that are born zero, and the picture's."""
    torch.manual_seed(3)
    made = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False, **changes)
    for name, weight in made.named_parameters():
        if weight.ndim > 1 and ("cond_embedding" in name or not weight.any()):
            torch.nn.init.normal_(weight, std=(4 / weight[0].numel()) ** 0.5)
    return made


def parts(kind: str) -> dict[str, Any]:
    """The components of a small model of `kind`, as its diffusers pipeline takes them."""
    torch.manual_seed(0)
    if kind == "sdxl":
        return _sdxl_parts()
    velocity = kind == "sd2"
    linear = {"use_linear_projection": True, "attention_head_dim": (1, 1, 1)} if velocity else {}
    channels = {"in_channels": 9} if kind == "sd_inpainting" else {}
    return {
        "text_encoder": text_encoder(64, act="gelu" if velocity else "quick_gelu"),
        "tokenizer": tokenizer("!" if velocity else "<|endoftext|>"),
        "unet": unet(64, **linear, **channels),
        "vae": vq_model() if kind == "sd_vq" else vae(),
        "scheduler": diffusers.DDIMScheduler(
            **_SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction" if velocity else "epsilon",
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sdxl_parts() -> dict[str, Any]:
    return {
        "text_encoder": text_encoder(64),
        "text_encoder_2": text_encoder(128, projection=96, act="gelu"),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer("!"),
        "unet": unet(
            192,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 64, 128),
            layers_per_block=1,
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=96 + 6 * 16,
        ),
        "vae": vae(scaling_factor=0.13025),
        "scheduler": diffusers.EulerDiscreteScheduler(**_SCHEDULE),
    }


def save_smallest(folder: Path, autoencoder: Callable[..., Any] = vae) -> Path:
    """An SD 1 with every module's every kind of layer once, for tests of what surrounds the model."""
    torch.manual_seed(0)
    smallest = {
        "text_encoder": text_encoder(64, layers=1),
        "unet": unet(
            64,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "vae": autoencoder(32, 32),
    }
    PIPELINES["sd1"](**parts("sd1") | smallest).save_pretrained(folder)
    return folder


def pipeline(kind: str) -> Any:
    return PIPELINES[kind](**parts(kind))


def save(kind: str, folder: Path, **options: Any) -> Path:
    pipeline(kind).save_pretrained(folder, **options)
    settings = folder / "scheduler" / "scheduler_config.json"
    # SDXL is published with the first two, which its own scheduler's class would drop on saving.
    published = {"clip_sample": False, "set_alpha_to_one": False}
    settings.write_text(json.dumps(published | json.loads(settings.read_text())))
    return folder
