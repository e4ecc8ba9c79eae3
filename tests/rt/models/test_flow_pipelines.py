"""SD3 and FLUX from prompt to latents and pictures, against diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_flow_checkpoints as small
import tintype
from tintype.errors import ProfileError, RequestError
from tintype.noise import initial_noise
from tolerances import LATENTS_20_STEPS, relative_error

PROMPT = "a red lighthouse, two blue boats in the rain!"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("flow") / "model"
            small.PIPELINES[kind](**small.parts(kind)).save_pretrained(folders[kind])
        return folders[kind]

    return save


def theirs(folder: Path, kind: str) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3 without T5" else {}
    pipeline = small.PIPELINES[kind].from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def as_diffusers_wants(noise: np.ndarray, kind: str) -> torch.Tensor:
    """FLUX's pipeline takes its noise packed."""
    tensor = torch.from_numpy(noise.copy())
    if not kind.startswith("flux"):
        return tensor
    return small.PIPELINES[kind]._pack_latents(tensor, 1, 16, *noise.shape[2:])


# FLUX counts true guidance apart; SD3 guides from the empty prompt where no negative one is given.
REQUESTS = {
    "sd3": {"negative_prompt": "the fog", "guidance_scale": 5.0},
    "sd3 without T5": {"guidance_scale": 5.0},
    "sd35": {"guidance_scale": 1.0},
    "flux-dev": {"guidance_scale": 3.5},
    "flux-schnell": {"negative_prompt": "the fog", "true_cfg_scale": 2.0, "guidance_scale": 0.0},
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_latents_equal_diffusers(saved: Any, kind: str) -> None:
    folder, noise = saved(kind), initial_noise(3, (16, 4, 6))[None]
    request = {"prompt": PROMPT, "height": 32, "width": 48, "num_inference_steps": 20}
    request |= REQUESTS[kind] | {"output_type": "latent"}
    tokens = 512 if kind == "flux-dev" else 256
    pipeline = theirs(folder, kind)
    expected = pipeline(
        **request, latents=as_diffusers_wants(noise, kind), max_sequence_length=tokens
    ).images
    actual = tintype.load(folder)(**request, latents=noise).images
    found = as_diffusers_wants(np.asarray(actual), kind)
    assert relative_error(found, expected) <= LATENTS_20_STEPS


@pytest.mark.parametrize("kind", ["sd3", "flux-schnell"])
def test_a_picture_equals_diffusers_in_every_byte_but_rounding(saved: Any, kind: str) -> None:
    folder, noise = saved(kind), initial_noise(1, (16, 4, 4))[None]
    request = {"prompt": PROMPT, "height": 32, "width": 32, "num_inference_steps": 3}
    request |= {"guidance_scale": 0.0}
    pipeline = theirs(folder, kind)
    expected = pipeline(
        **request, latents=as_diffusers_wants(noise, kind), max_sequence_length=256
    ).images[0]
    actual = tintype.load(folder)(**request, latents=noise).images[0]
    assert np.abs(np.asarray(actual, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_seeds_edits_and_batches_work_as_with_any_model(saved: Any, kind: str) -> None:
    pipeline = tintype.load(saved(kind))
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    batch = pipeline([PROMPT, "the"], seed=[3, 5], **settings).images
    alone = pipeline("the", seed=5, **settings).images[0]
    assert alone.tobytes() == batch[1].tobytes()
    mask = np.zeros((32, 32), np.float32)
    mask[:, :16] = 1
    edited = pipeline("the", image=batch[0], mask_image=mask, strength=0.5, seed=1, **settings)
    assert np.isfinite(edited.images).all()
    assert not np.array_equal(edited.images[0], batch[0])


def test_sizes_come_in_multiples_of_the_patches(saved: Any) -> None:
    with pytest.raises(ProfileError, match="multiples of 16"):
        tintype.load(saved("sd3"))("the", height=40, width=32)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("sd3", {"true_cfg_scale": 2.0}, "true_cfg_scale=2.0"),
        ("flux-dev", {"guidance_scale": [1.0, 2.0], "num_inference_steps": 2}, "one number"),
        ("flux-dev", {"true_cfg_scale": float("nan")}, "nan"),
    ],
)
def test_guidance_that_a_model_has_no_use_for_is_refused(
    saved: Any, kind: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        tintype.load(saved(kind))("the", height=32, width=32, **arguments)
