"""Heun's method: every step but the last looks again where Euler's would land (Karras et al. 2022, algorithm 1)."""

from __future__ import annotations

import numpy as np

from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.euler import start_scale
from tintype.schedulers.grids import ratio_grid
from tintype.schedulers.predict import clean_weights
from tintype.schedulers.sigmas import Float64, alpha_sigma
from tintype.schedulers.table import Table


def heun(config: ScheduleConfig, plan: Plan) -> Table:
    """h keeps x0, clipped; the derivative by sigma is (x - x0)/sigma."""
    grid = ratio_grid(config, plan)
    sigma = looked_at_twice(grid.sigma[:-1])
    alpha, noise = alpha_sigma(sigma)
    w_x, w_m = clean_weights(config.prediction_type, alpha, noise)
    a, b = heun_weights(grid.sigma)
    return Table(
        name="heun",
        timesteps=looked_at_twice(grid.times),
        c_in=alpha,
        u_x=w_x * alpha,
        u_m=w_m,
        a=a,
        b=b,
        signal=np.ones(len(sigma) + 1),
        noise=np.append(sigma, 0.0),
        init_scale=start_scale(config, grid),
        clip=config.clip(default=False),
    )


def looked_at_twice(points: Float64) -> Float64:
    """Every point but the first twice: where a step's second look and the next step's first one are taken."""
    return np.repeat(points, 2)[1:]


def heun_weights(sigma: Float64) -> tuple[Float64, Float64]:
    """(a [2n-1], b [2n-1, 2]) where h keeps x0, from the n + 1 noise levels.

    The first look steps from x by Euler. The second has x + d*(d1 + d2)/2 to make, with d the step and d1, d2 the
    derivatives at its ends; in terms of the point x + d*d1 that it starts from, that is (d2 - d1)*d/2 more.
    """
    now, then = sigma[:-1], sigma[1:]
    rows = 2 * len(now) - 1
    a, b = np.ones(rows), np.zeros((rows, 2))
    a[::2], b[::2, 0] = then / now, 1 - then / now
    half = (then - now)[:-1] / (2 * then[:-1])
    b[1::2] = np.stack([-half, half], axis=1)
    return a, b
