"""Euler's method on the probability-flow ODE (Karras et al., NeurIPS 2022, algorithm 1), and with fresh noise."""

from __future__ import annotations

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.grids import Grid, ratio_grid
from tintype.schedulers.predict import Weights, noise_weights
from tintype.schedulers.sigmas import Float64, alpha_sigma
from tintype.schedulers.table import Table


def euler(config: ScheduleConfig, plan: Plan) -> Table:
    """x holds signal + sigma*noise, so its derivative by sigma is the predicted noise, which is what h keeps."""
    grid = ratio_grid(config, plan)
    u_x, u_m = derivative_weights(config, grid.sigma[:-1])
    return Table(
        name="euler",
        timesteps=grid.times,
        c_in=alpha_sigma(grid.sigma[:-1])[0],
        u_x=u_x,
        u_m=u_m,
        a=np.ones(len(u_x)),
        b=np.diff(grid.sigma)[:, None],
        signal=grid.alpha,
        noise=grid.sigma,
        init_scale=start_scale(config, grid),
    )


def euler_ancestral(config: ScheduleConfig, plan: Plan) -> Table:
    """Each step goes further down than it should and adds noise to come back (k-diffusion, eta 1)."""
    grid = ratio_grid(config, plan)
    u_x, u_m = derivative_weights(config, grid.sigma[:-1])
    down, up = ancestral(grid.sigma[:-1], grid.sigma[1:])
    return Table(
        name="euler_ancestral",
        timesteps=grid.times,
        c_in=alpha_sigma(grid.sigma[:-1])[0],
        u_x=u_x,
        u_m=u_m,
        a=np.ones(len(u_x)),
        b=(down - grid.sigma[:-1])[:, None],
        s=up,
        signal=grid.alpha,
        noise=grid.sigma,
        init_scale=start_scale(config, grid),
    )


def ancestral(now: Float64, then: Float64) -> tuple[Float64, Float64]:
    """(sigma to step down to, deviation of the noise to add) for a step from `now` to `then`."""
    ratio = then / now
    return then * ratio, then * np.sqrt(1 - ratio**2)


def derivative_weights(config: ScheduleConfig, sigma: Float64) -> Weights:
    """(u_x, u_m) of dx/dsigma, where x = x0 + sigma*noise."""
    alpha, noise = alpha_sigma(sigma)
    n_x, n_m = noise_weights(config.prediction_type, alpha, noise)
    return n_x * alpha, n_m


def start_scale(config: ScheduleConfig, grid: Grid) -> float:
    """The deviation of the first x; with leading spacing the first level still has the picture's variance on top."""
    largest = float(grid.sigma.max())
    from_pure_noise = config.spacing("linspace") in ("linspace", "trailing")
    return largest if from_pure_noise else float(np.hypot(largest, 1.0))
