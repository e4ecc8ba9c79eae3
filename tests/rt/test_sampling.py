"""The loop itself: the noise that it draws, pictures walked together, sizes reached by interpolation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import tintype
from tintype.errors import ProfileError, RequestError, TintypeError
from tintype.noise import step_noise
from tintype.profiles import cut
from tintype.sampling import StepNoise
from tintype.schedulers import make_table
from tiny_bundle import SCHEDULER
from tolerances import KERNEL_STEP, TINY_GRAPH, relative_error
from watched import watched

PROMPT = "a red lighthouse"
STOCHASTIC = ["ddpm", "euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "lcm"]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_depends_on_seed_and_step_alone(tiny_pipeline, name):
    settings = {"scheduler": name, "num_inference_steps": 5, "output_type": "np"}
    batch = tiny_pipeline(PROMPT, seed=[3, 4, 3], num_images_per_prompt=3, **settings).images
    np.testing.assert_array_equal(batch[0], batch[2])
    assert not np.array_equal(batch[0], batch[1])
    np.testing.assert_array_equal(tiny_pipeline(PROMPT, seed=4, **settings).images[0], batch[1])


def test_carried_noise_is_the_same_path_seen_twice():
    table = make_table("dpmpp_sde", SCHEDULER, 4)
    noise = StepNoise(table, [6], (4, 2, 2))
    first, second = noise(0), noise(1)
    np.testing.assert_array_equal(first, step_noise(6, 0, (4, 2, 2))[None])
    kept, new = table.carry[1]
    expected = kept * first.astype(np.float64) + new * step_noise(6, 1, (4, 2, 2))
    assert relative_error(second, expected) < KERNEL_STEP


@pytest.mark.parametrize(
    ("rows", "batches", "expected"),
    [
        (5, None, [5]),
        (2, [1, 2], [2]),
        (2, [1], [1, 1]),
        (1, [2], [2]),
        (7, [2, 4], [4, 2, 2]),
        (7, [1, 2, 4], [4, 2, 1]),
        (3, [8], [8]),
    ],
)
def test_rows_are_cut_into_the_profiles_there_are(rows, batches, expected):
    assert cut(rows, batches) == expected


@pytest.mark.parametrize("name", ["ddim", "unipc", "euler_ancestral"])
def test_pictures_walked_together_equal_those_made_alone(tiny_pipeline, name):
    request = {
        "prompt": ["a", "b", "c"],
        "negative_prompt": ["x", "y", "z"],
        "seed": [4, 9, 1],
        "scheduler": name,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    pipeline, backend = watched(tiny_pipeline, batch_invariant=False)
    alone = tiny_pipeline(**request).images
    assert relative_error(pipeline(**request).images, alone) < TINY_GRAPH
    # two unguided pictures fill the profile of two rows, and the third has its own
    assert backend.ran == [("32x32-b2", 2)] * 4 + [("32x32-b1", 1)] * 4


def test_eight_pictures_at_a_time_on_torch(saved):
    pipe = tintype.load(saved("sd1"), batch_invariant=False)
    together_, backend = watched(pipe, batch_invariant=False)
    request = {"num_inference_steps": 2, "width": 32, "height": 32, "output_type": "latent"}
    steps = []
    made = together_(
        ["red", "the"],
        num_images_per_prompt=5,
        seed=0,
        callback_on_step_end=lambda step, total, x: steps.append((step, total, len(x))),
        **request,
    )
    assert backend.rows == [16, 16, 4, 4]
    assert steps == [(0, 4, 8), (1, 4, 8), (2, 4, 2), (3, 4, 2)]
    alone = tintype.load(saved("sd1"))("the", seed=9, **request).images
    assert relative_error(made.images[9:], alone) < 100 * TINY_GRAPH


def test_out_of_memory_halves_the_batch_once_and_says_so(saved, monkeypatch):
    pipe = tintype.load(saved("sd1"), batch_invariant=False)
    sizes = _with_room_for(4, pipe, monkeypatch)
    request = {"num_inference_steps": 2, "width": 32, "height": 32, "output_type": "latent"}
    with pytest.warns(RuntimeWarning, match="batch of 4 and goes on with 2") as told:
        made = pipe("red", num_images_per_prompt=4, seed=0, **request).images
    assert len(told) == 1
    assert sizes == [8, 4, 4, 4, 4]
    assert relative_error(made[:1], pipe("red", seed=0, **request).images) < 100 * TINY_GRAPH


def test_out_of_memory_of_one_picture_runs_its_two_rows_apart(saved, monkeypatch):
    request = {"num_inference_steps": 2, "width": 32, "height": 32, "output_type": "latent"}
    expected = tintype.load(saved("sd1"))("red", seed=0, **request).images
    pipe = tintype.load(saved("sd1"))
    sizes = _with_room_for(1, pipe, monkeypatch)
    with pytest.warns(RuntimeWarning, match="goes on with one row of its pair"):
        made = pipe("red", seed=0, **request).images
    assert sizes == [2, 1, 1, 1, 1]
    assert relative_error(made, expected) < 100 * TINY_GRAPH


def test_no_memory_for_a_single_row_of_a_pair_is_told(saved, monkeypatch):
    pipe = tintype.load(saved("sd1"))
    _with_room_for(0, pipe, monkeypatch)
    with (
        pytest.warns(RuntimeWarning, match="one row of its pair"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        pipe("red", num_inference_steps=1, width=32, height=32)


def _with_room_for(rows, pipe, monkeypatch):
    """Let the denoiser run out of memory where it is given more rows; the rows that it was given."""
    denoiser = pipe.family.backend.module("denoise")
    run, sizes = denoiser.forward, []

    def limited(sample, *told):
        sizes.append(len(sample))
        if len(sample) > rows:
            raise torch.OutOfMemoryError("pretended")
        return run(sample, *told)

    monkeypatch.setattr(denoiser, "forward", limited)
    return sizes


def test_no_memory_for_a_single_row_says_what_to_do(saved, monkeypatch):
    pipe = tintype.load(saved("sd1"))

    def full(*_):
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(pipe.family.backend, "_call", full)
    with pytest.raises(TintypeError, match="stage encode does not fit into memory"):
        pipe("red", num_inference_steps=1)


def test_a_size_reached_by_interpolating_latents(tiny_pipeline):
    seen = []
    request = {"width": 48, "height": 32, "seed": 2, "interpolate_from": (32, 32)}

    def note(step, total, x):
        seen.append((step, total, x.shape[2:]))

    tiny_pipeline(PROMPT, num_inference_steps=4, callback_on_step_end=note, **request)
    # four steps at the first size, and the latter half of them again at the second
    assert seen == [(i, 6, (4, 4)) for i in range(4)] + [(i, 6, (4, 6)) for i in (4, 5)]
    kept = [
        tiny_pipeline(PROMPT, strength=s, output_type="np", **request).images for s in (0.25, 1)
    ]
    assert kept[0].shape == (1, 32, 48, 3)
    first = tiny_pipeline(PROMPT, width=32, height=32, seed=2, output_type="np").images
    stretched = tintype.images.resize(first, 48, 32)
    near, far = (relative_error(each, stretched) for each in kept)
    assert near < far
    with pytest.raises(ProfileError, match="size 64x64"):
        tiny_pipeline(PROMPT, interpolate_from=(64, 64))


def test_variations_of_a_picture_keep_more_the_less_the_strength(tiny_pipeline):
    picture = tiny_pipeline(PROMPT, seed=0).images[0]
    request = {"image": picture, "seed": 5, "num_inference_steps": 10, "output_type": "latent"}
    original = tiny_pipeline.family.encode_image(
        _request(tiny_pipeline), tintype.images.to_numpy(picture), {}
    )
    distances = [
        relative_error(tiny_pipeline(PROMPT, strength=s, **request).images, original)
        for s in (0.1, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    two = tiny_pipeline(PROMPT, strength=0.5, num_images_per_prompt=2, **request).images
    assert not np.array_equal(two[0], two[1])


def _request(pipeline):
    from tintype.request import spread

    settings = pipeline.settings()
    return spread(PROMPT, None, 1, 0, {}, settings)[0]


def test_what_is_outside_the_mask_stays(tiny_pipeline):
    """Outside the mask the result is the picture's own latents, whatever the model says."""
    picture = tiny_pipeline(PROMPT, seed=0).images[0]
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    edited = tiny_pipeline(
        PROMPT, image=picture, mask_image=mask, seed=8, output_type="latent"
    ).images
    clean = tiny_pipeline.family.encode_image(
        _request(tiny_pipeline), tintype.images.to_numpy(picture), {}
    )
    np.testing.assert_array_equal(edited[:, :, 2:], clean[:, :, 2:])
    assert not np.isclose(edited[:, :, :2], clean[:, :, :2]).any()


