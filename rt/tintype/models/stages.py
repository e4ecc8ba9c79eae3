"""The stages of a latent diffusion pipeline as modules: what a backend runs and what an engine is exported from.

Faces are the same at every precision: float32 arrays (int64 token ids) in and out, cast to the weights' type inside.

    encode        input_ids [n, t]                              -> encoder_hidden_states [n, t, d]
    encode_2      input_ids [n, t] of the second tokenizer      -> encoder_hidden_states [n, t, d2], text_embeds [n, p]
    denoise       sample [n, c, h, w], timestep [n], encoder_hidden_states [n, t, d + d2]
                  and, where the model has them, text_embeds [n, p], time_ids [n, 6], guidance [n]
                                                              -> model_output [n, c_out, h, w]
    decode        latents [n, c, h, w]                          -> image [n, 8h, 8w, 3] in 0..1
    encode_image  image [n, 8h, 8w, 3] in 0..1                  -> latents [n, c, h, w]

Each text encoder is a stage of its own (`encode`, `encode_2`, `encode_3`), because their tokens differ; the family
joins what they give. Latents are scaled to the unit variance that the denoiser works on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import torch
from torch import Tensor, nn

from tintype.models.autoencoder_kl import AutoencoderKL
from tintype.models.clip import CLIPTextEncoder
from tintype.models.flux import FluxTransformer
from tintype.models.sd3 import SD3Transformer
from tintype.models.t5 import T5Encoder
from tintype.models.unet import UNet

Hidden = Literal["last", "penultimate"]
_ENCODERS = {"encode": "text_encoder", "encode_2": "text_encoder_2", "encode_3": "text_encoder_3"}


class Stage(nn.Module):
    """A pure function of named arrays; ``inputs`` and ``outputs`` are the names in the order of ``forward``."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype


class TextEncodeStage(Stage):
    """Token ids -> CLIP's hidden states of its last or penultimate layer, and pooled text where asked for."""

    inputs = ("input_ids",)

    def __init__(
        self, encoder: CLIPTextEncoder, output: Hidden = "last", *, pooled: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.output = output
        self.pooled = pooled
        self.outputs = (
            ("encoder_hidden_states", "text_embeds") if pooled else ("encoder_hidden_states",)
        )

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        encoding = self.encoder(input_ids)
        hidden = encoding.last_hidden_state if self.output == "last" else encoding.penultimate
        return (hidden.float(), encoding.pooled.float()) if self.pooled else hidden.float()


class DenoiseStage(Stage):
    """Noisy latents, time and text -> the model's prediction of noise, velocity or image."""

    outputs = ("model_output",)

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        added = (
            ("text_embeds", "time_ids") if unet.config.addition_embed_type == "text_time" else ()
        )
        self.inputs = ("sample", "timestep", "encoder_hidden_states", *added)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        dtype = self.dtype
        # Times and sizes stay float32: half precision cannot hold every integer above 2048.
        pooled = None if text_embeds is None else text_embeds.to(dtype)
        return self.unet(
            sample.to(dtype), timestep, encoder_hidden_states.to(dtype), pooled, time_ids
        ).float()


class T5EncodeStage(Stage):
    """Token ids -> hidden states."""

    inputs = ("input_ids",)
    outputs = ("encoder_hidden_states",)

    def __init__(self, encoder: T5Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids).float()


class FlowDenoiseStage(Stage):
    """Noisy latents, time, text and, for models distilled with it, guidance -> the model's velocity."""

    outputs = ("model_output",)

    def __init__(self, transformer: SD3Transformer | FluxTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        guided = getattr(transformer.config, "guidance_embeds", False)
        told = ("guidance",) if guided else ()
        self.inputs = ("sample", "timestep", "encoder_hidden_states", "text_embeds", *told)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        *guidance: Tensor,
    ) -> Tensor:
        dtype = self.dtype
        # Times and guidance stay float32 until they are frequencies.
        hidden, pooled = encoder_hidden_states.to(dtype), text_embeds.to(dtype)
        return self.transformer(sample.to(dtype), timestep, hidden, pooled, *guidance).float()


class DecodeStage(Stage):
    """Latents -> image. With ``keep_overflow`` an infinite pixel becomes NaN, where clamping would hide it."""

    inputs = ("latents",)
    outputs = ("image",)

    def __init__(self, vae: AutoencoderKL, *, keep_overflow: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.keep_overflow = keep_overflow

    def forward(self, latents: Tensor) -> Tensor:
        decoded = self.vae.decode(self.vae.from_model(latents).to(self.dtype)).float()
        image = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        if self.keep_overflow:
            image = torch.where(decoded.isfinite().permute(0, 2, 3, 1), image, torch.nan)
        return image


class EncodeImageStage(Stage):
    """Image -> the mean of its latents."""

    inputs = ("image",)
    outputs = ("latents",)

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        pixels = (image.permute(0, 3, 1, 2) * 2 - 1).to(self.dtype)
        return self.vae.to_model(self.vae.encode(pixels)[0].float())


def stage_names(components: Collection[str]) -> tuple[str, ...]:
    """The stages of a checkpoint with these components, in the order in which they run."""
    encoders = [name for name in _ENCODERS if _ENCODERS[name] in components]
    return (*encoders, "denoise", "decode", "encode_image")


def build_stage(
    name: str, components: Collection[str], component: Callable[[str], nn.Module]
) -> Stage:
    """Make stage ``name`` out of the modules that ``component`` hands out."""
    if name in _ENCODERS:
        return _text_stage(name, components, component(_ENCODERS[name]))
    if name == "denoise":
        if "transformer" in components:
            return FlowDenoiseStage(component("transformer"))
        return DenoiseStage(component("unet"))
    return {"decode": DecodeStage, "encode_image": EncodeImageStage}[name](component("vae"))


def _text_stage(name: str, components: Collection[str], encoder: nn.Module) -> Stage:
    """SD 1 and 2 condition on CLIP's last layer; whoever has more encoders, on the penultimate ones and pooled text."""
    if isinstance(encoder, T5Encoder):
        return T5EncodeStage(encoder)
    if "transformer" in components:
        return TextEncodeStage(encoder, "penultimate", pooled=True)
    alone = "text_encoder_2" not in components
    return TextEncodeStage(encoder, "last" if alone else "penultimate", pooled=name == "encode_2")
