"""Pipelines made of checkpoints: sizes, no guidance, and what `tintype inspect` says of them."""

from __future__ import annotations

import pytest
import torch

import small_checkpoints
import tintype
from tintype.cli import main
from tintype.noise import initial_noise
from tolerances import LATENTS_20_STEPS, relative_error

PROMPT = "the red lighthouse"


def test_no_guidance_equals_diffusers_pipeline(saved):
    theirs = small_checkpoints.PIPELINES["sd1"].from_pretrained(saved("sd1"), safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    request = {"num_inference_steps": 20, "guidance_scale": 1.0, "height": 64, "width": 64}
    noise = initial_noise(3, (1, 4, 8, 8))
    latents = torch.from_numpy(noise.copy())
    expected = theirs(PROMPT, **request, latents=latents, output_type="latent").images
    actual = tintype.load(saved("sd1"))(PROMPT, **request, latents=noise, output_type="latent")
    assert relative_error(actual.images, expected) < LATENTS_20_STEPS


def test_any_multiple_of_the_factor_is_a_size(saved):
    pipeline = tintype.load(saved("sd1"))
    factor = pipeline.family.factor
    (image,) = pipeline(PROMPT, width=10 * factor, height=6 * factor, num_inference_steps=2).images
    assert image.size == (10 * factor, 6 * factor)
    with pytest.raises(tintype.ProfileError, match=f"multiples of {factor}"):
        pipeline(PROMPT, width=10 * factor + 1)


def test_inspect_names_the_components(saved, capsys):
    assert main(["inspect", str(saved("sdxl"))]) == 0
    text = capsys.readouterr().out
    assert "text_encoder_2" in text
    assert "auto picks torch: it runs a checkpoint" in text
