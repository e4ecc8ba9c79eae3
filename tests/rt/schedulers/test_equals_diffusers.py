"""Every step of every table against diffusers' scheduler, fed the same x, the same outputs and the same noise."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import tintype
from diffusers_schedulers import CLASSES, DIFFUSION, SD1, compare, configured, injected_noise
from tintype.errors import CheckpointError, RequestError
from tintype.sampling import spread
from tintype.schedulers import ScheduleConfig, make_table
from tintype.schedulers.betas import BETAS
from tintype_kernels import scheduler_step
from tolerances import DIFFUSERS_SIGMAS, RESCALED_SCHEDULE, SCHEDULER_STEP, relative_error

STEPS = [1, 2, 5, 20, 50, 1000]
SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
BY_SIGMA = ["lms", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc"]
NO_SAMPLE_THERE = ("pndm", "euler_ancestral", "dpmpp_sde")  # diffusers does not implement it


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", DIFFUSION)
def test_steps_spacings_and_predictions(name, steps, spacing, prediction):
    fields = {**SD1, "timestep_spacing": spacing, "prediction_type": prediction}
    if name in NO_SAMPLE_THERE and prediction == "sample":
        return
    if name == "lcm" and steps > 50:
        with pytest.raises(RequestError, match="outside 1..50"):
            make_table(name, fields, steps)
        return
    if name in ("dpmpp_2m", "dpmpp_2m_sde", "unipc") and (spacing, steps) == ("leading", 1000):
        with pytest.raises(RequestError, match="at most 999"):
            make_table(name, fields, steps)
        return
    if name == "pndm":
        fields["skip_prk_steps"] = True
    compare(name, fields, steps)


# Trailing steps end above time zero, where diffusers leaves noise in the picture.
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("steps", STEPS)
def test_noise_that_a_model_asks_for(steps, spacing):
    """In further channels, from -1 to 1; what it asks for is between what theory gives."""
    fields = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}
    config, theirs = configured("ddpm", {**fields, "timestep_spacing": spacing})
    table = make_table("ddpm", config, steps)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.set_timesteps(steps)
    rng, shape = np.random.default_rng(steps), (1, 2, 3, 4)
    x = rng.standard_normal(shape)
    with injected_noise(theirs) as injected:
        for step, row in enumerate(table.rows):
            m, noise, wanted = (rng.standard_normal(shape) for _ in range(3))
            wanted = np.tanh(wanted)
            injected[:] = [None, torch.from_numpy(noise)]
            output = torch.from_numpy(np.concatenate([m, wanted], axis=1))
            expected = theirs.step(output, theirs.timesteps[step], torch.from_numpy(x)).prev_sample
            drawn = noise * spread(wanted, table.log_spread[step]) if row.s else None
            x, _ = scheduler_step(x, m, None, [], row, drawn)
            assert relative_error(x, expected) < SCHEDULER_STEP, f"step {step}"


def test_a_denoiser_that_asks_for_no_noise_is_refused_such_a_scheduler():
    pipeline = tintype.load("postcard")
    config = {**pipeline.family.scheduler_config, "variance_type": "learned_range"}
    changed = replace(pipeline, family=replace(pipeline.family, scheduler_config=config))
    with pytest.raises(CheckpointError, match="variance_type='learned_range' is for denoisers"):
        changed("red", scheduler="ddpm")


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", BY_SIGMA)
def test_sigma_distributions(name, steps, sigmas):
    compare(name, {**SD1, f"use_{sigmas}_sigmas": True}, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", BY_SIGMA)
def test_karras_sigmas_with_other_options(name, prediction, spacing):
    if name in NO_SAMPLE_THERE and prediction == "sample":
        return
    own = {"use_karras_sigmas": True, "timestep_spacing": spacing, "prediction_type": prediction}
    compare(name, {**SD1, **own}, 8)


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
def test_given_sigma_ends(name, sigmas):
    compare(name, {**SD1, f"use_{sigmas}_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0}, 8)


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
def test_lms_heeds_the_sigma_ends_of_another_methods_configuration_where_theirs_does(sigmas):
    fields = {**SD1, f"use_{sigmas}_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0}
    theirs = CLASSES["lms"].from_config(fields)
    theirs.set_timesteps(8)
    table = make_table("lms", {**theirs.config, "_class_name": "LMSDiscreteScheduler"}, 8)
    error = relative_error(table.noise / table.signal, theirs.sigmas.double().numpy())
    assert error < DIFFUSERS_SIGMAS


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_the_cosine_schedule_rounds_karras_times_its_own_way(name):
    compare(name, {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}, 8)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_beta_schedules(name, schedule):
    compare(name, {"beta_schedule": schedule, "beta_start": 0.0001, "beta_end": 0.02}, 10)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("ends", [(0.0001, 0.02), (0.00085, 0.012)])
def test_noise_schedule_is_diffusers_own(schedule, ends, rescaled):
    fields = {"beta_schedule": schedule, "beta_start": ends[0], "beta_end": ends[1]}
    fields["rescale_betas_zero_snr"] = rescaled
    ours = ScheduleConfig.from_config(fields).alphas_cumprod()
    theirs = CLASSES["ddim"](**fields).alphas_cumprod.double().numpy()
    if rescaled:
        assert relative_error(ours, theirs) < RESCALED_SCHEDULE
        assert ours[-1] == 0
    else:
        np.testing.assert_array_equal(ours, theirs)


def test_sigmoid_and_sqrt_schedules():
    theirs = CLASSES["ddpm"](beta_schedule="sigmoid", beta_start=0.0001, beta_end=0.02).betas
    ours = BETAS["sigmoid"](0.0001, 0.02, 1000)
    np.testing.assert_array_max_ulp(ours, theirs.numpy(), maxulp=2)
    roots = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64).sqrt()
    assert relative_error(BETAS["sqrt"](0.0001, 0.02, 1000), roots) < SCHEDULER_STEP


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "name",
    ["ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"],
)
def test_zero_terminal_signal(name, spacing):
    fields = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    compare(name, {**SD1, **fields, "timestep_spacing": spacing}, 10)


def test_noise_cannot_be_predicted_where_there_is_no_signal():
    fields = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(CheckpointError, match="no finite u_x for 10 steps.*epsilon"):
        make_table("ddim", fields, 10)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"clip_sample": False},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 3.0},
    ],
    ids=["clipped", "free", "thresholded"],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"]
)
def test_what_happens_to_the_clean_picture(name, prediction, options):
    fields = {**SD1, **options, "prediction_type": prediction}
    read = CLASSES[name]().config
    compare(name, {field: value for field, value in fields.items() if field in read}, 6)


@pytest.mark.parametrize("name", ["ddim", "pndm", "lcm"])
@pytest.mark.parametrize("whole", [True, False])
def test_final_alpha_and_offset(name, whole):
    fields = {**SD1, "set_alpha_to_one": whole, "steps_offset": 1}
    if name == "pndm":
        fields["skip_prk_steps"] = True
    compare(name, fields, 20)


@pytest.mark.parametrize("name", ["ddpm", "lms", "euler", "heun", "dpmpp_2m", "dpmpp_sde", "unipc"])
def test_offset(name):
    compare(name, {**SD1, "timestep_spacing": "leading", "steps_offset": 1}, 20)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_variances(variance, spacing):
    compare("ddpm", {**SD1, "variance_type": variance, "timestep_spacing": spacing}, 20)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [4, 5, 20, 50, 1000])
def test_pndm_begun_by_runge_and_kutta(steps, spacing, prediction):
    fields = {"prediction_type": prediction, "timestep_spacing": spacing, "skip_prk_steps": False}
    compare("pndm", {**SD1, **fields}, steps)


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpm_solver_forms(name, order, kind):
    compare(name, {**SD1, "solver_order": order, "solver_type": kind}, 20)


CUTS = [(5, 1), (5, 4), (10, 2), (10, 5), (50, 10), (50, 47)]


# Runge and Kutta's beginning takes four steps at least.
@pytest.mark.parametrize(
    ("skip", "cut"), [(True, (1, 0)), (True, (2, 1)), *product((True, False), CUTS)], ids=str
)
def test_an_edit_by_pndm_begins_where_theirs_does(skip, cut):
    steps, start = cut
    compare("pndm", {**SD1, "skip_prk_steps": skip, "steps_offset": 1}, steps, start=start)


@pytest.mark.parametrize("steps", STEPS[:-1])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_forms(order, kind, steps):
    compare("unipc", {**SD1, "solver_order": order, "solver_type": kind}, steps)


def test_unipc_without_some_corrections():
    compare("unipc", {**SD1, "disable_corrector": [0, 3]}, 8)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("taught", [50, 100])
def test_lcm_distillation(steps, taught):
    compare("lcm", {**SD1, "original_inference_steps": taught, "timestep_scaling": 3.0}, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["flow_euler", "flow_heun"])
def test_flow_with_a_fixed_shift(name, shift, steps):
    compare(name, {"shift": shift}, steps)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_flow_shifted_with_resolution(kind, tokens):
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    fields = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": 0.02}
    compare("flow_euler", fields, 8, mu=mu, tokens=tokens)
    with pytest.raises(RequestError, match="picture's size"):
        make_table("flow_euler", configured("flow_euler", fields)[0], 8)


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
def test_flow_sigma_distributions(sigmas):
    compare("flow_euler", {f"use_{sigmas}_sigmas": True, "shift": 2.0}, 8)


def test_flow_with_fresh_noise():
    compare("flow_euler", {"stochastic_sampling": True, "shift": 3.0}, 8)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_solvers_on_flow(name, steps):
    fields = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    compare(name, fields, steps)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("fields", [{}, SD1, {"sigma_min": 0.05, "sigma_max": 200.0}], ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_takes_karras_sigmas_on_flow_from_the_noise_schedule(steps, fields):
    compare("unipc", {**FLOW, **fields, "use_karras_sigmas": True}, steps)


@pytest.mark.parametrize(
    ("name", "sigmas"),
    [
        ("unipc", "exponential"),
        ("unipc", "beta"),
        *product(("dpmpp_2m", "dpmpp_2m_sde"), ("karras", "exponential", "beta")),
    ],
)
def test_solvers_of_which_theirs_puts_ratios_where_flow_has_times_are_refused(name, sigmas):
    field = f"use_{sigmas}_sigmas"
    config, theirs = configured(name, {**FLOW, field: True})
    theirs.set_timesteps(8)
    assert theirs.sigmas.max() > 1  # no time of a straight path
    with pytest.raises(
        CheckpointError, match=f"{field} with use_flow_sigmas.*by {name}.*flow_euler"
    ):
        make_table(name, config, 8)


@pytest.mark.parametrize(
    "ends", [{"sigma_max": 200.0}, {"sigma_min": 0.0}, {"sigma_min": 2}], ids=str
)
def test_ends_of_sigmas_that_are_no_times_of_a_straight_path_are_refused(ends):
    config = {**configured("flow_euler", {"use_karras_sigmas": True})[0], **ends}
    (name, value) = next(iter(ends.items()))
    with pytest.raises(CheckpointError, match=rf"{name}={value} is outside \(0, 1\]"):
        make_table("flow_euler", config, 8)
    assert len(make_table("flow_euler", {**config, "use_karras_sigmas": False}, 8)) == 8


@pytest.mark.parametrize("name", ["flow_euler", "unipc"])
def test_one_step_has_no_last_time_to_stretch_to(name):
    """Theirs divides zero by zero."""
    fields = {"shift_terminal": 0.02, **(FLOW if name == "unipc" else {})}
    config, theirs = configured(name, fields)
    theirs.set_timesteps(1)
    assert not torch.isfinite(theirs.sigmas).all()
    with pytest.raises(
        RequestError, match=r"num_inference_steps=1.*shift_terminal=0\.02.*at least 2"
    ):
        make_table(name, config, 1)
    compare(name, fields, 2)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
def test_edm(sigmas, prediction, steps):
    compare("edm_euler", {"sigma_schedule": sigmas, "prediction_type": prediction}, steps)
