"""The stages of a latent UNet pipeline as modules: what a backend runs and what an engine is exported from.

Faces are the same at every precision: float32 arrays (int64 token ids) in and out, cast to the weights' type inside.

    encode        input_ids [n, t]                              -> encoder_hidden_states [n, t, d]
    encode_2      input_ids [n, t] of the second tokenizer      -> encoder_hidden_states [n, t, d2], text_embeds [n, p]
    denoise       sample [n, c, h, w], timestep [n], encoder_hidden_states [n, t, d + d2]
                  and, where the model has them, text_embeds [n, p], time_ids [n, 6]   -> model_output [n, c_out, h, w]
    decode        latents [n, c, h, w]                          -> image [n, 8h, 8w, 3] in 0..1
    encode_image  image [n, 8h, 8w, 3] in 0..1                  -> latents [n, c, h, w]

SDXL's two text encoders are two stages, because their tokens differ; the family joins the hidden states of `encode`
and `encode_2` along the last axis. Latents are scaled to the unit variance that the denoiser works on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import torch
from torch import Tensor, nn

from tintype.models.autoencoder_kl import AutoencoderKL
from tintype.models.clip import CLIPTextEncoder
from tintype.models.unet import UNet

Hidden = Literal["last", "penultimate"]


class Stage(nn.Module):
    """A pure function of named arrays; ``inputs`` and ``outputs`` are the names in the order of ``forward``."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype


class TextEncodeStage(Stage):
    """Token ids -> hidden states: SD 1 and 2 condition on the last, SDXL on the penultimate layer."""

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
    second = ("encode_2",) if "text_encoder_2" in components else ()
    return ("encode", *second, "denoise", "decode", "encode_image")


def build_stage(
    name: str, components: Collection[str], component: Callable[[str], nn.Module]
) -> Stage:
    """Make stage ``name`` out of the modules that ``component`` hands out."""
    two = "text_encoder_2" in components
    makers: dict[str, Callable[[], Stage]] = {
        "encode": lambda: TextEncodeStage(
            component("text_encoder"), "penultimate" if two else "last"
        ),
        "encode_2": lambda: TextEncodeStage(
            component("text_encoder_2"), "penultimate", pooled=True
        ),
        "denoise": lambda: DenoiseStage(component("unet")),
        "decode": lambda: DecodeStage(component("vae")),
        "encode_image": lambda: EncodeImageStage(component("vae")),
    }
    return makers[name]()
