"""Euler's method on models with EDM's own preconditioning (Karras et al., NeurIPS 2022, table 1, last column)."""

from __future__ import annotations

import math

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.sigmas import karras
from tintype.schedulers.table import Table

_SIGMA_MAX, _SIGMA_MIN = 80.0, 0.002  # Karras et al., table 1


def edm_euler(config: ScheduleConfig, plan: Plan) -> Table:
    """x = x0 + sigma*noise; h keeps x0 = c_skip*x + c_out*m, and dx/dsigma is (x - x0)/sigma."""
    high = _SIGMA_MAX if config.sigma_max is None else config.sigma_max
    low = _SIGMA_MIN if config.sigma_min is None else config.sigma_min
    if config.sigma_schedule == "karras":
        sigmas = karras(high, low, plan.steps, config.rho)
    else:
        sigmas = np.exp(np.linspace(math.log(low), math.log(high), plan.steps))[::-1]
    now = sigmas[plan.start :]
    then = np.append(now[1:], 0.0)
    data = config.sigma_data
    root = np.sqrt(now**2 + data**2)
    sign = -1.0 if config.prediction_type == "v_prediction" else 1.0
    return Table(
        name="edm_euler",
        timesteps=np.log(now) / 4,
        c_in=1 / root,
        u_x=data**2 / root**2,
        u_m=sign * now * data / root,
        a=then / now,
        b=(1 - then / now)[:, None],
        signal=np.ones(len(now) + 1),
        noise=np.append(now, 0.0),
        init_scale=math.hypot(high, 1.0),
    )
