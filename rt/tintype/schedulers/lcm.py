"""Latent consistency models: jump to the picture, add noise, jump again (Luo et al., arXiv 2310.04378)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tintype.errors import RequestError
from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.predict import clean_weights
from tintype.schedulers.table import Table

_SIGMA_DATA = 0.5


def lcm(config: ScheduleConfig, plan: Plan) -> Table:
    """h keeps x0, clipped; the picture is a blend of it and x that is x itself at time zero."""
    times = _timesteps(config, plan.steps)[plan.start :]
    now = config.alphas_cumprod()[times]
    then = np.append(now[1:], 1.0)
    u_x, u_m = clean_weights(config.prediction_type, np.sqrt(now), np.sqrt(1 - now))
    scaled = times * config.timestep_scaling
    skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    out = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)
    every = np.append(now, 1.0)
    return Table(
        name="lcm",
        timesteps=times.astype(np.float64),
        c_in=np.ones(len(times)),
        u_x=u_x,
        u_m=u_m,
        a=np.sqrt(then) * skip,
        b=(np.sqrt(then) * out)[:, None],
        s=np.sqrt(1 - then),
        signal=np.sqrt(every),
        noise=np.sqrt(1 - every),
        clip=config.clip(default=False),
        threshold=config.threshold(),
    )


def _timesteps(config: ScheduleConfig, steps: int) -> NDArray[np.int64]:
    """Evenly chosen among the steps that the model was distilled on."""
    taught = config.original_inference_steps
    if not 1 <= steps <= taught:
        raise RequestError(
            f"num_inference_steps={steps} is outside 1..{taught}, the steps that lcm models are distilled on"
        )
    stride = config.num_train_timesteps // taught
    falling = np.arange(taught, 0, -1) * stride - 1
    return falling[np.floor(np.linspace(0, taught, steps, endpoint=False)).astype(np.int64)]
