"""The sampler's step inside the stage: pictures as by the plain denoiser, and latents that stay where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tintype
from tintype import guidance
from tintype.schedulers import make_table
from tintype.steps import STEPS, step_row
from tiny_bundle import SCHEDULER
from tolerances import TINY_GRAPH, relative_error
from watched import with_backend

REQUEST = {"width": 32, "height": 32, "num_inference_steps": 6, "seed": 4, "output_type": "latent"}
DIFFUSION = [name for name in tintype.schedulers() if not name.startswith(("flow", "edm"))]


class Backend:
    """The backend `inner` with these stages alone; `ran` lists the stages that were run, `fetched` counts arrays."""

    def __init__(self, inner, *absent):
        self.inner, self.ran, self.fetched = inner, [], 0
        self.stages = tuple(stage for stage in inner.stages if stage not in absent)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def run(self, stage, profile, inputs):
        self.ran.append(stage)
        return self.inner.run(stage, profile, inputs)

    def run_placed(self, stage, profile, inputs):
        self.ran.append(stage)
        return self.inner.run_placed(stage, profile, inputs)

    def fetch(self, placed):
        self.fetched += 1
        return self.inner.fetch(placed)


@pytest.fixture
def pipes(saved):
    """The pipeline as it is, and without the stages that hold the step; and the backend of each.

    Both run the two rows of a pair together: a random model magnifies the rounding by which one row differs from two.
    """
    pipe = tintype.load(saved("sd1"), batch_invariant=False)
    inner = pipe.family.backend
    whole, plain = Backend(inner), Backend(inner, "step", "guided_step")
    return [(with_backend(pipe, backend), backend) for backend in (whole, plain)]


@pytest.mark.parametrize("scheduler", DIFFUSION)
def test_every_scheduler_gives_what_the_plain_denoiser_gives(pipes, scheduler):
    (whole, _), (plain, _) = pipes
    made = [pipe("a red boat", scheduler=scheduler, **REQUEST).images for pipe in (whole, plain)]
    assert relative_error(*made) < 100 * TINY_GRAPH


def test_guidance_in_an_interval_takes_both_stages(pipes):
    (whole, backend), (plain, _) = pipes
    scale = guidance.interval(5.0, 0.3, 0.7)
    made = [pipe("a red boat", guidance_scale=scale, **REQUEST).images for pipe in (whole, plain)]
    assert relative_error(*made) < 100 * TINY_GRAPH
    steps = [stage for stage in backend.ran if "step" in stage]
    assert steps == ["step"] * 2 + ["guided_step"] * 3 + ["step"]


@pytest.mark.parametrize("scheduler", ["euler", "heun", "unipc", "lcm"])
def test_every_step_stands_at_one_of_the_times_that_were_foretold(pipes, scheduler):
    (pipe, backend), _ = pipes
    stood = []

    def foretold(told, times):
        return {**told, "times": times}

    def run_placed(stage, profile, inputs):
        inputs = dict(inputs)
        times = inputs.pop("times")
        assert times.dtype == np.float32
        stood.append((inputs["row"][:, 0].numpy(), times))
        return backend.inner.run_placed(stage, profile, inputs)

    backend.foretold, backend.run_placed = foretold, run_placed
    pipe("a", scheduler=scheduler, num_images_per_prompt=2, **REQUEST)
    assert len(stood) >= REQUEST["num_inference_steps"]
    for step, (found, times) in enumerate(stood):
        assert (found == times[step]).all()


def test_latents_are_fetched_once_unless_a_callback_looks(pipes):
    (pipe, backend), _ = pipes
    pipe("a", **REQUEST)
    assert backend.fetched == 1
    seen = []
    pipe("a", callback_on_step_end=lambda step, total, x: seen.append(x.shape), **REQUEST)
    assert seen == [(1, 4, 4, 4)] * 6
    assert backend.fetched == 8


class Overflowing(Backend):
    """Gives NaN until it is watched, as a GPU's does in 16 bits; then it can do better, or cannot."""

    def __init__(self, inner, *, helps):
        super().__init__(inner)
        self.watched, self.helps = set(), helps

    def run_placed(self, stage, profile, inputs):
        if self.helps and stage in self.watched:
            return super().run_placed(stage, profile, inputs)
        self.ran.append(stage)
        return {f"next_{n}": torch.full_like(inputs[n], torch.nan) for n in ("sample", "history")}

    def watch(self, stage):
        self.watched.add(stage)
        return self.helps


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_latents_that_overflow_are_walked_again_with_the_same_noise(saved, scheduler):
    pipe = tintype.load(saved("sd1"), batch_invariant=False)
    asked = {**REQUEST, "scheduler": scheduler, "guidance_scale": guidance.interval(5.0, 0.3, 0.7)}
    backend = Overflowing(pipe.family.backend, helps=True)
    made = with_backend(pipe, backend)("a red boat", **asked).images
    assert backend.watched == {"step", "guided_step"}
    np.testing.assert_array_equal(made, pipe("a red boat", **asked).images)


def test_latents_that_nothing_helps_are_walked_once_and_refused(saved):
    pipe = tintype.load(saved("sd1"), batch_invariant=False)
    backend = Overflowing(pipe.family.backend, helps=False)
    with pytest.raises(tintype.TintypeError, match="denoise gave NaN or infinity within 6 steps"):
        with_backend(pipe, backend)("a red boat", **REQUEST)
    assert backend.ran.count("guided_step") == REQUEST["num_inference_steps"]


