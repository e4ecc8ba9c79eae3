"""The stages of a latent diffusion pipeline as modules, and of which stages a checkpoint is made.

    encode        input_ids [n, t]                              -> encoder_hidden_states [n, t, d]
    encode_2      input_ids [n, t] of the second tokenizer      -> encoder_hidden_states [n, t, d2], text_embeds [n, p]
    denoise       sample [n, c, h, w], timestep [n], encoder_hidden_states [n, t, d + d2]
                  and, where the model has them, text_embeds [n, p], time_ids [n, 6], guidance [n], and of a ControlNet
                  control [n, 8h, 8w, 3] in 0..1, control_scale [n]
                                                              -> model_output [n, c_out, h, w]
    step          sample [n, c, h, w], history [n, 3, c, h, w], row [n, 13], noise [n, c, h, w], then what denoise is
                  told behind its timestep                    -> next_sample, next_history
    guided_step   the same, each told pair [n, 2, ...] with the unconditional first
    decode        latents [n, c, h, w]                          -> image [n, 8h, 8w, 3] in 0..1
    encode_image  image [n, 8h, 8w, 3] in 0..1                  -> latents [n, c, h, w]

Each text encoder is a stage of its own (`encode`, `encode_2`, `encode_3`), because their tokens differ; the family
joins what they give. Latents are scaled to the unit variance that the denoiser works on. unCLIP's other stages are in
`unclip_stages`; what steps around which is in `tintype.steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from tintype.models.autoencoder_kl import AutoencoderKL, decode_tiled, encode_tiled
from tintype.models.clip import CLIPTextEncoder
from tintype.models.flux import FluxTransformer
from tintype.models.fused import per_sample, scheduler_step
from tintype.models.joint import modulations
from tintype.models.sd3 import SD3Transformer
from tintype.models.stage import Denoising, Remembering, Stage
from tintype.models.t5 import T5Encoder
from tintype.models.unclip_stages import CASCADE, cascade_stage
from tintype.models.unet import UNet
from tintype.models.vq_model import VQModel
from tintype.steps import ROW, STEP_OF, STEPS, Step

Hidden = Literal["last", "penultimate"]
_SIZED, _STEERED = ("text_embeds", "time_ids"), ("control", "control_scale")
_ENCODERS = {"encode": "text_encoder", "encode_2": "text_encoder_2", "encode_3": "text_encoder_3"}


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


class DenoiseStage(Denoising):
    """Noisy latents, time and text -> the model's prediction of noise, velocity or image."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        sized = unet.config.addition_embed_type == "text_time"
        steered = unet.config.controlnet is not None
        self._told_of = ("encoder_hidden_states", *_SIZED * sized, *_STEERED * steered)
        self.inputs = ("sample", "timestep", *self._told_of)

    def forward(self, sample: Tensor, timestep: Tensor, *told: Tensor) -> Tensor:
        return self.unet(sample.to(self.dtype), timestep, *self._told(told)).float()

    def remember(self, *told: Tensor) -> tuple[Tensor, ...]:
        return self.unet.remember(*self._told(told))

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        return self.unet.at(remembered, times)

    def recall(
        self,
        remembered: tuple[Tensor, ...],
        told: Sequence[Tensor],
        sample: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        return self.unet.recall(remembered, told, sample.to(self.dtype)).float()

    def _told(self, told: Sequence[Tensor]) -> list[Tensor | None]:
        """What the UNet is told, in the weights' type, pixels as it convolves them.

        Times and sizes stay float32, as half precision lacks integers above 2048.
        """
        given = dict(zip(self._told_of, told, strict=True))
        wide = {name: x if name == "time_ids" else x.to(self.dtype) for name, x in given.items()}
        ordered = [wide.get(name) for name in ("encoder_hidden_states", *_SIZED)]
        if "control" in wide:
            ordered += [wide["control"].permute(0, 3, 1, 2), wide["control_scale"]]
        return ordered


class T5EncodeStage(Stage):
    """Token ids -> hidden states."""

    inputs = ("input_ids",)
    outputs = ("encoder_hidden_states",)

    def __init__(self, encoder: T5Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids).float()


class FlowDenoiseStage(Denoising):
    """Noisy latents, time, text and, for models distilled with it, guidance -> the model's velocity."""

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
        told = self._told(encoder_hidden_states, text_embeds)
        return self.transformer(sample.to(self.dtype), timestep, *told, *guidance).float()

    def remember(
        self, encoder_hidden_states: Tensor, text_embeds: Tensor, *guidance: Tensor
    ) -> tuple[Tensor, ...]:
        hidden, pooled = self._told(encoder_hidden_states, text_embeds)
        added = self.transformer.time_text_embed.remember(pooled, *guidance)
        return self.transformer.context_embedder(hidden), *added

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        conditioning = self.transformer.time_text_embed.at(times, remembered[1:])
        return tuple(each.told(conditioning) for each in modulations(self.transformer))

    def recall(
        self,
        remembered: tuple[Tensor, ...],
        told: Sequence[Tensor],
        sample: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        conditioning = dict(zip(modulations(self.transformer), told, strict=True))
        return self.transformer.denoised(sample.to(self.dtype), conditioning, remembered[0]).float()

    def _told(self, hidden: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """In the weights' type; times and guidance stay float32 until they are frequencies."""
        return hidden.to(self.dtype), pooled.to(self.dtype)


class StepStage(Remembering):
    """One step of any sampler around the denoiser, so that latents need not leave the device between two steps.

    ``row`` is `step_row` of each sample, ``history`` the quantities kept at earlier steps, newest first. Guidance
    is the linear kind; every input has its sample first, so that samples of one batch may stand at different steps.
    What a denoiser says behind its channels is how much noise it wants, of the conditional row. With ``apart`` the two
    of a pair run one after the other, in half the memory.
    """

    outputs = ("next_sample", "next_history")
    changing = 4

    def __init__(self, denoise: Remembering, *, guided: bool) -> None:
        super().__init__()
        self.denoise = denoise
        self.guided = guided
        self.apart: bool = False
        _, _, *told = denoise.inputs
        self.inputs = ("sample", "history", "row", "noise", *told)

    @property
    def remembers(self) -> bool:
        return not self.apart

    def forward(
        self, sample: Tensor, history: Tensor, row: Tensor, noise: Tensor, *told: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = _both(told) if self.guided else told
        denoise = partial(self._denoised, rows)
        return self._stepped(sample, history, row, noise, denoise)

    def remember(self, *told: Tensor) -> tuple[Tensor, ...]:
        return self.denoise.remember(*(_both(told) if self.guided else told))

    def time(self, sample: Tensor, history: Tensor, row: Tensor, noise: Tensor) -> Tensor:
        return row[:, 0]

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        return self.denoise.at(remembered, times.repeat(1, 2) if self.guided else times)

    def recall(
        self,
        remembered: tuple[Tensor, ...],
        told: Sequence[Tensor],
        sample: Tensor,
        history: Tensor,
        row: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        denoise = partial(self.denoise.recall, remembered, told)
        return self._stepped(sample, history, row, noise, denoise)

    def _denoised(self, told: Sequence[Tensor], seen: Tensor, time: Tensor) -> Tensor:
        if not (self.guided and self.apart):
            return self.denoise(seen, time, *told)
        halves = zip(*(rows.chunk(2) for rows in (seen, time, *told)), strict=True)
        return torch.cat([self.denoise(*half) for half in halves])

    def _stepped(
        self,
        sample: Tensor,
        history: Tensor,
        row: Tensor,
        noise: Tensor,
        denoise: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        time, c_in = row[:, 0], per_sample(row[:, 1], sample)
        seen, plain = c_in * sample, None
        if self.guided:
            both = denoise(torch.cat([seen, seen]), torch.cat([time, time]))
            plain, output = both.chunk(2)
        else:
            output = denoise(seen, time)
        channels = sample.shape[1]
        if output.shape[1] > channels:
            noise = noise * _spread(output[:, channels:], row[:, ROW:])
            output, plain = output[:, :channels], None if plain is None else plain[:, :channels]
        numbers = row[:, 2:ROW]
        stepped, kept = scheduler_step(sample, output, plain, history.unbind(1), numbers, noise)
        return stepped, torch.cat([kept[:, None], history[:, :-1]], dim=1)


def _spread(wanted: Tensor, logarithms: Tensor) -> Tensor:
    """`sampling.spread` of what is wanted [n, c, ...] between each sample's logarithms [n, 2]."""
    least, most = per_sample(logarithms, wanted).unbind(1)
    share = (wanted + 1) / 2
    return torch.exp(share * most + (1 - share) * least)


def _both(told: tuple[Tensor, ...]) -> list[Tensor]:
    """Pairs [n, 2, ...] as rows [2n, ...], the unconditional ones first."""
    return [pair.transpose(0, 1).flatten(0, 1) for pair in told]


class DecodeStage(Stage):
    """Latents -> image. With ``keep_overflow`` an infinite pixel becomes NaN, where clamping would hide it."""

    inputs = ("latents",)
    outputs = ("image",)

    def __init__(self, vae: AutoencoderKL | VQModel, *, keep_overflow: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.keep_overflow = keep_overflow
        self.tiled = False  # in overlapping tiles, whose memory does not grow with the picture

    def forward(self, latents: Tensor) -> Tensor:
        unscaled = self.vae.from_model(latents)
        decoded = (
            decode_tiled(self.vae, unscaled) if self.tiled else self.vae.decode(unscaled)
        ).float()
        image = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        if self.keep_overflow:
            image = torch.where(decoded.isfinite().permute(0, 2, 3, 1), image, torch.nan)
        return image


class EncodeImageStage(Stage):
    """Image -> the mean of its latents, or those that no codebook has rounded yet."""

    inputs = ("image",)
    outputs = ("latents",)

    def __init__(self, vae: AutoencoderKL | VQModel) -> None:
        super().__init__()
        self.vae = vae
        self.tiled = False

    def forward(self, image: Tensor) -> Tensor:
        pixels = (image.permute(0, 3, 1, 2) * 2 - 1).to(self.dtype)
        means = encode_tiled(self.vae, pixels) if self.tiled else self.vae.means(pixels)
        return self.vae.to_model(means.float())


def _is_cascade(components: Collection[str]) -> bool:
    """Whether these are unCLIP's."""
    return "text_proj" in components


def stage_names(components: Collection[str]) -> tuple[str, ...]:
    """The stages of a checkpoint with these components, in the order in which they run."""
    if _is_cascade(components):
        walked = ("encode", *(stage for stage, part in CASCADE.items() if part in components))
    else:
        encoders = [name for name in _ENCODERS if _ENCODERS[name] in components]
        walked = (*encoders, "denoise", "decode", "encode_image")
    return tuple(chain.from_iterable(map(_with_steps, walked)))


def _with_steps(stage: str) -> tuple[str, ...]:
    steps = (STEP_OF.get(Step(stage, guided)) for guided in (False, True))
    return stage, *(name for name in steps if name)


def stage_component(name: str, components: Collection[str]) -> str:
    """The one component that stage ``name`` is made of."""
    name = STEPS[name].model if name in STEPS else name
    if _is_cascade(components):
        return CASCADE.get(name, _ENCODERS["encode"])
    if name == "denoise":
        return "transformer" if "transformer" in components else "unet"
    return _ENCODERS.get(name, "vae")


def build_stage(
    name: str, components: Collection[str], component: Callable[[str], nn.Module]
) -> Stage:
    """Make stage ``name`` out of the module that ``component`` hands out."""
    part = stage_component(name, components)
    if name in _ENCODERS:
        return _text_stage(name, components, component(part))
    if name in STEPS:
        return step_stage(name, build_stage(STEPS[name].model, components, component))
    if _is_cascade(components):
        return cascade_stage(name, component(part))
    if name == "denoise":
        return (FlowDenoiseStage if part == "transformer" else DenoiseStage)(component(part))
    return {"decode": DecodeStage, "encode_image": EncodeImageStage}[name](component(part))


def step_stage(name: str, model: Remembering) -> StepStage:
    """The step of this name around a stage that there is."""
    return StepStage(model, guided=STEPS[name].guided)


def _text_stage(name: str, components: Collection[str], encoder: nn.Module) -> Stage:
    """SD 1 and 2 condition on CLIP's last layer; whoever has more encoders, on the penultimate ones and pooled text;
    unCLIP on the last and pooled text."""
    if isinstance(encoder, T5Encoder):
        return T5EncodeStage(encoder)
    if _is_cascade(components):
        return TextEncodeStage(encoder, "last", pooled=True)
    if "transformer" in components:
        return TextEncodeStage(encoder, "penultimate", pooled=True)
    alone = "text_encoder_2" not in components
    return TextEncodeStage(encoder, "last" if alone else "penultimate", pooled=name == "encode_2")
