"""Making a scheduler's table, and walking it with a model that costs nothing: `pytest bench/test_schedulers.py`.

The walk's time over its steps is what our loop adds to every call of the denoiser; diffusers' own step is beside it.
"""
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import numpy as np
import pytest

from tintype.guidance import Guidance, scales
from tintype.sampling import StepNoise, walk
from tintype.schedulers import make_table

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
METHODS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
STEPS = 50
LATENTS = (1, 4, 64, 64)  # SD 1.5 at 512


@pytest.mark.parametrize("method", METHODS)
def test_make_table(benchmark, method):
    benchmark.group = f"table of {STEPS} steps, {method}"
    benchmark(make_table, method, CONFIG, STEPS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("who", ["tintype", "diffusers"])
def test_walk(benchmark, method, who):
    benchmark.group = f"{STEPS} steps of {LATENTS}, {method}, guided"
    x = np.random.default_rng(0).standard_normal(LATENTS, np.float32)
    benchmark(_tintype_walk(method, x) if who == "tintype" else _diffusers_walk(method, x))
    benchmark.extra_info["steps"] = STEPS


def _tintype_walk(method, x):
    table = make_table(method, CONFIG, STEPS)
    guidance = Guidance(scales(7.5, len(table), 0.0), 0.0, 1.0)
    noise = StepNoise(table, [0], LATENTS[1:])
    return lambda: walk(
        table, x, noise, lambda seen, time, guided: (seen, seen), guidance, lambda step, now: now
    )


def _diffusers_walk(method, x):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = getattr(diffusers, METHODS[method]).from_config(CONFIG)
    begin = torch.from_numpy(x)

    def steps():
        scheduler.set_timesteps(STEPS)
        now = begin
        for time in scheduler.timesteps:
            seen = scheduler.scale_model_input(now, time)
            guided = seen + 7.5 * (seen - seen)
            now = scheduler.step(guided, time, now, return_dict=False)[0]
        return now

    return steps
