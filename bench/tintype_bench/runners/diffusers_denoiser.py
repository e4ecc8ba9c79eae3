"""diffusers' denoiser alone, as a function of the arrays that our stage `denoise` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tintype.checkpoints import Checkpoint
from tintype.models.stages import stage_component
from tintype_bench.runners.diffusers_compiled import inductor_flags, prepare
from tintype_bench.runners.diffusers_pipeline import imported

Denoise = Callable[[Mapping[str, Tensor]], Tensor]
_SD3_BLOCKS = ["JointTransformerBlock"]  # diffusers names the blocks that repeat of others alone


@contextmanager
def denoiser(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, *, compiled: bool = False
) -> Iterator[Denoise]:
    """With the checkpoint's weights, eagerly or compiled; channels-last, as diffusers' guide asks of a UNet."""
    model = _model(checkpoint, device, dtype)
    call = _CALLS[checkpoint.family]

    def denoise(inputs: Mapping[str, Tensor]) -> Tensor:
        kept = ("timestep", "time_ids", "context_mask")
        with torch.inference_mode():
            return call(model, {n: t if n in kept else t.to(dtype) for n, t in inputs.items()})

    with _compiled(model, checkpoint.family, device) if compiled else nullcontext():
        yield denoise


def _model(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> nn.Module:
    name = stage_component("denoise", checkpoint.components)
    part = checkpoint.components[name]
    with torch.device("meta"):
        model: nn.Module = getattr(imported(), part.architecture).from_config(dict(part.config))
    model.load_state_dict(checkpoint.component(name, dtype, device).state_dict(), assign=True)
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@contextmanager
def _compiled(model: Any, family: str, device: str) -> Iterator[None]:
    """The model compiled, while Inductor has diffusers' flags: what else is timed here is compiled with its own.

    Of a transformer, which keeps a GPU busy without graphs, the blocks that repeat: as fast, and compiled in a fraction
    of the time. Weights are not frozen, or each block would be compiled by itself. A CPU, on which this is tried out,
    is not tuned for minutes.
    """
    whole = family in ("latent_unet", "unclip")
    mode = "max-autotune" if whole else "max-autotune-no-cudagraphs"
    mode = "default" if device == "cpu" else mode
    prepare(model)
    with torch._inductor.config.patch(inductor_flags(mode, freezing=False)):
        if whole:
            model.forward = torch.compile(model.forward, mode=mode, fullgraph=True)
        else:
            model._repeated_blocks = model._repeated_blocks or _SD3_BLOCKS
            model.compile_repeated_blocks(mode=mode, fullgraph=True)
        try:
            yield
        finally:
            torch.compiler.reset()  # graphs hold memory


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


def _unclip(model: nn.Module, told: Mapping[str, Tensor]) -> Tensor:
    mask = told["context_mask"].bool()
    how: dict[str, Any] = {"class_labels": told["added"], "attention_mask": mask}
    output: Tensor = model(
        told["sample"], told["timestep"], told["context"], **how, return_dict=False
    )[0]
    return output


_CALLS = {"latent_unet": _unet, "sd3": _sd3, "flux": _flux, "unclip": _unclip}
