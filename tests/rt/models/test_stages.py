"""What a stage takes and gives is the same at every precision, and equals the published pipelines' own steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

import small_checkpoints
from tintype.checkpoints import Checkpoint, open_checkpoint
from tintype.models.stage import Stage
from tintype.models.stages import build_stage, stage_names
from tintype.steps import STEPS
from tintype.tokenizer import ClipTokenizer
from tolerances import MODULE_FP32, relative_error

Saved = Callable[[str], Path]


def stage(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> Stage:
    return build_stage(name, checkpoint.components, lambda part: checkpoint.component(part, dtype))


def example(name: str, channels: int) -> dict[str, torch.Tensor]:
    """Inputs of every stage of the small SDXL, and of the others where they share a width."""
    torch.manual_seed(0)
    everything = {
        "sample": torch.randn(1, channels, 8, 8),
        "history": torch.randn(1, 3, channels, 8, 8),
        "row": torch.rand(1, 13),
        "noise": torch.randn(1, channels, 8, 8),
        "timestep": torch.tensor([501.0]),
        "text_embeds": torch.randn(1, 96),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        "latents": torch.randn(1, 4, 2, 2),
        "image": torch.rand(1, 16, 16, 3),
        "input_ids": torch.randint(0, 500, (1, 77)),
    }
    return everything | {"encoder_hidden_states": torch.randn(1, 77, 192 if name == "sdxl" else 64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", small_checkpoints.KINDS)
@torch.no_grad()
def test_faces_are_float32_at_every_precision(saved: Saved, kind: str, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(saved(kind))
    given = example(kind, checkpoint.defaults["denoiser_channels"])
    for name in stage_names(checkpoint.components):
        if name in STEPS and kind == "sd_inpainting":
            continue  # is shown a mask at every step, and takes the plain denoiser
        module = stage(checkpoint, name, dtype)
        told = module.inputs[4 if name in STEPS else 0 :]
        pairs = {key: torch.stack([given[key]] * 2, dim=1) for key in told if name == "guided_step"}
        outputs = module(*((given | pairs)[key] for key in module.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert len(outputs) == len(module.outputs)
        assert {output.dtype for output in outputs} == {torch.float32}


def test_stages_run_in_order(saved: Saved) -> None:
    assert stage_names(open_checkpoint(saved("sdxl")).components) == (
        "encode",
        "encode_2",
        "denoise",
        "step",
        "guided_step",
        "decode",
        "encode_image",
    )


# Stable Diffusion 1 and 2 condition on the last layer, XL on the last but one of both encoders.
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@torch.no_grad()
def test_encoded_prompts_equal_diffusers(saved: Saved, kind: str) -> None:
    theirs = small_checkpoints.PIPELINES[kind].from_pretrained(saved(kind))
    expected = theirs.encode_prompt(
        "the red", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    checkpoint = open_checkpoint(saved(kind))
    names = [name for name in stage_names(checkpoint.components) if name.startswith("encode")][:-1]
    outputs = [
        stage(checkpoint, name)(torch.from_numpy(ClipTokenizer(folder)("the red")))
        for name, folder in zip(names, checkpoint.tokenizer_folders, strict=True)
    ]
    hidden = torch.cat([out[0] if isinstance(out, tuple) else out for out in outputs], dim=-1)
    assert relative_error(hidden, expected[0]) <= MODULE_FP32
    if kind == "sdxl":
        assert relative_error(outputs[1][1], expected[2]) <= MODULE_FP32


@pytest.mark.parametrize("kind", ["sd1", "sd_vq"])
@torch.no_grad()
def test_decoding_equals_the_published_pipeline(saved: Saved, kind: str) -> None:
    theirs = small_checkpoints.PIPELINES[kind].from_pretrained(saved(kind))
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    raw = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    expected = theirs.image_processor.postprocess(raw, output_type="np")
    actual = stage(open_checkpoint(saved(kind)), "decode")(latents)
    assert relative_error(actual, expected) <= MODULE_FP32


@pytest.mark.parametrize("kind", ["sd1", "sd_vq"])
@torch.no_grad()
def test_encoding_an_image_equals_the_published_pipeline(saved: Saved, kind: str) -> None:
    theirs = small_checkpoints.PIPELINES[kind].from_pretrained(saved(kind))
    picture = np.random.default_rng(0).random((32, 48, 3), np.float32)
    pixels = theirs.image_processor.preprocess(picture)
    unscaled = retrieve_latents(theirs.vae.encode(pixels), sample_mode="argmax")
    expected = unscaled * theirs.vae.config.scaling_factor
    actual = stage(open_checkpoint(saved(kind)), "encode_image")(torch.from_numpy(picture)[None])
    assert relative_error(actual, expected) <= MODULE_FP32


@torch.no_grad()
def test_an_overflowing_pixel_is_kept_as_nan_where_asked(saved: Saved) -> None:
    decode = stage(open_checkpoint(saved("sd1")), "decode")
    decode.vae.decoder.conv_out.bias[0] = torch.inf
    latents = torch.zeros(1, 4, 2, 2)
    assert decode(latents).isfinite().all()
    decode.keep_overflow = True
    assert decode(latents)[..., 0].isnan().all()
    assert decode(latents)[..., 1:].isfinite().all()
