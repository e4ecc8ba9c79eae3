"""Guidance: which steps ask for the unconditional output, rescaling against diffusers, and every way to say a scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

import tintype
from tintype.errors import RequestError
from tintype.guidance import check_scale, interval, projected, rescaled, scales
from tolerances import KERNEL_STEP, relative_error
from watched import watched

PROMPT = "a red lighthouse"
SETTINGS = {"seed": 5, "output_type": "latent", "num_inference_steps": 6}


def latents(pipeline, scale, **options):
    return pipeline(PROMPT, "fog", guidance_scale=scale, **SETTINGS, **options).images


def test_a_number_a_list_and_a_function_agree(tiny_pipeline):
    number = latents(tiny_pipeline, 3.0)
    np.testing.assert_array_equal(latents(tiny_pipeline, [3.0] * 6), number)
    np.testing.assert_array_equal(latents(tiny_pipeline, lambda progress: 3.0), number)
    falling = latents(tiny_pipeline, [6.0, 5.0, 4.0, 3.0, 2.0, 1.5])
    assert not np.array_equal(falling, number)
    np.testing.assert_array_equal(
        latents(
            tiny_pipeline, lambda progress: [6.0, 5.0, 4.0, 3.0, 2.0, 1.5][round(6 * progress)]
        ),
        falling,
    )


def test_the_unconditional_pass_is_left_out_where_the_scale_is_one(tiny_pipeline):
    pipeline, backend = watched(tiny_pipeline)
    latents(pipeline, interval(3.0, 1 / 3, 2 / 3))
    assert backend.rows == [1, 1, 2, 2, 1, 1]


def test_an_interval_equals_its_list(tiny_pipeline):
    expected = latents(tiny_pipeline, [1.0, 1.0, 3.0, 3.0, 1.0, 1.0])
    np.testing.assert_array_equal(latents(tiny_pipeline, interval(3.0, 0.3, 0.6)), expected)


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "dpmpp_sde"])
def test_a_list_spreads_over_methods_that_look_more_often(tiny_pipeline, scheduler):
    number = latents(tiny_pipeline, 3.0, scheduler=scheduler)
    np.testing.assert_array_equal(latents(tiny_pipeline, [3.0] * 6, scheduler=scheduler), number)


def test_progress_counts_from_what_is_left_out():
    assert scales((1.0, 2.0, 3.0, 4.0), 2, 0.5) == (3.0, 4.0)
    assert scales(tuple(range(50)), 50, 0.0) == tuple(range(50))
    assert scales(tuple(range(49)), 42, 7 / 49) == tuple(range(7, 49))


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_rescaling_is_diffusers_own(amount):
    m, guided = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    expected = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(m), amount)
    # a deviation is one sum more
    assert relative_error(rescaled(guided, m, amount), expected) < 2 * KERNEL_STEP


@pytest.mark.parametrize("parallel", [0.0, 0.4, 1.0])
def test_projected_guidance_is_diffusers_own(parallel):
    m, uncond = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    # theirs counts the scale from the conditional output
    expected = normalized_guidance(
        torch.from_numpy(m), torch.from_numpy(uncond), 6.5, None, parallel, 0.0, True
    )
    assert relative_error(projected(m, uncond, 7.5, parallel), expected) < KERNEL_STEP


def test_without_a_parallel_part_guidance_adds_nothing_along_the_output():
    m, uncond = np.random.default_rng(1).standard_normal((2, 1, 4, 5, 6)).astype(np.float32)
    added = projected(m, uncond, 7.5, 0.0).astype(np.float64) - m
    assert abs(np.sum(added * m)) < KERNEL_STEP * np.linalg.norm(added) * np.linalg.norm(m)


@pytest.mark.parametrize(
    ("option", "plainest"), [("guidance_rescale", 0.0), ("guidance_parallel", 1.0)]
)
def test_options_reach_the_loop(tiny_pipeline, option, plainest):
    plain = latents(tiny_pipeline, 7.5)
    assert not np.array_equal(latents(tiny_pipeline, 7.5, **{option: 0.7}), plain)
    np.testing.assert_array_equal(latents(tiny_pipeline, 7.5, **{option: plainest}), plain)


@pytest.mark.parametrize(
    "bad",
    [
        *("much", "7", b"7", True, np.True_, None, 10**400),
        *([1.0], [1.0, np.inf], (np.nan, 1.0), ["1", "2"], [True, 1.0], {1.0, 2.0}),
        *(np.ones(3), np.ones((2, 2)), np.array(["1", "2"]), np.array([True, False])),
        torch.ones(2, 2),
    ],
    ids=str,
)
def test_bad_scales_are_named(bad):
    with pytest.raises(RequestError, match="^guidance_scale") as refused:
        check_scale(bad, 2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "each",
    [
        *((3, 1.5), range(3, 0, -2), np.array([3.0, 1.5]), np.array([3, 1], np.int8)),
        *(np.array([3.0, 1.5], np.float16), torch.tensor([3.0, 1.5])),
    ],
    ids=repr,
)
def test_one_number_a_step_comes_in_any_row_of_numbers(each):
    expected = tuple(float(number) for number in each)
    assert check_scale(each, 2) == expected
    assert all(type(number) is float for number in check_scale(each, 2))


@pytest.mark.parametrize("number", [3, np.float32(3), np.array(3.0), torch.tensor(3.0)])
def test_a_number_is_a_number_whosever_it_is(number):
    assert check_scale(number, 2) == 3.0


def test_an_array_of_scales_draws_what_its_list_does(tiny_pipeline):
    falling = [6.0, 5.0, 4.0, 3.0, 2.0, 1.5]
    np.testing.assert_array_equal(
        latents(tiny_pipeline, np.array(falling)), latents(tiny_pipeline, falling)
    )


def test_a_bundle_of_single_rows_is_guided_one_row_at_a_time(tiny_pipeline):
    pipeline, backend = watched(tiny_pipeline)
    every = backend.inner.profiles
    backend.profiles = lambda stage: [name for name in every(stage) if "-b2" not in name]
    one_by_one = latents(pipeline, 3.0)
    assert set(backend.rows) == {1}
    assert len(backend.rows) == 12
    assert relative_error(one_by_one, latents(tiny_pipeline, 3.0)) < KERNEL_STEP * 10


def test_the_module_is_public():
    assert tintype.guidance.interval(2.0)(0.5) == 2.0
