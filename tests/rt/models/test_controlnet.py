"""ControlNets against diffusers' own, alone and in whole pictures, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import save_file

import original_layout
import small_checkpoints
import tintype
from tintype.errors import CheckpointError, RequestError
from tintype.models.unet import UNet
from tintype.models.unet_config import UNetConfig
from tintype.noise import initial_noise
from tolerances import LATENTS_20_STEPS, MODULE_FP32, relative_error

Saved = Callable[[str], Path]
KINDS = ("sd1", "sd2", "sdxl")
# The small autoencoder's latents are an eighth as wide as pictures, as the published ones'.
PIPELINES = {
    "sd1": diffusers.StableDiffusionControlNetPipeline,
    "sd2": diffusers.StableDiffusionControlNetPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
}
REQUEST: dict[str, Any] = {
    "prompt": "the red, the Red",
    "negative_prompt": "blue",
    "num_inference_steps": 5,
    "guidance_scale": 4.0,
    "output_type": "latent",
    "controlnet_conditioning_scale": 0.7,
}


def shown(seed: int = 5, size: tuple[int, int] = (64, 48)) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def steering(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a ControlNet for a small model of a kind."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("controlnet")
            unet = small_checkpoints.parts(kind)["unet"]
            small_checkpoints.controlnet(unet).save_pretrained(folders[kind])
        return folders[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_steered_unet_equals_diffusers(kind: str) -> None:
    unet = small_checkpoints.parts(kind)["unet"].eval()
    controlnet = small_checkpoints.controlnet(unet).eval()
    ours = UNet(UNetConfig.from_json({**unet.config, "controlnet": dict(controlnet.config)})).eval()
    theirs = {f"controlnet.{name}": value for name, value in controlnet.state_dict().items()}
    ours.load_state_dict(unet.state_dict() | theirs, strict=True)
    torch.manual_seed(1)
    sample, time = torch.randn(2, 4, 6, 8), torch.tensor([3.0, 741.0])
    text = torch.randn(2, 77, ours.config.cross_attention_dim)
    picture, scale = torch.rand(2, 3, 48, 64), torch.tensor([0.7, 0.7])
    pooled, ids = torch.randn(2, 96), torch.tensor([[1024.0, 768, 0, 64, 1024, 768]] * 2)
    added = {"text_embeds": pooled, "time_ids": ids} if kind == "sdxl" else {}
    with torch.no_grad():
        down, middle = controlnet(
            sample,
            time,
            text,
            controlnet_cond=picture,
            conditioning_scale=0.7,
            added_cond_kwargs=added or None,
            return_dict=False,
        )
        expected = unet(
            sample,
            time,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            added_cond_kwargs=added or None,
        ).sample
        told = (text, *(added.values() or (None, None)), picture, scale)
        actual = ours(sample, time, *told)
        unsteered = unet(sample, time, text, added_cond_kwargs=added or None).sample
        remembered = ours.remember(*told)
        recalled = ours.recall(remembered, [x[0] for x in ours.at(remembered, time[None])], sample)
    assert relative_error(actual, expected) <= MODULE_FP32
    assert relative_error(unsteered, expected) > 0.05
    assert relative_error(recalled, actual) <= MODULE_FP32


def theirs(kind: str, folder: Path, controlnet: Path, **changes: Any) -> torch.Tensor:
    pipe = PIPELINES[kind].from_pretrained(
        folder, controlnet=diffusers.ControlNetModel.from_pretrained(controlnet)
    )
    pipe.set_progress_bar_config(disable=True)
    noise = np.stack([initial_noise(seed, (4, 6, 8)) for seed in (7, 8)])
    pictures = [shown(5), shown(6)]
    return pipe(
        **REQUEST | changes,
        image=pictures,
        latents=torch.from_numpy(noise),
        num_images_per_prompt=1,
    ).images


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=lambda g: f"guidance {g:g}")
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_equal_diffusers(
    kind: str, guidance: float, saved: Saved, steering: Callable[[str], Path]
) -> None:
    """Two of one call, each with a picture of its own."""
    prompts = {
        "prompt": [REQUEST["prompt"]] * 2,
        "negative_prompt": [REQUEST["negative_prompt"]] * 2,
    }
    expected = theirs(kind, saved(kind), steering(kind), guidance_scale=guidance, **prompts)
    pipe = tintype.load(saved(kind), controlnet=steering(kind))
    asked = {**REQUEST, "guidance_scale": guidance, "seed": 7}
    made = pipe(**asked, num_images_per_prompt=2, control_image=[shown(5), shown(6)]).images
    assert relative_error(torch.from_numpy(made), expected) <= LATENTS_20_STEPS
    other = pipe(**asked, num_images_per_prompt=2, control_image=[shown(6), shown(5)]).images
    assert relative_error(torch.from_numpy(other), expected) > 0.01


def test_a_saved_pipeline_brings_its_controlnet(
    saved: Saved, steering: Callable[[str], Path], tmp_path: Path
) -> None:
    part = diffusers.ControlNetModel.from_pretrained(steering("sd1"))
    PIPELINES["sd1"].from_pretrained(saved("sd1"), controlnet=part).save_pretrained(tmp_path)
    apart = tintype.load(saved("sd1"), controlnet=steering("sd1"))
    asked = {**REQUEST, "seed": 3, "control_image": shown()}
    assert (tintype.load(tmp_path)(**asked).images == apart(**asked).images).all()
    with pytest.raises(CheckpointError, match="has a ControlNet; one at a time"):
        tintype.load(tmp_path, controlnet=steering("sd1"))


def original_names(part: diffusers.ControlNetModel) -> dict[str, str]:
    """Our names of an SD 1 ControlNet's parameters by those of the original layout, out of diffusers' own converter."""
    layout = original_layout.controlnet(original_layout.SMALL["sd1"].unet, (16, 32, 96, 256))
    marks = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(layout)}
    numbered = list(marks)
    found = convert_controlnet_checkpoint(dict(marks), dict(part.config))
    return {numbered[int(value.flatten()[0])]: name for name, value in found.items()}


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_a_file_of_the_original_layout_steers_alike(
    prefix: str, saved: Saved, steering: Callable[[str], Path], tmp_path: Path
) -> None:
    part = diffusers.ControlNetModel.from_pretrained(steering("sd1"))
    state = part.state_dict()
    named = {prefix + original: state[name] for original, name in original_names(part).items()}
    assert len(named) == len(state)
    save_file(
        {name: value.contiguous() for name, value in named.items()}, tmp_path / "edges.safetensors"
    )
    asked = {**REQUEST, "seed": 3, "control_image": shown()}
    expected = tintype.load(saved("sd1"), controlnet=steering("sd1"))(**asked).images
    pipe = tintype.load(saved("sd1"), controlnet=tmp_path / "edges.safetensors")
    assert (pipe(**asked).images == expected).all()


def test_a_file_that_is_no_controlnet_is_refused(saved: Saved, tmp_path: Path) -> None:
    path, first = tmp_path / "other.safetensors", "input_hint_block.0.weight"
    for name, told in (("lora_controlnet", first), (first, "input_blocks.0.0.weight")):
        save_file({name: torch.zeros(16, 3, 3, 3)}, path)
        with pytest.raises(CheckpointError, match=f"in the original layout: {told} is missing"):
            tintype.load(saved("sd1"), controlnet=path)
    with pytest.raises(CheckpointError, match="config.json is missing"):
        tintype.load(saved("sd1"), controlnet=tmp_path / "nowhere")


def test_the_picture_gives_the_size(saved: Saved, steering: Callable[[str], Path]) -> None:
    pipe = tintype.load(saved("sd1"), controlnet=steering("sd1"))
    assert pipe(**REQUEST, seed=1, control_image=shown()).images.shape == (1, 4, 6, 8)


def test_edits_and_second_passes_are_steered_too(
    saved: Saved, steering: Callable[[str], Path]
) -> None:
    pipe = tintype.load(saved("sd1"), controlnet=steering("sd1"))
    for asked in ({"image": shown(9)}, {"interpolate_from": (32, 24), "height": 48, "width": 64}):
        first, second = (
            pipe(**REQUEST, seed=1, control_image=shown(seed), **asked).images for seed in (5, 6)
        )
        assert np.isfinite(first).all()
        assert not np.array_equal(first, second)


def test_a_picture_has_the_same_bytes_in_any_batch(
    saved: Saved, steering: Callable[[str], Path]
) -> None:
    pipe = tintype.load(saved("sd1"), controlnet=steering("sd1"))
    pictures = [shown(5), shown(6), shown(9)]
    both = pipe(**REQUEST, seed=7, num_images_per_prompt=3, control_image=pictures).images
    alone = pipe(**REQUEST, seed=8, control_image=pictures[1]).images
    assert (both[1] == alone[0]).all()


def test_a_training_step_reaches_every_parameter_of_the_controlnet(
    saved: Saved, steering: Callable[[str], Path]
) -> None:
    from tintype.checkpoints import open_checkpoint

    unet = open_checkpoint(saved("sd1")).steered_by(steering("sd1")).component("unet")
    told = (torch.randn(1, 77, 64), None, None, torch.rand(1, 3, 64, 64), torch.ones(1))
    unet(torch.randn(1, 4, 8, 8), torch.tensor([5.0]), *told).square().mean().backward()
    idle = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "it needs control_image"),
        (
            {"control_image": shown(), "controlnet_conditioning_scale": float("nan")},
            "is not a finite",
        ),
        ({"controlnet_conditioning_scale": np.ones(2)}, "is not a finite"),
        ({"control_image": "a.png"}, "control_image"),
    ],
)
def test_what_a_steered_model_is_not_told_right_is_named(
    arguments: dict[str, Any], told: str, saved: Saved, steering: Callable[[str], Path]
) -> None:
    pipe = tintype.load(saved("sd1"), controlnet=steering("sd1"))
    with pytest.raises(RequestError, match=told):
        pipe("a", **arguments)


def test_other_models_take_no_control_picture(saved: Saved) -> None:
    pipe = tintype.load(saved("sd1"))
    with pytest.raises(RequestError, match="this one has none"):
        pipe("a", control_image=shown())
    with pytest.raises(RequestError, match="give that, too"):
        pipe("a", controlnet_conditioning_scale=0.5)


def test_a_controlnet_of_another_model_is_refused(
    saved: Saved, steering: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="the ControlNet's block_out_channels is"):
        tintype.load(saved("sd1"), controlnet=steering("sdxl"))
    unet = small_checkpoints.parts("sd1")["unet"]
    changes = {"conditioning_embedding_out_channels": (16, 32)}
    small_checkpoints.controlnet(unet, **changes).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="reads 2 pixels a latent, and the model has 8"):
        tintype.load(saved("sd1"), controlnet=tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("controlnet_conditioning_channel_order", "bgr"),
        ("conditioning_channels", 1),
        ("global_pool_conditions", True),
        ("conditioning_embedding_out_channels", 4),
        ("_class_name", "ControlNetXSAdapter"),
    ],
)
def test_a_controlnet_that_asks_for_more_is_refused_by_name(
    field: str, value: object, saved: Saved, steering: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((steering("sd1") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(steering("sd1") / weights)
    with pytest.raises(CheckpointError, match=str(value) if field == "_class_name" else field):
        tintype.load(saved("sd1"), controlnet=tmp_path)


def test_no_controlnet_steers_a_flow_transformer(
    saved: Saved, steering: Callable[[str], Path]
) -> None:
    with pytest.raises(CheckpointError, match="ControlNets here are for Stable Diffusion"):
        tintype.load(saved("sd3"), controlnet=steering("sd1"))
