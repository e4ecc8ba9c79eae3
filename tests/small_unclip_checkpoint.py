"""Small random-weight unCLIP checkpoints in Karlo's form, made and saved by diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import small_checkpoints as small

WIDTH = 32  # of CLIP's embeddings
SIDE = 32  # of the pictures that it embeds
_CONTEXT = 24
_CHANNELS = (32, 64)


def _enlarging() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=32,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        add_attention=False,
    )


def decoder(**changes: Any) -> diffusers.UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "block_out_channels": _CHANNELS,
        "layers_per_block": 1,
        "cross_attention_dim": _CONTEXT,
        "attention_head_dim": 16,
        "class_embed_type": "identity",
        "resnet_time_scale_shift": "scale_shift",
    }
    return diffusers.UNet2DConditionModel(**settings | changes)


def parts() -> dict[str, Any]:
    """The components, as diffusers' pipeline takes them; what Karlo's own weights set to zero is not left so."""
    torch.manual_seed(0)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH
    )
    text_proj = UnCLIPTextProjModel(
        clip_embeddings_dim=WIDTH, time_embed_dim=4 * _CHANNELS[0], cross_attention_dim=_CONTEXT
    )
    for parameter in (*prior.parameters(recurse=False), *text_proj.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = {"decoder": decoder(), "super_res_first": _enlarging(), "super_res_last": _enlarging()}
    for (
        unet
    ) in pixels.values():  # else steps would enlarge every rounding, as no trained model does
        torch.nn.init.normal_(unet.conv_out.weight, std=0.01)
    variance = "fixed_small_log"
    return {
        "text_encoder": small.text_encoder(WIDTH, projection=WIDTH),
        "tokenizer": small.tokenizer("!"),
        "prior": prior,
        "text_proj": text_proj,
        **pixels,
        "prior_scheduler": diffusers.UnCLIPScheduler(
            prediction_type="sample", variance_type=variance, clip_sample_range=5.0
        ),
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(variance_type=variance),
    }


def variation_parts() -> dict[str, Any]:
    """The same for the pipeline that varies pictures."""
    kept = {name: part for name, part in parts().items() if not name.startswith("prior")}
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
    )
    torch.manual_seed(1)
    return kept | {
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "feature_extractor": CLIPImageProcessor(**sides),
    }


PIPELINES = {
    "unclip": (diffusers.UnCLIPPipeline, parts),
    "unclip_variation": (diffusers.UnCLIPImageVariationPipeline, variation_parts),
}


def save(kind: str, folder: Path) -> Path:
    """A folder in diffusers layout."""
    pipeline, components = PIPELINES[kind]
    pipeline(**components()).save_pretrained(folder)
    index = folder / "model_index.json"
    named = json.loads(index.read_text())
    named["text_proj"][0] = "unclip"  # as published; what diffusers saves it does not find again
    index.write_text(json.dumps(named))
    return folder