def test_a_mask_and_guidance_that_is_not_linear_take_the_plain_denoiser(pipes):
    (pipe, backend), _ = pipes
    picture = np.zeros((1, 32, 32, 3), np.float32)
    pipe("a", image=picture, mask_image=picture[..., :1] + 1, **REQUEST)
    pipe("a", guidance_rescale=0.5, **REQUEST)
    assert not any("step" in stage for stage in backend.ran)


def test_without_the_plain_denoiser_what_needs_it_is_refused(saved):
    pipe = tintype.load(saved("sd1"))
    alone = with_backend(pipe, Backend(pipe.family.backend, "denoise"))
    alone("a", **REQUEST)
    with pytest.raises(tintype.RequestError, match="plain stage denoise, which has no engine"):
        alone("a", guidance_rescale=0.5, **REQUEST)


CASCADE = {
    "prior_num_inference_steps": 3,
    "num_inference_steps": 4,
    "super_res_num_inference_steps": 3,
}


@pytest.fixture
def cascades(saved):
    """As `pipes`, of an unCLIP; models that predict clean values do not magnify a rounding."""
    pipe = tintype.load(saved("unclip"), batch_invariant=False)
    inner = pipe.family.backend
    whole, plain = Backend(inner), Backend(inner, *STEPS)
    return [(with_backend(pipe, backend), backend) for backend in (whole, plain)]


def after_each_step(pipe, **request):
    """What stands after each step of a cascade, an array a step."""
    seen = []
    pipe(
        ["a red boat", "the"],
        seed=[4, 5],
        callback_on_step_end=lambda step, total, latents: seen.append(latents.copy()),
        **{**CASCADE, **request},
    )
    return seen


@pytest.mark.parametrize(
    "request_",
    [{}, {"guidance_scale": 1.0}, {"prior_guidance_scale": 1.0}, {"scheduler": "euler_ancestral"}],
    ids=str,
)
def test_a_cascade_gives_what_its_plain_models_give(cascades, request_):
    (whole, backend), (plain, _) = cascades
    pairs = zip(*(after_each_step(pipe, **request_) for pipe in (whole, plain)), strict=True)
    for made, expected in pairs:
        # The first step of enlarging divides by 0.006.
        assert relative_error(made, expected) < 1000 * TINY_GRAPH
    assert not {STEPS[name].model for name in STEPS} & {*backend.ran}


def test_a_cascade_without_its_plain_models_draws_the_same(cascades):
    """As engines have it, which are built of whole steps alone."""
    (whole, backend), _ = cascades
    plain = {step.model for step in STEPS.values()}
    alone = with_backend(whole, Backend(backend.inner, *plain))
    assert alone.family.needs == ()
    for made, expected in zip(*map(after_each_step, (alone, whole)), strict=True):
        np.testing.assert_array_equal(made, expected)
    with pytest.raises(tintype.RequestError, match="plain stage denoise, which has no engine"):
        after_each_step(alone, guidance_rescale=0.5)


def test_how_much_noise_is_wanted_where_none_is_added_changes_nothing(cascades):
    (whole, backend), (plain, _) = cascades
    # Beyond what is trained: at the last step, whose bounds lie far apart, this overflows.
    with torch.no_grad():
        backend.inner.module("denoise").unet.conv_out.bias[3:] += 12
    for made, expected in zip(*map(after_each_step, (whole, plain)), strict=True):
        assert relative_error(made, expected) < 1000 * TINY_GRAPH


def test_a_cascade_takes_the_last_step_by_its_own_model(cascades):
    (pipe, backend), _ = cascades
    after_each_step(pipe)
    steps = [stage for stage in backend.ran if stage in STEPS]
    expected = {"prior_guided_step": 3, "guided_step": 4, "enlarge_step": 2, "enlarge_last_step": 1}
    assert steps == [stage for stage, count in expected.items() for _ in range(count)]


def test_a_cascade_whose_guidance_is_rescaled_takes_the_plain_decoder_alone(cascades):
    (pipe, backend), _ = cascades
    after_each_step(pipe, guidance_rescale=0.5)
    assert backend.ran.count("denoise") == 4
    assert {"prior", "enlarge", "enlarge_last"}.isdisjoint(backend.ran)


def test_a_larger_batch_is_filled_up(saved):
    pipe = tintype.load(saved("sd1"), batch_invariant=False)
    backend = Backend(pipe.family.backend)
    backend.profiles = lambda stage: {"encode": ["b1"], "decode": ["32x32-b1"]}.get(
        stage, ["32x32-b4"]
    )
    made = with_backend(pipe, backend)("a", num_images_per_prompt=3, **REQUEST).images
    assert backend.ran.count("guided_step") == 6
    expected = pipe("a", num_images_per_prompt=3, **REQUEST).images
    assert relative_error(made, expected) < 100 * TINY_GRAPH


def test_a_row_says_time_scale_and_all_coefficients_in_finite_numbers():
    table = make_table("dpmpp_2m", SCHEDULER, 4)
    row = table.rows[2]._replace(guidance=5.0)
    numbers = step_row(table.timesteps[2], 0.5, row)
    assert numbers.dtype == np.float32
    assert np.isfinite(numbers).all()
    expected = [table.timesteps[2], 0.5, 5.0, row.u_x, row.u_m, row.a, row.c, row.s, *row.b, 0, 0]
    np.testing.assert_allclose(np.delete(numbers, 5), expected, rtol=1e-6)
