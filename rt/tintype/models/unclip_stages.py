"""unCLIP's stages behind the text encoder's, as modules: a prior, and pixels drawn and enlarged.

    prior         sample [n, e], timestep [n], encoder_hidden_states [n, t, e], text_embeds [n, e], text_mask [n, t]
                                                              -> model_output [n, e]
    embed         latents [n, e], where the prior's steps end   -> image_embeds [n, e]
    embed_image   image [n, s, s, 3] in 0..1                    -> image_embeds [n, e], in the place of the two before
    project       image_embeds [n, e], shown [n], encoder_hidden_states [n, t, e], text_embeds [n, e]
                                                              -> context [n, k, d], added [n, m]
    denoise       sample [n, 3, h, w], timestep [n], context [n, k, d], context_mask [n, k], added [n, m]
                                                              -> model_output [n, 6, h, w]
    enlarge       sample [n, 3, H, W], timestep [n], low_res [n, 3, H, W] -> model_output [n, 3, H, W]
    enlarge_last  the same, for the last step

Masks are 1 where a token is read; ``shown`` is 0 where the image embedding is not, for guidance; ``low_res`` is the
small picture at the large size. Around prior, denoise and what enlarges there are steps, as `stages` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tintype.models.clip import DEVIATION, MEAN, CLIPImageEncoder
from tintype.models.pixel_unet import PixelUNet
from tintype.models.prior import Prior
from tintype.models.stage import Denoising, Stage
from tintype.models.unclip_projection import UnclipProjection

# The component of each stage, in the order in which they run.
CASCADE = {
    "prior": "prior",
    "embed": "prior",
    "embed_image": "image_encoder",
    "project": "text_proj",
    "denoise": "decoder",
    "enlarge": "super_res_first",
    "enlarge_last": "super_res_last",
}


class PriorStage(Denoising):
    """A noisy image embedding, time and text -> the clean one."""

    inputs = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "text_mask")

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
    ) -> Tensor:
        told = (each.to(self.dtype) for each in (encoder_hidden_states, text_embeds, text_mask))
        return self.prior(sample.to(self.dtype), timestep, *told).float()

    def remember(self, *told: Tensor) -> tuple[Tensor, ...]:
        return self.prior.remember(*(each.to(self.dtype) for each in told))

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        return self.prior.at(remembered, times)

    def recall(
        self,
        remembered: tuple[Tensor, ...],
        told: Sequence[Tensor],
        sample: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        return self.prior.recall(remembered, told, sample.to(self.dtype)).float()


class EmbedStage(Stage):
    """Where the prior's steps end -> an image embedding of CLIP's."""

    inputs = ("latents",)
    outputs = ("image_embeds",)

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, latents: Tensor) -> Tensor:
        return self.prior.embedded(latents.to(self.dtype)).float()


class EmbedImageStage(Stage):
    """A picture -> its image embedding of CLIP's."""

    inputs = ("image",)
    outputs = ("image_embeds",)

    def __init__(self, encoder: CLIPImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(each, device=image.device) for each in (MEAN, DEVIATION))
        pixels = ((image - mean) / deviation).permute(0, 3, 1, 2)
        return self.encoder(pixels.to(self.dtype)).float()


class ProjectStage(Stage):
    """Image embedding and text -> what the decoder is told."""

    inputs = ("image_embeds", "shown", "encoder_hidden_states", "text_embeds")
    outputs = ("context", "added")

    def __init__(self, projection: UnclipProjection) -> None:
        super().__init__()
        self.projection = projection

    def forward(
        self,
        image_embeds: Tensor,
        shown: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
    ) -> tuple[Tensor, Tensor]:
        told = (image_embeds, shown, encoder_hidden_states, text_embeds)
        context, added = self.projection(*(each.to(self.dtype) for each in told))
        return context.float(), added.float()


class PixelDenoiseStage(Denoising):
    """Noisy pixels, time and context -> the noise in them, and how much a step should add."""

    inputs = ("sample", "timestep", "context", "context_mask", "added")

    def __init__(self, unet: PixelUNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, added: Tensor
    ) -> Tensor:
        tokens = (context.to(self.dtype), context_mask)
        return self.unet(sample.to(self.dtype), timestep, tokens, added.to(self.dtype)).float()

    def remember(self, context: Tensor, context_mask: Tensor, added: Tensor) -> tuple[Tensor, ...]:
        pairs = self.unet.remember(context.to(self.dtype))
        return context_mask.to(self.dtype), added.to(self.dtype), *pairs

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        return self.unet.at(times, remembered[1], self.dtype)

    def recall(
        self,
        remembered: tuple[Tensor, ...],
        told: Sequence[Tensor],
        sample: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        read, _, *pairs = remembered
        return self.unet.recall(told, sample.to(self.dtype), pairs, read).float()


class EnlargeStage(Denoising):
    """Noisy pixels, time and the small picture -> the noise in them."""

    inputs = ("sample", "timestep", "low_res")

    def __init__(self, unet: PixelUNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, low_res: Tensor) -> Tensor:
        return self.unet(self._beside(sample, low_res), timestep).float()

    def remember(self, low_res: Tensor) -> tuple[Tensor, ...]:
        return (low_res.to(self.dtype),)

    def at(self, remembered: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        return self.unet.at(times, None, self.dtype)

    def recall(
        self,
        remembered: tuple[Tensor, ...],
        told: Sequence[Tensor],
        sample: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        return self.unet.recall(told, self._beside(sample, *remembered)).float()

    def _beside(self, sample: Tensor, low_res: Tensor) -> Tensor:
        return torch.cat([sample, low_res], dim=1).to(self.dtype)


_STAGES: dict[str, type[Stage]] = {
    "prior": PriorStage,
    "embed": EmbedStage,
    "embed_image": EmbedImageStage,
    "project": ProjectStage,
    "denoise": PixelDenoiseStage,
    "enlarge": EnlargeStage,
    "enlarge_last": EnlargeStage,
}


def cascade_stage(name: str, component: nn.Module) -> Stage:
    """Make stage ``name`` out of its component."""
    return _STAGES[name](component)  # type: ignore[call-arg]
