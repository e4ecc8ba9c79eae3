"""SD3 and FLUX from prompt to latents and pictures, against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_flow_checkpoints as small
import tintype
from tintype.checkpoints import open_checkpoint
from tintype.errors import CheckpointError, ProfileError, RequestError
from tintype.families.conditioning import Reading
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


@pytest.mark.parametrize("ends", [{}, {"max_shift": 1.3}], ids=str)
@pytest.mark.parametrize("scheduler", ["UniPCMultistep", "FlowMatchEulerDiscrete"])
@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_a_largest_shift_left_open_is_the_pipelines_own(
    saved: Any, tmp_path: Path, kind: str, scheduler: str, ends: dict[str, float]
) -> None:
    """Diffusers' FlowMatch class has 1.15 of itself; of others SD3's pipeline takes 1.16, FLUX's 1.15."""
    folder = shutil.copytree(saved(kind), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", f"{scheduler}Scheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    # The picture's six tokens are the longest, so that the whole shift is told.
    own = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 6, **ends}
    if scheduler == "UniPCMultistep":
        own |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": f"{scheduler}Scheduler", **own}))
    request = {"prompt": PROMPT, "height": 32, "width": 48, "num_inference_steps": 5}
    request |= {"guidance_scale": 1.0, "output_type": "latent"}
    noise = initial_noise(3, (16, 4, 6))[None]
    expected = theirs(folder, kind)(**request, latents=as_diffusers_wants(noise, kind)).images
    actual = tintype.load(folder)(**request, latents=noise).images
    found = as_diffusers_wants(np.asarray(actual), kind)
    assert relative_error(found, expected) <= LATENTS_20_STEPS


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
        ("flux-dev", {"true_cfg_scale": float("nan"), "negative_prompt": ""}, "nan"),
        (
            "flux-dev",
            {"true_cfg_scale": 4.0},
            "true_cfg_scale=4.0 extrapolates from a negative_prompt",
        ),
    ],
)
def test_guidance_that_a_model_has_no_use_for_is_refused(
    saved: Any, kind: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        tintype.load(saved(kind))("the", height=32, width=32, **arguments)


def shown_without(pipeline: Any, zeroed: list[str], request: dict[str, Any]) -> np.ndarray:
    """What diffusers draws where encoders say zeros, as the model was trained with."""
    tell = {"negative": request.pop("negative_prompt"), "": request.pop("prompt")}
    embeds = {}
    for kind, prompt in tell.items():
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=256
        )
        # CLIPs are 16 and 24 wide, beside each other in the first 77 tokens; T5's tokens follow.
        cuts = {"text_encoder": slice(0, 16), "text_encoder_2": slice(16, 40)}
        for name in zeroed:
            if name == "text_encoder_3":
                hidden[:, 77:] = 0
            else:
                hidden[:, :77, cuts[name]], pooled[:, cuts[name]] = 0, 0
        prefix = f"{kind}_" if kind else ""
        embeds |= {f"{prefix}prompt_embeds": hidden, f"{prefix}pooled_prompt_embeds": pooled}
    return np.asarray(pipeline(**embeds, **request).images)


@pytest.mark.parametrize(
    "without",
    [["text_encoder"], ["text_encoder_2"], ["text_encoder_3"], ["text_encoder", "text_encoder_2"]],
    ids="-".join,
)
def test_encoders_left_out_say_zeros(saved: Any, without: list[str]) -> None:
    folder, noise = saved("sd3"), initial_noise(3, (16, 4, 4))[None]
    request = {"prompt": PROMPT, "negative_prompt": "the fog", "height": 32, "width": 32}
    request |= {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    actual = tintype.load(folder, without=without)(**request, latents=noise).images
    tensors = torch.from_numpy(noise.copy())
    expected = shown_without(theirs(folder, "sd3"), without, request | {"latents": tensors})
    assert relative_error(actual, expected) <= LATENTS_20_STEPS


def test_an_encoder_that_the_model_never_had_says_nothing(saved: Any, tmp_path: Path) -> None:
    """Not named in the index, against named and null: no tokens, against tokens of zeros."""
    folder = Path(shutil.copytree(saved("sd3 without T5"), tmp_path / "model"))
    index = folder / "model_index.json"
    named = json.loads(index.read_text())
    lengths = {}
    for kind in ("null", "not named"):
        index.write_text(json.dumps(named))
        text = tintype.load(folder).family.text
        lengths[kind] = text.encode("red", {}, Reading()).hidden.shape
        named = {name: value for name, value in named.items() if not name.endswith("_3")}
    assert lengths == {"null": (1, 77 + 256, 48), "not named": (1, 77, 48)}


@pytest.mark.parametrize(
    ("kind", "without", "message"),
    [
        ("flux-dev", ["text_encoder_2"], "without text_encoder_2; SD3 alone runs without some"),
        ("sd3", ["vae"], "without vae; SD3 runs without text_encoder, text_encoder_2"),
        (
            "sd3",
            ["text_encoder", "text_encoder_2", "text_encoder_3"],
            "but not all of them",
        ),
    ],
)
def test_what_cannot_be_left_out_is_named(
    saved: Any, kind: str, without: list[str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        tintype.load(saved(kind), without=without)


@pytest.mark.parametrize("kind", ["sd35", "flux-dev"])
def test_shards_load_like_the_whole(saved: Any, tmp_path: Path, kind: str) -> None:
    whole = open_checkpoint(saved(kind))
    pipeline = small.PIPELINES[kind].from_pretrained(saved(kind))
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    sharded = open_checkpoint(tmp_path / "shards")
    assert len(sharded.components["transformer"].weights.files) > 2
    for name in whole.components:
        expected = whole.component(name).state_dict()
        found = sharded.component(name).state_dict()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
