"""What must hold of any table: finite numbers, falling times, and a model that knows the answer is followed to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffusers_schedulers import DIFFUSION, SD1
from tintype.schedulers import make_table
from tintype_kernels import scheduler_step
from tolerances import SCHEDULER_STEP

SIGMAS = ["", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FLOWING = ["flow_euler", "flow_heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]
# LCM blends x into its picture near time zero, so it does not keep to the line on purpose.
FOLLOWING = [name for name in DIFFUSION if name != "lcm"]


def own_limits(name, steps, fields):
    """Leave out what the methods refuse."""
    assume(name != "lcm" or steps <= 50)
    assume(name != "pndm" or fields["prediction_type"] != "sample")


@given(
    name=st.sampled_from(DIFFUSION),
    steps=st.integers(1, 999),
    start=st.floats(0, 1, exclude_max=True),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "sqrt"]),
    sigmas=st.sampled_from(SIGMAS),
    offset=st.integers(0, 1),
    order=st.integers(1, 2),
)
@settings(max_examples=150, deadline=None)
def test_tables_are_finite_fall_and_end(
    name, steps, start, spacing, prediction, schedule, sigmas, offset, order
):
    fields = {
        **SD1,
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "beta_schedule": schedule,
        "steps_offset": offset,
        "solver_order": order,
        **({sigmas: True} if sigmas else {}),
    }
    own_limits(name, steps, fields)
    first = int(start * steps)
    table = make_table(name, fields, steps, start=first)
    numbers = [number for row in table.rows for number in (*row[:4], *row.b, row.s)]
    assert np.isfinite(numbers).all()
    assert len(table) >= steps - first
    assert (np.diff(table.timesteps) <= 0).all()
    assert (np.diff(table.noise / np.hypot(table.signal, table.noise)) <= 1e-12).all()
    # PNDM ends at training step zero unless told otherwise, and DDIM where its whole stride does not fill the time.
    if name != "pndm" and not (name == "ddim" and 1000 % steps):
        assert table.noise[-1] == 0
        assert table.signal[-1] == 1


@given(
    name=st.sampled_from(FOLLOWING),
    steps=st.integers(1, 40),
    start=st.floats(0, 1, exclude_max=True),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    sigmas=st.sampled_from(SIGMAS),
)
@settings(max_examples=150, deadline=None)
def test_a_model_that_knows_the_picture_is_followed(name, steps, start, prediction, sigmas):
    """At every step x is signal*x0 + noise*n with unit n, whatever mixture of noises n has become."""
    fields = {
        **SD1,
        "timestep_spacing": "leading",  # the only one whose steps have DDIM's and PNDM's length
        "prediction_type": prediction,
        "skip_prk_steps": True,
        "clip_sample": False,
        **({sigmas: True} if sigmas else {}),
    }
    assume(name != "pndm" or prediction == "epsilon")  # velocities of different times do not mix
    # Where an edit by PNDM begins, its published moves do not meet the noise that is there.
    first = 0 if name == "pndm" else int(start * steps)
    follow(make_table(name, fields, steps, start=first), prediction)


@given(
    name=st.sampled_from(FLOWING),
    steps=st.integers(1, 40),
    shift=st.floats(0.5, 8),
    sigmas=st.sampled_from(SIGMAS),
)
@settings(max_examples=60, deadline=None)
def test_a_flow_is_followed(name, steps, shift, sigmas):
    takes = {"dpmpp_2m": (), "dpmpp_2m_sde": (), "unipc": ("use_karras_sigmas",)}
    assume(not sigmas or sigmas in takes.get(name, SIGMAS))  # others are refused
    fields = {**FLOW, "shift": shift, **({sigmas: True} if sigmas else {})}
    follow(make_table(name, fields, steps), "flow_prediction")


def follow(table, prediction):
    """Walk with x as coordinates: the picture, the first noise, and each step's own noise."""
    axes = np.eye(2 + len(table))
    picture = axes[0]
    x, history, last = table.signal[0] * picture + table.noise[0] * axes[1], [], 0 * picture
    for step, row in enumerate(table.rows):
        carry = (0.0, 1.0) if table.carry is None else table.carry[step]
        last = carry[0] * last + carry[1] * axes[2 + step]
        noise = (x - table.signal[step] * picture) / table.noise[step]
        alpha, sigma = np.array([table.signal[step], table.noise[step]]) * table.c_in[step]
        outputs = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * picture,
            "sample": picture,
            "flow_prediction": noise - picture,
        }
        x, h = scheduler_step(x, outputs[prediction], None, history, row, last)
        history = [h, *history][: table.history]
        assert x[0] == pytest.approx(table.signal[step + 1], rel=SCHEDULER_STEP)
        spread = np.linalg.norm(x[1:])
        assert spread == pytest.approx(table.noise[step + 1], rel=SCHEDULER_STEP, abs=1e-9)
