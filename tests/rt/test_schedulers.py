"""Every step of every table against diffusers' scheduler, fed the same x and the same model outputs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import tintype
from tintype.errors import CheckpointError, RequestError
from tintype.schedulers import ScheduleConfig, default_name, make_table, names
from tintype_kernels import scheduler_step
from tolerances import DIFFUSERS_SIGMAS, SCHEDULER_STEP, relative_error

CLASSES = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
STEPS = [1, 2, 5, 20, 50, 1000]
SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (1, 4, 3, 5)


def reference(name, config, steps):
    """diffusers' scheduler with its own float32 schedule, doing its arithmetic in float64."""
    theirs = CLASSES[name](**config)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = (
        torch.ones((), dtype=torch.float64)
        if config.get("set_alpha_to_one", True)
        else theirs.alphas_cumprod[0]
    )
    theirs.set_timesteps(steps)
    return theirs


def sigmas64(theirs, training):
    """The sigmas of diffusers' own timesteps in float64, by the definition: interpolation in the training sigmas."""
    if theirs.config.use_karras_sigmas:
        ends = theirs.sigmas[:-1].double().numpy()
        rho, ramp = 7.0, np.linspace(0, 1, len(ends))
        high, low = ends[0] ** (1 / rho), ends[-1] ** (1 / rho)
        body = (high + ramp * (low - high)) ** rho
    else:
        body = np.interp(theirs.timesteps.double().numpy(), np.arange(len(training)), training)
    exact = np.append(body, 0.0)
    assert relative_error(theirs.sigmas, exact) < DIFFUSERS_SIGMAS
    return torch.from_numpy(exact)


def compare(name, config, steps):
    config = {**config, "_class_name": CLASSES[name].__name__}
    table = make_table(name, config, steps)
    theirs = reference(name, {k: v for k, v in config.items() if k[0] != "_"}, steps)
    if hasattr(theirs, "sigmas"):
        alphas = theirs.alphas_cumprod.numpy()
        theirs.sigmas = sigmas64(theirs, np.sqrt((1 - alphas) / alphas))
        theirs.set_begin_index(0)
    assert len(table) == steps
    assert relative_error(table.timesteps, theirs.timesteps.double()) < SCHEDULER_STEP
    assert table.init_scale == pytest.approx(float(theirs.init_noise_sigma), rel=DIFFUSERS_SIGMAS)
    return walk(table, theirs)


def walk(table, theirs):
    rng = np.random.default_rng(len(table))
    x = table.init_scale * rng.standard_normal(SHAPE)
    history = []
    for step in range(len(table)):
        m = rng.standard_normal(SHAPE)
        t = theirs.timesteps[step]
        # float32 inside diffusers' step would hide our error behind theirs
        seen = theirs.scale_model_input(torch.from_numpy(x), t)
        assert relative_error(table.c_in[step] * x, seen) < SCHEDULER_STEP
        expected = theirs.step(torch.from_numpy(m), t, torch.from_numpy(x)).prev_sample
        x, h = scheduler_step(x, m, None, history, table.row(step))
        history = [h, *history][: table.history]
        if not torch.isfinite(expected).all():
            # diffusers divides by a step of no length where rounding made two timesteps equal
            assert table.name == "dpmpp_2m"
            assert table.timesteps[step] == table.timesteps[step - 1]
            assert np.isfinite(x).all()
            continue
        assert relative_error(x, expected) < SCHEDULER_STEP, f"step {step}"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CLASSES)
def test_equals_diffusers(name, steps, spacing, prediction):
    if name == "dpmpp_2m" and spacing == "leading" and steps == 1000:
        with pytest.raises(RequestError, match="at most 999"):
            make_table(name, {"timestep_spacing": spacing}, steps)
        return
    compare(name, {**SD1, "timestep_spacing": spacing, "prediction_type": prediction}, steps)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", CLASSES)
def test_beta_schedules(name, schedule):
    compare(name, {"beta_schedule": schedule}, 20)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("ends", [(0.0001, 0.02), (0.00085, 0.012)])
def test_noise_schedule_is_diffusers_own(schedule, ends):
    fields = {"beta_schedule": schedule, "beta_start": ends[0], "beta_end": ends[1]}
    ours = ScheduleConfig.from_config(fields).alphas_cumprod()
    np.testing.assert_array_equal(ours, DDIMScheduler(**fields).alphas_cumprod.double().numpy())


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"clip_sample": True, "clip_sample_range": 0.5},
    ],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_options(options, prediction):
    compare("ddim", {**SD1, **options, "prediction_type": prediction}, 20)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [2, 5, 20, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_karras_sigmas(name, steps, spacing):
    compare(name, {**SD1, "use_karras_sigmas": True, "timestep_spacing": spacing}, steps)


@given(
    name=st.sampled_from(sorted(CLASSES)),
    steps=st.integers(1, 999),
    spacing=st.sampled_from(SPACINGS),
    prediction=st.sampled_from(PREDICTIONS),
    karras=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_tables_are_finite_and_fall(name, steps, spacing, prediction, karras):
    config = {
        **SD1,
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "use_karras_sigmas": karras,
    }
    table = make_table(name, config, steps)
    for field in ("timesteps", "c_in", "u_x", "u_m", "a", "c", "b", "s"):
        assert np.isfinite(getattr(table, field)).all(), field
    assert (np.diff(table.timesteps) <= 0).all()


def test_names_are_listed_and_callable():
    assert names() == tintype.schedulers() == list(CLASSES)


def test_default_name_follows_the_checkpoint():
    assert [default_name({"_class_name": c.__name__}) for c in CLASSES.values()] == names()
    with pytest.raises(RequestError, match="PNDMScheduler.*ddim"):
        default_name({"_class_name": "PNDMScheduler"})


def test_unknown_scheduler_lists_names():
    with pytest.raises(RequestError, match="warp.*ddim, euler, dpmpp_2m"):
        make_table("warp", {}, 20)


@pytest.mark.parametrize("steps", [0, -3, 1001])
@pytest.mark.parametrize("name", CLASSES)
def test_step_counts_out_of_range(name, steps):
    with pytest.raises(RequestError, match=f"num_inference_steps={steps}"):
        make_table(name, {}, steps)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.1, 0.2]),
        ("algorithm_type", "sde-dpmsolver++"),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "random"),
        ("a_field_of_next_year", 3),
    ],
)
def test_fields_of_consequence_are_errors(field, value):
    with pytest.raises(CheckpointError, match=field):
        make_table("ddim", {field: value}, 20)


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_config_is_read_whole(name, tmp_path):
    CLASSES[name](**SD1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert default_name(config) == name
    assert math.isfinite(make_table(name, config, 20).init_scale)
