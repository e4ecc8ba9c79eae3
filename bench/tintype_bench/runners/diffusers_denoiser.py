"""diffusers' denoiser alone, as a function of the arrays that our stage `denoise` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tintype.checkpoints import Checkpoint
from tintype.models.stages import stage_component
from tintype_bench.runners.diffusers_pipeline import imported

Denoise = Callable[[Mapping[str, Tensor]], Tensor]


def denoiser(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Denoise:
    """With the checkpoint's weights, eagerly; a UNet's convolutions lie channels-last, as diffusers' guide asks."""
    diffusers = imported()
    name = stage_component("denoise", checkpoint.components)
    part = checkpoint.components[name]
    with torch.device("meta"):
        model = getattr(diffusers, part.architecture).from_config(dict(part.config))
    state = checkpoint.component(name, dtype, device).state_dict()
    model.load_state_dict(state, assign=True)
    model = model.eval().to(memory_format=torch.channels_last)
    call = {"latent_unet": _unet, "sd3": _sd3, "flux": _flux}[checkpoint.family]

    def denoise(inputs: Mapping[str, Tensor]) -> Tensor:
        kept = ("timestep", "time_ids")
        with torch.inference_mode():
            return call(model, {n: t if n in kept else t.to(dtype) for n, t in inputs.items()})

    return denoise


def _unet(model: nn.Module, told: Mapping[str, Tensor]) -> Tensor:
    added = {name: told[name] for name in ("text_embeds", "time_ids") if name in told}
    sample, text = told["sample"], told["encoder_hidden_states"]
    how: dict[str, Any] = {"added_cond_kwargs": added or None, "return_dict": False}
    output: Tensor = model(sample, told["timestep"], text, **how)[0]
    return output


def _sd3(model: nn.Module, told: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = model(
        hidden_states=told["sample"],
        timestep=told["timestep"],
        encoder_hidden_states=told["encoder_hidden_states"],
        pooled_projections=told["text_embeds"],
        return_dict=False,
    )[0]
    return output


def _flux(model: nn.Module, told: Mapping[str, Tensor]) -> Tensor:
    pipeline: Any = imported().FluxPipeline
    n, c, h, w = told["sample"].shape
    text = told["encoder_hidden_states"]
    output = model(
        hidden_states=pipeline._pack_latents(told["sample"], n, c, h, w),
        timestep=told["timestep"] / 1000,
        guidance=told.get("guidance"),
        encoder_hidden_states=text,
        pooled_projections=told["text_embeds"],
        img_ids=pipeline._prepare_latent_image_ids(n, h // 2, w // 2, text.device, text.dtype),
        txt_ids=text.new_zeros(text.shape[1], 3),
        return_dict=False,
    )[0]
    unpacked: Tensor = pipeline._unpack_latents(output, 8 * h, 8 * w, 8)
    return unpacked
