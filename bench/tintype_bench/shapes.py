"""Published generators as shapes: configurations without weights, at full size and in a tiny form of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tintype.errors import RequestError
from tintype_bench import published_configs as published

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One component: its published class, the library that has it, its `config.json`."""

    architecture: str
    library: str
    config: Config


@dataclass(frozen=True)
class Shape:
    """A generator as diffusers' folder describes it; ``tokenizers`` are in the order of the text encoders, and
    ``schedulers`` go by the folders that they lie in."""

    pipeline: str
    parts: Mapping[str, Part]
    tokenizers: tuple[str, ...]
    schedulers: Mapping[str, Config]


def _clip(name: str) -> Part:
    config, projects = published.TEXT_ENCODERS[name]
    architecture = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
    return Part(architecture, "transformers", config)


_T5 = Part("T5EncoderModel", "transformers", published.T5_XXL)


def _diffusers(architecture: str, config: Config) -> Part:
    return Part(architecture, "diffusers", config)


def _vae(name: str) -> Part:
    return _diffusers("AutoencoderKL", published.VAES[name])


def _flux(name: str) -> Shape:
    transformer = published.FLUX_TRANSFORMERS[name]
    return Shape(
        "FluxPipeline",
        {
            "text_encoder": _clip("flux1"),
            "text_encoder_2": _T5,
            "transformer": _diffusers("FluxTransformer2DModel", transformer),
            "vae": _vae("flux1"),
        },
        ("clip", "t5"),
        {"scheduler": published.FLUX_SCHEDULERS[name]},
    )


SHAPES = {
    "sd15": Shape(
        "StableDiffusionPipeline",
        {
            "text_encoder": _clip("sd15"),
            "unet": _diffusers("UNet2DConditionModel", published.UNETS["sd15"]),
            "vae": _vae("sd15"),
        },
        ("clip",),
        {"scheduler": published.SD15_DDIM},
    ),
    "sdxl": Shape(
        "StableDiffusionXLPipeline",
        {
            "text_encoder": _clip("sdxl"),
            "text_encoder_2": _clip("sdxl_2"),
            "unet": _diffusers("UNet2DConditionModel", published.UNETS["sdxl"]),
            "vae": _vae("sdxl"),
        },
        ("clip", "clip"),
        {"scheduler": published.SDXL_SCHEDULER},
    ),
    "sd3-medium": Shape(
        "StableDiffusion3Pipeline",
        {
            "text_encoder": _clip("sd3"),
            "text_encoder_2": _clip("sd3_2"),
            "text_encoder_3": _T5,
            "transformer": _diffusers(
                "SD3Transformer2DModel", published.SD3_TRANSFORMERS["sd3-medium"]
            ),
            "vae": _vae("sd3-medium"),
        },
        ("clip", "clip", "t5"),
        {"scheduler": published.SD3_SCHEDULER},
    ),
    "flux1-dev": _flux("flux1-dev"),
    "flux1-schnell": _flux("flux1-schnell"),
    "karlo": Shape(
        "UnCLIPPipeline",
        {
            "text_encoder": _clip("karlo"),
            "prior": _diffusers("PriorTransformer", published.KARLO["prior"]),
            # in diffusers, but with the pipeline
            "text_proj": replace(
                _diffusers("UnCLIPTextProjModel", published.KARLO["text_proj"]), library="unclip"
            ),
            "decoder": _diffusers("UNet2DConditionModel", published.KARLO["decoder"]),
            "super_res_first": _diffusers("UNet2DModel", published.KARLO["super_res_first"]),
            "super_res_last": _diffusers("UNet2DModel", published.KARLO["super_res_last"]),
        },
        ("clip",),
        published.KARLO_SCHEDULERS,
    ),
}

# What is smaller in the tiny form; every kind of layer stays. Widths that must agree with another part's agree.
_TINY_VIT_L = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "projection_dim": 64,
}
_TINY_BIG_G = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 96,
}
_TINY_T5 = {"d_model": 192, "d_ff": 256, "num_heads": 4, "d_kv": 32, "num_layers": 2}
_TINY_VAE = {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "sample_size": 64}
_TINY_HEADS = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 192}
_TINY: dict[str, dict[str, Config]] = {
    "sd15": {
        "text_encoder": _TINY_VIT_L,
        "unet": {
            "block_out_channels": [32, 64, 64, 64],
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 64,
            "sample_size": 8,
        },
    },
    "sdxl": {
        "text_encoder": _TINY_VIT_L,
        "text_encoder_2": _TINY_BIG_G,
        "unet": {
            "block_out_channels": [32, 64, 64],
            "layers_per_block": 1,
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [1, 1, 2],
            "cross_attention_dim": 192,
            "projection_class_embeddings_input_dim": 96 + 6 * 16,
            "addition_time_embed_dim": 16,
            "sample_size": 8,
        },
    },
    "sd3-medium": {
        "text_encoder": _TINY_VIT_L,
        "text_encoder_2": _TINY_BIG_G,
        "text_encoder_3": _TINY_T5,
        "transformer": {
            **_TINY_HEADS,
            "attention_head_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 64 + 96,
            "pos_embed_max_size": 16,
            "sample_size": 8,
        },
    },
}
_TINY["flux1-dev"] = _TINY["flux1-schnell"] = {
    "text_encoder": _TINY_VIT_L,
    "text_encoder_2": _TINY_T5,
    "transformer": {
        **_TINY_HEADS,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12],
        "pooled_projection_dim": 64,
    },
}


_TINY_PIXELS = {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1}
_TINY["karlo"] = {
    "text_encoder": _TINY_VIT_L,
    "prior": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "embedding_dim": 64,
    },
    "text_proj": {
        "clip_embeddings_dim": 64,
        "time_embed_dim": 128,
        "cross_attention_dim": 64,
    },
    "decoder": {
        **_TINY_PIXELS,
        "cross_attention_dim": 64,
        "attention_head_dim": 32,
        "sample_size": 16,
    },
    "super_res_first": {**_TINY_PIXELS, "sample_size": 64},
    "super_res_last": {**_TINY_PIXELS, "sample_size": 64},
}


def find_shape(name: str, *, tiny: bool = False) -> Shape:
    """The shape of that name, or its tiny form: the same layers, few and narrow."""
    if name not in SHAPES:
        raise RequestError(f"shape {name!r} is unknown; choose one of {', '.join(SHAPES)}")
    return _shrunk(SHAPES[name], {**_TINY[name], "vae": _TINY_VAE}) if tiny else SHAPES[name]


def _shrunk(shape: Shape, changes: Mapping[str, Config]) -> Shape:
    parts = {
        name: replace(part, config={**part.config, **changes[name]})
        for name, part in shape.parts.items()
    }
    return replace(shape, parts=parts)