def test_a_strength_that_leaves_no_step_is_an_error(tiny_pipeline):
    picture = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(RequestError, match="strength=0.2 of num_inference_steps=4 leaves no step"):
        tiny_pipeline(PROMPT, image=picture, strength=0.2)


def test_a_bundle_without_an_image_encoder_says_so(tiny_pipeline):
    pipeline, backend = watched(tiny_pipeline, batch_invariant=False)
    backend.stages = ("encode", "denoise", "decode")
    with pytest.raises(RequestError, match="lacks"):
        pipeline(PROMPT, image=np.zeros((32, 32, 3), np.uint8))


def test_one_picture_is_encoded_once_for_a_batch(tiny_pipeline):
    pipeline, backend = watched(tiny_pipeline, batch_invariant=False)
    backend.batch_invariant, ran = True, []
    run = backend.run
    backend.run = lambda stage, profile, inputs: (ran.append(stage), run(stage, profile, inputs))[1]
    pipeline(PROMPT, image=np.zeros((32, 32, 3), np.uint8), num_images_per_prompt=3, seed=0)
    assert ran.count("encode_image") == 1


def test_eight_threads_edit_without_disturbing_each_other(tiny_bundle):
    pipeline = tintype.load(tiny_bundle)
    pictures = [np.full((32, 32, 3), 30 * i, np.uint8) for i in range(8)]
    results = {}

    def work(seed):
        out = pipeline(
            PROMPT,
            image=pictures[seed],
            seed=seed,
            scheduler=STOCHASTIC[seed % 4],
            output_type="np",
        )
        results[seed] = out.images.tobytes()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together_ = dict(results)
    for seed in range(8):
        work(seed)
    assert together_ == results


def test_a_thousand_draws_of_batch_position_and_seed(tiny_pipeline):
    """Wherever a prompt and seed stand in whatever batch, their picture has the bytes that it has alone."""
    random = np.random.default_rng(0)
    settings = {"scheduler": "dpmpp_sde", "num_inference_steps": 2, "output_type": "np"}
    prompts = ["a", "b", "the red lighthouse"]
    alone = {
        (prompt, seed): tiny_pipeline(prompt, seed=seed, **settings).images[0].tobytes()
        for prompt in prompts
        for seed in range(20)
    }
    draws = 0
    while draws < 1000:
        size = int(random.integers(1, 7))
        keys = [(prompts[random.integers(3)], int(random.integers(20))) for _ in range(size)]
        texts, seeds = ([key[part] for key in keys] for part in (0, 1))
        batch = tiny_pipeline(texts, seed=seeds, **settings).images
        assert [image.tobytes() for image in batch] == [alone[key] for key in keys]
        draws += size
