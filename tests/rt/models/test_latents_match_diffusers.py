"""Twenty guided steps through our pipeline and through diffusers' own, from the same noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import small_checkpoints
import tintype
from tintype.errors import RequestError
from tintype_bench import published_configs
from tintype_export.quality import psnr
from tolerances import LATENTS_20_STEPS, relative_error

Saved = Callable[[str], Path]
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


# Without a negative prompt SDXL is guided from zeros, the others from the empty prompt.
@pytest.mark.parametrize("negative", ["blue", None])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_latents_equal_diffusers(
    saved: Saved, kind: str, scheduler: str, negative: str | None
) -> None:
    theirs = small_checkpoints.PIPELINES[kind].from_pretrained(saved(kind))
    theirs.set_progress_bar_config(disable=True)
    # From the file, because one scheduler's class drops settings that the next one reads.
    theirs.scheduler = SCHEDULERS[scheduler].from_pretrained(saved(kind) / "scheduler")
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 6)).astype(np.float32)
    request = {
        "prompt": "the red, the Red",
        "negative_prompt": negative,
        "height": 64,
        "width": 48,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "output_type": "latent",
    }
    expected = theirs(**request, latents=torch.from_numpy(noise.copy())).images
    actual = tintype.load(saved(kind))(**request, latents=noise, scheduler=scheduler).images
    assert relative_error(actual, expected) <= LATENTS_20_STEPS


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_stable_diffusions_published_scheduler(saved: Saved, tmp_path: Path, steps: int) -> None:
    """The PNDM settings that SD 1.5 is published with, as the checkpoint's own scheduler."""
    folder = Path(shutil.copytree(saved("sd1"), tmp_path / "sd15"))
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(published_configs.SD15_SCHEDULER)
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    theirs = small_checkpoints.PIPELINES["sd1"].from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs.scheduler) is diffusers.PNDMScheduler
    noise = np.random.default_rng(2).standard_normal((1, 4, 8, 8)).astype(np.float32)
    request = {"prompt": "red", "num_inference_steps": steps, "output_type": "latent"}
    expected = theirs(**request, latents=torch.from_numpy(noise.copy())).images
    actual = tintype.load(folder)(**request, latents=noise).images
    assert relative_error(actual, expected) <= LATENTS_20_STEPS


def test_a_picture_equals_diffusers_in_every_byte_but_rounding(saved: Saved) -> None:
    theirs = small_checkpoints.PIPELINES["sd1"].from_pretrained(saved("sd1"))
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    request = {"prompt": "red", "num_inference_steps": 5}
    expected = theirs(**request, latents=torch.from_numpy(noise.copy())).images[0]
    actual = tintype.load(saved("sd1"))(**request, latents=noise).images[0]
    assert np.abs(np.asarray(actual, int) - np.asarray(expected, int)).max() <= 1


def test_a_picture_of_latents_that_are_rounded_to_a_codebook_is_diffusers(saved: Saved) -> None:
    """By the noise between them, since a cell that lies between two entries may be rounded to either."""
    theirs = small_checkpoints.PIPELINES["sd_vq"].from_pretrained(saved("sd_vq"))
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    request = {"prompt": "red", "num_inference_steps": 5}
    latents = theirs(**request, latents=torch.from_numpy(noise.copy()), output_type="latent").images
    # Its pipeline hands a generator to decoders, which this one does not take.
    with torch.no_grad():
        raw = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    expected = theirs.image_processor.postprocess(raw, output_type="np")
    actual = tintype.load(saved("sd_vq"))(**request, latents=noise, output_type="np").images
    assert psnr(actual, expected) > 60.0


def test_an_inpainting_model_says_that_it_needs_a_picture(saved: Saved) -> None:
    with pytest.raises(RequestError, match="inpaint"):
        tintype.load(saved("sd_inpainting"))("red", num_inference_steps=1)
