"""The pipeline on a tiny bundle: its pictures against numpy and diffusers, its bytes, and its refusals."""

from __future__ import annotations

import threading
from inspect import signature

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

import tintype
from tintype.errors import Cancelled, ProfileError, RequestError, TintypeError
from tintype.noise import initial_noise
from tintype.pipeline import Pipeline
from tintype.tokenizer import ClipTokenizer
from tiny_bundle import SCHEDULER, random_weights
from tolerances import TINY_GRAPH, relative_error
from watched import watched, with_backend

THEIRS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}
PROMPT = "a red lighthouse"


def convolve(sample, kernel):
    return torch.nn.functional.conv2d(sample, torch.from_numpy(kernel), padding=1)


def expected_latents(folder, scheduler, guidance, steps, negative=""):
    """The same picture by the tiny graphs' definition, in torch, with diffusers' own loop."""
    weights = random_weights()
    tokenizer = ClipTokenizer(folder / "tokenizer")
    texts = [
        weights["embed"][tokenizer(text)[0]].mean(0) @ weights["mix"] for text in (negative, PROMPT)
    ]
    told = [torch.from_numpy(text).reshape(1, 4, 1, 1) for text in texts]
    theirs = THEIRS[scheduler].from_config({**SCHEDULER, "clip_sample": False})
    theirs.set_timesteps(steps)
    x = torch.from_numpy(initial_noise(5, (1, 4, 4, 4))) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        local = convolve(theirs.scale_model_input(x, t), weights["conv"])
        uncond, cond = (torch.tanh(local + text + t / 1000) for text in told)
        m = uncond + guidance * (cond - uncond) if guidance > 1 else cond
        x = theirs.step(m, t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("scheduler", THEIRS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_latents_equal_diffusers_loop(tiny_pipeline, tiny_bundle, scheduler, guidance, steps):
    out = tiny_pipeline(
        PROMPT,
        "fog",
        seed=5,
        num_inference_steps=steps,
        guidance_scale=guidance,
        scheduler=scheduler,
        output_type="latent",
    )
    expected = expected_latents(tiny_bundle, scheduler, guidance, steps, "fog")
    assert out.images.shape == (1, 4, 4, 4)
    assert relative_error(out.images, expected) < TINY_GRAPH


def test_image_is_the_decoded_latents(tiny_pipeline):
    latents = tiny_pipeline(PROMPT, seed=5, output_type="latent").images
    image = tiny_pipeline(PROMPT, seed=5, output_type="np").images
    blocks = 1 / (1 + np.exp(-(latents.transpose(0, 2, 3, 1) @ random_weights()["paint"])))
    rows = blocks.reshape(1, 4, 4, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    assert image.dtype == np.float32
    assert relative_error(image, rows.reshape(1, 32, 32, 3)) < TINY_GRAPH
    (picture,) = tiny_pipeline(PROMPT, seed=5).images
    np.testing.assert_array_equal(np.asarray(picture), np.rint(image[0] * 255).astype(np.uint8))


def test_same_seed_gives_the_same_bytes_alone_and_in_a_batch(tiny_pipeline):
    batch = tiny_pipeline(PROMPT, seed=10, num_images_per_prompt=4, output_type="np")
    assert batch.seeds == [10, 11, 12, 13]
    for seed, image in zip(batch.seeds, batch.images, strict=True):
        alone = tiny_pipeline(PROMPT, seed=seed, output_type="np").images[0]
        assert alone.tobytes() == image.tobytes()
    assert len({image.tobytes() for image in batch.images}) == 4


def test_prompt_lists_with_their_own_negatives_and_seeds(tiny_pipeline):
    out = tiny_pipeline(
        ["a", "b"], ["x", "y"], num_images_per_prompt=2, seed=[4, 3, 2, 1], output_type="np"
    )
    assert out.seeds == [4, 3, 2, 1]
    alone = tiny_pipeline("b", "y", seed=2, output_type="np").images[0]
    np.testing.assert_array_equal(out.images[2], alone)


def test_negative_prompt_and_empty_prompt_matter(tiny_pipeline):
    plain, negative, empty = (
        tiny_pipeline(*prompts, seed=1, output_type="np").images.tobytes()
        for prompts in ((PROMPT,), (PROMPT, "fog"), ("",))
    )
    assert len({plain, negative, empty}) == 3
    assert tiny_pipeline(PROMPT, "", seed=1, output_type="np").images.tobytes() == plain


def test_seed_is_drawn_and_told(tiny_pipeline):
    first, second = (tiny_pipeline(PROMPT, output_type="np") for _ in range(2))
    assert first.seeds != second.seeds
    again = tiny_pipeline(PROMPT, seed=first.seeds[0], output_type="np")
    np.testing.assert_array_equal(again.images, first.images)


def test_given_latents_replace_the_seed(tiny_pipeline):
    latents = initial_noise(5, (1, 4, 4, 4))
    given = tiny_pipeline(PROMPT, latents=latents, seed=0, output_type="np").images
    np.testing.assert_array_equal(given, tiny_pipeline(PROMPT, seed=5, output_type="np").images)


def test_another_size(tiny_pipeline):
    (image,) = tiny_pipeline(PROMPT, width=48, height=32, seed=0).images
    assert isinstance(image, Image.Image)
    assert image.size == (48, 32)


def test_timings_name_the_stages(tiny_pipeline):
    timings = tiny_pipeline(PROMPT, seed=0).timings
    assert set(timings) == {"encode", "denoise", "decode"}
    assert all(seconds >= 0 for seconds in timings.values())


def test_callback_sees_every_step_and_can_cancel(tiny_pipeline):
    seen = []
    tiny_pipeline(
        PROMPT,
        num_images_per_prompt=2,
        callback_on_step_end=lambda step, total, latents: seen.append((step, total, latents.shape)),
    )
    assert seen == [(step, 8, (1, 4, 4, 4)) for step in range(8)]
    for kind in (bool, np.bool_):
        with pytest.raises(Cancelled, match="step 2 of 4"):
            tiny_pipeline(PROMPT, callback_on_step_end=lambda step, *_, kind=kind: kind(step < 1))


def test_what_a_callback_writes_to_its_latents_changes_no_picture(tiny_pipeline, saved):
    def spoil(step, total, latents):
        latents[:] = 0

    for pipeline in (tiny_pipeline, tintype.load(saved("sd1")), tintype.load(saved("unclip"))):
        settings = {"seed": 3, "num_inference_steps": 2, "output_type": "latent"}
        spoiled = pipeline(PROMPT, callback_on_step_end=spoil, **settings).images
        np.testing.assert_array_equal(spoiled, pipeline(PROMPT, **settings).images)


@pytest.mark.parametrize("where", ["callback_on_step_end", "guidance_scale"])
@pytest.mark.parametrize("kind", [TypeError, ValueError, KeyError])
def test_what_a_callers_own_function_raises_reaches_the_caller(tiny_pipeline, where, kind):
    expected = tiny_pipeline(PROMPT, seed=1, output_type="np").images
    own = kind("the caller's own")

    def fail(*_):
        raise own

    with pytest.raises(kind) as caught:
        tiny_pipeline(PROMPT, **{where: fail})
    assert caught.value is own
    again = tiny_pipeline(PROMPT, seed=1, output_type="np").images
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 59.6 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
)
def test_memory_that_lacks_is_told_with_the_size(tiny_pipeline, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tintype.families.latent_diffusion.initial_noise", fail)
    with pytest.raises(TintypeError, match="picture of 32x32 does not fit into memory"):
        tiny_pipeline(PROMPT)


def test_a_prepared_call_is_checked_at_once_and_makes_its_pictures_when_it_is_run(tiny_pipeline):
    pipeline, backend = watched(tiny_pipeline)
    with pytest.raises(ProfileError, match="size 64x64"):
        pipeline.prepare(PROMPT, width=64, height=64)
    with pytest.raises(RequestError, match="scheduler='warp'"):
        pipeline.prepare(PROMPT, scheduler="warp")
    call = pipeline.prepare(PROMPT, seed=3, num_images_per_prompt=2, output_type="np")
    assert not backend.ran
    expected = tiny_pipeline(PROMPT, seed=3, num_images_per_prompt=2, output_type="np")
    out = call.run()
    np.testing.assert_array_equal(out.images, expected.images)
    assert out.seeds == [3, 4]


def test_a_call_and_a_prepared_one_take_the_same_arguments():
    called, prepared = (signature(each) for each in (Pipeline.__call__, Pipeline.prepare))
    assert called.parameters == prepared.parameters
    assert (called.return_annotation, prepared.return_annotation) == ("Output", "Call")


def test_threads_do_not_disturb_each_other(tiny_bundle):
    pipeline = tintype.load(tiny_bundle)
    results = {}

    def work(seed):
        cancel = (lambda step, total, latents: step < 1) if seed == 3 else None
        try:
            out = pipeline(PROMPT, seed=seed, output_type="np", callback_on_step_end=cancel)
            results[seed] = out.images.tobytes()
        except Cancelled:
            results[seed] = b"cancelled"

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {s: pipeline(PROMPT, seed=s, output_type="np").images.tobytes() for s in range(8)}
    assert results == {**expected, 3: b"cancelled"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "much", None.__class__])
def test_guidance_must_be_finite(tiny_pipeline, bad):
    with pytest.raises(RequestError, match="guidance_scale"):
        tiny_pipeline(PROMPT, guidance_scale=bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": -1}, "num_inference_steps=-1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"num_inference_steps": 1001}, "1..1000"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"scheduler": "warp"}, "ddpm, ddim, pndm"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "2\\*\\*64"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": [1, 2]}, "2 entries for 1 images"),
        ({"output_type": "gif"}, "pil, np, latent"),
        ({"width": 0}, "width=0"),
        ({"latents": np.zeros((1, 4, 5, 4))}, "latents has shape"),
        ({"latents": np.zeros((2, 4, 4, 4))}, "latents has shape"),
        ({"latents": np.full((1, 4, 4, 4), np.nan)}, "NaN"),
        ({"image": object()}, "image is a object; expected a PIL image"),
        ({"mask_image": object()}, "give image, too"),
        ({"strength": 0.5}, "give image, too"),
        ({"image": np.full((8, 8, 3), np.nan)}, "image holds NaN"),
        ({"image": np.full((8, 8, 3), 2.0)}, "image holds values from 2 to 2"),
        ({"image": np.zeros((8, 8, 4))}, "image has shape"),
        ({"image": np.zeros((8, 8, 3)), "strength": 0}, "strength=0 is outside"),
        ({"image": np.zeros((8, 8, 3)), "strength": 1.1}, "strength=1.1 is outside"),
        ({"image": np.zeros((32, 32, 3)), "mask_image": np.zeros((8, 8))}, "mask_image is 8x8"),
        ({"image": [np.zeros((8, 8, 3))] * 2}, "image has 2 pictures for 1 images"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale has 2 entries for 4 steps"),
        ({"guidance_scale": lambda progress: np.nan}, "guidance_scale=nan"),
        ({"guidance_rescale": 2}, "guidance_rescale=2"),
        ({"guidance_parallel": -1}, "guidance_parallel=-1"),
        (
            {"num_images_per_prompt": 10**9},
            "num_images_per_prompt=1000000000 makes more than 65536",
        ),
        ({"interpolate_from": (32, 32), "image": np.zeros((8, 8, 3))}, "takes no image"),
        ({"interpolate_from": 32}, "interpolate_from=32 is not"),
        ({"interpolate_from": (32, 32, 3)}, "interpolate_from=.* is not"),
        ({"interpolate_from": (32.0, 32)}, "interpolate_from=32.0 is not a whole number"),
        ({"callback_on_step_end": 5}, "callback_on_step_end=5 cannot be called"),
        ({"scheduler": ["ddim"]}, "scheduler=.* is unknown"),
        ({"latents": "noise"}, "latents is a str"),
        ({"latents": [[1.0], [1.0, 2.0]]}, "latents is a list"),
        ({"latents": np.zeros((1, 4, 4, 4), complex)}, "latents is a ndarray"),
        ({"image": np.full((8, 8, 3), "a")}, "image holds <U1"),
    ],
)
def test_bad_arguments_are_named(tiny_pipeline, arguments, message):
    with pytest.raises(RequestError, match=message):
        tiny_pipeline(PROMPT, **arguments)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (([],), "empty list"),
        (([3],), "prompt holds 3"),
        ((None,), "prompt=None is neither"),
        (({"a": 1},), "prompt=.* is neither"),
        ((["a", "b"], ["x"]), "negative_prompt has 1 entries for 2"),
        ((["a"], [5]), "negative_prompt holds 5"),
        (("a", 5), "negative_prompt=5 is neither"),
    ],
    ids=str,
)
def test_bad_prompts_are_named(tiny_pipeline, prompts, message):
    with pytest.raises(RequestError, match=message):
        tiny_pipeline(*prompts)


