"""diffusers' schedulers as the oracle of our tables: their own float32 training schedule, their steps in float64."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch

from tintype.schedulers import make_table
from tintype_kernels import scheduler_step
from tolerances import DIFFUSERS_SIGMAS, SCHEDULER_STEP, relative_error

CLASSES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_sde": diffusers.DPMSolverSDEScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "flow_euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "flow_heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "edm_euler": diffusers.EDMEulerScheduler,
}
DIFFUSION = [name for name in CLASSES if not name.startswith(("flow", "edm"))]
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (1, 2, 3, 4)


def configured(name, fields):
    """The config as a checkpoint would have it: the class's name and every field of it."""
    options = {"algorithm_type": "sde-dpmsolver++"} if name == "dpmpp_2m_sde" else {}
    theirs = CLASSES[name](**{**options, **fields})
    return {**theirs.config, "_class_name": CLASSES[name].__name__}, theirs


def compare(name, fields, steps, *, mu=None, tokens=None, start=0):
    """Walk our table and diffusers' scheduler side by side, both from our x, with the same outputs and noise.

    Of methods of one evaluation a step, from the one numbered `start`, as an edit does.
    """
    config, theirs = configured(name, fields)
    table = make_table(name, config, steps, tokens=tokens, start=start)
    if hasattr(theirs, "alphas_cumprod"):
        theirs.alphas_cumprod = theirs.alphas_cumprod.double()
        if hasattr(theirs, "final_alpha_cumprod") and not config["set_alpha_to_one"]:
            theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    theirs.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    theirs.timesteps = theirs.timesteps[start:]
    assert len(table) == len(theirs.timesteps)
    assert relative_error(table.timesteps, theirs.timesteps.double()) < SCHEDULER_STEP
    expected = float(getattr(theirs, "init_noise_sigma", 1.0))
    assert relative_error(table.init_scale, expected) < DIFFUSERS_SIGMAS
    if hasattr(theirs, "sigmas"):
        _widen_sigmas(name, theirs, table)
    _walk(table, theirs)


def _widen_sigmas(name, theirs, table):
    """Give diffusers our noise levels, which are its own before it rounded them to float32."""
    ratio = table.noise if name.startswith(("flow", "edm")) else table.noise / table.signal
    if theirs.config.get("use_flow_sigmas"):
        ratio = table.noise
    own = theirs.sigmas.double().numpy()
    if name == "dpmpp_sde":
        ratio = np.append(np.concatenate([ratio[:1], np.repeat(ratio[2:-1:2], 2)]), 0.0)
    assert relative_error(own, ratio) < DIFFUSERS_SIGMAS
    zero = own == 0
    assert np.abs(np.log(own[~zero] / ratio[~zero])).max() < DIFFUSERS_SIGMAS
    # plain numbers, because LMS integrates over them with scipy one at a time
    theirs.sigmas = ratio.tolist() if name == "lms" else torch.from_numpy(ratio)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)


def _walk(table, theirs):
    draws = np.random.default_rng(len(table)).standard_normal((len(table), 2, *SHAPE))
    x = table.init_scale * np.random.default_rng(0).standard_normal(SHAPE)
    history, last = [], np.zeros(SHAPE)
    with injected_noise(theirs) as injected:
        for step, (row, (m, fresh)) in enumerate(zip(table.rows, draws, strict=True)):
            carry = (0.0, 1.0) if table.carry is None else table.carry[step]
            injected[:] = [torch.from_numpy(each) for each in (last, fresh)]
            last = carry[0] * last + carry[1] * fresh
            t = theirs.timesteps[step]
            if hasattr(theirs, "scale_model_input"):
                seen = theirs.scale_model_input(torch.from_numpy(x), t)
                assert relative_error(table.c_in[step] * x, seen) < SCHEDULER_STEP
            expected = theirs.step(torch.from_numpy(m), t, torch.from_numpy(x)).prev_sample
            x, h = scheduler_step(x, m, None, history, row, last if row.s else None)
            history = [h, *history][: table.history]
            if torch.isfinite(expected).all():
                assert relative_error(x, expected) < SCHEDULER_STEP, f"step {step}"
            else:
                assert np.isfinite(x).all()
                assert theirs_breaks(theirs, table, step)


def theirs_breaks(theirs, table, step):
    """Whether diffusers divides by nothing here.

    It does at a step of no length, where rounding made two timesteps equal, and its UniPC keeps what came of it;
    UniPC's bh1 form multiplies zero with the infinite length of the last step.
    """
    no_length = (np.diff(table.timesteps[: step + 2]) == 0).any()
    return no_length or (theirs.config.solver_type == "bh1" and step == len(table) - 1)


@contextmanager
def injected_noise(theirs):
    """While it lasts, diffusers draws the second of the tensors in the list that this gives.

    Its Brownian path over two parts of a step is drawn from both.
    """
    injected = [None, None]

    def path(begin, end):
        before, fresh = injected
        if theirs.state_in_first_order:
            return fresh
        middle = (begin * end) ** 0.5
        total = (begin - middle) ** 0.5 * before + (middle - end) ** 0.5 * fresh
        return total / (begin - end) ** 0.5

    if hasattr(theirs, "noise_sampler"):
        theirs.noise_sampler = path
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[type(theirs).__module__]
        patch.setattr(module, "randn_tensor", lambda *_, **__: injected[1], raising=False)
        yield injected
