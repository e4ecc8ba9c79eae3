"""What is published of a latent UNet, and of the ControlNet that may steer it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tintype.errors import CheckpointError
from tintype.models.config import from_json

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "conditioning_channels": (3,),
    "controlnet_conditioning_channel_order": ("rgb",),
    "attention_type": ("default",),
    "addition_embed_type_num_heads": (64,),
    # a precision hint: attention scores are accumulated in float32 here in any case
    "upcast_attention": (True, False),
}


@dataclass(frozen=True)
class UNetConfig:
    """Fields as in the published ``unet/config.json``. ``attention_head_dim`` holds the number of heads, a misnomer
    that every published file keeps. ``controlnet`` is of the ControlNet beside it, where there is one."""

    sample_size: int | None = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    controlnet: ControlNetConfig | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], component: str = "unet") -> UNetConfig:
        own = {name: value for name, value in raw.items() if name != "controlnet"}
        config = from_json(cls, own, component=component, neutral=_NEUTRAL)
        if not isinstance(config.cross_attention_dim, int):
            raise CheckpointError(
                f"{component}/config.json asks for cross_attention_dim={raw['cross_attention_dim']!r}; "
                "possible here: one number for all levels"
            )
        if raw.get("controlnet") is None:
            return config
        return replace(config, controlnet=ControlNetConfig.from_json(raw["controlnet"]))


@dataclass(frozen=True)
class ControlNetConfig:
    """The published ``controlnet/config.json``: an ``encoder`` with a UNet's fields, and the widths of what reads the
    picture on its way to latents' size, which it halves between each two."""

    encoder: UNetConfig
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ControlNetConfig:
        name = "conditioning_embedding_out_channels"
        own = {key: value for key, value in raw.items() if key != name}
        config = cls(UNetConfig.from_json(own, "controlnet"))
        widths = raw.get(name) or config.conditioning_embedding_out_channels
        if not isinstance(widths, list | tuple) or not all(isinstance(w, int) for w in widths):
            raise CheckpointError(
                f"controlnet/config.json: {name}={widths!r} is not a list of widths"
            )
        return replace(config, conditioning_embedding_out_channels=tuple(widths))