def test_sizes_that_the_bundle_lacks_are_listed(tiny_pipeline):
    with pytest.raises(ProfileError, match="size 64x32.*32x32, 48x32"):
        tiny_pipeline(PROMPT, width=64)


class Recorder:
    """Stands between the family and a backend: notes what begins and runs, hides profiles, spoils outputs."""

    def __init__(self, inner, hide=None, spoil=None):
        self.name, self.stages, self.inner = "recorder", inner.stages, inner
        self.batch_invariant = inner.batch_invariant
        self.hide, self.spoil, self.begun, self.ran = hide, spoil, [], []

    def profiles(self, stage):
        return [name for name in self.inner.profiles(stage) if (stage, name) != self.hide]

    def compile(self, stage, profile):
        self.begun.append((stage, profile))
        self.inner.compile(stage, profile)

    def run(self, stage, profile, inputs):
        self.ran.append((stage, profile))
        outputs = self.inner.run(stage, profile, inputs)
        if stage == self.spoil:
            return {name: np.full_like(array, np.nan) for name, array in outputs.items()}
        return outputs


def recorded(pipeline, **options):
    backend = Recorder(pipeline.family.backend, **options)
    return with_backend(pipeline, backend), backend


@pytest.mark.parametrize(
    "refused",
    [
        {"latents": np.zeros((1, 4, 9, 9), np.float32)},
        {"interpolate_from": (32, 32), "width": 64, "height": 64},
    ],
    ids=["latents", "second size"],
)
def test_nothing_begins_for_a_request_that_is_refused(tiny_pipeline, refused):
    pipeline, backend = recorded(tiny_pipeline)
    with pytest.raises(TintypeError):
        pipeline.prepare(PROMPT, **refused)
    assert backend.begun == []


