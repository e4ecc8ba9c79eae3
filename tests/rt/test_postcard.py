"""The model in the box: small, readable by others, and true to what it is asked."""

from __future__ import annotations

import hashlib

import diffusers
import numpy as np
import pytest
import torch

import tintype
from tintype.loading import BOX
from tintype.noise import initial_noise
from tintype.training.postcard import is_held_out
from tintype.training.postcard.evaluate import prompt_accuracy, prompts
from tintype.training.postcard.judge import load_judge
from tolerances import LATENTS_20_STEPS, STAGE_FP32, relative_error

POSTCARD = BOX / "postcard"
PROMPT = "a red lighthouse on a rocky coast at dusk"


@pytest.fixture(scope="module")
def postcard():
    return tintype.load("postcard")


def test_it_fits_in_forty_megabytes():
    assert sum(path.stat().st_size for path in POSTCARD.rglob("*") if path.is_file()) < 40e6


def test_graphs_and_torch_agree(postcard):
    settings = {"seed": 5, "num_inference_steps": 4, "output_type": "np"}
    on_torch = tintype.load("postcard", backend="torch", dtype="float32")
    guidance = postcard.family.defaults["guidance_scale"]
    expected = on_torch(PROMPT, guidance_scale=guidance, scheduler="dpmpp_2m", **settings)
    assert relative_error(postcard(PROMPT, **settings).images, expected.images) < STAGE_FP32


def test_diffusers_loads_the_folder_and_draws_the_same_picture(postcard):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(POSTCARD, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = initial_noise(11, (1, 4, 16, 16))
    settings = {"num_inference_steps": 20, "guidance_scale": 4.0, "negative_prompt": "fog"}
    expected = theirs(
        PROMPT, latents=torch.from_numpy(noise), output_type="latent", **settings
    ).images
    actual = postcard(
        PROMPT, latents=noise, output_type="latent", scheduler="dpmpp_2m", **settings
    ).images
    assert relative_error(actual, expected.numpy()) < LATENTS_20_STEPS
    picture = theirs(PROMPT, latents=torch.from_numpy(noise), output_type="np", **settings).images
    ours = postcard(
        PROMPT, latents=noise, output_type="np", scheduler="dpmpp_2m", **settings
    ).images
    assert np.abs(np.asarray(ours) - picture).max() < 2 / 255


def test_a_seed_gives_the_same_bytes_alone_and_in_a_batch_of_four(postcard):
    asked = [PROMPT, "two white pines", "a castle at night", "three blue boats in the rain"]
    together = postcard(asked, seed=[3, 1, 4, 1], num_inference_steps=4)
    for text, seed, image in zip(asked, together.seeds, together.images, strict=True):
        alone = postcard(text, seed=seed, num_inference_steps=4).images[0]
        assert _digest(alone) == _digest(image)


def test_it_draws_what_held_out_prompts_say(postcard):
    asked = prompts(12, 77, held_out=True)
    assert all(is_held_out(scene) for scene in asked.scenes)
    read = prompt_accuracy(postcard, load_judge(POSTCARD / "judge"), asked, num_inference_steps=20)
    # The goal; the model card has what was measured on more prompts.
    assert read["overall"] >= 0.9


def test_the_card_says_how_it_was_made_and_what_was_measured():
    card = (POSTCARD / "README.md").read_text()
    for needed in ("tintype train postcard", "held out", "| overall |", "seed 1"):
        assert needed in card


def _digest(image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()
