"""Names, a checkpoint's own scheduler, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats

import tintype
from diffusers_schedulers import CLASSES, compare, configured
from tintype.errors import CheckpointError, RequestError
from tintype.schedulers import ScheduleConfig, default_name, make_table, names
from tintype.schedulers.sigmas import beta_quantile
from tintype_bench.published_configs import SD15_SCHEDULER

CONTRACT = {
    *("ddpm", "ddim", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde"),
    *("unipc", "lcm", "flow_euler"),
}


def test_names_are_listed_and_callable():
    assert names() == tintype.schedulers() == list(CLASSES)
    assert set(names()) >= CONTRACT


@pytest.mark.parametrize("name", CLASSES)
def test_default_name_follows_the_checkpoint(name):
    assert default_name(configured(name, {})[0]) == name


def test_an_absent_scheduler_lists_those_there_are():
    with pytest.raises(RequestError, match="DEISMultistepScheduler.*ddim"):
        default_name({"_class_name": "DEISMultistepScheduler"})


def test_stable_diffusions_own_scheduler():
    assert default_name(SD15_SCHEDULER) == "pndm"
    table = make_table("pndm", SD15_SCHEDULER, 50)
    assert table.timesteps[:4].tolist() == [981, 961, 961, 941]
    theirs = {name: value for name, value in SD15_SCHEDULER.items() if name[0] != "_"}
    theirs.pop("clip_sample")  # which their class does not know
    compare("pndm", theirs, 50)


@pytest.mark.parametrize("name", [n for n in CLASSES if not n.startswith(("flow", "edm"))])
def test_every_method_takes_the_published_config(name):
    assert len(make_table(name, SD15_SCHEDULER, 20)) >= 20


def test_unknown_scheduler_lists_names():
    with pytest.raises(RequestError, match="warp.*ddpm, ddim, pndm"):
        make_table("warp", {}, 20)


def test_a_method_for_another_kind_of_model_lists_those_that_fit():
    with pytest.raises(RequestError, match="'flow_euler' does not sample a diffusion model"):
        make_table("flow_euler", SD15_SCHEDULER, 20)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    with pytest.raises(RequestError, match="flow model; choose one of dpmpp_2m, dpmpp_2m_sde"):
        make_table("ddim", flow, 20)


@pytest.mark.parametrize("steps", [0, -3, 1001])
@pytest.mark.parametrize("name", CLASSES)
def test_step_counts_out_of_range(name, steps):
    with pytest.raises(RequestError, match=f"num_inference_steps={steps}"):
        make_table(name, configured(name, {})[0], steps)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_start", "0.1"),
        ("beta_schedule", 5),
        ("num_train_timesteps", "1000"),
        ("disable_corrector", 5),
        ("trained_betas", [0.1, 0.2]),
        ("algorithm_type", "dpmsolver"),
        ("beta_schedule", "laplace"),
        ("prediction_type", "score"),
        ("timestep_spacing", "random"),
        ("final_sigmas_type", "sigma_min"),
        ("variance_type", "learned"),
        ("solver_order", 4),
        ("predict_x0", False),
        ("timestep_type", "continuous"),
        ("invert_sigmas", True),
        ("use_lu_lambdas", True),
        ("a_field_of_next_year", 3),
    ],
)
def test_fields_of_consequence_are_errors(field, value):
    with pytest.raises(CheckpointError, match=field):
        make_table("ddim", {field: value}, 20)


def test_options_that_exclude_each_other():
    with pytest.raises(CheckpointError, match="more than one of use_karras_sigmas"):
        make_table("euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, 20)
    with pytest.raises(CheckpointError, match="solver_order=3.*unipc takes 3"):
        make_table("dpmpp_2m", {"solver_order": 3}, 20)
    with pytest.raises(CheckpointError, match="pndm takes prediction_type epsilon"):
        make_table("pndm", {"prediction_type": "sample"}, 20)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 is not a whole number from 1"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000 is not"),
        ({"num_train_timesteps": 999.5}, "num_train_timesteps=999.5 is not"),
        ({"beta_start": -1.0}, "its numbers give euler no steps"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 2}, "ratio=2 is outside"),
        ({"use_karras_sigmas": True, "sigma_min": -1.0, "sigma_max": 1.0}, "give euler no steps"),
    ],
)
def test_numbers_that_no_schedule_has_are_named(fields, said):
    with pytest.raises(CheckpointError, match=said):
        make_table("euler", {"beta_schedule": "scaled_linear", **fields}, 20)


def test_a_flow_whose_shift_nothing_tells_is_named():
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    lengths = {"base_image_seq_len": 256, "max_image_seq_len": 256}
    with pytest.raises(CheckpointError, match="its numbers give flow_euler no steps"):
        make_table("flow_euler", {**flow, "use_dynamic_shifting": True, **lengths}, 20, tokens=64)


@pytest.mark.parametrize(
    "field",
    ["num_train_timesteps", "beta_start", "disable_corrector", "flow_shift", "steps_offset"],
)
def test_a_number_that_is_null_is_left_open(field):
    assert ScheduleConfig.from_config({field: None}) == ScheduleConfig()


def test_a_switch_that_is_null_is_off_as_in_diffusers():
    fields = {"solver_order": 2, "lower_order_final": None}
    compare("dpmpp_2m", fields, 6)


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_config_is_read_whole(name, tmp_path):
    configured(name, {})[1].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert default_name(config) == name
    assert make_table(name, config, 20).init_scale > 0


def test_beta_quantile_is_scipys():
    p = np.concatenate([np.linspace(0, 1, 1001), 10.0 ** np.arange(-14, -1)])
    np.testing.assert_allclose(beta_quantile(p), scipy.stats.beta.ppf(p, 0.6, 0.6), rtol=1e-10)


@pytest.mark.parametrize("name", ["pndm", "heun", "dpmpp_sde", "lms", "unipc", "dpmpp_2m"])
def test_starting_late_takes_no_history(name):
    """The first row of a table that starts late looks back at nothing, and its noise levels are the whole table's."""
    whole, late = (make_table(name, SD15_SCHEDULER, 10, start=start) for start in (0, 4))
    assert len(late.rows[0].b) == 1
    assert set(late.noise.tolist()) <= set(whole.noise.tolist())
    assert len(late) == len(whole) - 4 * (2 if name in ("heun", "dpmpp_sde") else 1)


def test_tables_are_shared():
    assert make_table("unipc", SD15_SCHEDULER, 20) is make_table("unipc", dict(SD15_SCHEDULER), 20)
