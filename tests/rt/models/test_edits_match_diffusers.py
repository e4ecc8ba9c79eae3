"""Image to image and inpainting through our pipeline and through diffusers' own, from the same picture and noise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import small_flow_checkpoints
import tintype
from tintype.noise import initial_noise
from tolerances import LATENTS_20_STEPS, relative_error

Saved = Callable[[str], Path]
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
# What edits with each, without a mask and with one, and how many tokens its T5 reads.
FLOWS = {
    "sd3": (
        diffusers.StableDiffusion3Img2ImgPipeline,
        diffusers.StableDiffusion3InpaintPipeline,
        256,
    ),
    "flux-dev": (diffusers.FluxImg2ImgPipeline, diffusers.FluxInpaintPipeline, 512),
}
REQUEST = {
    "prompt": "the red, the Red",
    "negative_prompt": "blue",
    "num_inference_steps": 10,
    "guidance_scale": 4.0,
    "output_type": "latent",
}


def picture(size: tuple[int, int] = (64, 48)) -> Image.Image:
    colours = np.random.default_rng(5).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int] = (64, 48)) -> Image.Image:
    shade = np.zeros(size[::-1], np.uint8)
    shade[8:40, 20:56] = 255
    return Image.fromarray(shade)


def theirs(
    kind: type, folder: Path, scheduler: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """diffusers' pipeline with our noise, and with the mean of a picture's latents, as our stage gives it."""
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[scheduler].from_pretrained(folder / "scheduler")
    told(kind, (4, 6, 8), seed, monkeypatch)
    return pipe


def told(
    kind: type, shape: tuple[int, int, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give diffusers' pipelines of a kind our noise, and the mean of a picture's latents."""
    module: Any = sys.modules[kind.__module__]
    noise = torch.from_numpy(initial_noise(seed, shape)[None].copy())
    means = partial(module.retrieve_latents, sample_mode="argmax")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(module, "retrieve_latents", lambda output, *_, **__: means(output))


@pytest.mark.parametrize(
    ("model", "scheduler", "strength"),
    [*product(["sd1"], SCHEDULERS, [0.35, 0.8, 1.0]), ("sd_vq", "ddim", 0.8)],
)
def test_image_to_image(
    saved: Saved, model: str, scheduler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = diffusers.StableDiffusionImg2ImgPipeline
    pipe = theirs(kind, saved(model), scheduler, 7, monkeypatch)
    request = {**REQUEST, "image": picture(), "strength": strength}
    expected = pipe(**request).images
    actual = tintype.load(saved(model))(**request, seed=7, scheduler=scheduler).images
    assert relative_error(actual, expected) <= LATENTS_20_STEPS


@pytest.mark.parametrize(("steps", "strength"), [(10, 0.5), (10, 0.35), (28, 0.6), (4, 0.2)])
@pytest.mark.parametrize("masked", [False, True], ids=["image", "inpainting"])
@pytest.mark.parametrize("model", FLOWS)
def test_flow_edits_run_the_step_that_the_strength_cuts(
    tmp_path: Path, model: str, masked: bool, steps: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder, (*kinds, tokens) = small_flow_checkpoints.save(model, tmp_path / model), FLOWS[model]
    pipe = kinds[masked].from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    told(kinds[masked], (16, 4, 6), 7, monkeypatch)
    size = {"height": 32, "width": 48}
    request = {**REQUEST, **size, "num_inference_steps": steps, "strength": strength}
    request["image"] = picture((48, 32))
    if masked:
        request["mask_image"] = mask((48, 32))
    if model == "flux-dev":
        del request["negative_prompt"]  # which it is not told without a second scale
    expected = np.asarray(pipe(**request, max_sequence_length=tokens).images)
    actual = torch.as_tensor(tintype.load(folder)(**request, seed=7).images)
    if model == "flux-dev":
        actual = kinds[masked]._pack_latents(actual, *actual.shape)
    assert relative_error(actual.numpy(), expected) <= LATENTS_20_STEPS


@pytest.mark.parametrize(
    ("model", "scheduler", "strength"),
    [
        *product(["sd1", "sd_inpainting"], ["ddim", "euler", "unipc", "heun"], [0.5, 1.0]),
        ("sd_vq", "ddim", 0.5),
    ],
)
def test_inpainting(
    saved: Saved, model: str, scheduler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = diffusers.StableDiffusionInpaintPipeline
    pipe = theirs(kind, saved(model), scheduler, 3, monkeypatch)
    request = {**REQUEST, "image": picture(), "mask_image": mask(), "strength": strength}
    expected = pipe(**request, height=48, width=64).images
    actual = tintype.load(saved(model))(**request, seed=3, scheduler=scheduler).images
    assert relative_error(actual, expected) <= LATENTS_20_STEPS
