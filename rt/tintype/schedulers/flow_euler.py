"""Euler's and Heun's methods on straight paths, x = (1 - t)*x0 + t*noise (Liu et al., ICLR 2023)."""

from __future__ import annotations

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.flow import time_shifted
from tintype.schedulers.grids import Grid, flow_grid
from tintype.schedulers.heun import looked_at_twice
from tintype.schedulers.table import Float64, Table


def flow_euler(config: ScheduleConfig, plan: Plan) -> Table:
    """The model's output noise - x0 is dx/dt; h keeps it, or x0 where the noise is drawn anew at each step."""
    grid = flow_grid(config, plan, _times(config, plan.steps))
    now, then = grid.sigma[:-1], grid.sigma[1:]
    ones, zeros = np.ones(len(now)), np.zeros(len(now))
    fresh = config.stochastic_sampling
    return Table(
        name="flow_euler",
        timesteps=grid.times,
        c_in=ones,
        u_x=ones if fresh else zeros,
        u_m=-now if fresh else ones,
        a=zeros if fresh else ones,
        b=(1 - then if fresh else then - now)[:, None],
        s=then if fresh else None,
        signal=grid.alpha,
        noise=grid.sigma,
    )


def flow_heun(config: ScheduleConfig, plan: Plan) -> Table:
    """Heun's method; h keeps dx/dt. See `heun` for why the second look needs no earlier x."""
    grid: Grid = flow_grid(config, plan, _times(config, plan.steps))
    sigma = looked_at_twice(grid.sigma[:-1])
    step = np.diff(grid.sigma)
    b = np.zeros((len(sigma), 2))
    b[::2, 0] = step
    b[1::2] = np.stack([step[:-1] / 2, -step[:-1] / 2], axis=1)
    return Table(
        name="flow_heun",
        timesteps=looked_at_twice(grid.times),
        c_in=np.ones(len(sigma)),
        u_x=np.zeros(len(sigma)),
        u_m=np.ones(len(sigma)),
        a=np.ones(len(sigma)),
        b=b,
        signal=np.append(1 - sigma, 1.0),
        noise=np.append(sigma, 0.0),
    )


def _times(config: ScheduleConfig, steps: int) -> Float64:
    """From pure noise to the last time. A fixed shift moves a training time once in training and once more here."""
    if config.flow_last_time == "step":
        return np.linspace(1.0, 1 / steps, steps)
    last = np.array([1 / config.num_train_timesteps])
    if not config.use_dynamic_shifting:
        last = time_shifted(config, last, None)
    return np.linspace(1.0, float(last[0]), steps)