def test_what_a_request_walks_through_begins_once_it_is_checked(tiny_pipeline):
    pipeline, backend = recorded(tiny_pipeline)
    pipeline.prepare(PROMPT, interpolate_from=(32, 32), width=48, height=32)
    denoisers = {("denoise", f"{size}-b2") for size in ("32x32", "48x32")}
    assert {*backend.begun} == {("encode", "b1"), ("decode", "48x32-b1")} | denoisers


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_nan_from_a_stage_is_an_error(tiny_pipeline, stage):
    pipeline, _ = recorded(tiny_pipeline, spoil=stage)
    with pytest.raises(TintypeError, match=f"stage {stage} gave NaN"):
        pipeline(PROMPT, seed=0)


def test_no_guidance_takes_the_single_row_graph_or_doubles(tiny_pipeline):
    single, singles = recorded(tiny_pipeline)
    double, doubles = recorded(tiny_pipeline, hide=("denoise", "32x32-b1"))
    one = single(PROMPT, seed=0, guidance_scale=1.0, output_type="latent").images
    two = double(PROMPT, seed=0, guidance_scale=1.0, output_type="latent").images
    assert {profile for stage, profile in singles.ran if stage == "denoise"} == {"32x32-b1"}
    assert {profile for stage, profile in doubles.ran if stage == "denoise"} == {"32x32-b2"}
    assert relative_error(one, two) < TINY_GRAPH


def test_the_empty_prompt_is_encoded_once(tiny_bundle):
    pipeline, backend = recorded(tintype.load(tiny_bundle))
    for seed in range(3):
        pipeline(PROMPT, seed=seed)
    assert sum(stage == "encode" for stage, _ in backend.ran) == 1 + 3


def test_a_long_prompt_warns_once_a_call(tiny_pipeline):
    with pytest.warns(UserWarning, match="dropped") as caught:
        tiny_pipeline("word " * 100, num_images_per_prompt=3, seed=0)
    assert len(caught) == 1
