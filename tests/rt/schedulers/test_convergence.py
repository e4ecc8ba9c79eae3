"""Orders of convergence on a problem with a known solution: normally distributed data and its exact model."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_schedulers import SD1
from tintype.schedulers import make_table
from tintype_kernels import scheduler_step

DATA = 0.5  # the data's standard deviation
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
KARRAS = {**SD1, "use_karras_sigmas": True}
LEADING = {**SD1, "timestep_spacing": "leading", "clip_sample": False}
PLMS = {**LEADING, "skip_prk_steps": True}


def deviation(table, step):
    """The exact deviation of x before `step`; the ODE scales every x by the ratio of two of them."""
    return np.hypot(table.signal[step] * DATA, table.noise[step])


def stop(table):
    """Where to measure: before the last step, whose length never shrinks.

    With even training steps at the 200th of them, because the noise level has an infinite slope in time at zero.
    """
    even = table.name in ("ddim", "ddpm", "pndm")
    return int(np.argmax(table.timesteps <= 200)) if even else len(table) - 1


def walked(table):
    """x before `stop`, as coordinates of the first noise and each step's own."""
    axes = np.eye(1 + len(table))
    x, history, last = deviation(table, 0) * axes[0], [], 0 * axes[0]
    for step, row in enumerate(table.rows[: stop(table)]):
        carry = (0.0, 1.0) if table.carry is None else table.carry[step]
        last = carry[0] * last + carry[1] * axes[1 + step]
        share = x / deviation(table, step) ** 2
        noise, picture = table.noise[step] * share, table.signal[step] * DATA**2 * share
        m = noise - picture if table.name.startswith("flow") else noise
        x, h = scheduler_step(x, m, None, history, row, last)
        history = [h, *history][: table.history]
    return x


def orders(name, fields, counts):
    """log2 of how much the final deviation's error falls at each doubling of the steps."""
    errors = []
    for steps in counts:
        table = make_table(name, fields, steps)
        exact = deviation(table, stop(table))
        errors.append(abs(np.linalg.norm(walked(table)) / exact - 1))
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize(
    ("name", "fields", "counts"),
    [
        ("euler", KARRAS, (20, 40, 80, 160)),
        ("ddim", LEADING, (25, 50, 100, 200)),
        ("flow_euler", FLOW, (20, 40, 80, 160)),
    ],
)
def test_first_order(name, fields, counts):
    assert orders(name, fields, counts)[-1] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("name", "fields", "counts"),
    [
        ("heun", KARRAS, (20, 40, 80, 160)),
        ("dpmpp_2m", KARRAS, (20, 40, 80, 160)),
        ("dpmpp_2m", {**KARRAS, "solver_type": "heun"}, (20, 40, 80, 160)),
        ("flow_heun", FLOW, (20, 40, 80, 160)),
    ],
)
def test_second_order(name, fields, counts):
    assert orders(name, fields, counts)[-1] == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(
    ("name", "fields", "counts"),
    [
        ("lms", KARRAS, (20, 40, 80, 160)),
        ("unipc", KARRAS, (20, 40, 80, 160)),
        ("pndm", PLMS, (25, 50, 100, 200)),
    ],
)
def test_at_least_second_order(name, fields, counts):
    assert orders(name, fields, counts)[-1] > 1.8


@pytest.mark.parametrize(
    ("name", "fields", "counts"),
    [
        ("ddpm", LEADING, (25, 50, 100, 200)),
        ("euler_ancestral", KARRAS, (20, 40, 80, 160)),
        ("dpmpp_sde", KARRAS, (20, 40, 80, 160)),
        ("dpmpp_2m_sde", KARRAS, (20, 40, 80, 160)),
    ],
)
def test_stochastic_methods_reach_the_datas_deviation(name, fields, counts):
    assert orders(name, fields, counts)[-1] > 0.9
