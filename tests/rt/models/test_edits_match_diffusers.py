"""Image to image and inpainting through our pipeline and through diffusers' own, from the same picture and noise."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    module = sys.modules[kind.__module__]
    noise = torch.from_numpy(initial_noise(seed, shape)[None].copy())
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(
        module, "retrieve_latents", lambda output, *_, **__: output.latent_dist.mode()
    )


@pytest.mark.parametrize("strength", [0.35, 0.8, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_to_image(
    saved: Saved, scheduler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = diffusers.StableDiffusionImg2ImgPipeline
    pipe = theirs(kind, saved("sd1"), scheduler, 7, monkeypatch)
    request = {**REQUEST, "image": picture(), "strength": strength}
    expected = pipe(**request).images
    actual = tintype.load(saved("sd1"))(**request, seed=7, scheduler=scheduler).images
    assert relative_error(actual, expected) <= LATENTS_20_STEPS


@pytest.mark.parametrize(("steps", "strength"), [(10, 0.5), (10, 0.35), (28, 0.6), (4, 0.2)])
def test_flow_image_to_image_runs_the_step_that_the_strength_cuts(
    tmp_path: Path, steps: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_flow_checkpoints.save("sd3", tmp_path / "sd3")
    kind = diffusers.StableDiffusion3Img2ImgPipeline
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": steps, "strength": strength, "image": picture((48, 32))}
    request = {**REQUEST, **given, "height": 32, "width": 48}
    told(kind, (16, 4, 6), 7, monkeypatch)
    expected = pipe(**request, max_sequence_length=256).images
    actual = tintype.load(folder)(**request, seed=7).images
    assert relative_error(actual, expected) <= LATENTS_20_STEPS


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "unipc", "heun"])
@pytest.mark.parametrize("model", ["sd1", "sd_inpainting"])
def test_inpainting(
    saved: Saved, model: str, scheduler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = diffusers.StableDiffusionInpaintPipeline
    pipe = theirs(kind, saved(model), scheduler, 3, monkeypatch)
    request = {**REQUEST, "image": picture(), "mask_image": mask(), "strength": strength}
    expected = pipe(**request, height=48, width=64).images
    actual = tintype.load(saved(model))(**request, seed=3, scheduler=scheduler).images
    assert relative_error(actual, expected) <= LATENTS_20_STEPS
