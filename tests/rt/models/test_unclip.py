"""unCLIP's modules and the whole of it, from prompt to picture, against diffusers' own in float32."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from PIL import Image
from safetensors.torch import save_file

import small_unclip_checkpoint as small
import tintype
from tintype import images
from tintype.errors import CheckpointError, ProfileError, RequestError
from tintype.models.clip import DEVIATION, MEAN
from tintype.models.pixel_unet import PixelUNet, PixelUNetConfig
from tintype.models.prior import Prior, PriorConfig
from tintype.models.unclip_projection import UnclipProjection, UnclipProjectionConfig
from tintype.noise import Walk, initial_noise, step_noise
from tintype_bench import published_configs as published
from tintype_export.quality import psnr
from tolerances import LATENTS_20_STEPS, MODULE_FP32, relative_error

Saved = Callable[[str], Path]
PROMPT = "a red lighthouse, two blue boats in the rain!"
STEPS = {
    "prior_num_inference_steps": 6,
    "num_inference_steps": 5,
    "super_res_num_inference_steps": 4,
}
REQUEST = {**STEPS, "output_type": "np"}


def pair(theirs: torch.nn.Module, ours: torch.nn.Module) -> Any:
    """Both with the same weights, of which none is left at a value that hides it."""
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def prior() -> Any:
    theirs = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, embedding_dim=32
    )
    return pair(theirs, Prior(PriorConfig.from_json(theirs.config)))


def projection() -> Any:
    theirs = UnCLIPTextProjModel(
        clip_extra_context_tokens=3,
        clip_embeddings_dim=32,
        time_embed_dim=40,
        cross_attention_dim=24,
    )
    return pair(theirs, UnclipProjection(UnclipProjectionConfig.from_json(theirs.config)))


DECODERS = {
    "karlo's kind": {},
    "times that shift": {"resnet_time_scale_shift": "default"},
    "three levels, attention on all": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}


def decoder(kind: str) -> Any:
    theirs = small.decoder(**DECODERS[kind])
    return pair(theirs, PixelUNet(PixelUNetConfig.from_json(theirs.config, "decoder")))


def enlarging() -> Any:
    theirs = small.parts()["super_res_first"]
    return pair(theirs, PixelUNet(PixelUNetConfig.from_json(theirs.config, "super_res_first")))


def read(*lengths: int, tokens: int) -> torch.Tensor:
    """1 for that many first tokens of each row."""
    return (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).float()


def prior_inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(2, 32), torch.randn(2, 77, 32), torch.randn(2, 32), read(5, 77, tokens=77)


def test_the_prior_equals_diffusers() -> None:
    theirs, ours = prior()
    sample, hidden, pooled, mask = prior_inputs()
    time = torch.tensor([3, 741])
    with torch.no_grad():
        expected = theirs(sample, time, pooled, hidden, mask.bool()).predicted_image_embedding
        actual = ours(sample, time.float(), hidden, pooled, mask)
        embeds = ours.embedded(sample)
    assert relative_error(actual, expected) <= MODULE_FP32
    assert relative_error(embeds, theirs.post_process_latents(sample).detach()) <= MODULE_FP32


def test_padding_changes_nothing_of_what_the_prior_predicts() -> None:
    _, ours = prior()
    sample, hidden, pooled, mask = prior_inputs()
    time, other = torch.full((2,), 100.0), hidden.clone()
    other[0, 5:] = 100 * torch.randn(72, 32)
    with torch.no_grad():
        assert torch.equal(*(ours(sample, time, each, pooled, mask) for each in (hidden, other)))


def test_the_projection_equals_diffusers() -> None:
    theirs, ours = projection()
    image, hidden, pooled = torch.randn(2, 32), torch.randn(4, 7, 32), torch.randn(4, 32)
    with torch.no_grad():
        expected = theirs(
            image_embeddings=image,
            prompt_embeds=pooled,
            text_encoder_hidden_states=hidden,
            do_classifier_free_guidance=True,
        )
        shown = torch.tensor([0.0, 0.0, 1.0, 1.0])
        actual = ours(torch.cat([image, image]), shown, hidden, pooled)
    for found, wanted in zip(actual, expected, strict=True):
        assert relative_error(found, wanted) <= MODULE_FP32


@pytest.mark.parametrize("kind", DECODERS)
def test_the_decoder_equals_diffusers(kind: str) -> None:
    theirs, ours = decoder(kind)
    torch.manual_seed(1)
    sample, time = torch.randn(2, 3, 8, 16), torch.tensor([3, 741])
    tokens, mask, added = torch.randn(2, 11, 24), read(6, 11, tokens=11), torch.randn(2, 128)
    with torch.no_grad():
        expected = theirs(
            sample, time, tokens, class_labels=added, attention_mask=mask.bool()
        ).sample
        actual = ours(sample, time.float(), (tokens, mask), added)
    assert relative_error(actual, expected) <= MODULE_FP32


def test_what_enlarges_equals_diffusers() -> None:
    theirs, ours = enlarging()
    sample, time = torch.randn(2, 6, 8, 16), torch.tensor([3, 741])
    with torch.no_grad():
        expected = theirs(sample, time).sample
        actual = ours(sample, time.float())
    assert relative_error(actual, expected) <= MODULE_FP32


def test_a_training_step_reaches_every_parameter() -> None:
    sample, hidden, pooled, mask = prior_inputs()
    time = torch.tensor([3.0, 741.0])
    pixels, context = torch.randn(2, 3, 8, 8), (torch.randn(2, 11, 24), read(6, 11, tokens=11))
    given = {
        prior: (sample, time, hidden, pooled, mask),
        projection: (sample, torch.tensor([0.0, 1.0]), hidden, pooled),
        lambda: decoder("karlo's kind"): (pixels, time, context, torch.randn(2, 128)),
        enlarging: (torch.randn(2, 6, 8, 8), time),
    }
    for made, inputs in given.items():
        _, ours = made()
        outputs = ours(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(each.square().mean() for each in outputs).backward()
        idle = {n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()}
        assert idle <= {"clip_mean", "clip_std"}  # which are of the data, and are not learnt


@pytest.fixture
def folder(saved: Saved) -> Path:
    return saved("unclip")


def draw_as_ours(monkeypatch: pytest.MonkeyPatch, *walks: Walk) -> Iterator[torch.Tensor]:
    """Have diffusers draw for the steps of these walks, one after the other, what we draw for seed 3."""
    shapes = {"prior": (small.WIDTH,), "picture": (3, 8, 8), "enlarged": (3, 32, 32)}
    draws = iter(
        torch.from_numpy(step_noise(3, step, shapes[walk], walk)[None].copy())
        for walk, count in zip(shapes, STEPS.values(), strict=True)
        if walk in walks
        for step in range(count - 1)
    )
    module = sys.modules[diffusers.UnCLIPScheduler.__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws))
    return draws


def consistent(scheduler: Any) -> Any:
    """Diffusers' own, its betas made of its products of alphas: rounded to float32 each by itself they differ by parts
    in a thousand at the last step, where a beta is 4e-5."""
    products = scheduler.alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    scheduler.alphas_cumprod, scheduler.alphas = products, products / before
    scheduler.betas = 1 - scheduler.alphas
    return scheduler


def latents() -> dict[str, torch.Tensor]:
    begun = {
        "prior_latents": initial_noise(3, (small.WIDTH,), "prior"),
        "decoder_latents": initial_noise(3, (3, 8, 8)),
        "super_res_latents": initial_noise(3, (3, 32, 32), "enlarged"),
    }
    return {name: torch.from_numpy(array[None].copy()) for name, array in begun.items()}


@pytest.mark.parametrize("guidance", [(4.0, 8.0), (1.0, 3.0), (2.0, 1.0), (1.0, 1.0)], ids=str)
def test_a_picture_equals_diffusers(
    folder: Path, guidance: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = draw_as_ours(monkeypatch, "prior", "picture", "enlarged")
    before, during = guidance
    theirs = diffusers.UnCLIPPipeline(**small.parts())
    theirs.set_progress_bar_config(disable=True)
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        consistent(getattr(theirs, name))
    counts = {"prior_num_inference_steps": 6, "decoder_num_inference_steps": 5}
    expected = theirs(
        PROMPT,
        **counts,
        super_res_num_inference_steps=4,
        prior_guidance_scale=before,
        decoder_guidance_scale=during,
        output_type="np",
        **latents(),
    ).images
    actual = tintype.load(folder)(
        PROMPT,
        seed=3,
        **STEPS,
        prior_guidance_scale=before,
        guidance_scale=during,
        output_type="np",
    ).images
    assert next(draws, None) is None
    assert actual.std() > 0.05  # not clipped to one colour
    assert relative_error(actual, expected) <= LATENTS_20_STEPS


@pytest.fixture
def varying(saved: Saved) -> Path:
    return saved("unclip_variation")


def picture(width: int, height: int | None = None) -> Image.Image:
    colours = np.random.default_rng(width).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height or width), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("guidance", [8.0, 1.0])
def test_a_variation_equals_diffusers(
    varying: Path, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_as_ours(monkeypatch, "picture", "enlarged")
    theirs = diffusers.UnCLIPImageVariationPipeline(**small.variation_parts())
    theirs.set_progress_bar_config(disable=True)
    for name in ("decoder_scheduler", "super_res_scheduler"):
        consistent(getattr(theirs, name))
    begun = {name: each for name, each in latents().items() if not name.startswith("prior")}
    expected = theirs(
        picture(small.SIDE),
        decoder_num_inference_steps=5,
        super_res_num_inference_steps=4,
        decoder_guidance_scale=guidance,
        output_type="np",
        **begun,
    ).images
    actual = tintype.load(varying)(
        "", image=picture(small.SIDE), seed=3, **REQUEST, guidance_scale=guidance
    ).images
    assert relative_error(actual, expected) <= LATENTS_20_STEPS


@pytest.mark.parametrize(
    "size", [(96, 96), (20, 14), (14, 20), (201, 50), (50, 201), (100, 67)], ids=str
)
def test_a_picture_is_shown_to_clip_as_its_own_processor_does(
    varying: Path, size: tuple[int, int]
) -> None:
    family = tintype.load(varying).family
    processor = small.variation_parts()["feature_extractor"]
    whole = picture(*size)
    expected = processor(images=whole, return_tensors="np").pixel_values[0]
    shown = family.fitted(images.to_numpy(whole), 32, 32)
    actual = np.moveaxis((shown[0] - MEAN) / DEVIATION, -1, 0)
    # Its pixels are whole, after each of the two directions.
    assert np.abs(actual - expected).max() <= 2.1 / 255 / min(DEVIATION)


def test_what_varies_pictures_takes_one_and_what_draws_from_texts_takes_none(
    folder: Path, varying: Path
) -> None:
    with pytest.raises(RequestError, match="has no prior, and varies pictures; give image"):
        tintype.load(varying)("red", **REQUEST)
    with pytest.raises(RequestError, match="has no image_encoder, and draws from a text alone"):
        tintype.load(folder)("red", image=picture(32), **REQUEST)


def test_variations_differ_by_picture_text_and_seed_and_keep_their_bytes(varying: Path) -> None:
    pipeline = tintype.load(varying)
    pictures = [picture(32), picture(48), picture(48), picture(48)]
    made = pipeline(["", "", "red", "red"], image=pictures, seed=[3, 3, 3, 4], **REQUEST).images
    assert len({each.tobytes() for each in made}) == 4
    alone = pipeline("red", image=picture(48), seed=4, **REQUEST).images[0]
    assert alone.tobytes() == made[3].tobytes()


def test_a_picture_that_is_varied_often_is_embedded_once(varying: Path) -> None:
    pipeline, seen = tintype.load(varying), []
    pipeline.family.backend.module("embed_image").register_forward_pre_hook(
        lambda _, given: seen.append(given)
    )
    pipeline("red", image=picture(48), num_images_per_prompt=3, seed=1, **REQUEST)
    assert len(seen) == 1


def test_a_picture_has_its_own_bytes_in_any_batch(folder: Path) -> None:
    pipeline = tintype.load(folder)
    batch = pipeline([PROMPT, "the"], seed=[3, 5], **REQUEST)
    alone = pipeline("the", seed=5, **REQUEST)
    assert alone.images[0].tobytes() == batch.images[1].tobytes()
    assert batch.images[0].tobytes() != batch.images[1].tobytes()
    assert set(batch.timings) == {"encode", "prior", "denoise", "enlarge", "decode"}


def test_pictures_that_are_walked_together_are_those_that_are_walked_alone(folder: Path) -> None:
    together = tintype.load(folder, batch_invariant=False)([PROMPT, "the"], seed=[3, 5], **REQUEST)
    alone = tintype.load(folder)([PROMPT, "the"], seed=[3, 5], **REQUEST)
    # A pixel now and then magnifies its rounding by all that the first step of enlarging does.
    assert psnr(together.images, alone.images) > 60


def test_given_latents_stand_for_the_seeds_noise_of_the_decoder(folder: Path) -> None:
    pipeline, noise = tintype.load(folder), initial_noise(3, (3, 8, 8))[None]
    drawn = pipeline("the", seed=3, **REQUEST).images
    assert pipeline("the", seed=3, latents=noise, **REQUEST).images.tobytes() == drawn.tobytes()
    with pytest.raises(RequestError, match=r"latents has shape \[n, \[3, 8, 4\]\], expected"):
        pipeline("the", latents=noise[..., :4], **REQUEST)


@pytest.mark.parametrize(
    "change",
    [
        {"negative_prompt": "the fog"},
        {"prior_guidance_scale": 1.0},
        {"guidance_scale": 1.0},
        {"prior_num_inference_steps": 2},
        {"super_res_num_inference_steps": 2},
        {"scheduler": "euler"},
        {"guidance_rescale": 0.7},
        {"prompt_weighting": True, "prompt": "the (red:1.4)"},
    ],
    ids="-".join,
)
def test_every_argument_changes_the_picture(folder: Path, change: dict[str, Any]) -> None:
    pipeline = tintype.load(folder)
    request = {"prompt": "the red", "seed": 1, **REQUEST}
    usual, other = pipeline(**request).images, pipeline(**request | change).images
    assert np.isfinite(other).all()
    assert not np.array_equal(usual, other)


def test_steps_of_all_stages_are_counted_and_can_be_cancelled(folder: Path) -> None:
    pipeline, seen = tintype.load(folder), []

    def look(step: int, total: int, latents: np.ndarray) -> bool:
        seen.append((step, total, latents.shape))
        return step < 12

    with pytest.raises(tintype.TintypeError, match="cancelled the request at step 13 of 15"):
        pipeline("the", callback_on_step_end=look, **REQUEST)
    shapes = [(1, small.WIDTH)] * 6 + [(1, 3, 8, 8)] * 5 + [(1, 3, 32, 32)] * 2
    assert seen == [(step, 15, shape) for step, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": np.zeros((32, 32, 3))}, RequestError, "no image_encoder, and draws from a text"),
        ({"strength": 0.5}, RequestError, "strength=0.5 is not for unCLIP models"),
        ({"long_prompts": True}, RequestError, "long_prompts is not for unCLIP"),
        ({"interpolate_from": (16, 16)}, RequestError, "interpolate_from is not for unCLIP"),
        ({"width": 64}, ProfileError, "size 64x32 is not in this model; it draws 32x32"),
        ({"prior_num_inference_steps": 0}, RequestError, "prior_num_inference_steps=0"),
        ({"super_res_num_inference_steps": 1.5}, RequestError, "super_res_num_inference_steps=1.5"),
        ({"prior_guidance_scale": "much"}, RequestError, "much"),
        ({"prior_guidance_scale": [1.0, 2.0]}, RequestError, r"prior_guidance_scale=.*1.0.* is not a finite"),
        ({"prior_guidance_scale": float("nan")}, RequestError, "prior_guidance_scale=nan is not a finite"),
        ({"prior_num_inference_steps": 1001}, RequestError, "prior_num_inference_steps=1001 is outside"),
        ({"super_res_num_inference_steps": 1001}, RequestError, "super_res_num_inference_steps=1001 is out"),
        ({"scheduler": "flow_euler"}, RequestError, "does not sample a diffusion model"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_of_it_is_told(
    folder: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tintype.load(folder)("the", **arguments)


def test_what_is_for_unclip_alone_is_refused_by_others() -> None:
    with pytest.raises(RequestError, match="prior_guidance_scale=2.0 is for unCLIP models"):
        tintype.load("postcard")("the", prior_guidance_scale=2.0)


@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("prior/config.json", "embedding_dim", 48, "prior's embedding_dim is 48, and the text enc"),
        ("decoder/config.json", "cross_attention_dim", 8, "decoder's cross_attention_dim is 8"),
        ("super_res_last/config.json", "in_channels", 3, "super_res_last's in_channels is 3"),
        ("super_res_first/config.json", "sample_size", 30, "sample_size=30 is no multiple"),
        ("super_res_scheduler/scheduler_config.json", "variance_type", "learned_range", "the super_res_first does not"),
        ("decoder/config.json", "class_embed_type", "timestep", "class_embed_type='timestep'"),
        ("decoder/config.json", "only_cross_attention", True, "only_cross_attention=True"),
        ("decoder/config.json", "attention_head_dim", 48, "attention heads over 32 channels"),
        ("super_res_first/config.json", "add_attention", True, "add_attention=True"),
        ("prior/config.json", "added_emb_type", None, "added_emb_type=None"),
        ("prior/config.json", "norm_in_type", "layer", "norm_in_type='layer'"),
    ],
)  # fmt: skip
def test_configurations_that_would_be_something_else_are_refused(
    folder: Path, tmp_path: Path, file: str, field: str, value: Any, message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        tintype.load(copy)("the", **REQUEST)


def test_low_rank_updates_are_the_decoders_where_they_name_no_component(
    folder: Path, tmp_path: Path
) -> None:
    layer = "down_blocks.1.attentions.0.to_q"
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    for prefix in ("base_model.model.", "decoder."):
        file = tmp_path / f"{prefix}safetensors"
        key = f"{prefix}{layer}.lora"
        save_file({f"{key}_A.weight": down, f"{key}_B.weight": up}, file)
        weight, updated = (
            tintype.load(folder, lora=files)
            .family.backend.module("denoise")
            .get_parameter(f"unet.{layer}.weight")
            for files in ((), file)
        )
        assert relative_error((updated - weight).detach(), up @ down) <= MODULE_FP32


@pytest.mark.parametrize("name", published.KARLO)
def test_at_full_size_names_and_shapes_equal_diffusers(name: str) -> None:
    kinds = {
        "prior": (diffusers.PriorTransformer, lambda c: Prior(PriorConfig.from_json(c))),
        "text_proj": (
            UnCLIPTextProjModel,
            lambda c: UnclipProjection(UnclipProjectionConfig.from_json(c)),
        ),
        "decoder": (
            diffusers.UNet2DConditionModel,
            lambda c: PixelUNet(PixelUNetConfig.from_json(c, "decoder")),
        ),
    }
    enlarges = (diffusers.UNet2DModel, lambda c: PixelUNet(PixelUNetConfig.from_json(c, "sr")))
    theirs, ours = kinds.get(name, enlarges)
    with torch.device("meta"):
        modules = ours(published.KARLO[name]), theirs.from_config(published.KARLO[name])
    found, expected = (
        {key: tuple(value.shape) for key, value in module.state_dict().items()}
        for module in modules
    )
    assert found == expected
